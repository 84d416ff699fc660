"""The plan of the code, held: which way imports point, who may import what, and that two lists of stages are one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dopsd.stages import STAGES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dopsd"

ROOMS = {
    # room: the rooms it may import from
    "config": set(),
    "data": {"config"},
    "models": {"config", "data"},
    "distill": {"config", "models"},
    "train": {"config", "data", "models", "distill"},
    "emoji_turbo": {"config", "data", "models", "distill", "train"},
    "evaluation": {"config", "data", "models", "distill", "train", "emoji_turbo"},
    "export": {"config", "data", "models", "distill"},
    "tracking": {"config"},
    "registry": {"config", "tracking"},
}
"""Arrows of house.md. The edges (stages, cli, doctor) may import from every room, and no room from them."""

ONLY_THERE = {
    "prefect": ("flows/",),
    "mlflow": ("dopsd/tracking/", "dopsd/registry.py"),
    "ray": ("dopsd/train/launch.py",),
    "pandera": ("dopsd/data/schema.py",),
    "dvc": ("dopsd/data/concept.py",),
    "typer": ("dopsd/cli.py",),
}

# typed-only imports of World: the truth of the embedded base is data to what measures on it
_FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "flows").rglob("*.py")])


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of the modules that a file imports anywhere in it, relative ones resolved, with their lines."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def _room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "dopsd" and len(parts) > 1 else None


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_the_arrows_point_one_way(path: Path) -> None:
    room = _room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if room not in ROOMS:
        return
    wrong = {
        f"line {line}: {module}"
        for module, line in _imports(path)
        if (other := _room(module)) is not None and other != room and other not in ROOMS[room]
    }
    assert not wrong, f"{_name(path)} ({room}) may import from {sorted(ROOMS[room]) or 'no room'} alone"


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_heavy_libraries_are_imported_only_there(path: Path) -> None:
    name = _name(path)
    wrong = {
        f"line {line}: {module}"
        for module, line in _imports(path)
        if (places := ONLY_THERE.get(module.partition(".")[0])) and not name.startswith(places)
    }
    assert not wrong


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_nothing_is_pickled(path: Path) -> None:
    source = path.read_text()
    assert "pickle" not in {module.partition(".")[0] for module, _ in _imports(path)}
    assert not re.search(r"torch\.(save|load)\(|yaml\.load\(", source)


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_a_file_opens_with_what_it_does(path: Path) -> None:
    source = path.read_text()
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), "a line at the top says what the file is for"
    assert source.count("\n") <= 450, "split it: about 400 lines is what one can hold in the head"


# --- the two lists of stages ------------------------------------------------------------------------------------------


def _pipeline() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_dvc_has_the_stages_of_the_code_and_runs_them_through_the_cli() -> None:
    pipeline = _pipeline()
    assert list(pipeline) == list(STAGES)
    for name, stage in pipeline.items():
        assert stage["cmd"] == f"dopsd {name} --concept ${{item.concept}}"
        assert stage["matrix"] == {"concept": "${concepts}"}


def test_dvc_depends_on_code_that_exists() -> None:
    for name, stage in _pipeline().items():
        for dep in stage["deps"]:
            if dep.startswith("dopsd/"):
                assert (ROOT / dep).exists(), f"stage {name}: {dep}"


def test_all_code_that_decides_a_result_is_a_dependency() -> None:
    """A new file in a room must not be forgotten: every one is a dependency of some stage, or named here."""
    listed = {dep for stage in _pipeline().values() for dep in stage["deps"]}
    not_a_result = {"dopsd/data/cache.py", "dopsd/data/concept.py"}
    for room in ("data", "models", "distill", "train", "evaluation"):
        for path in (PACKAGE / room).rglob("*.py"):
            name = _name(path)
            covered = any(name == dep or name.startswith(dep + "/") for dep in listed)
            assert covered or name in not_a_result or path.name == "__init__.py", f"{name}: in no stage of dvc.yaml"


def test_evaluation_settings_and_code_do_not_retrain() -> None:
    train = _pipeline()["train"]
    assert not any("evaluation" in item for item in [*train["params"], *train["deps"]])
    assert "evaluation" in _pipeline()["evaluate"]["params"]


# --- what is said about it --------------------------------------------------------------------------------------------


def test_continuous_integration_runs_what_a_person_runs() -> None:
    run = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in run.splitlines() if line.startswith("make ")]
    assert commands == ["make test"]
    readme = ROOT / "README.md"
    if readme.exists():
        assert "make test" in readme.read_text(), "README and .ci/run name one command"


def test_the_lock_names_no_place() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+(\[[a-z0-9,-]+\])?==[0-9][0-9a-z.]*( ; .*)?", line) for line in lines), [
        line for line in lines if not re.fullmatch(r"[a-z0-9._-]+(\[[a-z0-9,-]+\])?==[0-9][0-9a-z.]*( ; .*)?", line)
    ]
    assert any(re.fullmatch(r"torch==[0-9.]+", line) for line in lines), "torch without a build tag"
