"""Folders as other tools have them, read as they are: each written the way that tool's own pages write it."""

from __future__ import annotations

import json
import shutil
from pathlib import PureWindowsPath

import pandas as pd
import pytest
from concept_folders import SETTINGS, allowing, faults_of, make, picture, texts, write_rows
from foreign_folders import CAPTIONS, EXPECTED, pictures, read

from dopsd.data.captions import save, uncaptioned
from dopsd.data.manifest import DataError
from dopsd.data.needs import Needs
from dopsd.data.schema import validate_dataset

# --- Hugging Face: https://huggingface.co/docs/datasets/image_dataset#imagefolder -------------------------------------


@pytest.mark.parametrize("caption", ["text", "caption", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("key", ["file_name", "image_file_name"])
def test_a_hugging_face_image_folder(tmp_path, kind, caption, key):
    folder = pictures(tmp_path)
    listed = [{key: f"{i}.png", caption: CAPTIONS[i], "width": 64, "id": f"n{i}"} for i in range(5)]
    if kind == "jsonl":
        write_rows(folder, listed)
    else:
        getattr(pd.DataFrame(listed), {"csv": "to_csv", "parquet": "to_parquet"}[kind])(
            folder / f"metadata.{kind}", index=False
        )
    assert read(folder) == (EXPECTED, f"Hugging Face image folder (metadata.{kind}), ignored columns: width, id")


def test_its_table_may_lie_in_a_split_beside_its_pictures(tmp_path):
    write_rows(pictures(tmp_path / "train"), [{"file_name": f"{i}.png", "text": CAPTIONS[i]} for i in range(5)])
    assert read(tmp_path)[0] == [(f"train/{name}", text) for name, text in EXPECTED]


def test_two_columns_of_captions_are_one_fault(tmp_path):
    write_rows(pictures(tmp_path), [{"file_name": f"{i}.png", "text": "[V]", "prompt": "[V]"} for i in range(5)])
    assert faults_of(tmp_path) == [
        ("metadata.jsonl", None, None, "text and prompt are captions, each of them; keep one")
    ]


@pytest.mark.parametrize("key", ["file_name", "image_path", "local_path_list"])
def test_rows_of_other_tools_may_hold_this_projects_words(tmp_path, key):
    pictures(tmp_path)
    pictures(tmp_path / "before", 2, first=20)
    own = {"captions": {"short": "[V]", "long": "a [V]"}, "references": ["/home/me/before/1.png", "before/0.png"]}
    write_rows(tmp_path, [{key: f"{i}.png", "repeats": 1 + i % 2, "label": 3, **own} for i in range(5)])
    table = validate_dataset(tmp_path, "test", SETTINGS)[0]
    assert table.read_as.endswith("(metadata.jsonl), ignored columns: label")
    assert {row.captions for row in table.rows} == {(("short", "[V]"), ("long", "a [V]"))}
    assert {row.references for row in table.rows} == {(tmp_path / "before/1.png", tmp_path / "before/0.png")}
    assert [row.repeats for row in table.rows] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file_name": "0.png", "text": "[V]", "captions": {"a": "[V]"}}, "text and captions are captions, each of"),
        ({"image_path": "0.png", "caption": "[V]", "captions": {"a": "[V]"}}, "caption and captions are captions, ea"),
        ({"local_path_list": "0.png", "a_en": "[V]", "b_zh": "[V]", "caption": "[V]"}, "a_en, b_zh and caption are ca"),
        ({"image_path": "0.png", "caption": "[V]", "references": ["1.png"], "control_path": "1.png"},
         "references and control_path name pictures to edit; keep one"),
        ({"file_name": "0.png", "captions": ["[V]", "a [V]"]}, 'expected {"short": "...", ...}, found a list'),
        ({"file_name": "0.png", "text": "[V]", "references": "1.png"}, "expected a list of paths, found a text"),
    ],
)  # fmt: skip
def test_of_words_that_say_the_same_none_is_left_aside(tmp_path, row, said):
    write_rows(pictures(tmp_path, 2), [row])
    assert any(problem.startswith(said) for *_, problem in faults_of(tmp_path))


def test_rows_in_two_tools_words_are_one_fault(tmp_path):
    keys = ("image", "file_name", "image_path")
    write_rows(pictures(tmp_path), [{keys[i % 3]: f"{i}.png", "caption": "[V]"} for i in range(5)])
    ((*_, problem),) = faults_of(tmp_path)
    assert problem == "image, file_name and image_path name the picture, each of them; keep one"


