"""A disk that is full, at every door: one line saying where, nothing half, and a next start that goes on."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from concept_folders import SETTINGS, make
from dvc.repo import Repo

from dopsd import cli
from dopsd.config import load_settings
from dopsd.data.concept import add_concept
from dopsd.files import DiskFull, disk_full, full_disk_said, is_disk_full, write_tensors
from dopsd.lock import concept_lock
from dopsd.stages import STAGES, identify_base
from dopsd.tracking import send
from tests.small_disk import fill, free, small_disk
from tests.tiny_project import ROOT, make_project

LINE = re.compile(r"disk full: \S+( needs (more than )?[\d.]+ MB)?, [\d.]+ MB free; make room, then start it again.*")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "32m") as place:
        yield place


def refused(disk: Path, left: int, work: Callable[[], object]) -> str:
    """What is said where ``left`` bytes of room are too few for ``work``."""
    fill(disk, left)
    with pytest.raises(DiskFull) as caught:
        work()
    free(disk)
    assert LINE.fullmatch(str(caught.value)), caught.value
    return str(caught.value)


def results(root: Path) -> dict[str, bytes]:
    """All files of a run, with those of caches and trackers left out."""
    files = [path for path in (root / "runs").rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_every_stage_says_it_and_goes_on(disk: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    root = make_project(disk / "p", methods=["d-opsd"], checkpoint_steps=2)
    monkeypatch.chdir(root)
    settings = load_settings(Path("params.yaml"), ("tracking.enabled=false",))

    def run(stage: str) -> None:
        STAGES[stage]("blots", settings, Path())

    assert "runs/base.json" in refused(disk, 0, lambda: identify_base(settings, Path()))
    identify_base(settings, Path())
    for stage, left, place in (
        ("validate", 0, "runs/blots"),
        ("encode", 8192, r"\.safetensors needs 0\.\d+ MB, 0\.0"),
        ("encode", 30_000, "runs/blots/encoded"),  # again, from the cache
        ("train", 200_000, "runs/blots/train/d-opsd"),
        ("evaluate", 200_000, "runs/blots/evaluation needs more than"),
        ("report", 0, "runs/blots"),
        ("register", 30_000, "runs/blots/export"),
    ):
        before = results(root)
        assert re.search(place, refused(disk, left, lambda: run(stage))), stage  # noqa: B023
        if stage != "train":  # which tests/test_train_disk.py looks into
            assert results(root) == before, f"{stage}: nothing half, and what was there stays"
        run(stage)
    assert not list(root.rglob("*.partial"))
    said = capsys.readouterr()
    assert "d-opsd -> runs/blots/export" in said.out


def test_the_tracker_is_sent_the_rest_once_there_is_room(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full while MLflow makes its database, which it does in fifty steps; and while a file is sent."""
    from tests.tracked import SETTINGS as TRACKING
    from tests.tracked import Folder, history_of

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{disk}/mlflow.db")
    folder = Folder(disk, "mine")
    folder.step(1)
    for left in (50_000, 400_000):
        lines: list[str] = []
        fill(disk, left)
        assert not send(folder.root, folder.run, TRACKING, lines.append)
        free(disk)
        (line,) = (line for line in lines if "disk full" in line)
        assert re.fullmatch(r"tracking: disk full: \S*mlflow\.db, [\d.]+ MB free; .*; the run goes on, .*", line), line
    assert send(folder.root, folder.run, TRACKING)
    folder.step(2)
    folder.preview(2, side=512)
    lines = []
    fill(disk, 100_000)
    assert not send(folder.root, folder.run, TRACKING, lines.append)
    free(disk)
    assert any("disk full: " in line for line in lines), lines
    assert send(folder.root, folder.run, TRACKING)
    assert [step for step, _ in history_of(folder)] == [1, 2]


@pytest.mark.parametrize("how", ["fresh", "replace", "in place"])
@pytest.mark.parametrize("kind", ["copy", "symlink"])
def test_concept_add_leaves_all_as_it_was(disk: Path, tmp_path: Path, how: str, kind: str) -> None:
    root = disk / "p"
    root.mkdir()
    Repo.init(str(root), no_scm=True).close()
    with (root / ".dvc/config").open("a") as file:
        file.write(f"[cache]\n    type = {kind}\n")
    (root / "params.yaml").write_text("concepts: []\n")
    folder = make(root / "data/concepts/mine" if how == "in place" else tmp_path / "mine")
    if how == "replace":
        add_concept(make(tmp_path / "old", first=20), "mine", root, SETTINGS)

    def add() -> None:
        add_concept(folder, "mine", root, SETTINGS, how == "replace", listed_in=root / "params.yaml")

    def seen() -> dict[Path, bytes]:
        files = [*(root / "data").rglob("*"), root / "params.yaml"]
        return {path: path.read_bytes() for path in files if path.is_file()}

    before = seen()
    for left in (0, 12_288, 24_576, 40_960):
        refused(disk, left, add)
        assert seen() == before, left
    add()
    assert (root / "params.yaml").read_text() == "concepts: [mine]\n"


def test_the_command_line_says_it_in_one_line(disk: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(disk)
    monkeypatch.setattr("sys.argv", ["dopsd", "validate", "-c", "mine"])
    (disk / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with concept_lock("mine", disk, "before"):
        pass
    fill(disk, 0)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: disk full: runs/\.locks/mine\.json, 0\.000 MB free; .*\n", said), said


def test_what_is_known_is_said(disk: Path, tmp_path: Path) -> None:
    """Bytes that are needed, and those that are free once the half is gone; no more files; a quota, which is not the
    disk's; an error below another; and what is no full disk stays what it is."""
    import torch

    fill(disk, 1_200_000)
    with pytest.raises(DiskFull, match=r"t\.safetensors needs 4\.0 MB, 1\.2 MB free"):
        write_tensors(disk / "t.safetensors", {"a": torch.zeros(1_000_000)})
    free(disk)
    subprocess.run(["mount", "-o", "remount,nr_inodes=8", disk], check=True)
    for number in range(6):
        write_tensors(disk / f"{number}.safetensors", {})
    with pytest.raises(DiskFull, match=r"MB free, but no file more may be there;"):
        write_tensors(disk / "one/more.safetensors", {})
    quota = OSError(122, "Disk quota exceeded")
    assert re.fullmatch(rf"disk full: {tmp_path} \(your quota\); .*", str(disk_full(quota, tmp_path)))
    with pytest.raises(DiskFull, match=re.escape(f"{tmp_path}/x")), full_disk_said(tmp_path):
        raise ValueError from OSError(28, "No space left on device", str(tmp_path / "x"))
    assert not is_disk_full(OSError(13, "Permission denied"))
    other = RuntimeError("in another's place")
    other.__context__, other.__suppress_context__ = quota, True
    assert not is_disk_full(other)
