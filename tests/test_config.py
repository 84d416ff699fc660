"""Settings: what a person may get wrong is one line that names the key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dopsd.config import Settings, SettingsError, load_settings
from dopsd.models import ModelError, family_class, resolved
from dopsd.project import concept_folder, run_folder
from dopsd.stages import run_stage

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "params.yaml"


def _write(tmp_path: Path, **changes: Any) -> Path:
    raw = yaml.safe_load(SHIPPED.read_text())
    for key, value in changes.items():
        node = raw
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def check_every_key(file: Path) -> None:
    """The file is a complete one: a person finds every setting in it, with its value."""
    raw = yaml.safe_load(file.read_text())
    assert load_settings(file).model_dump(mode="json").keys() == raw.keys()

    def same_keys(group: Any, written: Any, place: str) -> None:
        assert isinstance(written, dict), place
        assert set(written) == {name for name, field in type(group).model_fields.items() if not field.exclude}, (
            f"{place}: {file.name} is the one place for settings"
        )
        for name in type(group).model_fields:
            if hasattr(getattr(group, name), "model_fields"):
                same_keys(getattr(group, name), written[name], f"{place}.{name}")

    same_keys(load_settings(file), raw, file.name)


def test_the_shipped_settings_are_valid_and_name_every_key() -> None:
    check_every_key(SHIPPED)


def test_the_shipped_concepts_are_there() -> None:
    for concept in load_settings(SHIPPED).concepts:
        assert (ROOT / "data" / "concepts" / concept).is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__max_stepz": 3}, "train.max_stepz: unknown setting"),
        ({"train__max_steps": ...}, "train.max_steps: missing"),
        ({"train__max_steps": 0}, "train.max_steps: "),
        ({"train__max_steps": "many"}, "train.max_steps: "),
        ({"train__methods": ["d-opsd", "magic"]}, "train.methods.1: "),
        ({"train__teacher__decay": 1.0}, "train.teacher.decay: "),
        ({"train__teacher__guidance": 0.5}, "train.teacher.guidance: "),
        ({"train__replay": {"weight": 1.0}}, "replay.prompts is empty"),
        ({"evaluation__few_steps": 3}, "must be one of evaluation.steps"),
        ({"data": ...}, "data: missing"),
        ({"overrides": {"max_steps": 3}}, "overrides: unknown setting"),
        ({"registry__min_retention": 0.9}, "registry.min_retention: unknown setting; remove it; registry.max_few"),
        ({"train__learning_rate": float("inf")}, "train.learning_rate: "),
        ({"train__betas": [0.9, 1.0]}, "train.betas.1: "),
        ({"train__methods": []}, "train.methods: empty; name at least one"),
        ({"train__methods": ["sft", "d-opsd", "sft"]}, "train.methods: sft is there twice; name each once"),
        ({"train__lora__targets": []}, "train.lora.targets: empty"),
        ({"train__lora__targets": ["to_(q"]}, "'to_(q' is not a regular expression"),
        ({"evaluation__steps": []}, "evaluation.steps: empty"),
        ({"evaluation__steps": [4, 8, 4]}, "evaluation.steps: 4 is there twice; name each once"),
        ({"evaluation__steps": [4], "evaluation__many_steps": 4}, "evaluation.steps [4] has none above 4"),
        ({"evaluation__few_steps": 8, "evaluation__many_steps": 4}, "evaluation.many_steps (4) is below few_steps (8)"),
        ({"evaluation__kept_prompts": []}, "evaluation.kept_prompts is empty, and the registry asks what was kept"),
        ({"evaluation__backbones": ["clip", "dinov2:a", "dinov2:b"]}, "two of the kind dinov2"),
        ({"evaluation__steps": [2, 4], "evaluation__many_steps": 4}, "or set registry.enabled to false"),
        ({"evaluation": {"steps": [8]}}, "evaluation.steps [8] has none above 8"),
        ({"concepts": ["style-ink", "style-ink"]}, "concepts: style-ink is there twice"),
        ({"train__seed": -1}, "train.seed: "),
        ({"train__seed": 2**63}, "train.seed: "),
        ({"evaluation__seed": -1}, "evaluation.seed: "),
        ({"evaluation__seed": 2**63}, "evaluation.seed: "),
        ({"concepts": ["../../x"]}, "concepts.0: concept name '../../x': use 1 to 64 of a-z, 0-9 and -"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(_write(tmp_path, **changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value), "one fault, one line"


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(_write(tmp_path, train__max_steps=-1, data__resolution="big", model__colour="red"))
    assert len(str(caught.value).splitlines()) == 3


def _floats(group: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all numbers with a fraction, and of those that may be left out; a pair by its first."""
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        if isinstance(value, BaseModel):
            yield from _floats(value, (*place, name))
        elif re.search(r"\bfloat\b", str(field.annotation)):
            yield (*place, name)


SHIPPED_FLOATS = list(_floats(load_settings(SHIPPED)))