def test_what_a_row_of_another_tool_lacks_is_a_fault_of_the_row(tmp_path):
    listed = [{"file_name": f"{i}.png", "text": CAPTIONS[i]} for i in range(5)]
    del listed[1]["text"]
    listed[3]["text"] = None
    listed[4]["file_name"] = "nowhere.png"
    write_rows(pictures(tmp_path, 4), listed)
    assert [(row, column) for _, row, column, _ in faults_of(tmp_path)] == [
        (2, "captions"),
        (4, "captions"),
        (5, "image"),
    ]


# --- kohya's sd-scripts, and musubi-tuner -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["{}.txt", "{}.caption", "{}.CAPTION", "{}.png.txt", "{}.png.caption"])
def test_captions_beside_pictures(tmp_path, name):
    for i in range(5):
        (pictures(tmp_path) / name.format(i)).write_text(f"{CAPTIONS[i]}\n")
    assert read(tmp_path) == (EXPECTED, f"captions beside pictures ({name.format(0)}, ...)")
    # and `concept caption` writes the one that is missing as the others are called
    (tmp_path / name.format(3)).unlink()
    (one,), _ = uncaptioned(tmp_path)
    assert name.format(3) in faults_of(tmp_path)[0][3]
    assert save(one, {"medium": CAPTIONS[3]})
    assert read(tmp_path)[0] == EXPECTED


def test_a_text_of_the_whole_name_belongs_to_that_picture_alone(tmp_path):
    pictures(tmp_path)
    shutil.move(tmp_path / "4.png", tmp_path / "0.jpg")
    for name, i in (("0.png", 0), ("0.jpg", 4), ("1.png", 1), ("2.png", 2), ("3.png", 3)):
        (tmp_path / f"{name}.txt").write_text(CAPTIONS[i])
    assert dict(read(tmp_path)[0])["0.jpg"] == CAPTIONS[4]
    (tmp_path / "0.txt").write_text("[V]")
    assert {(file, problem) for file, *_, problem in faults_of(tmp_path)} == {
        ("0.jpg.txt", "0.txt is there too; keep one caption file"),
        ("0.png.txt", "0.txt is there too; keep one caption file"),
    }


def test_two_layouts_at_once_are_one_fault_that_names_both(tmp_path):
    texts(tmp_path)
    (tmp_path / "2.caption").write_text("a fox")  # kohya's captions, beside its tagger's words
    assert "more than one way (0.txt, 2.caption)" in faults_of(tmp_path)[0][3]
    (tmp_path / "2.caption").unlink()
    write_rows(tmp_path, [{"file_name": "0.png", "text": "[V]"}])
    ((*_, problem),) = faults_of(tmp_path)
    assert "more than one way (metadata.jsonl, 0.txt); keep only one" in problem


def kohya_repeats(name: str) -> int:
    """As sd-scripts have it (``config_util.py``): the number before the first ``_`` of a folder's name."""
    try:
        return int(name.split("_")[0])
    except ValueError:
        return 0


@pytest.mark.parametrize("names", [("10_fox", "5_owl"), ("1_a b", "3_c_4_d"), ("010_fox", "4_x")])
def test_kohyas_folders_say_how_often_their_pictures_are_drawn(tmp_path, names):
    for first, name in zip((0, 10), names, strict=True):
        texts(tmp_path / "img" / name, count=3, first=first)
    table = validate_dataset(tmp_path, "test", SETTINGS)[0]
    wanted = [kohya_repeats(row.image.parent.name) for row in table.rows]
    assert [row.repeats * wanted[0] for row in table.rows] == [times * table.rows[0].repeats for times in wanted]
    assert [str(tmp_path / "img" / name) for name in sorted(names)] == sorted(w.file for w in table.warnings)
    assert all("times as its name says, as with kohya's tools" in warning.problem for warning in table.warnings)


def test_a_year_is_no_number_of_repeats(tmp_path):
    texts(tmp_path / "2024_holidays", count=2)
    texts(tmp_path / "5_fox", count=2, first=10)
    assert [row.repeats for row in validate_dataset(tmp_path, "test", SETTINGS)[0].rows] == [1, 1, 5, 5]


