"""Data sets that pack their pictures: unpacked as the tool that made them reads them, and hostile ones refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from concept_folders import SETTINGS, make, picture
from packed_by_their_tools import CHOSEN, packed_by_their_tools
from packed_sets import (
    CAPTIONS,
    PACKED,
    content,
    is_as_packed,
    parquet,
    refused,
    rows_of,
    samples,
    saved,
    shard,
    unpacked,
)
from small_disk import small_disk

from dopsd.config import SettingsError
from dopsd.data import packed
from dopsd.data.schema import validate_dataset
from dopsd.data.unpack import Rewording, as_folder, rewording
from dopsd.files import is_disk_full
from tests.fake_hub import FakeHub, Repository

# --- WebDataset: https://github.com/webdataset/webdataset, and what img2dataset writes --------------------------------


def test_a_shard_is_a_row_for_every_key(tmp_path):
    found, held_out, said = unpacked(shard(tmp_path / "a.tar", samples()))
    assert is_as_packed(found, range(5))
    assert held_out == []
    assert said == [f"{tmp_path}/a.tar: read as WebDataset (1 file): 5 rows, 5 pictures"]


def test_a_folder_of_shards_with_img2datasets_columns(tmp_path):
    for number in range(2):
        members = [
            member
            for i in range(number * 3, min(number * 3 + 3, 5))
            for member in (
                (f"{i:09}.jpg", content(i, "PNG")),
                (f"{i:09}.txt", CAPTIONS[i].encode()),
                (f"{i:09}.json", json.dumps({"caption": CAPTIONS[i], "url": "x", "key": f"{i:09}"}).encode()),
                (f"{i:09}.npy", b"0"),
            )
        ]
        shard(tmp_path / "shards" / f"{number:05}.tar", members)
        (tmp_path / "shards" / f"{number:05}_stats.json").write_text("{}")
        pa.parquet.write_table(pa.table({"url": ["x"]}), tmp_path / "shards" / f"{number:05}.parquet")
    found, _, said = unpacked(tmp_path / "shards")
    assert is_as_packed(found, range(5))
    ignored = "ignored columns: npy, json.caption, json.url, json.key"
    left = "left aside: 00000.parquet, 00000_stats.json, 00001.parquet, 00001_stats.json"
    assert said == [f"{tmp_path}/shards: read as WebDataset (2 files), {ignored}: 5 rows, 5 pictures, {left}"]


@pytest.mark.parametrize("how", ["shards", "saved", "parquet"])
def test_a_concepts_own_documents_come_along_and_what_is_left_aside_is_named(tmp_path, how):
    folder = tmp_path / "data"
    {"shards": lambda: shard(folder / "a.tar", samples()), "saved": lambda: saved(folder),
     "parquet": lambda: parquet(folder / "a.parquet")}[how]()  # fmt: skip
    documents = {"train.yaml": "max_steps: 7\n", "concept.json": "{}", "LICENSE": "CC", "x/README.md": "x"}
    for name, text in {**documents, "notes.doc": "x", "x/urls.csv": "x", "x/train.yaml": "x"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    said: list[str] = []
    with as_folder(folder, tmp_path / ".place", said.append) as (place, _):
        validate_dataset(place, "test", SETTINGS)
        assert {name: (place / name).read_text() for name in documents} == documents
        assert not {"notes.doc", "urls.csv"} & {path.name for path in place.rglob("*")}
        assert not (place / "x" / "train.yaml").exists()
    assert said[0].endswith(": 5 rows, 5 pictures, left aside: notes.doc, x/train.yaml, x/urls.csv")
    if how == "shards":  # one file is given, not what lies beside it
        assert unpacked(folder / "a.tar")[2][0].endswith(": 5 rows, 5 pictures")


@pytest.mark.parametrize("name", ["shot 1.5 m.png", "shot 1.5 m.txt", "a/0.png.txt", "x.y.JPG", "v1.2.caption"])
def test_a_dot_in_a_pictures_or_captions_name_is_said(tmp_path, name):
    said = refused(shard(tmp_path / "a.tar", [*samples(), (name, content(9))]))
    assert f"a.tar: a.tar: {name}: has a dot in its name, at the first of which its ending begins; rename it" in said


def test_a_caption_may_be_in_the_json_and_repeats_too(tmp_path):
    members = [
        member
        for i in range(5)
        for member in (
            (f"./{i}.json", json.dumps({"text": CAPTIONS[i], "repeats": 1 + i % 2}).encode()),
            (f"./{i}.PNG", content(i)),
        )
    ]
    found, *_ = unpacked(shard(tmp_path / "a.tar", [("__meta__/info.json", b"{}"), ("./._0.png", b"x"), *members]))
    assert is_as_packed(found, range(5))
    assert [repeats for *_, repeats in found] == [1, 2, 1, 2, 1]


def test_shards_of_another_split_are_held_out(tmp_path):
    shard(tmp_path / "s" / "train-000000.tar", samples(4))
    shard(tmp_path / "s" / "val-000000.tar", samples(2, first=20))
    found, held_out, said = unpacked(tmp_path / "s")
    assert is_as_packed(found, range(4))
    assert is_as_packed(held_out, range(20, 22))
    assert said[0].endswith("6 rows, 6 pictures, 2 of them held out as their split's name says (val-000000.tar)")
    (tmp_path / "s" / "train-000000.tar").unlink()
    assert "only 2 rows of splits that are for testing (val-000000.tar); give what is to be trained on" in refused(
        tmp_path / "s"
    )


def test_the_rows_are_those_that_the_tool_itself_wrote(tmp_path):
    found, _, said = unpacked(packed_by_their_tools(tmp_path) / "webdataset.tar")
    assert is_as_packed(found, range(5))
    assert "ignored columns: cls:" in said[0]


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


HOSTILE = {
    "symbolic link": (_member("0.png", tarfile.SYMTYPE, "/etc/passwd"), "0.png is a link or a device"),
    "hard link": (_member("0.png", tarfile.LNKTYPE, "../x.png"), "0.png is a link or a device"),
    "device": (_member("0.png", tarfile.CHRTYPE), "0.png is a link or a device"),
    "pipe": (_member("0.txt", tarfile.FIFOTYPE), "0.txt is a link or a device"),
    "parent folder": (_member("a/../../0.png"), "a/../../0.png leaves the folder"),
    "back-slashes": (_member("..\\0.png"), "..\\0.png leaves the folder"),
    "absolute": (_member("/tmp/0.png"), "/tmp/0.png leaves the folder"),
    "drive": (_member("C:\\0.png"), "C:\\0.png leaves the folder"),
    "huge picture": (_member("0.png", size=1 << 40), "1,099,511,627,776 bytes, at most 1,073,741,824 are read"),
    "huge caption": (_member("0.txt", size=65537), "65,537 bytes, at most 65,536 are read"),
    "line break": (_member("../a\nb.png"), "../a\\nb.png leaves the folder"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused_and_nothing_is_written(tmp_path, name):
    member, words = HOSTILE[name]
    (tmp_path / "in").mkdir()
    path = shard(tmp_path / "in" / "a.tar", samples())
    with tarfile.open(path, "a") as file:
        file.addfile(member, io.BytesIO(bytes(min(member.size, 65537))) if member.size < 1 << 20 else None)
    said = refused(path)
    assert said.startswith(f"{path}: ")
    assert words in said
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "a.tar"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("0.png", content(0))], "a.tar: 0 has no caption (text, caption, prompt); there is nothing else"),
        ([("0.txt", b"[V]")], "a.tar: 0 has txt: a row is one picture and one caption"),
        ([("0.png", b"x"), ("1.png", b"x"), ("0.txt", b"x")], "a.tar: 0 has no caption"),
        ([("0.png", b"x"), ("0.jpg", b"x"), ("0.txt", b"x")], "a.tar: 0 has png, jpg, txt: a row is"),
        ([("0.png", b"x"), ("0.txt", b"x"), ("0.png", b"x")], "0.png is there twice"),
        (
            [("0.png", b"x"), ("0.txt", b"caf\xe9 au lait")],
            "a.tar: 0: is not UTF-8 (line 1); it looks like Windows-1252",
        ),
        ([("0.png", b"x"), ("0.json", b"{")], "a.tar: 0: Expecting property name"),
        ([("0.png", b"x"), ("0.json", b"[" * 100_000)], "a.tar: 0: "),
        ([("0.png", b"x"), ("0.json", b'{"text": "a", "caption": "b"}')], "text and caption are captions, each of"),
        ([("readme", b"x")], "no rows; give what is to be trained on"),
    ],
)
def test_a_shard_that_is_none_says_which_key(tmp_path, members, words):
    assert words in refused(shard(tmp_path / "a.tar", members))


def test_there_are_limits_of_rows_and_bytes(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", samples())
    monkeypatch.setattr("dopsd.data.unpack.MAX_ROWS", 4)
    assert "more than 4 rows; give a part of it" in refused(path)
    monkeypatch.setattr("dopsd.data.unpack.MAX_ROWS", 5)
    monkeypatch.setattr(packed, "MAX_BYTES", 500)
    assert "in all; give a part of it" in refused(path)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caption", ["text", "caption", "prompt"])
def test_a_data_set_that_was_saved_to_disk(tmp_path, caption, monkeypatch):
    monkeypatch.setattr(packed, "_TOGETHER", 2)
    found, _, said = unpacked(saved(tmp_path / "saved", rows_of(caption=caption)))
    assert is_as_packed(found, range(5))
    name = "Hugging Face data set on disk (1 file), ignored columns: label"
    assert said == [f"{tmp_path}/saved: read as {name}: 5 rows, 5 pictures"]


def test_splits_that_were_saved_to_disk(tmp_path):
    saved(tmp_path / "all" / "train")
    saved(tmp_path / "all" / "validation", rows_of(2, first=30))
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    found, held_out, _ = unpacked(tmp_path / "all")
    assert is_as_packed(found, range(5))
    assert is_as_packed(held_out, range(30, 32))


@pytest.mark.parametrize("plain", [True, False])
def test_parquet_with_pictures_in_shards(tmp_path, plain):
    table = rows_of()
    if plain:  # the bytes alone
        table = table.set_column(0, "jpg", pa.array([content(i) for i in range(5)]))
    for number, part in enumerate((table.slice(0, 3), table.slice(3))):
        parquet(tmp_path / "repo" / "data" / f"train-0000{number}-of-00002.parquet", part)
    parquet(tmp_path / "repo" / "data" / "test-00000-of-00001.parquet", rows_of(1, first=40))
    (tmp_path / "repo" / "README.md").write_text("x")
    found, held_out, _ = unpacked(tmp_path / "repo")
    assert is_as_packed(found, range(5))
    assert is_as_packed(held_out, range(40, 41))


@pytest.mark.parametrize("name", ["saved", "splits", "datasets.parquet"])
def test_the_rows_are_those_that_the_library_itself_wrote(tmp_path, name):
    found, held_out, _ = unpacked(packed_by_their_tools(tmp_path) / name)
    assert [text for _, text, _ in found] == [CAPTIONS[i] for i in CHOSEN]
    assert all(np.array_equal(one[0], np.asarray(picture(i))) for one, i in zip(found, CHOSEN, strict=True))
    assert [text for _, text, _ in held_out] == ([CAPTIONS[3]] if name == "splits" else [])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (rows_of().append_column("mask", rows_of()["image"]).rename_columns(["a", "text", "label", "b"]),
         "which column is the picture? It has a, b; rename that to image"),
        (rows_of().append_column("prompt", pa.array(["[V]"] * 5)), "row 1: text and prompt are captions, each of them"),
        (rows_of().drop_columns(["text"]), "row 1 has no caption (text, caption, prompt); there is nothing else"),
        (pa.table({"image": pa.array([{"path": "/x.png"}], PACKED), "text": ["[V]"]}), "row 1: no picture in column"),
        (pa.table({"image": [content(0)], "text": ["\u00e9" * 32768]}), "row 1, text: 65,548 bytes, at most 65,536"),
        (pa.table({"image": [b"hello"] * 4, "text": CAPTIONS[:4]}), "row 2, image: row-000002.png: is not a readable"),
    ],
)  # fmt: skip
def test_a_table_whose_rows_are_not_clear_says_why(tmp_path, table, words):
    parquet(tmp_path / "a.parquet", table)
    said = refused(tmp_path / "a.parquet")
    assert said.startswith(str(tmp_path / "a.parquet"))
    assert words in said


def test_a_data_set_of_the_hub_by_its_name(tmp_path):
    """In a process of its own: the library reads its environment once."""
    folder = {f"{i}.png": content(i) for i in range(5)}
    folder["metadata.jsonl"] = "".join(
        json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i]}) + "\n" for i in range(5)
    ).encode()
    odd = {f"fox [{name}].{ending}": data for name, data in zip("1*?a!", folder.values(), strict=False)
           for ending, data in (("png", data), ("txt", b"[V]"))}  # fmt: skip
    repositories = {
        "me/odd": Repository(odd, commit="d" * 40),
        "me/folder": Repository({**folder, "load.py": b"raise SystemExit", ".gitattributes": b"x"}),
        "me/rows": Repository({"data/train-0.parquet": parquet(tmp_path / "x.parquet")}, commit="b" * 40),
        "me/closed": Repository({}, gated="all"),
        "me/less": Repository(folder, commit="f" * 40, withheld="4.png"),
        "me/full": Repository({"full.tar": os.urandom(1 << 20)}, commit="e" * 40),
        "me/large": Repository({"a.tar": bytes(3000)}, commit="c" * 40),
    }
    script = (
        "import json, sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from concept_folders import SETTINGS; from dopsd.data import fetched\n"
        "from dopsd.data.schema import validate_dataset; from dopsd.data.unpack import as_folder\n"
        "for name, fetched.MAX_BYTES in json.loads(sys.argv[2]):\n"
        "    try:\n"
        "        say = lambda line: print(line, end='|')\n"
        "        with as_folder(Path(name), Path(sys.argv[1]), say) as (folder, packed):\n"
        "            print(len(validate_dataset(folder, 'x', SETTINGS)[0].rows), packed)\n"
        "    except (ValueError, OSError) as error:\n"
        "        print(error)\n"
    )

    def add(*names: str, most: int = 1 << 30, place: Path = tmp_path) -> list[str]:
        command = [sys.executable, "-c", script, str(place / "place"), json.dumps([(name, most) for name in names])]
        environment = hub.environment(tmp_path / "home", PYTHONPATH=os.getcwd())
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    with FakeHub(repositories) as hub:
        names = ("me/folder", "me/rows", "me/closed", "me/none", "tests/none", "me/odd", "me/less")
        folder_, rows, closed, none, misspelt, odd_, less = add(*names)
        assert folder_ == "me/folder: no such folder here; asking the hub|5 False"
        read = "read as parquet with pictures (1 file), ignored columns: label: 5 rows, 5 pictures"
        assert odd_.endswith("|5 False")
        assert "the hub lists 4.png and does not give it (1 of 6 files); try again" in less
        assert rows.split("|")[1:] == [f"me/rows: {read}", "5 True"]
        assert "me/closed: gated: accept its licence" in closed
        assert "me/none: no such folder here, and no such data set on the hub" in none
        assert "no such folder; check the path" in misspelt, "a folder that is misspelt is not asked for"
        assert not hub.fetched() & {"load.py", ".gitattributes"}
        with small_disk(tmp_path / "disk", "500k") as disk:
            assert f"disk full: {disk}/place.fetched needs 1.0 MB, " in add("me/full", place=disk)[0]
        assert "GiB in all" in add("me/large", most=2999)[0]
        assert "a.tar" not in hub.fetched()
    assert "me/folder: no such folder here, and the hub gives nothing" in add("me/folder")[0]
    assert not (tmp_path / "place.fetched").exists()


# --- two at once, and captions reworded -------------------------------------------------------------------------------


def test_two_data_sets_in_one_folder_are_one_fault_that_names_both(tmp_path):
    folder = make(tmp_path / "data")
    shard(folder / "a.tar", samples())
    assert refused(folder) == (
        f"{folder}: holds two data sets at once: WebDataset (a.tar) and pictures in the folder (0.png); keep one"
    )
    shard(tmp_path / "other" / "a.tar", samples())
    parquet(tmp_path / "other" / "b.parquet")
    assert "WebDataset (a.tar) and parquet with pictures (b.parquet); keep one" in refused(tmp_path / "other")


@pytest.mark.parametrize(
    ("trigger", "wording", "before", "after"),
    [
        ("ohwx", None, "ohwx dog, an ohwx, ohwxs", "[V] dog, an [V], ohwxs"),
        ("ohwx dog", None, "a ohwx dog here", "a [V] here"),
        ("c++", None, "a c++ fox", "a [V] fox"),
        ("ohwx", None, "a fox", "a fox"),
        (None, "{} in [V] style", "a fox", "a fox in [V] style"),
        (None, "[V], {}", "a {} fox \\1", "[V], a {} fox \\1"),
        ("ohwx", "{} in [V] style", "a ohwx", "a [V]"),
        ("ohwx", "{} in [V] style", "a fox", "a fox in [V] style"),
        ("fox", "{} in [V] style", "a fox in [V]", "a fox in [V]"),
        ("fox", "{} in [V] style", "a fox in [ v ]", "a fox in [ v ]"),
    ],
)
def test_the_placeholder_is_written_where_it_lacks(trigger, wording, before, after):
    how = Rewording("[V]", trigger, wording)
    assert how.texts({"a": before, "long": before}, "long") == {"a": after, "long": before}


@pytest.mark.parametrize(("trigger", "wording"), [(" ", None), (None, "in [V] style"), (None, "{} in V style")])
def test_a_rewording_that_can_do_nothing_is_refused(trigger, wording):
    with pytest.raises(SettingsError, match="--trigger: name" if trigger else "--wording: write"):
        rewording("[V]", trigger, wording)
    assert rewording("[V]", None, None) is None


def test_a_full_disk_is_what_it_is_and_leaves_nothing(tmp_path):
    path = shard(tmp_path / "a.tar", [*samples(), ("x.png", os.urandom(1 << 20)), ("x.txt", b"[V]")])
    with small_disk(tmp_path / "disk", "500k") as disk:
        with pytest.raises(OSError, match="No space left") as caught, as_folder(path, disk / "place", print):
            pass
        assert is_disk_full(caught.value)
        assert not [*disk.iterdir()]


def test_pictures_of_one_name_or_of_odd_names_are_all_kept(tmp_path):
    keys = ["a/x", "b/x", "row-000004", "é é", "y" * 300]
    members = [(f"{key}.{ending}", data) for i, key in enumerate(keys)
               for ending, data in (("png", content(i)), ("txt", CAPTIONS[i].encode()))]  # fmt: skip
    found, *_ = unpacked(shard(tmp_path / "a.tar", members))
    assert is_as_packed(found, range(5))