def _refusal(override: str) -> str:
    """What is said of a setting that is changed in what is shipped; empty where it is taken."""
    try:
        load_settings(SHIPPED, (override,))
    except SettingsError as error:
        return str(error)
    return ""


def test_no_number_may_be_infinite_or_none_at_all() -> None:
    for path, word in product(SHIPPED_FLOATS, (".inf", "-.inf", ".nan")):
        key, value = ".".join(path), f"[{word}, 0.5]" if path[-1] == "betas" else word
        said = _refusal(f"{key}={value}")
        assert re.search(rf"{key}[.0-9a-z\[\],]*: .*finite", said), f"{key}={value}: {said or 'taken'}"


def test_the_floats_are_found() -> None:
    named = {".".join(path) for path in SHIPPED_FLOATS}
    assert {"train.learning_rate", "train.betas", "train.replay.weight", "compute.memory_gib"} <= named
    assert len(named) > 15


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {max_steps: 1}\ndata: 1\ntrain: {}\n", "`train` is there twice (lines 1 and 3); keep one"),
        ("train:\n  seed: 1\n  lora:\n    rank: 1\n    rank: 2\n", "`train.lora.rank` is there twice (lines 4 and 5)"),
        ("a: [{b: 1}, {b: 1, 'b': 2}]", "`a.1.b` is there twice (lines 1 and 1)"),
        ("a: &x {b: 1}\nc: {d: *x, d: *x}", "`c.d` is there twice (lines 2 and 2)"),
    ],
)
def test_a_key_that_is_there_twice_is_named_with_its_lines(tmp_path: Path, text: str, said: str) -> None:
    """Of two `train:` the last would win, and take all that the first says with it."""
    (tmp_path / "params.yaml").write_text(text)
    own = tmp_path / "data/concepts/style-ink/train.yaml"
    _own(tmp_path, "style-ink", text)
    for file, door in (
        (tmp_path / "params.yaml", lambda: load_settings(tmp_path / "params.yaml")),
        (own, lambda: load_settings(SHIPPED).of("style-ink", tmp_path)),
    ):
        with pytest.raises(SettingsError) as caught:
            door()
        assert str(caught.value).startswith(f"{file}: ")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_key_twice_in_what_the_command_line_says() -> None:
    with pytest.raises(SettingsError, match="`rank` is there twice"):
        load_settings(SHIPPED, ("train.lora={rank: 2, rank: 4}",))


def test_the_same_key_in_two_groups_and_what_an_anchor_repeats_is_no_fault(tmp_path: Path) -> None:
    text = SHIPPED.read_text().replace("export:", "export: &same", 1) + "\n"
    (tmp_path / "params.yaml").write_text(text)
    assert load_settings(tmp_path / "params.yaml") == load_settings(SHIPPED)
    _own(tmp_path, "style-ink", "teacher: &t {every: 2}\nlora: {rank: 2}\n")
    listed = load_settings(SHIPPED, ("evaluation.kept_prompts=[a red house]",))
    assert listed.of("style-ink", tmp_path).train.teacher.every == 2


def test_steps_may_be_few_alone_where_no_gate_asks_for_more(tmp_path: Path) -> None:
    for registry in ({"registry__enabled": False}, {"registry__max_few_step_loss": None}):
        few = {"evaluation__steps": [4], "evaluation__many_steps": 4, **registry}
        assert load_settings(_write(tmp_path, **few)).evaluation.steps == (4,)


