"""The tracker as one SQLite file: several clones of a project that use it at once, and one that is killed with it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tracked import Folder, Log, history_of, in_haste

ROOT = Path(__file__).parent.parent
in_haste = pytest.fixture(in_haste, autouse=True)
SCRIPT = """
import sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from tests.tracked import Folder
folder, kill_at, seen = Folder(Path(sys.argv[1]), "mine"), int(sys.argv[2]), []

@event.listens_for(Engine, "before_cursor_execute")
def _(*_):
    seen.append(0)
    if len(seen) == kill_at:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

for step in range(300):
    folder.step(step)
sys.stdin.readline()
sys.exit(not folder.send())
"""


def clone(place: Path, uri: str, kill_at: int = 0) -> subprocess.Popen[str]:
    """A process that sends a run of its own once it is told to."""
    command = [sys.executable, "-c", SCRIPT, str(place), str(kill_at)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, text=True)


def test_two_clones_begin_one_file_at_one_moment_and_both_have_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    clones = [clone(tmp_path / name, f"sqlite:///{tmp_path}/{way}mlflow.db") for name, way in (("a", ""), ("b", "./"))]
    for one in clones:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.close()
    assert [one.wait() for one in clones] == [0, 0]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        (rows,) = database.execute("select count(*) from metrics where key = 'train/loss'").fetchone()
    assert rows == 600


@pytest.mark.parametrize("statement", [40, 200])
def test_killed_while_the_file_is_made_the_next_one_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: int
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    one = clone(tmp_path / "a", uri, statement)
    one.communicate("go\n")
    assert one.returncode == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder = Folder(tmp_path / "b", "mine")
    folder.step(1)
    assert folder.send()
    assert history_of(folder) == [(1, 0.5)]
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "b", "mlflow.db", ".mlflow.db.lock"}


def test_a_file_that_another_process_has_locked_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder, log = Folder(tmp_path, "mine"), Log()
    folder.step(1)
    assert folder.send()
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    with folder.sender(log) as sender:
        other.execute("begin exclusive")
        folder.step(2)
        sender.wake()
        log.wait("database is locked")
        folder.step(3)
        other.execute("rollback")
        log.wait("answers again")
    other.close()
    assert [step for step, _ in history_of(folder)] == [1, 2, 3]
    assert not any("not all of" in line for line in log)
