"""Tables as programs write them: CSV in every spelling, nulls, parquet within bounds."""

from __future__ import annotations

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from concept_folders import SETTINGS, faults_of, write_rows
from foreign_folders import CAPTIONS, EXPECTED, pictures, read

from dopsd.data import tables
from dopsd.data.captions import uncaptioned
from dopsd.data.manifest import DataError
from dopsd.data.schema import validate_dataset
from dopsd.data.unpack import as_folder

# --- CSV as spreadsheets write it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("comma", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_of_a_spreadsheet(tmp_path, comma, encoding, end):
    folder, odd = pictures(tmp_path), f'a "fox", red; in [V]\tstyle{end}and köln'
    with (folder / "metadata.csv").open("w", newline="", encoding=encoding) as file:
        rows = csv.writer(file, delimiter=comma, lineterminator=end)
        rows.writerows([("image", "caption", "repeats"), ("0.png", odd, ""), *(
            (f"{i}.png", CAPTIONS[i], i) for i in range(1, 5)), ()])  # fmt: skip
    assert read(folder)[0] == [("0.png", 'a "fox", red; in [V] style and köln'), *EXPECTED[1:]]
    assert [row.repeats for row in validate_dataset(folder, "test", SETTINGS)[0].rows] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("filename,caption\n0.png,[V]\n", [(None, "no column names the pictures (image, file_name, ")]),
        ("", [(None, "its columns are: none")]),
        ("image,caption,caption\n0.png,[V],[V]\n", [(None, "two columns have the same name")]),
        ('image,caption\n0.png,"[V]\n', [(None, "cannot be read as CSV: unexpected end of data")]),
        ('image,caption\r0.png,"[V]\r', [(None, "cannot be read as CSV: unexpected end of data (line 2)")]),
        (f"image,caption\r0.png,{'a' * 140_000}\r", [(None, "cannot be read as CSV: field larger than field limit")]),
        (f"image,{'a' * 140_000}\r0.png,[V]\r", [(None, "cannot be read as CSV: field larger than field limit")]),
        ("image,caption\n0.png,a fox, [V]\n", [(2, "has 3 cells, and there are 2 columns")]),
        ("image,caption\n0.png,\n", [(2, "missing; write caption")]),
        ("image,caption,colour\n0.png,[V],red\n", [(None, "unknown key colour; known are image")]),
        ("image,caption,repeats\n0.png,[V],2.5\n", [(2, "whole number from 1 to 999, found 2.5")]),
    ],
)
def test_a_csv_that_cannot_be_read_says_where(tmp_path, content, found):
    folder = pictures(tmp_path, 1)
    (folder / "a.csv").write_text(content)
    faults = [(row, problem) for file, row, _, problem in faults_of(folder) if file == "a.csv"]
    assert len(faults) == len(found)
    assert all(row == own and words in problem for (row, problem), (own, words) in zip(faults, found, strict=True))


@pytest.mark.parametrize("key", ["image", "file_name", "image_path"])
def test_a_null_is_no_value_in_json_lines_as_in_parquet(tmp_path, key):
    """As ``datasets`` writes them (``to_json``): every row has every column."""
    nothing = {"repeats": None, "references": None, "captions": None, "label": None, "control_path": None}
    write_rows(pictures(tmp_path), [{key: f"{i}.png", "caption": CAPTIONS[i], **nothing} for i in range(5)])
    assert read(tmp_path)[0] == EXPECTED
    rows = [{key: f"{i}.png", "caption": None, "captions": {"a": CAPTIONS[i], "b": None if i else "[V]"}}
            for i in range(5)]  # fmt: skip
    write_rows(tmp_path, rows)
    assert read(tmp_path)[0] == [EXPECTED[0], ("0.png", "[V]"), *EXPECTED[1:]]
    write_rows(tmp_path, [*rows[:4], {key: None, "captions": {"a": "[V]"}}])
    found = [fault[1:] for fault in faults_of(tmp_path) if fault[0] == "metadata.jsonl"]
    assert found == [(5, "image", "missing; name the picture's file")]
    write_rows(tmp_path, [{"image": f"{i}.png", "captions": {"medium": None}} for i in range(5)])
    assert len(uncaptioned(tmp_path)[0]) == 5


# --- parquet as its writers pack it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a column", "a struct", "a list in one row", "a map"])
@pytest.mark.parametrize(("size", "count", "said"), [(1 << 20, 400, "1,024 KiB in one cell, and 64 are read"),
                                                    (60_000, 5000, "far too large")])  # fmt: skip