def test_the_familys_own_number_of_few_steps_counts_for_the_gate(tmp_path: Path) -> None:
    family = family_class(load_settings(SHIPPED).model).few_steps
    steps = {"steps": [1, family], "many_steps": family}
    with pytest.raises(ModelError, match=f"has none above {family}"):
        resolved(load_settings(_write(tmp_path, evaluation=steps)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 10_000, "not valid YAML"),
        ("a: 2025-13-45", "not valid YAML"),
        (None, "no such file"),
        ("a: [1", "not valid YAML"),
        ("[1, 2]", "expected keys and values"),
        ("", "expected keys"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=said):
        load_settings(path)


def test_overrides(tmp_path: Path) -> None:
    changed = load_settings(SHIPPED, ("train.max_steps=7", "train.lora.targets=[to_q, to_k]", "model.vlm=null"))
    assert changed.train.max_steps == 7
    assert changed.train.lora.targets == ("to_q", "to_k")
    for override, said in (
        ("train.max_steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train.max_steps.more=3", "is a value, not a group"),
        ("train.max_steps=[1", "is not a YAML value"),
        ("train.nothing=1", "train.nothing: unknown setting"),
        ("overrides.max_steps=1", "overrides: unknown setting"),
    ):
        with pytest.raises(SettingsError, match=said):
            load_settings(SHIPPED, (override,))


def _own(root: Path, concept: str, content: str) -> None:
    folder = root / "data/concepts" / concept
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.yaml").write_text(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no file; name one with a prompt in each line, or list the prompts"),
        (b"# nothing\n\n", "holds no prompt; write one in each line"),
        (b"a caf\xe9\n", "is not UTF-8"),
        (b"x" * (1 << 20) + b"\n", "is larger than 1 MiB"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_named_with_its_setting(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = _write(tmp_path, evaluation__kept_prompts="mine.txt")
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(SettingsError, match=r"evaluation\.kept_prompts: .*mine\.txt") as error:
        load_settings(path).of("style-ink", tmp_path).evaluation.kept_texts  # noqa: B018
    assert said in str(error.value)


def test_general_prompts_are_a_line_each_and_count_once(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("\ufeff# mine\r\n a red  house\r\n\r\na red house\ntwo cats\n", encoding="utf-8")
    settings = load_settings(_write(tmp_path, evaluation__kept_prompts="mine.txt")).of("style-ink", tmp_path)
    assert settings.evaluation.kept_texts == ("a red house", "two cats")
    assert settings.of("style-ink", tmp_path) == settings


def test_a_concept_has_settings_of_its_own_unless_the_command_line_says_otherwise(tmp_path: Path) -> None:
    path = _write(tmp_path, evaluation__kept_prompts=["a red house"])
    _own(tmp_path, "style-ink", "max_steps: 7\nlora: {rank: 2}\n")
    _own(tmp_path, "style-3d", "# nothing yet\n")
    shared = load_settings(path)
    ink = shared.of("style-ink", tmp_path)
    assert (ink.train.max_steps, ink.train.lora.rank) == (7, 2)
    assert ink.train.lora.targets == shared.train.lora.targets, "a group's other settings stay"
    assert ink.of("style-ink", tmp_path) == ink
    assert shared.of("style-3d", tmp_path) == shared == shared.of("nowhere-listed", tmp_path), "no file is an empty one"

    def asked(override: str) -> Any:
        return load_settings(path, (override,)).of("style-ink", tmp_path).train

    assert (asked("train.lora.rank=3").max_steps, asked("train.lora.rank=3").lora.rank) == (7, 3)
    assert asked("train.lora={rank: 4}").lora.rank == 4
    assert asked("train={max_steps: 9, batch_size: 1, learning_rate: 1.0e-3}").max_steps == 9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning_rates: 1", "train.yaml: learning_rates: unknown setting"),
        ("replay: {weight: -1}", "train.yaml: replay.weight: "),
        ("3", "train.yaml: expected keys and values, found int"),
        ("a: [1", "train.yaml: not valid YAML"),
        ("#" * (1 << 20) + "\n", "train.yaml: larger than 1 MiB"),
    ],
)
def test_a_fault_in_a_concepts_own_settings_names_the_file(tmp_path: Path, content: str, said: str) -> None:
    _own(tmp_path, "style-ink", content)
    with pytest.raises(SettingsError) as caught:
        load_settings(SHIPPED).of("style-ink", tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "", "A", "-x", "x" * 65, "x\n"])
def test_a_name_that_is_no_concepts_goes_nowhere(tmp_path: Path, name: str) -> None:
    for door in (
        lambda: load_settings(SHIPPED).of(name, tmp_path),
        lambda: run_folder(name, tmp_path),
        lambda: concept_folder(name, tmp_path),
        lambda: run_stage("validate", name, load_settings(SHIPPED), tmp_path),
    ):
        with pytest.raises(SettingsError, match="use 1 to 64 of a-z, 0-9 and -"):
            door()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_settings_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings(SHIPPED).train.max_steps = 3  # type: ignore[misc]


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_whatever_a_file_holds_the_answer_is_settings_or_a_settings_error(value: Any) -> None:
    raw = yaml.safe_load(SHIPPED.read_text())
    raw["train"] = value
    try:
        Settings.model_validate(raw)
    except ValueError as error:
        assert "train" in str(error)  # noqa: PT017


@pytest.mark.parametrize("place", [".", "x" * 300, "shut.yaml"])
def test_a_path_that_cannot_be_read_as_settings_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "shut.yaml").touch(mode=0)
    if place == "shut.yaml" and os.access(tmp_path / place, os.R_OK):
        pytest.skip("nothing is forbidden to root")
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / place)
    assert str(caught.value).startswith(f"{tmp_path / place}: cannot be read (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "0x" + "f" * 5000,
                                  "1" + ":01" * 300 + ".5", "[!!int '', 1]"])  # fmt: skip
def test_a_value_that_yaml_has_a_fault_of_its_own_for_is_one_line(tmp_path: Path, said: str) -> None:
    with pytest.raises(SettingsError, match="is not a YAML value") as caught:
        load_settings(SHIPPED, (f"train.seed={said}",))
    assert "\n" not in str(caught.value)
    (tmp_path / "params.yaml").write_text(f"train:\n  seed: {said}\n")
    with pytest.raises(SettingsError, match="not valid YAML") as caught:
        load_settings(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)
