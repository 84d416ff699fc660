"""The plan of the code, held: which way imports point, who may import what, and that two lists of stages are one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import yaml

from docs.draw_house import DRAWING, draw, imports, room_of, uses
from dopsd.stages import STAGES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dopsd"

ROOMS: dict[str, set[str]] = {
    # room: the rooms it may import from
    "params": set(),
    "config": {"params"},
    "files": set(),
    "versions": set(),
    "origin": set(),
    "data": {"config", "files"},
    "models": {"config", "files", "versions", "data", "process"},
    "identity": {"params", "config", "versions", "data", "models"},
    "distill": {"config", "files", "models"},
    "sizing": {"config", "models", "distill"},
    "train": {"config", "files", "data", "models", "identity", "distill", "sizing", "given"},
    "evaluation": {"params", "config", "files", "process", "data", "models", "distill", "train"},
    "emoji_turbo": {"config", "files", "data", "models", "distill", "train", "evaluation"},
    "export": {"config", "files", "data", "models", "distill"},
    "given": {"files", "distill", "models", "export"},
    "tracking": {"config", "files", "process"},
    "registry": {"config", "files", "identity", "tracking"},
    "captioning": {"config", "files", "data", "models"},
    "lock": {"config", "files"},
    "memory": {"config", "files", "data"},
    "process": set(),
    "project": {"config", "data", "models", "evaluation"},
    "card": {"config", "data", "models", "distill", "evaluation", "export", "project"},
    "champions": {"params", "config", "files", "origin", "data", "models", "identity", "distill", "train", "evaluation",
                  "export", "given", "tracking", "registry", "project"},
    "gain_report": {"config", "files", "data", "models", "train", "project"},
    "sampling": {"params", "config", "data", "models", "distill", "given", "project"},
    "clean": {"config", "files", "train", "lock", "project"},
    "runs": {"params", "config", "files", "identity", "train", "lock", "project"},
}  # fmt: skip
EDGES = {"stages", "cli", "doctor", "flows"}
"""They may import from every room, and no room from them."""

ONLY_THERE = {
    "prefect": ("flows/",),
    "mlflow": ("dopsd/tracking/", "dopsd/registry/"),
    "ray": ("dopsd/train/launch.py", "dopsd/train/worker.py", "dopsd/train/workers.py"),
    "pandera": ("dopsd/data/schema.py",),
    "dvc": ("dopsd/data/concept.py", "dopsd/data/dvc_cache.py", "dopsd/memory.py"),
    "typer": ("dopsd/cli/", "emoji_turbo/cli.py", "flows/train.py", "flows/nightly.py"),
}

_FILES = sorted(path for room in ("dopsd", "emoji_turbo", "flows") for path in (ROOT / room).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_arrows_point_one_way() -> None:
    wrong = []
    for path in _FILES:
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module, line in imports(path) if room in ROOMS else ():
            other = room_of(module)
            if other not in (None, room, *ROOMS[room]):
                wrong.append(f"{_name(path)}:{line} imports {module}; {room} may import {sorted(ROOMS[room])}")
    assert not wrong


def test_every_room_says_what_it_may_import_and_has_its_line_in_the_table() -> None:
    """One that is missing here could import anything."""
    rooms = set(uses())
    assert rooms == set(ROOMS) | EDGES
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    named = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named == rooms


def test_the_drawing_of_the_house_is_of_this_house() -> None:
    assert DRAWING.read_text() == draw(), "python docs/draw_house.py"


def test_the_package_knows_nothing_of_the_embedded_base() -> None:
    """It is a neighbour that brings its own truth: an edge may not reach for it either."""
    wrong = [
        f"{_name(path)}:{line} imports {module}"
        for path in _FILES
        if not _name(path).startswith("emoji_turbo/")
        for module, line in imports(path)
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
        named = [module for module, _ in imports(path) if module.rpartition(".")[2] in files]
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        named += sorted(strings & {"z-image", "flux2-klein", "krea-2"})
        if named and (_name(path), named) != ("dopsd/config/groups.py", ["z-image"]):
            wrong.append(f"{_name(path)}: {named}")
    assert not wrong


def test_heavy_libraries_are_imported_only_there() -> None:
    wrong = [
        f"{_name(path)}:{line} imports {module}"
        for path in _FILES
        for module, line in imports(path)
        if (places := ONLY_THERE.get(module.partition(".")[0])) and not _name(path).startswith(places)
    ]
    assert not wrong


def test_nothing_is_pickled_and_yaml_is_safe() -> None:
    wrong = []
    for path in _FILES:
        if any(module.partition(".")[0] in ("pickle", "joblib", "dill") for module, _ in imports(path)):
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
    base, plan, *names = pipeline
    assert pipeline[base]["cmd"] == "dopsd base identify"
    assert plan == "plan"
    assert names == list(STAGES)
    for name in (plan, *names):
        assert pipeline[name]["cmd"] == f"dopsd {name} --concept ${{item.concept}}"
        assert pipeline[name]["matrix"] == {"concept": "${concepts}"}
    assert [name for name, stage in pipeline.items() if stage.get("always_changed")] == [base, plan]


def test_dvc_reads_its_pipeline_for_every_concept() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    concepts = yaml.safe_load((ROOT / "params.yaml").read_text())["concepts"]
    assert set(listed) == {"base", *(f"{stage}@{concept}" for stage in ("plan", *STAGES) for concept in concepts)}


def test_every_stage_is_asked_for_by_its_part_of_the_plan() -> None:
    """The page alone depends on code: it is made anew in seconds, and no number could say that its words changed."""
    own = "runs/${item.concept}/plan.json"
    for name in STAGES:
        stage = _pipeline()[name]
        code = [dep for dep in stage["deps"] if dep.startswith("dopsd/")]
        assert all((ROOT / dep).exists() for dep in code)
        assert bool(code) == (name == "report"), name
        assert stage.get("params") == (None if name == "report" else [{own: [name]}])


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