def test_a_small_parquet_does_not_become_a_large_table(tmp_path, where, size, count, said):
    """One text that is written once and meant a thousand times: the file stays of a few kilobytes."""
    text, one = ["x" * size], pa.array([0] * count, pa.int32())
    repeated = pa.DictionaryArray.from_arrays(one, pa.array(text))
    table = {"image": ["0.png"] * count, "caption": ["[V]"] * count}
    if where == "a column":
        table |= {"caption": repeated}
    elif where == "a struct":
        del table["caption"]
        table |= {"captions": pa.StructArray.from_arrays([repeated], names=["short"])}
    elif where == "a map":
        del table["caption"]
        ends = pa.array([*range(count + 1)], pa.int32())
        table |= {"captions": pa.MapArray.from_arrays(ends, pa.array(["short"] * count), repeated.dictionary_decode())}
    else:
        ends = pa.array([0, count], pa.int32())
        table = {"image": ["0.png"], "caption": ["[V]"], "references": pa.ListArray.from_arrays(ends, repeated)}
    pq.write_table(pa.table(table), pictures(tmp_path, 1) / "metadata.parquet", compression="zstd")
    assert (tmp_path / "metadata.parquet").stat().st_size < 100_000
    found = [problem for file, *_, problem in faults_of(tmp_path) if file == "metadata.parquet"]
    assert len(found) == 1
    assert said in found[0]


def test_a_list_in_one_row_counts_as_long_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_PARQUET_ROWS", 4000)
    table = {"image": ["0.png"], "caption": ["[V]"], "references": [["0.png"] * 5000]}
    pq.write_table(pa.table(table), pictures(tmp_path, 1) / "metadata.parquet")
    assert any("far too large" in problem for *_, problem in faults_of(tmp_path))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_that_are_left_aside_are_named_and_not_read(tmp_path, kind):
    count = 5
    table = {"file_name": pa.array([f"{i}.png" for i in range(count)]).cast(kind), "text": CAPTIONS,
             "story": ["x" * 100_000] * count, "nothing": pa.nulls(count), "numbers": [[1.5]] * count}  # fmt: skip
    pq.write_table(pa.table(table), pictures(tmp_path) / "metadata.parquet")
    ignored = "story, nothing, numbers"
    assert read(tmp_path) == (EXPECTED, f"Hugging Face image folder (metadata.parquet), ignored columns: {ignored}")


@pytest.mark.parametrize("key", ["image", "file_name", "image_path", "local_path_list"])
def test_bytes_beside_the_names_of_pictures_make_no_packed_data_set(tmp_path, key):
    names = [[f"{i}.png"] if key == "local_path_list" else f"{i}.png" for i in range(5)]
    captions = {"text" if key == "file_name" else "a_en" if key == "local_path_list" else "caption": CAPTIONS}
    table = pa.table({key: names, **captions, "phash": [b"12345678"] * 5})
    pq.write_table(table, pictures(tmp_path / "data") / "metadata.parquet")
    said: list[str] = []
    with as_folder(tmp_path / "data", tmp_path / "unpacked", said.append) as (rows, packed):
        assert (rows, packed, said) == (tmp_path / "data", False, [])
    if key == "image":  # a table of this project's own has no other columns
        assert "unknown key phash" in faults_of(tmp_path / "data")[0][3]
    else:
        assert read(tmp_path / "data")[0] == EXPECTED
        assert read(tmp_path / "data")[1].endswith("ignored columns: phash")


@pytest.mark.parametrize("column", ["image", "img", "jpg"])
def test_what_holds_pictures_is_packed_although_it_names_them_too(tmp_path, column):
    folder = pictures(tmp_path / "pictures")
    content = [(folder / f"{i}.png").read_bytes() for i in range(5)]
    held = [{"bytes": one, "path": "x.png"} for one in content] if column == "img" else content
    (tmp_path / "data").mkdir()
    table = pa.table({column: held, "file_name": [f"{i}.png" for i in range(5)], "text": CAPTIONS})
    pq.write_table(table, tmp_path / "data/metadata.parquet")
    with as_folder(tmp_path / "data", tmp_path / "unpacked", lambda line: None) as (rows, packed):
        assert packed
        assert [text for _, text in read(rows)[0]] == CAPTIONS
    if column != "jpg":  # which may as well be a hash
        pictures(tmp_path / "data", 1)
        with (
            pytest.raises(DataError, match="holds two data sets at once"),
            as_folder(tmp_path / "data", tmp_path / "unpacked", lambda line: None),
        ):
            pass
