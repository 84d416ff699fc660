"""A disk of a test's own that can be filled; to be made a fixture of."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """``size`` as ``mount`` has it, such as ``16m``. Skips the test where none can be mounted."""
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave ``left`` bytes."""
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    with (disk / "ballast").open("rb+") as file:
        file.truncate(max(0, (disk / "ballast").stat().st_size - left))


def free(disk: Path) -> None:
    """Undo :func:`fill`."""
    (disk / "ballast").unlink()
