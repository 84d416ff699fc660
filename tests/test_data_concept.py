"""The checks of a concept folder: each fault of a row, a file or the table is found, named and nothing else is."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from concept_folders import SETTINGS, faults_of, make, picture, rows, write_rows
from PIL import Image

from dopsd.data.manifest import DataError
from dopsd.data.schema import validate_dataset


def test_a_sound_folder_gives_its_rows_in_their_order(tmp_path):
    table = validate_dataset(make(tmp_path), "test", SETTINGS)[0]
    assert [row.image for row in table.rows] == [tmp_path / f"{i}.png" for i in range(5)]
    assert [row.line for row in table.rows] == [1, 2, 3, 4, 5]
    assert table.rows[1].captions == (("short", "a 1 in [V] style"), ("medium", "1, [V]"))
    assert (table.name, table.root) == ("test", tmp_path)


def test_the_three_kinds_give_the_same_rows_and_hash(tmp_path):
    captions = [f"a {i} in [V] style" for i in range(5)]
    for kind in ("jsonl", "text", "parquet"):
        make(tmp_path / kind)
        (tmp_path / kind / "metadata.jsonl").unlink()
    write_rows(tmp_path / "jsonl", [{"image": f"{i}.png", "caption": captions[i]} for i in range(5)])
    for i in range(5):
        (tmp_path / "text" / f"{i}.txt").write_text(captions[i] + "\n")
    frame = pd.DataFrame({"image": [f"{i}.png" for i in range(5)], "caption": captions, "references": [None] * 5})
    frame.to_parquet(tmp_path / "parquet" / "rows.parquet")
    tables = [validate_dataset(tmp_path / kind, kind, SETTINGS)[0] for kind in ("jsonl", "text", "parquet")]
    assert len({table.content_hash for table in tables}) == 1
    assert len({tuple((row.image.name, row.captions) for row in table.rows) for table in tables}) == 1


def test_parquet_captions_by_variant_equal_those_of_json(tmp_path):
    make(tmp_path / "json")
    make(tmp_path / "parquet")
    (tmp_path / "parquet" / "metadata.jsonl").unlink()
    pd.DataFrame(rows()).to_parquet(tmp_path / "parquet" / "metadata.parquet")
    hashes = {validate_dataset(tmp_path / kind, kind, SETTINGS)[0].content_hash for kind in ("json", "parquet")}
    assert len(hashes) == 1


def test_hash_follows_content_not_place(tmp_path):
    before = validate_dataset(make(tmp_path / "a"), "one", SETTINGS)[0].content_hash
    moved = tmp_path / "deep" / "b"
    shutil.copytree(tmp_path / "a", moved)
    (moved / "0.png").rename(moved / "renamed.png")
    write_rows(moved, [{**rows()[0], "image": "renamed.png"}, *rows()[1:]])
    assert validate_dataset(moved, "two", SETTINGS)[0].content_hash == before
    changed = rows()
    changed[2]["captions"]["short"] += "!"
    write_rows(moved, [{**changed[0], "image": "renamed.png"}, *changed[1:]])
    assert validate_dataset(moved, "two", SETTINGS)[0].content_hash != before
    picture(99).save(tmp_path / "a" / "0.png")
    assert validate_dataset(tmp_path / "a", "one", SETTINGS)[0].content_hash != before


# --- one fault of a row: what is done to row 3, and (column, words) of the only fault that must be reported ----------


def _replace_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, list[dict]], None]:
    def spoil(folder: Path, listed: list[dict]) -> None:
        (folder / "2.png").write_bytes(change((folder / "2.png").read_bytes()))

    return spoil


def _save(name: str, fmt: str, image: Image.Image, **options) -> Callable[[Path, list[dict]], None]:
    def spoil(folder: Path, listed: list[dict]) -> None:
        (folder / "2.png").unlink()
        image.save(folder / name, fmt, **options)
        listed[2]["image"] = name

    return spoil


def _set(**values) -> Callable[[Path, list[dict]], None]:
    def spoil(folder: Path, listed: list[dict]) -> None:
        listed[2].update(values)

    return spoil


def _take(folder: Path, listed: list[dict], name: str) -> None:
    (folder / "2.png").unlink()
    listed[2]["image"] = name


def _symlink(folder: Path, listed: list[dict]) -> None:
    (folder / "2.png").rename(folder.parent / "outside.png")
    (folder / "linked").symlink_to(folder.parent)
    listed[2]["image"] = "linked/outside.png"


def _pipe(folder: Path, listed: list[dict]) -> None:
    (folder / "2.png").unlink()
    os.mkfifo(folder / "2.png")


def _absolute(folder: Path, listed: list[dict]) -> None:
    (folder / "2.png").rename(folder.parent / "outside.png")
    listed[2]["image"] = str(folder.parent / "outside.png")


_FRAMES = [picture(50), picture(51)]
_BOMB = Image.new("L", (5_000, 5_000))
ROW_FAULTS = {
    "no caption": (lambda folder, listed: listed[2].pop("captions"), "captions", "missing"),
    "captions without a variant": (_set(captions={}), "captions", "is empty"),
    "empty caption": (_set(captions={"short": "", "medium": "[V]"}), "captions", "'short' is empty"),
    "blank caption": (_set(captions={"short": " \u3000"}), "captions", "'short' is empty"),
    "null caption": (_set(captions={"short": None}), "captions", "is empty; write at least one caption"),
    "bell": (_set(captions={"short": "a\a [V]"}), "captions", "control characters"),
    "half a surrogate pair": (_set(captions={"short": "[V] \ud800"}), "captions", "control characters"),
    "two ways": (_set(caption="[V]"), "captions", "both caption and captions"),
    "unknown key": (_set(captoins="x"), None, "unknown key captoins"),
    "references no list": (_set(references="0.png"), "references", "expected a list"),
    "missing reference": (
        lambda folder, listed: (
            picture(0, (64, 64)).save(folder / "0.png"),
            listed[2].update(references=["0.png", "no.png"]),
        ),
        "references",
        "no.png: is missing",
    ),
    "missing image": (lambda folder, listed: (folder / "2.png").unlink(), "image", "2.png: is missing"),
    "no image": (lambda folder, listed: _take(folder, listed, ""), "image", "an empty text"),
    "image is a number": (lambda folder, listed: _take(folder, listed, 7), "image", "found a number"),  # type: ignore[arg-type]
    "image is a folder": (
        lambda folder, listed: ((folder / "2.png").unlink(), (folder / "2.png").mkdir()),
        "image",
        "not an ordinary",
    ),
    "image is a pipe": (_pipe, "image", "not an ordinary file"),
    "zero in the name": (lambda folder, listed: _take(folder, listed, "a\0.png"), "image", "control characters"),
    "name too long": (lambda folder, listed: _take(folder, listed, "n" * 300 + ".png"), "image", "cannot be read"),
    "empty file": (_replace_bytes(lambda content: b""), "image", "0 bytes"),
    "truncated": (_replace_bytes(lambda content: content[: len(content) // 2]), "image", "truncated"),
    "last chunk gone": (_replace_bytes(lambda content: content[:-12]), "image", "truncated"),
    "flipped byte": (_replace_bytes(lambda c: c[:60] + bytes([c[60] ^ 255]) + c[61:]), "image", "damaged"),
    "not an image": (_replace_bytes(lambda content: b"hello"), "image", "not a readable"),
    "format not allowed": (_save("2x.gif", "GIF", picture(2)), "image", "is a GIF picture, which is not read"),
    "animated webp": (
        _save("2x.webp", "WEBP", _FRAMES[0], save_all=True, append_images=_FRAMES[1:]),
        "image",
        "animated",
    ),
    "animated png": (_save("2x.png", "PNG", _FRAMES[0], save_all=True, append_images=_FRAMES[1:]), "image", "animated"),
    "too large": (_save("2x.png", "PNG", picture(2, (101, 100))), "image", "absurdly large: 101 x 100"),
    "decompression bomb": (_save("2x.png", "PNG", _BOMB), "image", "absurdly large"),
    "too small": (_save("2x.png", "PNG", picture(2, (15, 16))), "image", "15 x 16 pixels, less than half the side"),
    "too long": (_save("2x.png", "PNG", picture(2, (170, 40))), "image", "longer than 4 : 1"),
    "same file twice": (
        lambda folder, listed: _take(folder, listed, "./1.png"),
        "image",
        "the same picture as 1.png (row 2)",
    ),
    "exact copy": (
        lambda folder, listed: shutil.copy(folder / "0.png", folder / "2.png"),
        "image",
        "the same picture as 0.png",
    ),
    "re-encoded copy": (_save("2x.jpg", "JPEG", picture(0), quality=80), "image", "nearly the same picture"),
    "resized copy": (_save("2x.png", "PNG", picture(0, (90, 90))), "image", "nearly the same picture"),
    "darker copy": (_save("2x.png", "PNG", picture(0).point(lambda v: int(v * 0.8))), "image", "nearly the same"),
    "parent folder": (lambda folder, listed: _take(folder, listed, "../x.png"), "image", "leaves the folder"),
    "absolute path": (_absolute, "image", "leaves the folder"),
    "hidden file": (
        lambda folder, listed: ((folder / "2.png").rename(folder / ".2.png"), listed[2].update(image=".2.png")),
        "image",
        "hidden",
    ),
}


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_each_fault_of_a_row_is_named_with_file_and_row(tmp_path, name):
    spoil, column, words = ROW_FAULTS[name]
    folder = make(tmp_path / "data")
    listed = rows()
    spoil(folder, listed)
    write_rows(folder, listed)
    found = faults_of(folder)
    assert len(found) == 1, found
    assert found[0][:3] == ("metadata.jsonl", 3, column)
    assert words in found[0][3]


def test_links_that_leave_the_folder_are_refused(tmp_path):
    folder = make(tmp_path / "data")
    listed = rows()
    _symlink(folder, listed)
    (folder / "0.png").rename(tmp_path / "0.png")
    (folder / "0.png").symlink_to(tmp_path / "0.png")
    write_rows(folder, listed)
    found = faults_of(folder)
    assert {(file, row) for file, row, _, _ in found} == {
        ("metadata.jsonl", 1),
        ("metadata.jsonl", 3),
        ("linked", None),
        ("0.png", None),
    }
    assert all("link" in problem for *_, problem in found)


BAD_LINES = {
    "not JSON": (b"{image: 1}", "not valid JSON"),
    "no object": (b'["2.png", "[V]"]', "found a list"),
    "a key twice": (b'{"image": "2.png", "image": "1.png", "caption": "[V]"}', "there twice"),
    "not a number": (b'{"image": "2.png", "caption": NaN}', "NaN is not JSON"),
    "endless nesting": (b"[" * 100_000, "nested too deeply"),
    "endless number": (b"1" * 10_000, "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_the_others_are_still_checked(tmp_path, name):
    line, words = BAD_LINES[name]
    folder = make(tmp_path)
    lines = (folder / "metadata.jsonl").read_bytes().splitlines()
    lines[2] = line
    lines[4] = json.dumps({"image": "4.png", "caption": ""}).encode()
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    found = {(file, row): problem for file, row, _, problem in faults_of(folder)}
    assert words in found["metadata.jsonl", 3]
    assert "is empty" in found["metadata.jsonl", 5]
    assert found["2.png", None].startswith("no row mentions this picture")
    assert len(found) == 3


def _unlink(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


FOLDER_FAULTS = {
    "nothing says the captions": (_unlink("metadata.jsonl"), ".", "no captions found"),
    "two kinds": (
        lambda folder: (folder / "0.txt").write_text("[V]"),
        ".",
        "more than one way (metadata.jsonl, 0.txt)",
    ),
    "two kinds, parquet": (lambda folder: (folder / "a.parquet").write_bytes(b"x"), ".", "more than one way"),
    "image without a row": (lambda folder: picture(9).save(folder / "9.png"), "9.png", "no row mentions"),
    "image in a sub-folder": (
        lambda folder: ((folder / "sub").mkdir(), picture(9).save(folder / "sub" / "9.png")),
        "sub/9.png",
        "no row mentions",
    ),
    "text without an image": (lambda folder: (folder / "x.txt").write_text("[V]"), "x.txt", "no picture of this name"),
    "what is this": (lambda folder: (folder / "a.psd").write_bytes(b"x"), "a.psd", "not part of the data set"),
    "no placeholder": (
        lambda folder: write_rows(folder, [{"image": f"{i}.png", "caption": "a fox"} for i in range(5)]),
        ".",
        "no caption holds the placeholder [V]",
    ),
    "too few": (
        lambda folder: (write_rows(folder, rows(3)), _unlink("3.png")(folder), _unlink("4.png")(folder)),
        ".",
        "too few images: 3, at least 4",
    ),
    "no rows": (
        lambda folder: ((folder / "metadata.jsonl").write_text("\n"), [_unlink(f"{i}.png")(folder) for i in range(5)]),
        "metadata.jsonl",
        "holds no rows",
    ),
}


@pytest.mark.parametrize("name", FOLDER_FAULTS)
def test_each_fault_of_the_folder_is_named(tmp_path, name):
    spoil, file, words = FOLDER_FAULTS[name]
    spoil(make(tmp_path))
    found = faults_of(tmp_path)
    assert len(found) == 1, found
    assert found[0][:2] == (file, None)
    assert words in found[0][3]


def test_a_folder_that_is_missing_or_a_file(tmp_path):
    assert "no such folder" in faults_of(tmp_path / "nowhere")[0][3]
    (tmp_path / "file").write_text("x")
    assert "not a folder" in faults_of(tmp_path / "file")[0][3]


def test_text_files_beside_pictures(tmp_path):
    make(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("[V]\n")
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe[V]")
    (tmp_path / "2.txt").write_text("  \n")
    (tmp_path / "3.txt").write_text("a [V]\a")
    (tmp_path / "x.txt").write_text("[V]")
    found = {file: problem for file, _, _, problem in faults_of(tmp_path)}
    assert set(found) == {"1.txt", "2.txt", "3.txt", "4.png", "x.txt"}
    assert "UTF-8" in found["1.txt"]
    assert "is empty" in found["2.txt"]
    assert "control characters" in found["3.txt"]
    assert "write 4.txt" in found["4.png"]


def test_all_faults_at_once_in_the_rows_order(tmp_path):
    make(tmp_path)
    listed = rows()
    listed[0]["captions"]["short"] = ""
    listed[1]["image"] = "nowhere.png"
    listed[3]["captions"] = {}
    (tmp_path / "4.png").write_bytes(b"x")
    write_rows(tmp_path, listed)
    assert [(file, row) for file, row, _, _ in faults_of(tmp_path)] == [
        ("metadata.jsonl", 1),
        ("metadata.jsonl", 2),
        ("metadata.jsonl", 4),
        ("metadata.jsonl", 5),
        ("1.png", None),
    ]


def test_documents_and_hidden_files_are_no_fault(tmp_path):
    make(tmp_path)
    for name in ("README.md", "LICENSE", "NOTICE.txt", ".DS_Store"):
        (tmp_path / name).write_text("x")
    assert len(validate_dataset(tmp_path, "test", SETTINGS)[0].rows) == 5


# --- the held-out part -----------------------------------------------------------------------------------------------


def test_the_held_out_part_is_checked_but_needs_no_placeholder(tmp_path):
    make(tmp_path)
    assert validate_dataset(tmp_path, "test", SETTINGS)[1] is None
    make(tmp_path / "holdout", count=1, first=20)
    write_rows(tmp_path / "holdout", [{"image": "0.png", "caption": "a fox"}])
    table, held_out = validate_dataset(tmp_path, "test", SETTINGS)
    assert len(table.rows) == 5
    assert held_out is not None
    assert [row.image for row in held_out.rows] == [tmp_path / "holdout" / "0.png"]
    (tmp_path / "holdout" / "0.png").write_bytes(b"x")
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError) as caught:
        validate_dataset(tmp_path, "test", SETTINGS)
    assert [f.file for f in caught.value.faults] == [
        str(tmp_path / "metadata.jsonl"),
        str(tmp_path / "holdout" / "metadata.jsonl"),
    ]


def test_a_held_out_picture_must_not_be_a_training_picture(tmp_path):
    make(tmp_path)
    make(tmp_path / "holdout", count=2, first=20)
    picture(3).save(tmp_path / "holdout" / "1.jpg", quality=90)
    (tmp_path / "holdout" / "1.png").unlink()
    write_rows(tmp_path / "holdout", [{"image": f, "caption": "x"} for f in ("0.png", "1.jpg")])
    with pytest.raises(DataError, match=r"holdout/metadata.jsonl, row 2, image: 1.jpg .* copy of .* 3.png"):
        validate_dataset(tmp_path, "test", SETTINGS)
    listed = [*rows(), {"image": "holdout/0.png", "caption": "[V]"}]
    write_rows(tmp_path, listed)
    assert "held-out truth" in faults_of(tmp_path)[0][3]


def test_rows_keep_the_order_they_are_written_in(tmp_path):
    make(tmp_path)
    listed = rows()
    random.Random(0).shuffle(listed)
    write_rows(tmp_path, listed)
    table = validate_dataset(tmp_path, "test", SETTINGS)[0]
    assert [row.image.name for row in table.rows] == [row["image"] for row in listed]
