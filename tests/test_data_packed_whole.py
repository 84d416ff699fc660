"""Packed data sets that are not whole are refused: no row is left out without a word."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable

import pyarrow as pa
import pytest
from concept_folders import SETTINGS, make
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from packed_sets import CAPTIONS, is_as_packed, parquet, refused, rows_of, samples, saved, shard, unpacked

from dopsd.data.manifest import DataError
from dopsd.data.schema import validate_dataset
from dopsd.data.unpack import as_folder

BLOCK = tarfile.BLOCKSIZE


def flipped(whole: bytes, header: int) -> bytes:
    return whole[: header + 150] + bytes([whole[header + 150] ^ 1]) + whole[header + 151 :]


DAMAGES: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "cut at a member's header": (lambda whole, header: whole[:header], "ends too early, at byte {:,}; fetch it again"),
    "cut in a header": (lambda whole, header: whole[: header + 200], "is damaged at byte {:,}, or another"),
    "cut in a member": (lambda whole, header: whole[: header + BLOCK + 20], "unexpected end of data"),
    "a bit of a header": (flipped, "is damaged at byte {:,}, or another"),
    "zeros": (lambda whole, header: whole[:header] + bytes(2 * BLOCK) + whole[header + 2 * BLOCK :], "byte {:,}, or"),
    "one block of zeros at the end": (lambda whole, header: whole[:header] + bytes(BLOCK), "too early, at byte {:,}"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("member", range(1, 9))
def test_a_shard_that_is_cut_or_damaged_is_refused(tmp_path, name, member):
    path = shard(tmp_path / "a.tar", samples())
    with tarfile.open(path) as file:
        header = file.getmembers()[member].offset
    damaged, words = DAMAGES[name]
    path.write_bytes(damaged(path.read_bytes(), header))
    said = refused(path)
    assert said.startswith(f"{path}: ")
    assert words.format(header) in said


def test_two_shards_in_one_file_are_refused(tmp_path):
    one, two = (shard(tmp_path / f"{i}.tar", samples(2, first=3 * i, key=f"{i}/{{}}")) for i in range(2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    assert "another .tar was added to it there" in refused(one)


@pytest.mark.parametrize("zeros", [0, 512, 1 << 21])
def test_a_shard_ends_with_two_blocks_of_zeros_and_any_number_more(tmp_path, zeros):
    path = shard(tmp_path / "a.tar", samples())
    with tarfile.open(path) as file:
        file.getmembers()
        end = file.offset
    path.write_bytes(path.read_bytes()[:end] + bytes(2 * BLOCK + zeros))
    found, *_ = unpacked(path)
    assert is_as_packed(found, range(5))


# --- save_to_disk -----------------------------------------------------------------------------------------------------


def test_an_arrow_file_that_the_data_set_names_and_lacks_is_a_fault(tmp_path):
    folder = saved(tmp_path / "saved")
    names = [{"filename": name} for name in ("data.arrow", "data-1.arrow", "../../other.arrow")]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    assert refused(folder) == (
        f"{folder}: data-1.arrow is missing, 2 of 3 files that the data set names; copy all of it, or save it again "
        "with save_to_disk"
    )


def test_a_split_that_the_data_set_names_and_lacks_is_a_fault(tmp_path):
    saved(tmp_path / "all" / "train")
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert f"{tmp_path}/all: validation/state.json is missing, 1 of 3 files" in refused(tmp_path / "all")


@pytest.mark.parametrize("state", ["{}", '{"_data_files": []}', '{"_data_files": 3}', '{"_data_files": [{}, 1]}'])
def test_a_data_set_that_names_no_files_is_a_fault(tmp_path, state):
    folder = saved(tmp_path / "saved")
    (folder / "state.json").write_text(state)
    assert refused(folder) == f"{folder}: state.json: names no files of rows; save it again with save_to_disk"


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 200_000, "cannot be read ("),
        (json.dumps({"a": "x" * (1 << 20)}), "cannot be read (larger than 1 MiB)"),
        ("[]", "cannot be read (no JSON object)"),
        ("{", "cannot be read (Expecting property name"),
    ],
)
def test_a_state_that_is_none_is_one_line(tmp_path, name, content, words):
    folder = saved(tmp_path / "saved")
    (folder / name).write_text(content)
    assert refused(folder).startswith(f"{folder}: {name}: {words}")


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_an_arrow_file_that_is_cut_between_rows_is_refused(tmp_path, batches):
    folder = saved(tmp_path / "saved")
    whole, ends = rows_of(), []
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as stream:
        for i in range(5):
            ends.append(sink.tell())
            stream.write_batch(whole.slice(i, 1).to_batches()[0])
    assert [text for _, text, _ in unpacked(folder)[0]] == CAPTIONS
    content = (folder / "data.arrow").read_bytes()
    (folder / "data.arrow").write_bytes(content[: ends[batches]])
    assert f"data.arrow: ends too early or is damaged at byte {ends[batches]:,}; copy it again" in refused(folder)


def test_a_parquet_whose_columns_have_no_names_is_one_line(tmp_path):
    content = parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(content.replace(b"label", b"\xe9abel"))
    assert str(tmp_path / "a.parquet") in refused(tmp_path / "a.parquet")


def test_no_bit_of_a_parquets_end_loses_a_row(tmp_path):
    path, refusals = tmp_path / "a.parquet", 0
    content = parquet(path, rows_of().select(["image", "text"]).replace_schema_metadata(None))
    for place in range(len(content) - int.from_bytes(content[-8:-4], "little") - 8, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        try:
            with as_folder(path, tmp_path / ".place", lambda line: None) as (folder, packed):
                assert not packed or len((folder / "metadata.jsonl").read_text().splitlines()) == 5, place
        except DataError:
            refusals += 1
    assert refusals > 20


def test_of_many_files_the_damaged_one_is_named(tmp_path):
    content = parquet(tmp_path / "s" / "0.parquet")
    (tmp_path / "s" / "1.parquet").write_bytes(content[:200] + bytes(200) + content[400:])
    assert f"{tmp_path}/s: 1.parquet: cannot be read as parquet with pictures: " in refused(tmp_path / "s")
    folder = saved(tmp_path / "saved")
    (folder / "data.arrow").write_bytes((folder / "data.arrow").read_bytes()[:-300])
    assert f"{folder}: data.arrow: cannot be read as Hugging Face data set on disk: Expected" in refused(folder)


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "state.json", "dataset_dict.json", "x.png", "x"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pipe_is_not_waited_for(tmp_path, name, alone):
    folder = tmp_path / "data" if alone else make(tmp_path / "data")
    folder.mkdir(exist_ok=True)
    (folder / "dataset_info.json").write_text("{}")
    os.mkfifo(folder / name)
    assert refused(folder) == f"{folder}/{name}: is a pipe, a socket or a device, not an ordinary file; take it out"


fuzz = hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@fuzz
@given(data=st.binary(max_size=600), cut=st.integers(0, 20_000), place=st.integers(0, 20_000))
def test_whatever_is_damaged_no_row_is_lost_without_a_word(tmp_path, data, cut, place):
    made = {".tar": shard(tmp_path / "a.tar", samples(4)).read_bytes(), ".parquet": parquet(tmp_path / "a.parquet")}
    made["saved"] = saved(tmp_path / "saved").joinpath("data.arrow").read_bytes()
    for kind, whole in made.items():
        spoilt = bytearray(whole)
        spoilt[place % len(whole) : place % len(whole) + len(data)] = data
        path = tmp_path / ("saved/data.arrow" if kind == "saved" else f"a{kind}")
        path.write_bytes(bytes(spoilt[: max(1, len(spoilt) - cut)]))
        source = path.parent if kind == "saved" else path
        try:
            with as_folder(source, tmp_path / ".place", lambda line: None) as (one, _):
                rows = len(validate_dataset(one, "test", SETTINGS)[0].rows)
        except DataError as error:
            found = str(error)
        else:
            assert rows == (4 if kind == ".tar" else 5), "a row is lost without a word"
            found = str(source)
        assert str(source) in found
        assert not (tmp_path / ".place").exists()
