"""Files that are there whole or not at all, and whose bytes are the same whenever their content is."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes its place when the block ends well, and is gone when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: two that write the same file at one moment must not take each other's away
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A fresh folder beside ``path`` that takes its place, with all that was there, when the block ends well."""
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def link_or_copy(source: Path, target: Path) -> None:
    """``source`` under the name ``target`` too. Tensor files are replaced and never written into, so that on one disk a
    second name does, at no cost; all else is copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # it may be a name of something that is still in use
    if source.suffix == ".safetensors":
        with suppress(OSError):  # another disk, or one without links
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def size_of(*paths: Path) -> int:
    """Bytes that deleting files and folders frees. A file of several names frees its share: all of it when all go."""
    files = [file.lstat() for path in paths for file in [path, *path.rglob("*")] if not file.is_dir()]
    return sum(stat.st_size // stat.st_nlink for stat in files)


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of change and inode of every file below ``folder``: two equal ones, and nobody wrote meanwhile."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(FileNotFoundError):  # gone since it was looked at
                stat = path.stat()
                found[str(path)] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def write_json(path: Path, value: Any) -> None:
    """``value`` as readable JSON."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, warn: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """The object in a JSON file; nothing where it is missing; nothing, and a line to ``warn``, where it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        warn(f"{path} cannot be read ({error}); what it says is left out")
        return {}
    return value


class GrowingFile:
    """Lines that are added to a file; one that was put in the place of the old is read from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._position = self._lines = 0

    def new_lines(self, half: bool = False) -> Iterator[tuple[int, bytes]]:
        """Number (from 0) and content of the lines since the last call; ``half``: one without its end, too."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._file or about.st_size < self._position:
                self._file, self._position, self._lines = about.st_ino, 0, 0
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n") and not half:
                    return  # being written right now
                self._position, self._lines = self._position + len(line), self._lines + 1
                yield self._lines - 1, line


def append_line(path: Path, line: str) -> None:
    """One more line at the end of ``path``. Half a line that a kill left there becomes a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
            file.write(b"\n")
        file.write(line.encode() + b"\n")


def now() -> int:
    """Milliseconds since 1970, as all files of a run have their times."""
    return int(time.time() * 1000)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room. Safetensors has an error of its own, which says it in words."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    found = re.search(r"(?:os error |code: )(\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return found is not None and int(found[1]) in _NO_ROOM


_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's types as safetensors calls them."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:  # fmt: skip
    """Safetensors, from any device, with one tensor's copy in memory at a time; each as its type in ``dtypes``, where
    that has one.

    The library would collect all of them first. It also writes its metadata in an order that changes from process to
    process: two equal trainings would give files with equal tensors and other bytes, and whoever compares files would
    call them different.
    """
    import torch

    typed = {key: (dtypes or {}).get(key, tensor.dtype) for key, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # as the library orders them: the widest types first, so that each is aligned
    order, end = sorted(tensors, key=lambda key: (-typed[key].itemsize, key)), 0
    for key in order:
        begin, end = end, end + tensors[key].numel() * typed[key].itemsize
        name = _TYPES[str(typed[key]).removeprefix("torch.")]
        header[key] = {"dtype": name, "shape": list(tensors[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = tensors[key].detach().to("cpu", typed[key]).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
