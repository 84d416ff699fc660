"""What people really bring: folders of other tools, other systems' names, captions nearly right."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from concept_folders import SETTINGS, allowing, faults_of, make, picture, rows, texts, write_rows

from dopsd.config.groups import DataSettings
from dopsd.data.captions import save, uncaptioned
from dopsd.data.folders import not_for_training
from dopsd.data.manifest import DataError, concept_files
from dopsd.data.needs import Needs
from dopsd.data.schema import validate_dataset

# --- folders ----------------------------------------------------------------------------------------------------------

HELD_OUT = ["Holdout", "hold-out", "HELD_OUT", "holdouts", "val", "Valid", "validation", "val_images", "test", "Tests",
            "test-set", "eval", "5_test", "deep/holdout"]  # fmt: skip
REGULARISATION = ["reg", "Reg_Images", "regularization", "regularisation-images", "class_images", "reg/1_animal"]


def _says_why(name: str, problem: str, files: int) -> bool:
    """Whether a fault tells how many files a folder of that name holds, what the name says, and what to do."""
    return (
        problem.startswith(f"{files} files that would be trained on")
        and ("holdout/" in problem) == (name in HELD_OUT)
        and ("train.replay.prompts" in problem) == (name in REGULARISATION)
        and "data.allow: [folder-names]" in problem
    )


@pytest.mark.parametrize("name", [*HELD_OUT, *REGULARISATION])
@pytest.mark.parametrize("captions", [True, False])
def test_a_name_that_says_it_is_not_for_training_is_known(name, captions):
    files = [f"{name}/{i}.{suffix}" for i in range(3) for suffix in (("png", "txt") if captions else ("png",))]
    found, inside = not_for_training(["0.png", "0.txt", *files])
    ((folder, problem),) = found.items()
    assert (folder, inside) == (name.removesuffix("/1_animal"), set(files))
    assert _says_why(name, problem, len(files))


@pytest.mark.parametrize(
    ("name", "captions"), [("HELD_OUT", True), ("deep/holdout", False), ("class_images", False), ("reg/1_animal", True)]
)
def test_a_folder_that_says_it_is_not_for_training_is_one_fault(tmp_path, name, captions):
    """One that names the folder, how many files, and what to do: pictures there need no captions for it."""
    folder = texts(tmp_path / "data")
    texts(folder / name, count=3, first=10)
    if not captions:
        for text in (folder / name).glob("*.txt"):
            text.unlink()
    ((file, row, _, problem),) = faults_of(folder)
    assert (file, row) == (name.removesuffix("/1_animal"), None)
    assert _says_why(name, problem, 6 if captions else 3)
    assert "would be trained on" in _refused(lambda: uncaptioned(folder))
    if captions:
        assert len(validate_dataset(folder, "test", allowing("folder-names"))[0].rows) == 7
        assert uncaptioned(folder, any_folder=True)[1] == 7


def _refused(call) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["train", "10_fox", "animals", "protest", "class", "valentine", "regina", "images/tests-of-courage"]
)
def test_other_folders_are_training_data_and_are_counted(tmp_path, name):
    folder = texts(tmp_path / "data", count=2)
    texts(folder / name, count=3, first=10)
    texts(folder / "holdout" / "val", count=1, first=20)  # what is held out is so whatever is in it
    table, held_out = validate_dataset(folder, "test", SETTINGS)
    assert held_out is not None
    assert table.folders() == {".": 2, name: 3}
    assert held_out.folders() == {"val": 1}
    assert [str(warning) for warning in table.warnings if "its name" in str(warning)] == (
        [f"{folder}/10_fox: each of its pictures counts 10 times as its name says, as with kohya's tools; rename the "
         "folder if that is not meant"]
        if name == "10_fox" else []
    )  # fmt: skip


def test_a_manifest_that_trains_on_another_split_is_refused(tmp_path):
    folder = make(tmp_path)
    (folder / "test").mkdir()
    picture(9).save(folder / "test/0.png")
    write_rows(folder, [*rows(), {"image": "test/0.png", "caption": "[V] there"}])
    assert [fault[0] for fault in faults_of(folder)] == ["test"]


LEFTOVERS = ["Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini", ".DS_Store", "._0.png", "__MACOSX/._0.png",
             "__MACOSX/0.png", "@eaDir/0.png/THUMB.jpg", "Icon\r", "ehthumbs.db", "sub/Thumbs.db"]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "texts"])
def test_what_systems_leave_behind_is_no_part_of_the_data(tmp_path, kind):
    folder = make(tmp_path) if kind == "jsonl" else texts(tmp_path)
    before, hashed = concept_files(folder), validate_dataset(folder, "test", SETTINGS)[0].content_hash
    for name in LEFTOVERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert validate_dataset(folder, "test", SETTINGS)[0].content_hash == hashed
    assert concept_files(folder) == before
    assert uncaptioned(folder)[1] == (len(before) - 1 if kind == "jsonl" else len(before) // 2)


# --- names ------------------------------------------------------------------------------------------------------------

COMPOSED, SPLIT = (unicodedata.normalize(form, "Käse é ガ") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("written", "stored"), [(COMPOSED, SPLIT), (SPLIT, COMPOSED), (COMPOSED, COMPOSED)])
def test_two_spellings_of_one_name_match(tmp_path, written, stored):
    folder = make(tmp_path / "jsonl")
    (folder / stored).mkdir()
    (folder / "2.png").unlink()
    picture(2, (64, 64)).save(folder / stored / f"{stored}.png")  # large enough to be a reference
    shutil.copy(folder / stored / f"{stored}.png", tmp_path)
    listed = rows()
    listed[2]["image"] = f"{written}/{written}.png"
    listed[3]["references"] = [f"{written}/{written}.png"]
    write_rows(folder, listed)
    table = validate_dataset(folder, "test", SETTINGS)[0]
    assert table.rows[2].image == folder / stored / f"{stored}.png"
    assert table.rows[3].references == (folder / stored / f"{stored}.png",)
    # a caption that is written there goes into the row that there is
    del listed[3]["references"]
    write_rows(folder, listed)
    ones = [one for one in uncaptioned(folder, redo=True)[0] if one.image.endswith(f"{stored}.png")]
    assert [one.path.is_file() for one in ones] == [True]
    assert save(ones[0], {"short": "new [V]"}, redo=True)
    assert [json.loads(line)["image"] for line in (folder / "metadata.jsonl").read_text().splitlines()] == [
        row["image"] for row in listed
    ]

    beside = texts(tmp_path / "texts", count=3)
    picture(9).save(beside / f"{stored}.png")
    (beside / f"{written}.txt").write_text("a fox in [V] style")
    assert len(validate_dataset(beside, "test", SETTINGS)[0].rows) == 4


def test_two_files_of_one_name_in_two_spellings_are_each_their_own(tmp_path):
    folder = make(tmp_path)
    for name, old in ((COMPOSED, "2.png"), (SPLIT, "3.png")):
        (folder / old).rename(folder / f"{name}.png")
    listed = rows()
    listed[2]["image"], listed[3]["image"] = f"{COMPOSED}.png", f"{SPLIT}.png"
    write_rows(folder, listed)
    images = [row.image.name for row in validate_dataset(folder, "test", SETTINGS)[0].rows]
    assert images[2:4] == [f"{COMPOSED}.png", f"{SPLIT}.png"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sub\\2.png", "sub\\2.png: folders are parted by back-slashes; write sub/2.png"),
        (".\\sub\\2.png", "write ./sub/2.png"),
        ("C:\\pictures\\2.png", "write a path inside the folder, with /"),
        ("..\\2.png", "write a path inside the folder, with /"),
    ],
)
def test_a_path_with_back_slashes_is_named_as_that(tmp_path, name, words):
    folder = make(tmp_path)
    listed = rows()
    if "sub" in name:
        (folder / "sub").mkdir()
        (folder / "2.png").rename(folder / "sub/2.png")
    else:
        (folder / "2.png").unlink()
    listed[2]["image"] = name
    write_rows(folder, listed)
    ((file, row, column, problem),) = faults_of(folder)
    assert (file, row, column) == ("metadata.jsonl", 3, "image")
    assert words in problem
    (folder / "sub\\2.png").write_bytes(b"")  # where that is the file's name, it is
    listed[2]["image"] = "sub\\2.png"
    write_rows(folder, listed)
    assert any("sub\\2.png: is empty" in problem for *_, problem in faults_of(folder))


# --- captions ---------------------------------------------------------------------------------------------------------

NEAR = {
    "a fox in [v] style": ("[v]", "small or large"),
    "a fox in [ V ] style": ("[ V ]", "a blank inside"),
    "a fox in [V\u00a0] style": ("a blank inside",),
    "a fox in ［V］ style": ("［V］", "other characters"),
    "a fox in 【V】 style": ("【V】", "other characters"),
    "a fox in [Ｖ] style": ("[Ｖ]", "other characters"),
    "a fox in \\[V\\] style": ("is escaped",),
    "a fox in [V\\] style": ("is escaped",),
}


def test_every_caption_without_the_placeholder_is_named(tmp_path):
    folder = make(tmp_path)
    listed = rows()
    for row in listed[1:]:
        row["captions"]["medium"] = "a fox"
    write_rows(folder, listed)
    found = faults_of(folder)
    assert [fault[:3] for fault in found] == [("metadata.jsonl", number, "captions") for number in (2, 3, 4, 5)]
    assert all("'medium' does not hold the placeholder [V]" in fault[3] for fault in found)
    assert all("data.allow: [captions-without-placeholder]" in fault[3] for fault in found)
    table = validate_dataset(folder, "test", allowing("captions-without-placeholder"))[0]
    assert len(table.rows) == 5
    assert not table.warnings
    write_rows(folder, [{"image": f"{i}.png", "caption": "a fox"} for i in range(5)])
    assert len(validate_dataset(folder, "test", allowing("captions-without-placeholder"))[0].rows) == 5


@pytest.mark.parametrize("others", ["a fox in [V] style", "a fox"])
def test_near_misses_are_named_as_what_they_are(tmp_path, others):
    captions = [*NEAR, others, others]
    folder = make(tmp_path, count=len(captions))
    listed = [{"image": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    write_rows(folder, listed)
    found = {row: problem for _, row, _, problem in faults_of(folder)}
    near = list(range(1, len(NEAR) + 1))
    assert list(found) == near + ([] if "[V]" in others else [len(captions) - 1, len(captions)])
    for row, said in zip(near, NEAR.values(), strict=True):
        for words in (*said, "in place of the placeholder; write [V]"):
            assert words in found[row], captions[row - 1]
    # who allows captions without it is told all the same
    warnings = validate_dataset(folder, "test", allowing("captions-without-placeholder"))[0].warnings
    assert [(warning.row, warning.problem) for warning in warnings] == [(row, found[row]) for row in near]
    # nor is it right in what is held out, whose captions need none
    write_rows(folder, rows(len(captions)))
    make(folder / "holdout", count=len(captions), first=20)
    write_rows(folder / "holdout", listed)
    with pytest.raises(DataError) as caught:
        validate_dataset(folder, "test", SETTINGS)
    assert [fault.row for fault in caught.value.faults] == near


@pytest.mark.parametrize("caption", ["a sks fox", "desk still life", "SKS fox", "a ｓｋｓ fox"])
def test_a_placeholder_that_is_a_word(tmp_path, caption):
    folder = make(tmp_path)
    write_rows(folder, [{"image": f"{i}.png", "caption": caption if i == 2 else "a sks cat"} for i in range(5)])
    settings = SETTINGS.model_copy(update={"placeholder": "sks"})
    if "sks" in caption:
        assert validate_dataset(folder, "test", settings)[0].rows
        return
    ((*_, problem),) = faults_of(folder, settings)
    assert ("does not hold" in problem) == (caption == "desk still life")


def test_the_teachers_own_caption_needs_no_placeholder(tmp_path):
    folder = make(tmp_path)
    write_rows(folder, [{"image": f"{i}.png", "captions": {"a": "[V] fox", "long": "a red fox"}} for i in range(5)])
    validate_dataset(folder, "test", SETTINGS, Needs(teacher_variant="long"))
    with pytest.raises(DataError, match="'long' does not hold the placeholder"):
        validate_dataset(folder, "test", SETTINGS)


@pytest.mark.parametrize("caption", ["[V]", " [V].", "[V] "])
def test_a_caption_that_is_nothing_else_is_a_warning(tmp_path, caption):
    folder = make(tmp_path)
    write_rows(folder, [{**rows()[0], "captions": {"short": caption}}, *rows()[1:]])
    (warning,) = validate_dataset(folder, "test", SETTINGS)[0].warnings
    assert (warning.row, warning.column) == (1, "captions")
    assert warning.problem == "'short' is [V] and nothing else; say what the picture shows"


# --- judgements of taste ----------------------------------------------------------------------------------------------


def _copy(folder: Path) -> None:
    shutil.copy(folder / "0.png", folder / "2.png")


TASTE = {
    "copies": _copy,
    "near-duplicates": lambda folder: picture(0, (90, 90)).save(folder / "2.png"),
    "long-pictures": lambda folder: picture(2, (170, 40)).save(folder / "2.png"),
    "small-pictures": lambda folder: picture(2, (8, 8)).save(folder / "2.png"),
}


@pytest.mark.parametrize("word", TASTE)
def test_a_judgement_of_taste_says_the_word_that_allows_it(tmp_path, word):
    folder = make(tmp_path)
    TASTE[word](folder)
    ((*_, problem),) = faults_of(folder)
    assert problem.endswith(f"(or data.allow: [{word}])")
    assert len(validate_dataset(folder, "test", allowing(word))[0].rows) == 5
    others = allowing(*(set(TASTE) - {word}))
    assert [fault[3] for fault in faults_of(folder, others)] == [problem]


def test_what_is_like_the_held_out_truth_can_be_allowed_and_a_copy_of_it_cannot(tmp_path):
    folder = make(tmp_path)
    make(folder / "holdout", count=1, first=20)
    picture(20, (90, 90)).save(folder / "2.png")
    with pytest.raises(DataError, match=r"held-out truth but a copy .* \(or data.allow: \[near-duplicates\]\)"):
        validate_dataset(folder, "test", SETTINGS)
    held_out = validate_dataset(folder, "test", allowing("near-duplicates"))[1]
    assert held_out is not None
    assert ["training picture 2.png" in str(warning) for warning in held_out.warnings] == [True]
    picture(20).save(folder / "3.png")  # behind one that is only like it
    with pytest.raises(DataError, match=r"a copy of the training picture 3.png; remove one$"):
        validate_dataset(folder, "test", allowing("near-duplicates", "copies"))


def test_a_word_that_allows_nothing_is_a_fault_of_the_settings():
    with pytest.raises(ValueError, match="near-duplicates"):
        DataSettings(resolution=32, allow=("near-duplicate",))  # type: ignore[arg-type]
