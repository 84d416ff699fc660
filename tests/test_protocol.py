"""The published evaluation's prompts: written beside the data, edited by a person, read with every check."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dopsd import cli
from dopsd.captioning import naming_for
from dopsd.config.groups import DataSettings
from dopsd.data.manifest import PROTOCOL, ConceptTable, DataError
from dopsd.data.schema import validate_dataset
from dopsd.data.wording import naming_of
from dopsd.evaluation.protocol import (
    by_vlm,
    class_of,
    from_template,
    published_prompts,
    seed_of,
    text_for_clip,
    write_protocol,
)  # fmt: skip
from tests.concept_folders import SETTINGS, make, rows, write_rows
from tests.model_folders import one_line
from tests.speaking import write_speaking_vlm
from tests.tiny_project import make_project

CONCEPTS = Path(__file__).parent.parent / "data" / "concepts"
STYLE, WOLF = naming_of("style", None, "[V]"), naming_of("subject", "a wolf", "[V]")


@pytest.fixture
def table(tmp_path: Path) -> ConceptTable:
    folder = make(tmp_path / "mine")
    write_rows(folder, rows())
    return validate_dataset(folder, "mine", SETTINGS)[0]


def written(table: ConceptTable) -> Path:
    write_protocol(table, STYLE, None, 10_000, None)
    return table.root / PROTOCOL


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["style-ink", "subject-wolf"])
def test_of_the_shipped_concepts_every_prompt_asks_for_the_concept(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CONCEPTS / name, tmp_path / name))
    before, _ = validate_dataset(folder, name, DataSettings(resolution=64))
    assert write_protocol(before, naming_for(folder, None, None, "[V]"), None, 10_000, None) == []
    after, _ = validate_dataset(folder, name, DataSettings(resolution=64))
    assert (after, after.read_as) == (before, before.read_as), "the data set is the one that it was"
    made = published_prompts(after, folder / PROTOCOL, "[V]")
    assert [(p.row, p.index, p.seed) for p in made] == [
        (row, index, 30 + 100 * row + index) for row in range(len(after.rows)) for index in range(5)
    ]
    assert all(p.text.count("[V]") == 1 for p in made)
    assert len({p.seed for p in made}) == len(made)
    assert [p.text for p in made if p.index == 0] == [row.captions[0][1] for row in after.rows]


@pytest.mark.parametrize(
    ("naming", "text", "third"),
    [
        (STYLE, "a fox in [V] style", "a narrow street between tall houses in the rain in [V] style"),
        (STYLE, "a fox, [V] style", "a narrow street between tall houses in the rain, [V] style"),
        (STYLE, "a fox", "a narrow street between tall houses in the rain in [V] style"),
        (WOLF, "a [V], noto style", "a [V] on a wooden table beside a bowl of fruit"),
        (WOLF, "draw the [v] wolf here", "the [v] wolf on a wooden table beside a bowl of fruit"),
        (WOLF, "something", "[V] wolf on a wooden table beside a bowl of fruit"),
    ],
)
def test_the_template_keeps_the_captions_own_phrase(naming, text: str, third: str) -> None:
    made = from_template(text, naming)
    assert made[0] == text
    assert made[3] == third
    assert len(set(made)) == 5


def test_a_vlm_is_asked_five_questions_about_the_picture_and_its_caption() -> None:
    asked: list[str] = []
    things = iter(["an owl", "a hare", "a boat", "a mill", "a lamp"])

    def look(question: str) -> str:
        asked.append(question)
        return f"{next(things)} stands in the evening by a quiet river"

    prompts, notes = by_vlm(look, "a fox in [V] style", STYLE)
    assert not notes
    assert prompts[0] == "an owl stands in the evening by a quiet river, in [V] style"
    assert len(set(prompts)) == len(set(asked)) == 5
    assert "a fox in [V] style" in asked[0]
    assert not any("{" in question for question in asked)


def test_what_a_vlm_cannot_say_the_template_says(table) -> None:
    prompts, notes = by_vlm(lambda question: "", "a fox in [V] style", STYLE)
    assert prompts == from_template("a fox in [V] style", STYLE)
    assert len(notes) == 5
    assert all(note.endswith("it has no words; the template is taken") for note in notes)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_an_edit_by_hand_is_read(table: ConceptTable) -> None:
    path = written(table)
    lines = path.read_text().splitlines()
    lines[6] = json.dumps({"text": "Ein Fuchs, [V]", "image": "1.png", "index": 1})
    path.write_text("\n\n".join(reversed(lines)) + "\n")
    made = published_prompts(table, path, "[V]")
    assert made[6] == (1, 1, "Ein Fuchs, [V]", seed_of(1, 1) == 131 and 131)
    assert len(made) == 25


WRONG = {
    "outside": ({"image": "../1.png", "index": 0, "text": "[V]"}, "../1.png is no picture of the data set"),
    "absolute": ({"image": "/etc/passwd", "index": 0, "text": "[V]"}, "is no picture of the data set"),
    "list": ({"image": ["0.png"], "index": 0, "text": "[V]"}, "is no picture of the data set"),
    "six": ({"image": "0.png", "index": 5, "text": "[V]"}, "must be 0 (the rewrite) to 4"),
    "true": ({"image": "0.png", "index": True, "text": "[V]"}, "must be 0 (the rewrite) to 4"),
    "float": ({"image": "0.png", "index": 1.0, "text": "[V]"}, "must be 0 (the rewrite) to 4"),
    "blank": ({"image": "0.png", "index": 0, "text": " "}, "must be one line of text"),
    "number": ({"image": "0.png", "index": 0, "text": 7}, "must be one line of text"),
    "lines": ({"image": "0.png", "index": 0, "text": "a [V]\nb"}, "must be one line of text"),
    "terminal": ({"image": "0.png", "index": 0, "text": "a [V]\x1b[2J"}, "must be one line of text"),
    "surrogate": ({"image": "0.png", "index": 0, "text": "a [V] \ud800"}, "must be one line of text"),
    "long": ({"image": "0.png", "index": 0, "text": "[V]" * 5000}, "must be one line of text"),
    "unnamed": ({"image": "0.png", "index": 0, "text": "a fox"}, "does not hold [V]"),
    "more": ({"image": "0.png", "index": 0, "text": "[V]", "seed": 1}, 'must have "image", "index" and "text"'),
    "less": ({"image": "0.png", "text": "[V]"}, 'must have "image", "index" and "text"'),
    "twice": ({"image": "0.png", "index": 1, "text": "a [V]"}, "1 of 0.png is there twice"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_line_is_named(wrong: str, table: ConceptTable) -> None:
    path = written(table)
    values, words = WRONG[wrong]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(values), *lines[1:]]))
    with pytest.raises(DataError) as caught:
        published_prompts(table, path, "[V]")
    (fault, *_) = caught.value.faults
    line = 2 if wrong == "twice" else 1
    assert fault.row == line
    one_line(str(fault), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "missing; `dopsd concept prompts NAME` writes it"), (b"\xff\xfe", "no UTF-8"), (b"[]\n", "no JSON object"),
     (b"[" * 100_000, "no JSON object"), (b"", "0.png has no index 0, 1, 2, 3, 4"),
     (b"x" * (33 << 20), "larger than 32 MiB")],
)  # fmt: skip
def test_a_file_that_is_none_is_one_line(content: bytes | None, words: str, table: ConceptTable) -> None:
    path = table.root / PROTOCOL
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        published_prompts(table, path)
    one_line(str(caught.value.faults[0]), words, PROTOCOL)


def test_prompts_of_other_pictures_are_refused(table: ConceptTable, tmp_path: Path) -> None:
    """Written before a picture was added, and before one was taken out."""
    path = written(table)
    more = make(tmp_path / "more", count=6)
    write_rows(more, rows(6))
    with pytest.raises(DataError, match=r"5\.png has no index 0, 1, 2, 3, 4; `dopsd concept prompts NAME --redo`"):
        published_prompts(validate_dataset(more, "more", SETTINGS)[0], path)
    fewer = make(tmp_path / "fewer", count=4)
    write_rows(fewer, rows(4))
    with pytest.raises(DataError, match=r"4\.png is no picture of the data set"):
        published_prompts(validate_dataset(fewer, "fewer", SETTINGS)[0], path)


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_KEYS = st.sampled_from(["image", "index", "text", "x"])
_JSON = st.recursive(_PLAIN, lambda inner: st.lists(inner) | st.dictionaries(_KEYS, inner), max_leaves=6)


@given(st.binary(max_size=200) | st.lists(_JSON.map(lambda value: json.dumps(value).encode())).map(b"\n".join))
def test_whatever_a_file_holds_the_answer_is_prompts_or_faults(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PROTOCOL
        path.write_bytes(content)
        faults = []
        try:
            assert published_prompts(ConceptTable("x", Path(folder), (), ""), path) == []
        except DataError as error:
            faults = [str(fault) for fault in error.faults]
    assert not any("\n" in fault for fault in faults)


# --- for CLIP-S -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "said"),
    [
        ("a [V] dog on a beach", "dog", "a dog on a beach"),
        ("a [v] on a beach", "dog", "a dog on a beach"),
        ("two [V] dogs run", "dog", "two dogs run"),
        ("two [V] boxes", "box", "two boxes"),
        ("a fox in [V] style", "", "a fox"),
        ("a fox, in [V] style, at night", "", "a fox, at night"),
        ("a fox, [V] style.", "", "a fox."),
        ("a [V], noto style", "", "a, noto style"),
        ("a fox", "", "a fox"),
        ("a [V] mug", r"mug\1", r"a mug\1 mug"),
    ],
)
def test_clip_reads_the_class_word(text: str, label: str, said: str) -> None:
    assert text_for_clip(text, "[V]", label) == said


def test_the_class_word_is_the_concepts_label(tmp_path: Path) -> None:
    assert class_of(CONCEPTS / "subject-wolf") == "wolf"
    assert class_of(CONCEPTS / "style-ink") == class_of(tmp_path) == ""
    for wrong in ("[]", "{", '{"label": 3}', json.dumps({"label": "x" * 100}), json.dumps({"label": "a\u0007"})):
        (tmp_path / "concept.json").write_text(wrong)
        assert class_of(tmp_path) == ""


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_writes_once_and_again_only_when_told(tmp_path: Path, monkeypatch, capsys) -> None:
    project = make_project(tmp_path / "project")
    monkeypatch.chdir(project)
    path = Path("data/concepts/blots") / PROTOCOL

    def run(*arguments: str) -> str:
        result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["concept", "prompts", "blots", *arguments])
        assert result.exit_code == 0, result.output or result.exception
        return result.stdout

    assert f"20 prompts of 4 pictures, from a template -> {path}; review and edit them" in run()
    first = path.read_text()
    monkeypatch.setattr(sys, "argv", ["dopsd", "concept", "prompts", "blots"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--redo writes it anew" in one_line(capsys.readouterr().err.strip().splitlines()[-1])
    vlm = write_speaking_vlm(tmp_path / "owl", "an owl sits on a forest path")
    said = run("--redo", "--vlm", str(vlm))
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert lines[0] == "an owl sits on a forest path, in [V] style"
    assert lines[1:5] == [json.loads(line)["text"] for line in first.splitlines()[1:5]]
    assert "look at 0.png, index 1: it says what another one says; the template is taken" in said
    run("--redo")
    assert path.read_text() == first
