"""A concept's lock: held by one, whoever holds it is named, and it ends with its process however that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from dopsd.lock import ConceptBusy, concept_lock, end_with_dvc

ROOT = Path(__file__).parent.parent

HOLDER = """
import sys
from pathlib import Path
from dopsd.lock import concept_lock
with concept_lock("mine", Path(sys.argv[1]), "dopsd train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_one_is_told_who_holds_it(tmp_path: Path) -> None:
    with concept_lock("mine", tmp_path, "dopsd train"):
        with pytest.raises(ConceptBusy, match="mine is held by `dopsd train` ") as caught:
            concept_lock("mine", tmp_path, "dopsd evaluate").__enter__()
        assert f"process {os.getpid()} on " in str(caught.value)
        with concept_lock("other", tmp_path, "dopsd train"):
            pass
    with concept_lock("mine", tmp_path, "dopsd evaluate"):
        pass
    assert [path.name for path in (tmp_path / "runs/.locks").iterdir() if path.suffix == ".json"] == []


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ConceptBusy, match=f"process {child.pid} on "):
        concept_lock("mine", tmp_path, "dopsd evaluate").__enter__()
    child.kill()
    child.communicate()
    with concept_lock("mine", tmp_path, "dopsd evaluate"):
        held = json.loads((tmp_path / "runs/.locks/mine.json").read_text())
    assert held["pid"] == os.getpid(), "what the killed one left is written over"


def test_who_waits_says_so_and_goes_on_when_it_is_free(tmp_path: Path) -> None:
    told, waits = [], threading.Event()

    def message(text: str) -> None:
        told.append(text)
        waits.set()

    def second() -> None:
        with concept_lock("mine", tmp_path, "flow run x", 600, message):
            told.append("got it")

    with concept_lock("mine", tmp_path, "dopsd train"):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(60)
    thread.join(60)
    assert "`dopsd train`" in told[0]
    assert "10 minutes at most" in told[0]
    assert told[1] == "got it"


def test_a_holder_file_that_is_damaged_hides_nobody(tmp_path: Path) -> None:
    with concept_lock("mine", tmp_path, "dopsd train"):
        (tmp_path / "runs/.locks/mine.json").write_text("")
        with pytest.raises(ConceptBusy, match="mine is held by another process"):
            concept_lock("mine", tmp_path, "x").__enter__()


STAGE = """
import os, signal
from pathlib import Path
from dopsd.lock import concept_lock, end_with_dvc
with concept_lock("mine", Path(), "dopsd train", end_with_dvc()):
    again = Path("go").exists()
    print("begun", os.getpid(), flush=True)
    if not again:
        signal.pause()
    Path("out").write_text("made")
"""


def test_a_python_that_cannot_wait_for_processes_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """conda's, for one."""
    monkeypatch.setenv("DVC_STAGE", "train@mine")
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert end_with_dvc() == 0.0


def test_a_stage_ends_with_the_dvc_that_called_it_and_the_next_repro_goes_through(tmp_path: Path) -> None:
    """``kill -9`` of ``dvc repro`` alone: nobody would write down what the stage went on to make. It is called in
    a stage of another."""
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(f"stages: {{s: {{cmd: '{sys.executable} stage.py', outs: [out]}}}}\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "SHELL": "/bin/sh",
                   "DVC_STAGE": "outer"}  # fmt: skip

    def dvc(*command: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "dvc", *command], cwd=tmp_path, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    assert dvc("init", "-q", "--no-scm").wait() == 0
    first = dvc("repro")
    assert first.stdout is not None
    stage = next(int(line.split()[1]) for line in first.stdout if line.startswith("begun"))
    first.kill()
    first.wait()  # else it still counts as a process
    (tmp_path / "go").touch()
    second = dvc("repro")
    said, _ = second.communicate()
    with suppress(ProcessLookupError):
        os.kill(stage, signal.SIGKILL)  # where it did not end
    assert second.returncode == 0, said
    assert (tmp_path / "out").read_text() == "made"
