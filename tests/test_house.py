"""The plan of the code, held: which way imports point, who may import what, and that two lists of stages are one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from dopsd import champions
from dopsd.config import Settings, load_settings
from dopsd.pipeline import inputs_hash
from dopsd.stages import STAGES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dopsd"

ROOMS: dict[str, set[str]] = {
    # room: the rooms it may import from
    "config": set(),
    "files": set(),
    "data": {"config", "files"},
    "models": {"config", "files", "data"},
    "distill": {"config", "files", "models"},
    "train": {"config", "files", "data", "models", "distill"},
    "evaluation": {"config", "files", "data", "models", "distill", "train"},
    "emoji_turbo": {"config", "files", "data", "models", "distill", "train", "evaluation"},
    "export": {"config", "files", "data", "models", "distill"},
    "tracking": {"config", "files"},
    "registry": {"config", "files", "tracking"},
}
"""Arrows of house.md. The edges (stages, cli, doctor) may import from every room, and no room from them."""

ONLY_THERE = {
    "prefect": ("flows/",),
    "mlflow": ("dopsd/tracking/", "dopsd/registry/"),
    "ray": ("dopsd/train/launch.py", "dopsd/train/worker.py", "dopsd/train/workers.py"),
    "pandera": ("dopsd/data/schema.py",),
    "dvc": ("dopsd/data/concept.py",),
    "typer": ("dopsd/cli.py", "emoji_turbo/cli.py", "flows/train.py", "flows/nightly.py"),
}

_FILES = sorted(path for room in ("dopsd", "emoji_turbo", "flows") for path in (ROOT / room).rglob("*.py"))


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
    if parts[0] == "emoji_turbo":
        return parts[0]
    return parts[1] if parts[0] == "dopsd" and len(parts) > 1 else None


def test_the_arrows_point_one_way() -> None:
    wrong = []
    for path in _FILES:
        room = _room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module, line in _imports(path) if room in ROOMS else ():
            other = _room(module)
            if other not in (None, room, *ROOMS[room]):
                wrong.append(f"{_name(path)}:{line} imports {module}; {room} may import {sorted(ROOMS[room])}")
    assert not wrong


def test_the_package_knows_nothing_of_the_embedded_base() -> None:
    """It is a neighbour that brings its own truth: an edge may not reach for it either."""
    wrong = [
        f"{_name(path)}:{line} imports {module}"
        for path in _FILES
        if not _name(path).startswith("emoji_turbo/")
        for module, line in _imports(path)
        if module.partition(".")[0] == "emoji_turbo"
    ]
    assert not wrong


def test_nothing_outside_of_models_asks_which_family_it_has() -> None:
    """A family is one file and one line; emoji-turbo is made of Z-Image's classes, and the settings' default is it."""
    files = {path.stem for path in (PACKAGE / "models").glob("*.py")} & {"z_image", "flux2_klein", "krea2"}
    assert len(files) == 3
    wrong = []
    for path in _FILES:
        if _name(path).startswith(("dopsd/models/", "emoji_turbo/")):
            continue
        named = [module for module, _ in _imports(path) if module.rpartition(".")[2] in files]
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        named += sorted(strings & {"z-image", "flux2-klein", "krea-2"})
        if named and (_name(path), named) != ("dopsd/config.py", ["z-image"]):
            wrong.append(f"{_name(path)}: {named}")
    assert not wrong


def test_heavy_libraries_are_imported_only_there() -> None:
    wrong = [
        f"{_name(path)}:{line} imports {module}"
        for path in _FILES
        for module, line in _imports(path)
        if (places := ONLY_THERE.get(module.partition(".")[0])) and not _name(path).startswith(places)
    ]
    assert not wrong


def test_nothing_is_pickled_and_yaml_is_safe() -> None:
    wrong = []
    for path in _FILES:
        if any(module.partition(".")[0] in ("pickle", "joblib", "dill") for module, _ in _imports(path)):
            wrong.append(f"{_name(path)} imports a pickler")
        for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
            name = ast.unparse(call.func)
            tensors_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
            if name in ("torch.save", "yaml.load") or (name == "torch.load" and not tensors_only):
                wrong.append(f"{_name(path)}:{call.lineno} calls {name}")
    assert not wrong


def test_files_are_short_and_open_with_what_they_do() -> None:
    for path in _FILES:
        source = path.read_text()
        assert not source.strip() or ast.get_docstring(ast.parse(source)), (
            f"{_name(path)}: say at the top what it is for"
        )
        assert source.count("\n") <= 450, f"{_name(path)}: split it, about 400 lines is what one can hold in the head"


# --- the two lists of stages ------------------------------------------------------------------------------------------


def _pipeline() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_dvc_has_the_stages_of_the_code_and_runs_them_through_the_cli() -> None:
    pipeline = _pipeline()
    base, *names = pipeline
    assert pipeline[base]["cmd"] == "dopsd base identify"
    assert names == list(STAGES)
    for name, stage in list(pipeline.items())[1:]:
        assert stage["cmd"] == f"dopsd {name} --concept ${{item.concept}}"
        assert stage["matrix"] == {"concept": "${concepts}"}


def test_dvc_reads_its_pipeline_for_every_concept() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    concepts = yaml.safe_load((ROOT / "params.yaml").read_text())["concepts"]
    assert set(listed) == {"base", *(f"{stage}@{concept}" for stage in STAGES for concept in concepts)}


def test_dvc_depends_on_code_that_exists() -> None:
    for name, stage in _pipeline().items():
        for dep in stage.get("deps", []):
            if dep.startswith("dopsd/"):
                assert (ROOT / dep).exists(), f"stage {name}: {dep}"


def test_all_code_that_decides_a_result_is_a_dependency() -> None:
    """A new file in a room must not be forgotten: every one is a dependency of some stage, or named here."""
    listed = {dep for stage in _pipeline().values() for dep in stage.get("deps", [])}
    not_a_result = {
        "dopsd/data/cache.py",
        "dopsd/data/concept.py",
        "dopsd/models/folder.py",
        "dopsd/models/hashes.py",
        "dopsd/models/hub.py",
        "dopsd/models/sources.py",
        "dopsd/train/errors.py",
        "dopsd/train/job.py",
        "dopsd/train/launch.py",
        "dopsd/train/machine.py",
        "dopsd/train/status.py",
        "dopsd/train/storage.py",
        "dopsd/train/worker.py",
        "dopsd/train/workers.py",
    }  # fmt: skip
    for room in ("data", "models", "distill", "train", "evaluation"):
        for path in (PACKAGE / room).rglob("*.py"):
            name = _name(path)
            covered = any(name == dep or name.startswith(dep + "/") for dep in listed)
            assert covered or name in not_a_result or path.name == "__init__.py", f"{name}: in no stage of dvc.yaml"


def test_versions_of_method_and_scores_are_of_the_code_that_the_stages_depend_on() -> None:
    def code(*stages: str) -> set[str]:
        deps = {dep for stage in stages for dep in _pipeline()[stage]["deps"]}
        return {dep.removeprefix("dopsd/") for dep in deps if dep.startswith("dopsd/")}

    assert set(champions._TRAINING_CODE) == code("encode", "train")
    shown = {"evaluation/grids.py", "evaluation/naming.py"}  # pictures and words
    assert set(champions._SCORING_CODE) == code("evaluate") - shown


def test_evaluation_settings_and_code_do_not_retrain() -> None:
    train = _pipeline()["train"]
    assert not any("evaluation" in item for item in [*train["params"], *train["deps"]])
    assert "evaluation" in _pipeline()["evaluate"]["params"]


def test_settings_of_one_concept_run_that_concept_alone_again() -> None:
    def inputs(stage: str, concept: str, settings: Settings) -> str:
        return inputs_hash(stage, concept, settings, ROOT)

    before, after = (load_settings(ROOT / "params.yaml", (f"tuning.style-ink.max_steps={n}",)) for n in (7, 8))
    assert inputs("train", "style-ink", before) != inputs("train", "style-ink", after)
    assert inputs("train", "style-3d", before) == inputs("train", "style-3d", after)
    assert inputs("evaluate", "style-ink", before) == inputs("evaluate", "style-ink", after)


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


def test_showing_results_and_starting_a_flow_imports_nothing_heavy() -> None:
    """A flow run that reuses every stage, and `dopsd show`, are there in seconds because of it."""
    script = (
        "import sys\nimport flows.train, dopsd.cli, dopsd.evaluation.table, dopsd.evaluation.verdict\n"
        "print([m for m in ('torch', 'sklearn', 'diffusers', 'transformers', 'mlflow', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
