"""Captions as files: whose captions stay, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from concept_folders import SETTINGS, picture

from dopsd.data import captions
from dopsd.data.captions import Uncaptioned, check_pictures, keep_as_before, save, uncaptioned
from dopsd.data.manifest import DataError
from dopsd.data.schema import validate_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them in a sub-folder, and a held-out one; no captions."""
    part = tmp_path / "pictures"
    (part / "far").mkdir(parents=True)
    (part / "holdout").mkdir()
    for seed, name in enumerate(("a.png", "b.jpg", "far/c.png", "holdout/d.png")):
        picture(seed).save(part / name)
    return part


def _rows(part: Path) -> list[dict]:
    return [json.loads(line) for line in (part / "metadata.jsonl").read_text().splitlines()]


def _faults(folder: Path, redo: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        uncaptioned(folder, redo)
    assert len(str(caught.value).splitlines()) == len(caught.value.faults)
    return str(caught.value)


def test_a_folder_without_captions_gets_rows(folder: Path) -> None:
    found, count = uncaptioned(folder)
    assert count == 4
    assert [(one.path, one.target) for one in found] == [
        (folder / "a.png", folder / "metadata.jsonl"),
        (folder / "b.jpg", folder / "metadata.jsonl"),
        (folder / "far/c.png", folder / "metadata.jsonl"),
        (folder / "holdout/d.png", folder / "holdout/metadata.jsonl"),
    ]
    for one in found:
        assert save(one, {"short": f"ä {one.image} [V]"})
    assert _rows(folder)[2] == {"image": "far/c.png", "captions": {"short": "ä far/c.png [V]"}}
    assert _rows(folder / "holdout") == [{"image": "d.png", "captions": {"short": "ä d.png [V]"}}]
    assert uncaptioned(folder) == ([], 4)
    assert not list(folder.rglob("*.partial"))


def test_rows_with_captions_stay_to_the_byte_and_rows_without_are_filled(folder: Path) -> None:
    mine = '{ "image":"a.png",  "caption": "mine \\u00e4 [V]" }\r'
    lines = [mine, "", '{"image": "b.jpg", "captions": {"short": " "}}']
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    found, _ = uncaptioned(folder)
    assert [one.image for one in found] == ["b.jpg", "far/c.png", "d.png"]
    for one in found[:2]:
        save(one, {"short": "x [V]"})
    written = (folder / "metadata.jsonl").read_bytes().decode().split("\n")
    assert written == [
        mine, "", '{"image": "b.jpg", "captions": {"short": "x [V]"}}',
        '{"image": "far/c.png", "captions": {"short": "x [V]"}}', "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "lacking",
    ['{"image": "a.png"}', '{"image": "a.png", "caption": null}', '{"image": "a.png", "caption": ""}',
     '{"image": "a.png", "captions": {}}', '{"image": "a.png", "caption": "", "captions": {"x": "\\n"}}'],
)  # fmt: skip
def test_a_row_lacks_captions_in_many_ways(folder: Path, lacking: str) -> None:
    (folder / "metadata.jsonl").write_text(lacking + "\n")
    found = next(one for one in uncaptioned(folder)[0] if one.image == "a.png")
    save(found, {"short": "x [V]"})
    assert _rows(folder) == [{"image": "a.png", "captions": {"short": "x [V]"}}]


def test_texts_beside_pictures_are_completed_with_texts(folder: Path) -> None:
    (folder / "a.txt").write_text("mine [V]")
    (folder / "b.TXT").write_text(" \n")
    found, _ = uncaptioned(folder)
    assert [(one.image, one.source, one.single) for one in found] == [
        ("b.jpg", "b.TXT", True), ("far/c.png", "far/c.txt", True), ("d.png", "metadata.jsonl", False),
    ]  # fmt: skip
    for one in found[:2]:
        assert save(one, {"medium": f"{one.image} [V]"})
    assert (folder / "a.txt").read_text() == "mine [V]"
    assert (folder / "b.TXT").read_text() == "b.jpg [V]\n"
    assert (folder / "far/c.txt").read_text() == "far/c.png [V]\n"


def test_a_reference_of_an_edit_is_no_picture_to_caption(folder: Path) -> None:
    row = {"image": "a.png", "caption": "[V] of this", "references": ["far/../b.jpg"]}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert [one.image for one in uncaptioned(folder)[0]] == ["far/c.png", "d.png"]


def test_what_a_person_wrote_meanwhile_stays(folder: Path) -> None:
    first, *_ = uncaptioned(folder)[0]
    (folder / "metadata.jsonl").write_text('{"image": "a.png", "caption": "mine [V]"}\n')
    assert not save(first, {"short": "x [V]"})
    assert _rows(folder) == [{"image": "a.png", "caption": "mine [V]"}]
    beside = Uncaptioned(folder, "b.jpg", "b.txt")
    (folder / "b.txt").write_text("mine [V]")
    assert not save(beside, {"medium": "x [V]"})
    assert (folder / "b.txt").read_text() == "mine [V]"


def test_redo_takes_all_and_keeps_what_was_there(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"image": "a.png", "caption": "mine [V]"}\n')
    found, _ = uncaptioned(folder, redo=True)
    assert len(found) == 4
    keep_as_before(found)
    for one in found:
        assert save(one, {"short": "x [V]"}, redo=True)
    assert [row["captions"] for row in _rows(folder)] == [{"short": "x [V]"}] * 3
    assert (folder / ".metadata.jsonl.before").read_text() == '{"image": "a.png", "caption": "mine [V]"}\n'
    keep_as_before(found)
    assert "mine" in (folder / ".metadata.jsonl.before").read_text(), "what a person wrote is not lost by a second time"
    assert "x [V]" in (folder / ".metadata.jsonl.before2").read_text()


def test_redo_takes_texts_too(folder: Path) -> None:
    (folder / "a.txt").write_text("mine [V]")
    found, _ = uncaptioned(folder, redo=True)
    assert [one.source for one in found] == ["a.txt", "b.txt", "far/c.txt", "metadata.jsonl"]
    keep_as_before(found)
    assert save(found[0], {"medium": "x [V]"}, redo=True)
    assert (folder / "a.txt").read_text() == "x [V]\n"
    assert (folder / ".a.txt.before").read_text() == "mine [V]"


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def _link(name: str, place: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder.parent / "outside.txt").write_text("not yours")
        (folder.parent / "outside").mkdir()
        picture(77).save(folder.parent / "outside" / "x.png")
        (folder / name).symlink_to(folder.parent / place)

    return make


def _several(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [step(folder) for step in steps] and None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_several(_write("metadata.jsonl", ""), _write("a.txt", "x")), "more than one way (metadata.jsonl, a.txt)"),
        (_write("t.parquet", "x"), "not written into this table"),
        (_write("metadata.jsonl", '{"image": '), "row 1: not valid JSON"),
        (_write("metadata.jsonl", '{"image": "a.png", "caption": 3}'), "caption: expected a text, found a number"),
        (_write("metadata.jsonl", '{"image": "a.png", "captions": {"a": 3}}'), "captions: 'a' is a number"),
        (_write("metadata.jsonl", '{"caption": "x"}'), "row 1, image: missing"),
        (_write("metadata.jsonl", '{"image": "../x.png"}'), "../x.png: no picture of this folder"),
        (_write("metadata.jsonl", '{"image": "/etc/passwd"}'), "/etc/passwd: no picture of this folder"),
        (_write("metadata.jsonl", '{"image": "holdout/d.png"}'), "holdout/d.png: no picture of this folder"),
        (_write("metadata.jsonl", '{"image": "b.jpg", "references": ["a.png"]}'), "write it yourself"),
        (_write("a.txt", b"\xff"), "a.txt, row 1: is not UTF-8"),
        (_several(_write("a.txt", "x"), _write("b.png", b"")), "b.txt: two pictures share this one"),
        (_link("metadata.jsonl", "outside.txt"), "metadata.jsonl: is a link that leaves the folder"),
        (_several(_write("a.txt", "x"), _link("b.txt", "outside.txt")), "b.txt: is a link that leaves the folder"),
        (lambda folder: (folder / "metadata.jsonl").mkdir(), "metadata.jsonl: is a link that leaves the folder, or no"),
        (lambda folder: (folder / "a.png").rename(folder / "a\n.png"), "control characters"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_to_is_refused(folder: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert said in _faults(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_no_path_leaves_the_folder(folder: Path) -> None:
    """A linked picture or folder is never looked at, nor what ``..`` behind a linked folder would be."""
    _link("far/away", "outside")(folder)
    (folder / "link.png").symlink_to(folder.parent / "outside/x.png")
    picture(5).save(folder.parent / "a.png")
    row = {"image": "far/away/../../a.png"}  # by its letters, a.png of this folder
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    root = os.path.realpath(folder)
    for one in uncaptioned(folder)[0]:
        assert os.path.realpath(one.path).startswith(root + os.sep), one


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    assert "no pictures there" in _faults(tmp_path)
    assert "no such folder" in _faults(tmp_path / "nothing")


def test_every_picture_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"nothing")
    picture(3, (100, 20)).save(folder / "b.jpg")
    picture(4, (200, 200)).save(folder / "far/c.png")
    with pytest.raises(DataError) as caught:
        check_pictures(uncaptioned(folder)[0], max_pixels=10_000)
    first, second, third = str(caught.value).splitlines()
    assert "a.png: is not a readable" in first
    assert "b.jpg: is 100 x 20 pixels, longer than 4 : 1" in second
    assert "far/c.png: is absurdly large" in third


def test_a_file_of_captions_is_not_read_again_for_each_of_its_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"image": name}) for name in ("a.png", "b.jpg", "far/c.png")]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    read: list[Path] = []
    lines = captions._lines
    monkeypatch.setattr(captions, "_lines", lambda path: [read.append(path), lines(path)][1])
    assert [one.image for one in uncaptioned(folder)[0]] == ["a.png", "b.jpg", "far/c.png", "d.png"]
    assert read == [folder / "metadata.jsonl"]


def test_a_text_of_a_pictures_name_is_its_caption_and_any_other_of_that_name_a_document(folder: Path) -> None:
    """For whoever captions and for whoever reads, from one function."""
    for name in ("notice.png", "copying.png"):
        picture(len(name) + 40).save(folder / name)
    (folder / "LICENSE.txt").write_text("mine alone")
    (folder / "README.md").write_text("about it")
    for name in ("a", "b", "far/c", "notice"):
        (folder / f"{name}.txt").write_text(f"{name} [V]")
    (folder / "holdout" / "d.txt").write_text("d [V]")
    (missing,) = uncaptioned(folder)[0]
    assert (missing.image, missing.source) == ("copying.png", "copying.txt")
    save(missing, {"medium": "copying [V]"})
    assert uncaptioned(folder) == ([], 6)
    rows = validate_dataset(folder, "test", SETTINGS)[0].rows
    assert {row.image.stem: row.captions[0][1] for row in rows} == {
        name: f"{'far/c' if name == 'c' else name} [V]" for name in ("a", "b", "c", "notice", "copying")
    }
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(DataError) as caught:
        validate_dataset(folder, "test", SETTINGS)
    assert str(caught.value).splitlines()[0] in _faults(folder)
