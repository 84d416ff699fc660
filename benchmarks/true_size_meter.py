"""Seconds, bytes and kernels: how ``benchmarks/true_size.py`` measures, whatever it measures."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

_GROUPS = (
    ("attention", r"flash|fmha|attention|sdpa|efficient_"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|\bmm\b|addmm|bmm|linear|conv"),
    ("casts and copies", r"copy|memcpy|memset|catarray|_to_copy|fill|\bcat\b|clone"),
    ("optimizer and EMA", r"multi_tensor|adam|lerp|foreach"),
    ("element-wise, norms, sums", r"elementwise|reduce|norm|triton|softmax|silu|gelu|mul|add|sum|mean|pow|rsqrt|div"),
)
"""Kernels by what their names hold, the first that fits."""


def kernel_table(totals: dict[str, list[float]], wall: float, path: Path) -> Row:
    """Groups and shares of ``name -> [ms, calls]``, and how much of the step's time kernels ran."""
    whole = sum(ms for ms, _ in totals.values()) or 1.0
    groups: dict[str, list[float]] = {name: [0.0, 0] for name, _ in _GROUPS} | {"other": [0.0, 0]}
    placed = {}
    for name, (ms, calls) in totals.items():
        group = next((g for g, pattern in _GROUPS if re.search(pattern, name.lower())), "other")
        placed[name] = group
        groups[group][0] += ms
        groups[group][1] += calls
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])
    lines = [f"one optimizer step, {wall:.3f} s; kernels {whole / 1e3:.3f} s", ""]
    lines += [f"{ms:10.1f} ms {ms / whole:6.1%} {calls:8.0f} x  {group}" for group, (ms, calls) in groups.items()]
    lines += ["", "the 25 longest"]
    lines += [f"{ms:10.1f} ms {ms / whole:6.1%} {n:8.0f} x  [{placed[k]}] {k[:160]}" for k, (ms, n) in ranked[:25]]
    for group in groups:  # what the patterns may have put wrongly can be seen
        lines += ["", f"the longest of: {group}"]
        found = [(k, v) for k, v in ranked if placed[k] == group][:8]
        lines += [f"{ms:10.1f} ms {n:8.0f} x  {k[:160]}" for k, (ms, n) in found]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "wall_seconds": wall, "kernel_seconds": whole / 1e3, "busy_share": whole / 1e3 / wall,
        "groups": {k: {"ms": ms, "share": ms / whole, "calls": int(n)} for k, (ms, n) in groups.items()},
        "longest": [{"ms": ms, "calls": int(n), "name": k[:160], "group": placed[k]} for k, (ms, n) in ranked[:25]],
    }  # fmt: skip


class Meter:
    """Time and memory of a GPU; on a CPU the process's clock and resident pages."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long it takes, what it left running on the device included."""
        self._sync()
        started = time.perf_counter()
        work()
        self._sync()
        return time.perf_counter() - started

    def median(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """Seconds of short work, each repeat between two events of the device."""
        started = time.perf_counter()
        while time.perf_counter() - started < 0.3:  # an idle card needs a while to raise its clocks
            work()
            self._sync()
        if not self.cuda:
            return statistics.median(self.seconds(work) for _ in range(repeats))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in marks:
            before.record()
            work()
            after.record()
        self._sync()
        return statistics.median(before.elapsed_time(after) for before, after in marks) / 1e3

    def reset(self) -> int:
        """Start a new peak; what is resident now."""
        if self.cuda:
            self._sync()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5", encoding="utf-8")
        return _pages("VmRSS")

    def peak(self) -> int:
        """The most since :meth:`reset`."""
        return torch.cuda.max_memory_allocated() if self.cuda else _pages("VmHWM")

    @contextmanager
    def stage(self, into: list[Row], what: str) -> Iterator[None]:
        """Add a row about the work inside the block."""
        resident = self.reset()
        started = time.perf_counter()
        yield
        self._sync()
        seconds = time.perf_counter() - started
        into.append({"what": what, "seconds": seconds, "resident_bytes": resident, "peak_bytes": self.peak()})

    def _sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def _pages(name: str) -> int:
    """A line of Linux's own account of this process; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