def test_repeats_that_are_the_same_for_all_repeat_nothing(tmp_path):
    plain = validate_dataset(texts(tmp_path / "plain"), "test", SETTINGS)[0]
    for name in ("10_fox", "2024_holidays", "fox_10", "10"):
        table = validate_dataset(texts(tmp_path / name / name).parent, "test", SETTINGS)[0]
        assert (table.content_hash, table.warnings) == (plain.content_hash, ()), name
    shutil.rmtree(tmp_path / "10_fox/10_fox")
    texts(tmp_path / "10_fox/0_fox")
    assert [(f[0], f[3][:27]) for f in faults_of(tmp_path / "10_fox")] == [("0_fox", "its name says 0 repeats, wh")]


def test_repeats_are_a_field_of_a_row_and_part_of_what_the_data_are(tmp_path):
    folder = make(tmp_path)
    before = validate_dataset(folder, "test", SETTINGS)[0].content_hash
    listed = [{"image": f"{i}.png", "caption": CAPTIONS[i]} for i in range(5)]

    def repeated(*times: int) -> str:
        write_rows(folder, [row | {"repeats": n} for row, n in zip(listed, times, strict=True)])
        return validate_dataset(folder, "test", SETTINGS)[0].content_hash

    write_rows(folder, listed)
    plain = validate_dataset(folder, "test", SETTINGS)[0].content_hash
    assert plain != before
    assert repeated(1, 1, 1, 1, 1) == repeated(4, 4, 4, 4, 4) == plain
    assert repeated(2, 1, 1, 1, 1) == repeated(4, 2, 2, 2, 2)
    assert len({plain, repeated(2, 1, 1, 1, 1), repeated(1, 2, 1, 1, 1), repeated(3, 1, 1, 1, 1)}) == 4
    # a row says it before its folder does
    (folder / "10_fox").mkdir()
    shutil.move(folder / "0.png", folder / "10_fox/0.png")
    listed[0]["image"] = "10_fox/0.png"
    assert repeated(3, 1, 1, 1, 1) != plain
    write_rows(folder, listed)
    assert [row.repeats for row in validate_dataset(folder, "test", SETTINGS)[0].rows] == [10, 1, 1, 1, 1]
    repeated(3, 1, 1, 1, 1)
    assert [row.repeats for row in validate_dataset(folder, "test", SETTINGS)[0].rows] == [3, 1, 1, 1, 1]


@pytest.mark.parametrize("path", ["{}", "./{}", ".//{}"])
@pytest.mark.parametrize("key", ["image", "file_name"])
def test_a_folder_says_repeats_however_a_row_writes_its_path(tmp_path, path, key):
    for place, first in (("10_fox", 0), ("1_dog", 10)):
        pictures(tmp_path / place, 2, first=first)
    places = [f"{place}/{i}.png" for place in ("10_fox", "1_dog") for i in range(2)]
    write_rows(tmp_path, [{key: path.format(place), "caption": "a [V]"} for place in places])
    assert [row.repeats for row in validate_dataset(tmp_path, "test", SETTINGS)[0].rows] == [10, 10, 1, 1]


@pytest.mark.parametrize("times", [0, -1, 1000, 2.5, True, "two", [2], "1e400"])
def test_repeats_that_are_no_whole_number_are_a_fault(tmp_path, times):
    write_rows(make(tmp_path), [{"image": f"{i}.png", "caption": CAPTIONS[i], "repeats": times} for i in range(5)])
    assert [fault[:3] for fault in faults_of(tmp_path)] == [("metadata.jsonl", i + 1, "repeats") for i in range(5)]


def test_musubis_list_with_paths_of_another_machine(tmp_path):
    """https://github.com/kohya-ss/musubi-tuner, docs/dataset_config.md: image_jsonl_file, control_path."""
    folder = pictures(tmp_path / "img").parent
    pictures(tmp_path / "before", 3, first=20)
    lines = [
        {"image_path": "/home/other/set/img/0.png", "caption": CAPTIONS[0], "control_path": "/home/other/before/0.png"},
        {"image_path": str(PureWindowsPath(r"D:\set\img\1.png")), "caption": CAPTIONS[1], "control_path_1": "2.png",
         "control_path_0": "../before/1.png"},
        {"image_path": "./img/2.png", "caption": CAPTIONS[2]},
        {"image_path": str(folder / "img" / "3.png"), "caption": CAPTIONS[3]},
        {"image_path": "4.png", "caption": CAPTIONS[4], "fp_latent_window_size": 9},
    ]  # fmt: skip
    shutil.move(folder / "before/2.png", folder / "2.png")
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = validate_dataset(folder, "test", SETTINGS, Needs())[0]
    assert read(folder) == (
        [(f"img/{name}", text) for name, text in EXPECTED],
        "musubi list (list.jsonl), ignored columns: fp_latent_window_size",
    )
    references = [[path.relative_to(folder).as_posix() for path in row.references] for row in table.rows[:3]]
    assert references == [["before/0.png"], ["before/1.png", "2.png"], []]


