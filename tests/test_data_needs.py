"""What a teacher's context asks of the rows: references, the caption that is the teacher's alone, and no leaks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from concept_folders import SETTINGS, make, picture, rows, write_rows
from PIL import Image

from dopsd.data.duplicates import fingerprint, near_duplicates
from dopsd.data.manifest import ConceptTable, DataError
from dopsd.data.needs import Needs, first_unmet
from dopsd.data.schema import validate_dataset

REFUSED, ALLOWED, REQUIRED = (Needs(rule) for rule in ("refused", "allowed", "required"))
LONG = Needs("refused", "long")
Found = list[tuple[str, int | None, str | None, str]]


def check(folder: Path, needs: Needs) -> tuple[ConceptTable, ConceptTable | None]:
    return validate_dataset(folder, "test", SETTINGS, needs)


def faults(folder: Path, needs: Needs) -> Found:
    """(file, row, column, problem) of all that is wrong; each must be one line that a person can find the place by."""
    with pytest.raises(DataError) as caught:
        check(folder, needs)
    lines, found = str(caught.value).split("\n"), caught.value.faults
    assert len(lines) == len(found)
    for line, fault in zip(lines, found, strict=True):
        assert line.startswith(fault.file)
        assert line.removeprefix(fault.file)[:1] in (",", ":")
        assert fault.row is None or line.startswith(
            (f"{fault.file}, row {fault.row},", f"{fault.file}, row {fault.row}:")
        )
    return [(os.path.relpath(f.file, folder), f.row, f.column, f.problem) for f in found]


def make_pairs(folder: Path, count: int = 5, first: int = 0, shown: int = 100) -> list[dict[str, Any]]:
    """A data set for editing: each picture with the one before the edit. Returns its rows, for a test to spoil."""
    make(folder, count, first)
    (folder / "before").mkdir()
    for number in range(count):
        picture(shown + number, (64, 80)).save(folder / "before" / f"{number}.png")
    listed = [row | {"references": [f"before/{number}.png"]} for number, row in enumerate(rows(count))]
    write_rows(folder, listed)
    return listed


def hold_out(folder: Path) -> list[dict[str, Any]]:
    return make_pairs(folder / "holdout", 2, first=20, shown=200)


# --- whether there are references -------------------------------------------------------------------------------------


def test_pairs_are_sound_where_references_may_or_must_be(tmp_path):
    make_pairs(tmp_path)
    hold_out(tmp_path)
    for needs in (ALLOWED, REQUIRED):
        table, held_out = check(tmp_path, needs)
        assert [row.references for row in table.rows] == [(tmp_path / "before" / f"{i}.png",) for i in range(5)]
        assert held_out is not None
        assert held_out.rows[1].references == (tmp_path / "holdout" / "before" / "1.png",)


def test_a_reference_that_nobody_is_shown_is_refused(tmp_path):
    """Once an editing data set was trained on as plain text to image, and nothing was said."""
    make(tmp_path)
    listed = rows()
    picture(100, (64, 64)).save(tmp_path / "before.png")
    picture(101, (10, 10)).save(tmp_path / "tiny.png")
    listed[3]["references"] = ["before.png", "tiny.png"]
    write_rows(tmp_path, listed)
    hold_out(tmp_path)
    said = ("references", "this context shows the student none; remove them, or set model.context to edit-reference "
            "with a family that edits")  # fmt: skip
    held_out = os.path.join("holdout", "metadata.jsonl")
    assert faults(tmp_path, REFUSED) == [("metadata.jsonl", 4, *said), (held_out, 1, *said), (held_out, 2, *said)]


def test_every_row_needs_a_reference_where_the_student_edits_held_out_ones_too(tmp_path):
    listed = make_pairs(tmp_path)
    del listed[1]["references"]
    listed[4]["references"] = []
    os.remove(tmp_path / "before" / "1.png")
    os.remove(tmp_path / "before" / "4.png")
    write_rows(tmp_path, listed)
    make(tmp_path / "holdout", count=1, first=20)
    found = faults(tmp_path, REQUIRED)
    assert [fault[:3] for fault in found] == [
        ("metadata.jsonl", 2, "references"),
        ("metadata.jsonl", 5, "references"),
        ("holdout/metadata.jsonl", 1, "references"),
    ]
    assert {problem for *_, problem in found} == {
        "none given, and the context edit-reference needs them; name at least one picture, for example "
        '"references": ["before.png"]'
    }
    with pytest.raises(DataError):
        check(tmp_path / "holdout", REQUIRED)
    (tmp_path / "holdout" / "metadata.jsonl").unlink()
    (tmp_path / "holdout" / "0.png").unlink()
    (tmp_path / "holdout").rmdir()
    assert {row for _, row, *_ in faults(tmp_path, REQUIRED)} == {2, 5}
    assert len(check(tmp_path, ALLOWED)[0].rows) == 5


def make_texts(folder: Path) -> None:
    make(folder)
    (folder / "metadata.jsonl").unlink()
    for number in range(5):
        (folder / f"{number}.txt").write_text("[V]\n")


def test_text_files_cannot_name_references_and_what_can_is_said(tmp_path):
    make_texts(tmp_path)
    assert len(check(tmp_path, REFUSED)[0].rows) == 5
    found = faults(tmp_path, REQUIRED)
    assert [fault[:3] for fault in found] == [(f"{number}.txt", 1, "references") for number in range(5)]
    assert found[2][3].endswith(
        "a .txt cannot name any: write metadata.jsonl in place of the .txt files, one line a picture: "
        '{"image": "2.png", "caption": "...", "references": ["before.png"]}'
    )


def test_references_that_cannot_be_read_are_not_said_to_be_missing_as_well(tmp_path):
    listed = make_pairs(tmp_path)
    listed[0]["references"] = "before/0.png"
    listed[1]["referneces"] = listed[1].pop("references")
    listed[2]["references"] = ["before/nowhere.png"]
    listed[3]["references"] = ["before/3.png", "../outside.png"]
    write_rows(tmp_path, listed)
    found = [fault for fault in faults(tmp_path, REQUIRED) if fault[1] is not None]
    assert [fault[:3] for fault in found] == [
        ("metadata.jsonl", 1, "references"),
        ("metadata.jsonl", 2, None),
        ("metadata.jsonl", 3, "references"),
        ("metadata.jsonl", 4, "references"),
    ]
    words = ("expected a list", "unknown key referneces", "before/nowhere.png: is missing", "leaves the folder")
    assert all(word in problem for word, (*_, problem) in zip(words, found, strict=True))


# --- what a reference must be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((63, 64), ["before/2.png is 63 x 64 pixels, at least 64 a side are needed; give a larger one"]),
        ((200, 40), ["before/2.png is 200 x 40 pixels, at least 64 a side are needed; give a larger one"]),
        ((64, 513), ["before/2.png is 64 x 513 pixels, longer than 8 : 1; crop it"]),
        ((640, 79), ["before/2.png is 640 x 79 pixels, longer than 8 : 1; crop it"]),
        ((505, 63), ["505 x 63 pixels, at least 64 a side", "505 x 63 pixels, longer than 8 : 1"]),
    ],
)
@pytest.mark.parametrize("needs", [ALLOWED, REQUIRED])
def test_a_reference_that_no_pipeline_takes(tmp_path, size, words, needs):
    settings = SETTINGS.model_copy(update={"max_pixels": 100_000})
    make_pairs(tmp_path)
    picture(102, size).save(tmp_path / "before" / "2.png")
    with pytest.raises(DataError) as caught:
        validate_dataset(tmp_path, "test", settings, needs)
    found = caught.value.faults
    assert {(fault.row, fault.column) for fault in found} == {(3, "references")}
    assert len(found) == len(words)
    assert all(word in fault.problem for word, fault in zip(words, found, strict=True))


@pytest.mark.parametrize("size", [(64, 64), (64, 512), (512, 64), (1600, 200)])
def test_a_reference_exactly_at_the_limits(tmp_path, size):
    settings = SETTINGS.model_copy(update={"max_pixels": 400_000})
    make_pairs(tmp_path)
    picture(102, size).save(tmp_path / "before" / "2.png")
    assert validate_dataset(tmp_path, "test", settings, REQUIRED)[0].rows[2].references


def test_a_reference_must_not_be_the_answer(tmp_path):
    listed = make_pairs(tmp_path)
    picture(2, (80, 80)).save(tmp_path / "2.png")
    (tmp_path / "before" / "2.png").write_bytes((tmp_path / "2.png").read_bytes())
    picture(3, (80, 80)).save(tmp_path / "3.png")
    listed[3]["references"] = ["before/3.png", "3.png"]
    write_rows(tmp_path, listed)
    hold_out(tmp_path)
    truth = tmp_path / "holdout" / "1.png"
    picture(21, (80, 80)).save(truth)
    (tmp_path / "holdout" / "before" / "1.png").write_bytes(truth.read_bytes())
    found = faults(tmp_path, REQUIRED)
    assert [fault[:3] for fault in found] == [
        ("metadata.jsonl", 3, "references"),
        ("metadata.jsonl", 4, "references"),
        ("holdout/metadata.jsonl", 2, "references"),
    ]
    assert all("is the row's own image; the student would be shown the answer" in fault[3] for fault in found)
    assert found[1][3].startswith("3.png ")


def test_before_and_after_of_a_small_edit_are_no_fault(tmp_path):
    """They are near duplicates: only the very same file can be told to be a mistake."""
    make_pairs(tmp_path)
    edited = picture(2, (80, 80))
    edited.save(tmp_path / "before" / "2.png")
    small_edit(edited).save(tmp_path / "2.png")
    check(tmp_path, REQUIRED)


def test_one_pictures_reference_may_be_anothers_and_anothers_target(tmp_path):
    listed = make_pairs(tmp_path)
    picture(0, (80, 80)).save(tmp_path / "0.png")
    listed[1]["references"] = ["before/0.png"]
    listed[2]["references"] = ["0.png", "before/0.png"]
    for number in (1, 2):
        os.remove(tmp_path / "before" / f"{number}.png")
    write_rows(tmp_path, listed)
    assert len(check(tmp_path, REQUIRED)[0].rows[2].references) == 2


def small_edit(image: Image.Image) -> Image.Image:
    """A picture that differs in one corner, and is a near duplicate."""
    edited = image.copy()
    edited.paste((255, 0, 0), (0, 0, 4, 4))
    assert near_duplicates([fingerprint(image), fingerprint(edited)], SETTINGS.near_duplicate_bits)
    return edited


# --- leaks ------------------------------------------------------------------------------------------------------------


def test_a_held_out_truth_must_not_be_a_training_reference_not_even_re_encoded(tmp_path):
    listed = make_pairs(tmp_path)
    hold_out(tmp_path)
    for number in range(2):
        picture(20 + number, (80, 80)).save(tmp_path / "holdout" / f"{number}.png")
    copy = (tmp_path / "holdout" / "0.png").read_bytes()
    (tmp_path / "before" / "3.png").write_bytes(copy)
    picture(21, (96, 96)).save(tmp_path / "before" / "near.jpg", quality=80)
    listed[4]["references"] += ["before/near.jpg"]
    write_rows(tmp_path, listed)
    for needs in (ALLOWED, REQUIRED):
        assert faults(tmp_path, needs) == [
            ("holdout/metadata.jsonl", 1, "image",
             "0.png is held-out truth but a copy of the reference before/3.png of training row 4; remove one"),
            ("holdout/metadata.jsonl", 2, "image",
             "1.png is held-out truth but a copy of the reference before/near.jpg of training row 5; remove one "
             "(or data.allow: [near-duplicates])"),
        ]  # fmt: skip


def test_a_held_out_row_may_start_from_what_a_training_row_starts_from(tmp_path):
    make_pairs(tmp_path)
    hold_out(tmp_path)
    shared = (tmp_path / "before" / "3.png").read_bytes()
    (tmp_path / "holdout" / "before" / "1.png").write_bytes(shared)
    check(tmp_path, REQUIRED)
    # and its truth, a small edit of that, is not taken for a leak, though it looks like the reference of training
    edited = small_edit(picture(103, (64, 80)))
    edited.save(tmp_path / "holdout" / "1.png")
    check(tmp_path, REQUIRED)
    # a copy of the truth that stands behind the shared picture is one all the same
    edited.save(tmp_path / "before" / "4.png", compress_level=1)
    (fault,) = faults(tmp_path, REQUIRED)
    assert fault[:3] == ("holdout/metadata.jsonl", 2, "image")
    assert "copy of the reference before/4.png of training row 5" in fault[3]


def test_a_training_picture_may_be_what_a_held_out_row_starts_from(tmp_path):
    """Harmless: the question is not the answer, and base and tuned model are both shown the question anyway."""
    make_pairs(tmp_path)
    hold_out(tmp_path)
    picture(3, (80, 80)).save(tmp_path / "3.png")
    (tmp_path / "holdout" / "before" / "1.png").write_bytes((tmp_path / "3.png").read_bytes())
    picture(2, (80, 80)).save(tmp_path / "holdout" / "before" / "0.jpg", quality=80)
    names = ("before/0.jpg", "before/1.png")
    (tmp_path / "holdout" / "before" / "0.png").unlink()
    write_rows(tmp_path / "holdout", [row | {"references": [name]} for row, name in zip(rows(2), names, strict=True)])
    _, held_out = check(tmp_path, REQUIRED)
    assert held_out is not None
    assert [row.references[0].name for row in held_out.rows] == ["0.jpg", "1.png"]
    # the truth itself among the training pictures is a leak, whatever the row starts from
    picture(2).save(tmp_path / "holdout" / "1.png")
    (fault,) = faults(tmp_path, REQUIRED)
    assert fault[:3] == ("holdout/metadata.jsonl", 2, "image")
    assert "copy of the training picture 2.png" in fault[3]


# --- the caption that is the teacher's alone --------------------------------------------------------------------------


def with_long(count: int = 5) -> list[dict[str, Any]]:
    return [row | {"captions": {"short": "[V]", "long": f"a long text of [V], {number}"}}
            for number, row in enumerate(rows(count))]  # fmt: skip


def test_every_row_has_a_caption_for_the_teacher_and_one_for_the_student(tmp_path):
    make(tmp_path)
    make(tmp_path / "holdout", count=2, first=20)
    write_rows(tmp_path / "holdout", with_long(2))
    write_rows(tmp_path, with_long())
    table, _ = check(tmp_path, LONG)
    assert table.rows[1].student_captions("long") == ["[V]"]
    assert table.rows[1].caption("long") == "a long text of [V], 1"
    listed = with_long()
    del listed[1]["captions"]["long"]
    del listed[2]["captions"]["short"]
    listed[4] = {"image": "4.png", "caption": "[V]"}
    write_rows(tmp_path, listed)
    write_rows(tmp_path / "holdout", [with_long(2)[0], rows(2)[1]])
    missing = ("there is no 'long', which the teacher reads with model.context enhanced-prompt; write "
               '"captions": {"short": "...", "long": "..."} (model.context_variant)')  # fmt: skip
    assert faults(tmp_path, LONG) == [
        ("metadata.jsonl", 2, "captions", missing),
        ("metadata.jsonl", 3, "captions",
         "there is only 'long', which is the teacher's alone; add a caption for the student"),
        ("metadata.jsonl", 5, "captions", missing),
        ("holdout/metadata.jsonl", 2, "captions", missing),
    ]  # fmt: skip
    check(tmp_path, REFUSED)  # all the same to a teacher that reads what the student reads


def test_text_files_hold_one_caption_and_what_holds_two_is_said(tmp_path):
    make_texts(tmp_path)
    found = faults(tmp_path, LONG)
    assert [fault[:3] for fault in found] == [(f"{number}.txt", 1, "captions") for number in range(5)]
    assert (
        'a .txt holds one caption: write metadata.jsonl in place of the .txt files, there "captions": ' in found[0][3]
    )


def test_captions_that_were_faulty_before_are_not_said_to_lack_a_variant(tmp_path):
    make(tmp_path)
    listed = with_long()
    listed[1]["captions"] = {}
    listed[2]["captions"] = {"short": "[V]", "long": 3}
    listed[3]["captions"]["long"] = ""
    write_rows(tmp_path, listed)
    found = faults(tmp_path, LONG)
    assert [fault[1] for fault in found] == [2, 3, 4]
    assert not any("there is no" in fault[3] for fault in found)


# --- all at once ------------------------------------------------------------------------------------------------------


def test_all_faults_at_once_in_the_rows_order_with_those_of_every_context(tmp_path):
    listed = make_pairs(tmp_path)
    hold_out(tmp_path)
    listed[0]["captions"]["short"] = ""
    del listed[0]["references"]
    os.remove(tmp_path / "before" / "0.png")
    listed[1]["image"] = "nowhere.png"
    os.remove(tmp_path / "1.png")
    picture(101, (20, 20)).save(tmp_path / "before" / "1.png")
    picture(103, (10, 100)).save(tmp_path / "before" / "3.png")
    write_rows(tmp_path, listed)
    picture(4).save(tmp_path / "holdout" / "0.png")
    found = faults(tmp_path, Needs("required", "long"))
    assert [(file, row, column) for file, row, column, _ in found] == [
        ("metadata.jsonl", 1, "captions"),
        ("metadata.jsonl", 1, "references"),
        ("metadata.jsonl", 1, "captions"),
        ("metadata.jsonl", 2, "image"),
        ("metadata.jsonl", 2, "references"),
        ("metadata.jsonl", 2, "captions"),
        ("metadata.jsonl", 3, "captions"),
        ("metadata.jsonl", 4, "references"),
        ("metadata.jsonl", 4, "references"),
        ("metadata.jsonl", 4, "captions"),
        ("metadata.jsonl", 5, "captions"),
        ("holdout/metadata.jsonl", 1, "captions"),
        ("holdout/metadata.jsonl", 2, "captions"),
        ("holdout/metadata.jsonl", 1, "image"),
    ]
    words = [
        "'short' is empty",
        "none given",
        "there is no 'long'",
        "is missing",
        "20 x 20 pixels",
        "there is no 'long'",
    ]
    assert all(word in problem for word, (*_, problem) in zip(words, found, strict=False))
    assert "copy of the training picture 4.png" in found[-1][3]


def test_sound_rows_are_asked_whether_they_would_do_for_another_context(tmp_path):
    listed = make_pairs(tmp_path)
    rows_of = check(tmp_path, REQUIRED)[0].rows
    assert first_unmet(rows_of, REQUIRED) is None
    assert str(first_unmet(rows_of, REFUSED)).startswith("metadata.jsonl, row 1, references: this context shows")
    assert "row 1, captions: there is no 'long'" in str(first_unmet(rows_of, Needs("allowed", "long")))
    del listed[3]["references"]
    os.remove(tmp_path / "before" / "3.png")
    write_rows(tmp_path, listed)
    assert str(first_unmet(check(tmp_path, ALLOWED)[0].rows, REQUIRED)).startswith("metadata.jsonl, row 4, references")


def test_what_the_documentation_tells_to_write_is_sound(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    listed = [json.loads(line) for line in text.splitlines() if line.startswith('{"image"')]
    settings = SETTINGS.model_copy(update={"min_images": 1})
    for part, needs in ((listed[:2], REQUIRED), (listed[2:], LONG)):
        folder = tmp_path / needs.references
        for number, row in enumerate(part):
            for place, name in enumerate((row["image"], *row.get("references", []))):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                picture(10 * number + place, (64, 64)).save(folder / name)
        write_rows(folder, part)
        assert len(validate_dataset(folder, "test", settings, needs)[0].rows) == len(part) > 0


def test_once_a_copy_is_found_no_more_pictures_are_compared(tmp_path, monkeypatch):
    """Each comparison is cheap; one for every training picture and held-out row is not."""
    folder = make(tmp_path)
    make(folder / "holdout")  # the same pictures: row 5's is compared with none after the first that is the same file
    asked: list[int] = []

    def counted(prints, max_bits):
        asked.append(len(prints))
        return near_duplicates(prints, max_bits)

    monkeypatch.setattr("dopsd.data.needs.near_duplicates", counted)
    found = faults(folder, ALLOWED)
    assert [problem for *_, problem in found] == [
        f"{row['image']} is held-out truth but a copy of the training picture {row['image']}; remove one"
        for row in rows(5)
    ]
    assert asked == [10], "all at once, and never again"
