"""Machines that are otherwise: a locale that is not UTF-8, folders with spaces and umlauts, a long TMPDIR."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dopsd.config import load_settings
from dopsd.export import DIFFUSERS_FILE
from dopsd.stages import STAGES
from dopsd.train import launch
from dopsd.train.errors import LaunchError
from tests.tiny_project import ROOT, make_project

POOR = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""What Python calls ASCII."""


def _run(where: Path, *command: str, **environment: str) -> str:
    own = {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, *command], cwd=where, env=kept | own | environment, capture_output=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")[-3000:]
    return done.stdout.decode(errors="replace")


# --- texts ------------------------------------------------------------------------------------------------------------


BINARY = ("Image.open", "os.open", "tarfile.open", "page.open")
"""What opens no text."""


def _without_encoding(source: str) -> Iterator[int]:
    """Lines where a text file is opened, or a process's output read, in whatever encoding the machine has."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else "builtins"
        called = f"{owner}.{name}"
        first = owner == "builtins" or called == "os.fdopen"  # what is opened, before the mode
        given = [word.value for word in node.keywords if word.arg == "mode"] or node.args[first:]
        mode = given[0].value if given and isinstance(given[0], ast.Constant) else "r"
        if (
            (name == "read_text" and not node.args)
            or (name == "write_text" and len(node.args) < 2)
            or (name in ("open", "fdopen") and called not in BINARY and "b" not in str(mode))
            or any(word.arg in ("text", "universal_newlines") for word in node.keywords if owner == "subprocess")
        ):
            yield node.lineno


def test_every_text_file_is_utf_8() -> None:
    rooms = ("benchmarks", "docs", "dopsd", "emoji_turbo", "flows", "infra")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files
             for line in _without_encoding(path.read_text(encoding="utf-8"))]  # fmt: skip
    assert not found


@pytest.mark.parametrize(
    "line",
    ["p.read_text()", "p.write_text(t)", "open(p)", "open(p, 'w')", "p.open('a')", "p.open()", "os.fdopen(h, 'w')",
     "os.fdopen(h)", "subprocess.run(c, text=True)"],
)  # fmt: skip
def test_a_missing_encoding_would_be_noticed(line: str) -> None:
    assert list(_without_encoding(line)) == [1]
    assert not list(_without_encoding("p.open('rb'); open(p, 'wb'); Image.open(p); p.read_text('utf-8')"))
    assert not list(_without_encoding("os.open(p, os.O_RDONLY); os.fdopen(h, 'wb'); os.fdopen(h, 'w', encoding=e)"))


# --- projects ---------------------------------------------------------------------------------------------------------


def _project(root: Path) -> Path:
    """With captions that are not ASCII."""
    make_project(root, max_steps=1, methods=["d-opsd"])
    rows = root / "data/concepts/blots/metadata.jsonl"
    text = rows.read_text(encoding="utf-8").replace("blot number", "a „Klecks“, größer → number")
    rows.write_text(text, encoding="utf-8")
    return root


def test_dvc_and_stages_run_in_a_folder_with_spaces_and_umlauts(tmp_path: Path) -> None:
    root = _project(tmp_path / "Eigene Bilder für Größe")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    _run(root, "-m", "dvc", "repro", "-q", "encode@blots", PATH=path)
    assert "größer →" in (root / "runs/blots/encoded/index.json").read_text(encoding="utf-8")
    settings = load_settings(root / "params.yaml", ["tracking.enabled=false"])
    for stage in ("train", "evaluate", "report", "register"):
        STAGES[stage]("blots", settings, root)
    assert (root / "runs/blots/export" / DIFFUSERS_FILE).exists()


ALL_STAGES = """
import sys
from pathlib import Path
from dopsd.cli import main
from dopsd.config import load_settings
from dopsd.stages import STAGES
assert sys.getfilesystemencoding() != "utf-8"
for stage in STAGES.values():
    stage("blots", load_settings(Path("params.yaml"), ["tracking.enabled=false"]), Path())
sys.argv[1:] = ["show", "--concept", "blots"]
main()
"""


def test_all_stages_run_where_the_locale_is_not_utf_8(tmp_path: Path) -> None:
    root = _project(tmp_path / "project")
    shown = _run(root, "-c", ALL_STAGES, **POOR)
    assert "sharpness ?1" in shown, "in the place of an arrow that the terminal has not"
    for text in ("encoded/index.json", "report.html", "export/README.md"):
        assert "größer →" in (root / "runs/blots" / text).read_text(encoding="utf-8"), text


def test_a_folder_that_the_locale_cannot_name_is_one_line(tmp_path: Path) -> None:
    place = tmp_path / "Größe"
    place.mkdir()
    done = subprocess.run([sys.executable, "-m", "dopsd.cli", "doctor"], cwd=place, capture_output=True,
                          env={**os.environ, **POOR, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"error: {tmp_path}/Gr????e: its name has letters that the locale ({POOR['LC_ALL']}) has not; "
        "set LC_ALL=C.UTF-8\n"
    )


# --- Ray --------------------------------------------------------------------------------------------------------------

RAY = """
import os, sys
from dopsd.config.groups import ComputeSettings
from dopsd.train.launch import connect_ray
connect_ray(ComputeSettings())
import ray
asked = ray.remote(num_cpus=0)(lambda: 6 * 7)
print(ray.get(asked.remote()), ray._private.worker.global_worker.node.get_temp_dir_path())
"""


def test_a_long_tmpdir_is_no_fault(tmp_path: Path) -> None:
    long = tmp_path / ("t" * max(1, 70 - len(str(tmp_path)) - 1))
    long.mkdir()
    answer, place = _run(tmp_path, "-c", RAY, TMPDIR=str(long), RAY_ADDRESS="").split()
    assert answer == "42"
    assert place.startswith("/tmp/dopsd-ray-")
    assert not Path(place).exists(), "it goes with the process"


def test_a_short_tmpdir_is_rays_own_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/var/tmp")
    assert launch._place_for_sockets.__wrapped__() == {}


def test_no_place_for_sockets_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: str) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("RAY_TMPDIR", "/t" * 40)
    monkeypatch.setattr(launch.tempfile, "mkdtemp", full)
    with pytest.raises(LaunchError, match=r"too long for Ray's sockets.*set RAY_TMPDIR to a folder of at most 3"):
        launch._place_for_sockets.__wrapped__()
