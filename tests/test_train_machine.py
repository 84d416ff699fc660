"""What a training tells of the machine it runs on."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

from dopsd.train import machine
from tests import tiny


class _Listener(tiny.Recorder):
    """Somebody can wait for three looks."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.enough = threading.Event()

    def wrote(self, path: Path, line: str | None = None) -> None:
        assert path.name == machine.SYSTEM_FILE
        self.looks += 1
        if self.looks == 3:
            self.enough.set()


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / machine.SYSTEM_FILE).read_text().splitlines()]


def test_the_numbers_come_under_the_names_that_mlflow_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    listener = _Listener()
    with machine.MachineLoad(tmp_path / "run", listener):
        assert listener.enough.wait(60)
    rows = _rows(tmp_path / "run")
    assert len(rows) == listener.looks
    times = [row.pop("time") for row in rows]
    assert times == sorted(times)
    known = set()
    for monitor in (CPUMonitor(), DiskMonitor()):
        monitor.collect_metrics()
        known |= {f"system/{name}" for name in monitor.aggregate_metrics()}
    last = rows[-1]
    of_gpus = {name for name in last if name.startswith("system/gpu_")}
    assert set(last) - of_gpus - known == {"system/network_receive_megabytes", "system/network_transmit_megabytes"}
    assert 0 < last["system/system_memory_usage_percentage"] < 100
    assert all(value >= 0 for value in last.values())


def test_a_short_run_has_one_look_and_a_failed_one_ends_the_thread(tmp_path: Path) -> None:
    """A second run goes on in the same file, also behind half a line that a kill left."""
    with machine.MachineLoad(tmp_path, _Listener()):
        pass
    assert len(_rows(tmp_path)) == 1
    with (tmp_path / machine.SYSTEM_FILE).open("a") as file:
        file.write('{"time": 1')
    before = threading.active_count()
    with pytest.raises(RuntimeError), machine.MachineLoad(tmp_path, _Listener()):
        raise RuntimeError
    assert threading.active_count() == before
    with machine.MachineLoad(tmp_path, _Listener()):
        pass
    lines = (tmp_path / machine.SYSTEM_FILE).read_text().splitlines()
    assert lines[1] == '{"time": 1'
    assert json.loads(lines[2])["time"] > 1
