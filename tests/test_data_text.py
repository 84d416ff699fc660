"""Captions of several lines and files in other encodings: brought to one line, read, or named as what they are."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from concept_folders import SETTINGS, faults_of, picture, texts, write_rows
from hypothesis import given
from hypothesis import strategies as st

from dopsd.data.captions import save, uncaptioned
from dopsd.data.manifest import DataError, Fault
from dopsd.data.schema import validate_dataset
from dopsd.data.text import decoded, folded
from dopsd.data.unpack import Rewording, as_folder
from flows.artifacts import one_line

KINDS = [".txt", ".caption", ".jsonl", ".csv"]


def written(folder: Path, kind: str, caption: str, encoding: str = "utf-8") -> str:
    """Four pictures whose captions are of that kind; the name of the file, or of the second of them."""
    folder.mkdir(exist_ok=True)
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
        if kind in (".txt", ".caption"):
            (folder / f"{i}{kind}").write_bytes(caption.encode(encoding))
    if kind == ".jsonl":
        rows = (json.dumps({"image": f"{i}.png", "caption": caption}, ensure_ascii=False) + "\n" for i in range(4))
        (folder / "metadata.jsonl").write_bytes("".join(rows).encode(encoding))
    if kind == ".csv":
        quoted = "".join(f'{i}.png,"{caption}"\r\n' for i in range(4))
        (folder / "metadata.csv").write_bytes(f"image,caption\r\n{quoted}".encode(encoding))
    return f"1{kind}" if kind in (".txt", ".caption") else f"metadata{kind}"


def captions(folder: Path) -> set[str]:
    return {text for row in validate_dataset(folder, "test", SETTINGS)[0].rows for _, text in row.captions}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "caption",
    [
        "a fox\nin [V] style",
        "a fox\r\nin [V] style\r\n",
        " a fox \t in\u2028[V]\u2029style  \n",
        "\n\na fox\x0b\x0c\x85in\u3000[V]\xa0style\n\n",
        "a  fox  in  [V]  style",
    ],
)
def test_a_caption_becomes_one_line_of_single_spaces(tmp_path, kind, caption):
    written(tmp_path, kind, caption)
    assert captions(tmp_path) == {"a fox in [V] style"}


@given(st.text())
def test_folding_drops_white_space_and_nothing_else(text):
    one = folded(text)
    assert "".join(one.split()) == "".join(text.split())
    assert one == one.strip()
    assert "  " not in one
    assert folded(one) == one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, kind, encoding):
    caption = "ein Fuchs in [V], größer als 狐"
    written(tmp_path, kind, caption, encoding)
    if encoding in ("utf-16-le", "utf-16-be"):  # Python writes those without a mark
        mark = "\ufeff".encode(encoding)
        for file in (file for file in tmp_path.iterdir() if file.suffix == kind):
            file.write_bytes(mark + file.read_bytes())
    assert captions(tmp_path) == {caption}


ENCODINGS = [
    ("cp1252", "a fox in [V] style, näive “art” – Köln", "Windows-1252 (cp1252)"),
    ("latin-1", "señor zorro [V]", "Windows-1252 (cp1252)"),
    ("cp1251", "лиса на холме в стиле [V]", "Windows-1251 (cp1251)"),
    ("cp932", "丘の上の狐、[V]の絵", "Shift JIS (cp932)"),
    ("euc_jp", "丘の上の狐、[V]の絵", "EUC-JP"),
    ("gb18030", "一只狐狸在山上，[V]风格", "GBK (gb18030)"),
    ("gb18030", "[V] 森林中的女孩", "GBK (gb18030)"),  # kanji alone in EUC-JP, which Japanese never is
    ("cp949", "언덕 위의 여우 [V]", "EUC-KR (cp949)"),
    ("utf-16-le", "a fox in [V] style", "UTF-16 without a byte order mark"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("encoding", "caption", "name"), ENCODINGS)
def test_another_encoding_is_refused_by_its_name(tmp_path, kind, encoding, caption, name):
    file = written(tmp_path, kind, caption, encoding)
    found = [problem for source, *_, problem in faults_of(tmp_path) if source == file]
    assert len(found) == 1
    assert found[0].startswith("is not UTF-8")
    assert found[0].endswith(f"it looks like {name}: save it as UTF-8")
    others = [source for source, *_ in faults_of(tmp_path) if source not in (file, ".")]
    assert all(source.endswith(kind) for source in others)  # and no picture is said to be left over


@given(st.binary())
def test_whatever_the_bytes_are_they_are_read_or_refused(content):
    try:
        text = decoded(content)
    except ValueError as refused:
        text = str(refused)
        said = "UTF-" in text and "\n" not in text
    else:
        said = text in [content.decode(name, "ignore") for name in ("utf-8", "utf-8-sig", "utf-16", "utf-32")]
    assert said


def test_captions_are_added_to_a_table_in_another_encoding(tmp_path):
    """It becomes UTF-8; what a person wrote there stays."""
    written(tmp_path, ".jsonl", "größer [V]", "utf-16")
    picture(9).save(tmp_path / "9.png")
    (one,), _ = uncaptioned(tmp_path)
    assert save(one, {"medium": "a fox in [V]"})
    assert captions(tmp_path) == {"größer [V]", "a fox in [V]"}


@pytest.mark.parametrize("count", [1, 49, 50, 51, 3000])
def test_of_very_many_faults_the_first_are_shown_and_all_are_counted(tmp_path, count):
    write_rows(tmp_path, [{"image": f"{i}.png", "caption": "[V]"} for i in range(count)])
    faults = faults_of(tmp_path, SETTINGS.model_copy(update={"min_images": 1}))
    assert [(row, problem.partition(":")[0]) for _, row, _, problem in faults] == [
        (i + 1, f"{i}.png") for i in range(count)
    ]
    error = DataError(Fault(*fault) for fault in faults)
    lines = str(error).split("\n")
    assert lines[:50] == [str(fault) for fault in error.faults[:50]]
    assert lines[50:] == ([f"and {count - 50:,} more"] if count > 50 else [])
    assert one_line(error) == lines[0] + (f" (and {count - 1} more)" if count > 1 else "")
    again = copy.copy(error)  # as it is brought to another process
    assert (again.faults, str(again)) == (error.faults, str(error))
    # and the same of a folder that stands for another one
    with pytest.raises(DataError) as caught, as_folder(tmp_path, tmp_path / "copy", lambda line: None, copy=True):
        raise error
    assert caught.value.faults == error.faults


@pytest.mark.parametrize("trigger", ["ohwx", "Ohwx", "OHWX"])
@pytest.mark.parametrize(
    ("caption", "reworded"),
    [
        ("Ohwx on a hill", "[V] on a hill"),
        ("a OHWX, ohwx dog", "a [V], [V] dog"),
        ("(ohwx)", "([V])"),
        ("an ohwxian dog of Mohwx", "an ohwxian dog of Mohwx"),
        ("ohwx_2", "ohwx_2"),
        ("Ohwx and [V]", "Ohwx and [V]"),
    ],
)
def test_a_trigger_is_a_whole_word_in_small_letters_or_large(trigger, caption, reworded):
    how = Rewording("[V]", trigger)
    assert how.texts({"caption": caption, "long": "Ohwx"}, "long") == {"caption": reworded, "long": "Ohwx"}


def test_a_trigger_in_small_letters_and_large_is_found_in_all_captions(tmp_path):
    texts(tmp_path, caption="A photo of ohwx")
    (tmp_path / "1.txt").write_text("Ohwx, a Photo")
    assert "--trigger ohwx (every caption has ohwx, photo)" in faults_of(tmp_path)[0][3]
