"""Settings: what a person may get wrong is one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd.config import Settings, SettingsError, load_settings
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
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


def test_a_concept_has_settings_of_its_own_unless_the_command_line_says_otherwise(tmp_path: Path) -> None:
    path = _write(tmp_path)
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