def test_a_foreign_path_means_the_nearest_file_and_never_one_of_several(tmp_path):
    for seed, place in enumerate(("list/a", "a", "b", "c")):
        pictures(tmp_path / place, 1, first=seed)
    lines = [
        {"image_path": "a/0.png", "control_path_10": "b/0.png", "control_path_2": "c/0.png"},
        {"image_path": "../a/0.png"},
        {"image_path": "b/0.png"},
        {"image_path": "/old/c/0.png"},
        {"image_path": "/old/d/0.png"},
    ]
    path = tmp_path / "list" / "all.jsonl"

    def write(count: int) -> None:
        path.write_text("".join(json.dumps(line | {"caption": "a [V]"}) + "\n" for line in lines[:count]))

    write(4)
    table = validate_dataset(tmp_path, "test", SETTINGS)[0]
    assert [row.image.parent.relative_to(tmp_path).as_posix() for row in table.rows] == ["list/a", "a", "b", "c"]
    assert [reference.parent.name for reference in table.rows[0].references] == ["c", "b"]
    write(5)
    ((file, row, _, problem),) = faults_of(tmp_path)
    assert (file, row, problem[:17]) == ("list/all.jsonl", 5, "0.png: is missing")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../etc/passwd", "/home/x/nowhere.png", "C:\\x\\nowhere.png", "..", "/"]
)
def test_a_foreign_path_never_means_a_file_outside(tmp_path, path):
    folder = pictures(tmp_path / "data")
    picture(9).save(tmp_path / "passwd", "PNG")
    listed = [{"image_path": f"{i}.png", "caption": CAPTIONS[i]} for i in range(5)]
    write_rows(folder, [*listed, {"image_path": path, "caption": "[V]"}])
    assert [fault[:3] for fault in faults_of(folder)] == [("metadata.jsonl", 6, "image")]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("holdout/4.png", "holdout/4.png: is held-out truth"),
        ("./x/../holdout/4.png", "holdout/4.png: is held-out truth"),
        (r"holdout\4.png", "holdout/4.png: is held-out truth"),
        ("/home/me/set/holdout/4.png", "holdout/4.png: is held-out truth"),
        (r"D:\set\Holdout\4.png", "Holdout/4.png: is missing"),
        ("/home/holdout/set/holdout/4.png", "holdout/4.png: is held-out truth"),
        ("../set/holdout/sub/4.png", "holdout/sub/4.png: is held-out truth"),
        ("c/4.png", "c/4.png: is missing"),
        ("./c/d/4.png", "c/d/4.png: is missing"),
        ("../c/4.png", None),
        ("/old/c/4.png", None),
    ],
)
@pytest.mark.parametrize("key", ["file_name", "image_path"])
def test_a_foreign_path_means_no_other_picture_than_it_names(tmp_path, path, said, key):
    """4.png at the top is another picture than that of holdout/ and that of c/, which is not here."""
    for place, first in ((tmp_path, 0), (tmp_path / "holdout", 20)):
        listed = [{key: f"{i}.png", "caption": CAPTIONS[i]} for i in range(5)]
        write_rows(pictures(place, first=first), listed)
    assert read(tmp_path)[0] == EXPECTED
    listed[4][key] = path
    write_rows(tmp_path, listed)
    if said is None:  # another machine's: what it ends with
        assert read(tmp_path)[0] == EXPECTED
        return
    found = [(row, problem) for _, row, column, problem in faults_of(tmp_path) if column == "image"]
    assert len(found) == 1
    assert found[0][0] == 5
    assert found[0][1].startswith(said)


