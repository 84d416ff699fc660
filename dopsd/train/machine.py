"""How busy the machine is that trains: what MLflow's page "System metrics" shows.

MLflow's own monitor writes to the tracker by itself, where training would have to see the tracker, and loses what
comes during an outage. These numbers go into the run's folder as all others do, under the same names:
``system.jsonl``, a row ``{"time": ms, "system/...": ...}`` for each look. Rows are only ever added, also on resume.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
import torch

from dopsd.files import append_line, now
from dopsd.train.observer import Observer

SYSTEM_FILE = "system.jsonl"
SECONDS = 10.0
"""Between two looks."""
_MB = 1e6


class MachineLoad:
    """While it is entered, a thread adds a row to the file in ``folder`` every :data:`SECONDS`, and one at the end."""

    def __init__(self, folder: Path, observer: Observer) -> None:
        self._path, self._observer = folder / SYSTEM_FILE, observer
        self._failed = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="machine load", daemon=True)

    def __enter__(self) -> None:
        self._network = psutil.net_io_counters()
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._failed = error is not None
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        psutil.cpu_percent()  # since the last time that this thread asked: the first answer says nothing
        while not self._over.wait(SECONDS):
            self._write()
        if not self._failed:
            self._write()

    def _write(self) -> None:
        line = json.dumps({"time": now(), **{f"system/{key}": value for key, value in self._look().items()}})
        with suppress(OSError):  # where the disk is full, training itself says so
            append_line(self._path, line)
            self._observer.wrote(self._path, line)

    def _look(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(".")
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MB,
        }
        before, now = self._network, psutil.net_io_counters()
        if before is not None and now is not None:  # a container may have no network
            found["network_receive_megabytes"] = (now.bytes_recv - before.bytes_recv) / _MB
            found["network_transmit_megabytes"] = (now.bytes_sent - before.bytes_sent) / _MB
        if torch.cuda.is_initialized():
            found |= _gpus()
        return found


def _gpus() -> dict[str, float]:
    found: dict[str, float] = {}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found[f"gpu_{number}_memory_usage_megabytes"] = (total - free) / _MB
        found[f"gpu_{number}_memory_usage_percentage"] = 100 * (total - free) / total
        if importlib.util.find_spec("pynvml"):
            found[f"gpu_{number}_utilization_percentage"] = torch.cuda.utilization(number)
    return found
