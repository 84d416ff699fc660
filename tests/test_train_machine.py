"""What a training tells of the machine it runs on."""

from __future__ import annotations

import threading

import pytest
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

from dopsd.train import machine
from tests import tiny


class _Listener(tiny.Recorder):
    """Somebody can wait for news."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, dict[str, float]]] = []
        self.enough = threading.Event()

    def metrics(self, step, values) -> None:
        self.told.append((step, dict(values)))
        if len(self.told) == 3:
            self.enough.set()


def test_the_numbers_come_under_the_names_that_mlflow_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    listener = _Listener()
    with machine.MachineLoad(listener):
        assert listener.enough.wait(60)
    assert [step for step, _ in listener.told] == list(range(len(listener.told)))
    known = set()
    for monitor in (CPUMonitor(), DiskMonitor()):
        monitor.collect_metrics()
        known |= {f"system/{name}" for name in monitor.aggregate_metrics()}
    _, last = listener.told[-1]
    of_gpus = {name for name in last if name.startswith("system/gpu_")}
    assert set(last) - of_gpus - known == {"system/network_receive_megabytes", "system/network_transmit_megabytes"}
    assert 0 < last["system/system_memory_usage_percentage"] < 100
    assert all(value >= 0 for value in last.values())


def test_a_short_run_has_one_look_and_a_failed_one_ends_the_thread() -> None:
    listener = _Listener()
    with machine.MachineLoad(listener):
        pass
    assert len(listener.told) == 1
    before = threading.active_count()
    with pytest.raises(RuntimeError), machine.MachineLoad(listener):
        raise RuntimeError
    assert threading.active_count() == before