@pytest.mark.parametrize("path", ["holdout/{}", "/home/me/set/holdout/{}", r"D:\set\holdout\{}", "{}", "./{}"])
def test_paths_of_held_out_rows_may_be_written_from_the_top(tmp_path, path):
    write_rows(pictures(tmp_path), [{"file_name": f"{i}.png", "text": CAPTIONS[i]} for i in range(5)])
    listed = [{"file_name": path.format(f"{i}.png"), "text": CAPTIONS[i]} for i in range(2)]
    write_rows(pictures(tmp_path / "holdout", 2, first=20), listed)
    held_out = validate_dataset(tmp_path, "test", SETTINGS)[1]
    assert held_out is not None
    assert [row.image for row in held_out.rows] == [tmp_path / "holdout" / f"{i}.png" for i in range(2)]
    # of a data set that is called so itself, holdout/ is its own
    top = pictures(tmp_path / "data" / "holdout")
    write_rows(pictures(top / "holdout", 2, first=20), listed)
    rows = [{"file_name": f"{i}.png", "text": CAPTIONS[i]} for i in range(4)]
    write_rows(top, [*rows, {"file_name": path.format("4.png"), "text": "[V]"}])
    if "holdout" in path:
        assert any("holdout/4.png: is held-out truth" in problem for *_, problem in faults_of(top))
    else:
        assert len(validate_dataset(top, "test", SETTINGS)[0].rows) == 5


@pytest.mark.parametrize("path", ["../c/0.png", "c/0.png", "../holdout/0.png"])
def test_a_path_from_a_tables_own_folder_means_no_other_picture_either(tmp_path, path):
    """One that stays inside is as it is written."""
    pictures(tmp_path)
    (tmp_path / "list").mkdir()
    listed = [{"file_name": f"{i}.png", "text": CAPTIONS[i]} for i in range(1, 5)]
    write_rows(tmp_path / "list", [*listed, {"file_name": path, "text": "[V]"}])
    found = [(row, problem) for _, row, column, problem in faults_of(tmp_path) if column == "image"]
    expected = "is held-out truth" if "holdout" in path else "is missing"
    assert [(row, problem.partition(";")[0].partition(" and ")[0]) for row, problem in found] == [
        (5, f"{path.removeprefix('../')}: {expected}")
    ]


# --- the paper's own --------------------------------------------------------------------------------------------------


def test_the_papers_list(tmp_path):
    """docs/method.md: 8 captions a picture, short, medium, detailed and the user's, in two languages."""
    folder = pictures(tmp_path / "dog")
    variants = [
        f"{kind}_{language}" for kind in ("short", "medium", "detailed", "user_prompt") for language in ("en", "zh")
    ]
    lines = [
        {"local_path_list": [f"/data/users/me/dog/{i}.png"], "class_name": "dog",
         **{name: f"{name} {i}, [V] 在草地上" for name in variants}}
        for i in range(5)
    ]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    table = validate_dataset(tmp_path, "test", SETTINGS)[0]
    assert table.read_as == "D-OPSD list (data.jsonl), ignored columns: class_name"
    assert [row.image for row in table.rows] == [folder / f"{i}.png" for i in range(5)]
    assert table.rows[2].captions == tuple((name, f"{name} 2, [V] 在草地上") for name in variants)
    lines[1]["local_path_list"].append("/data/users/me/dog/2.png")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ("data.jsonl", 2, "image") in [fault[:3] for fault in faults_of(tmp_path)]


# --- captions without the placeholder ---------------------------------------------------------------------------------


def test_the_refusal_says_how_foreign_captions_get_the_placeholder(tmp_path):
    folder = texts(tmp_path, caption="a photo of ohwx dog in the park")
    (folder / "1.txt").write_text("ohwx dog, a photo")
    ((*_, problem),) = faults_of(folder)
    assert "--trigger dog (every caption has dog, ohwx, photo) writes it" in problem
    assert '--wording "{} in [V] style" puts that around' in problem
    assert problem.endswith("(or data.allow: [captions-without-placeholder])")
    (folder / "2.txt").write_text("of the")
    assert "--trigger WORD writes it" in faults_of(folder)[0][3]
    assert len(validate_dataset(folder, "test", allowing("captions-without-placeholder"))[0].rows) == 4


@pytest.mark.parametrize("listed", [[{"file_name": "0.png", "text": ""}], None])
def test_captions_are_not_written_into_another_tools_table(tmp_path, listed):
    folder = pictures(tmp_path)
    if listed:
        write_rows(folder, listed)
    else:
        (folder / "metadata.csv").write_text("file_name,text\n0.png,\n")
    with pytest.raises(DataError, match="captions are not written into this table; write them there yourself"):
        uncaptioned(folder)
