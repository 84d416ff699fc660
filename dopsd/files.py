"""Files that are there whole or not at all, and whose bytes are the same whenever their content is."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PARTIAL = ".partial"
_OF_A_FILE = re.compile(r".+\.\d+-\d+\.partial")


@contextmanager
def whole_file(path: Path, needs: int = 0) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes its place when the block ends well, and is gone when it does not.

    ``needs``: its bytes, where they are known beforehand. Raises :class:`DiskFull` where there is no room for it.
    """
    # a name of its own: two that write the same file at one moment must not take each other's away
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    with _gone_on_failure(partial, path, needs):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A fresh folder beside ``path`` that takes its place, with all that was there, when the block ends well; it is
    gone when it does not. Raises :class:`DiskFull` where there is no room for it."""
    partial, before = path.with_name(path.name + PARTIAL), path.with_name(f"{path.name}.before{PARTIAL}")
    if before.exists() and not path.exists():  # a kill between the two renamings
        before.rename(path)
    for leftover in (partial, before):
        shutil.rmtree(leftover, ignore_errors=True)
    with _gone_on_failure(partial, path):
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rename(before)  # and not deleted where it is: a kill would leave half of it under its name
        try:
            partial.rename(path)
        except OSError:
            if before.exists():
                before.rename(path)
            raise
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def _gone_on_failure(partial: Path, place: Path, needs: int = 0) -> Iterator[None]:
    """Where the block fails, take away what it wrote to ``partial``: on a full disk the next try needs its room."""
    try:
        yield
    except BaseException as error:
        written = size_of(partial) if os.path.lexists(partial) else 0
        remove(partial)
        if isinstance(error, Exception) and is_disk_full(error):
            raise disk_full(error, place, needs, written) from error
        raise


def is_partial(name: str) -> bool:
    """Whether it is what :func:`whole_file` calls a file that is being written."""
    return _OF_A_FILE.fullmatch(name) is not None


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, as far as that can be; what is not there is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def copy_files(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy the files ``names`` of one folder into another, in the folders that they are in; links become files."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


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


# --- a disk that is full ----------------------------------------------------------------------------------------------

_NO_ROOM = {errno.ENOSPC: "", errno.EDQUOT: " (your quota)", errno.EFBIG: " (a file may not be so large there)"}


class DiskFull(OSError):
    """A write that failed for want of room; its text is one line for a person. With room made, the same may be done
    again, and goes on from what was saved."""

    def __str__(self) -> str:
        return str(self.args[1])


def is_disk_full(error: BaseException) -> bool:
    """Whether it, or what it was raised from, is a write that failed for want of room."""
    return _no_room(error) is not None


def disk_full(error: BaseException, place: Path, needs: int = 0, written: int = 0) -> DiskFull:
    """An error of :func:`is_disk_full` as one that says where, and what is known of the room. ``place``: what was to be
    written; ``needs``: its bytes; ``written``: those that had room."""
    code, cause = _no_room(error) or (errno.ENOSPC, error)
    if isinstance(cause, DiskFull):
        return cause
    room = [f"needs {_megabytes(needs)}" if needs else f"needs more than {_megabytes(written)}" if written else ""]
    room += [_free(place)] if code == errno.ENOSPC else []
    known = ", ".join(filter(None, room))
    said = f"{place}{_NO_ROOM[code]}" + (f" {known}" if room[0] else f", {known}" if known else "")
    return DiskFull(code, f"disk full: {said}; make room, then start it again: what was saved is whole")


@contextmanager
def full_disk_said(place: Path) -> Iterator[None]:
    """A write of the block that had no room is a :class:`DiskFull`. ``place``: where it writes, as far as the error
    does not know better."""
    try:
        yield
    except Exception as error:
        if (found := _no_room(error)) is not None:
            named = getattr(found[1], "filename", None)
            raise disk_full(error, Path(named) if isinstance(named, str | os.PathLike) else place) from error
        raise


def _no_room(error: BaseException | None) -> tuple[int, BaseException] | None:
    """The number of the system's error, and whose it is: the error's own, or that of one which it was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error.errno, error
        # safetensors' errors have a text and no number, SQLite's a number of its own: 13
        theirs = type(error).__name__ == "SafetensorError"
        if theirs and (found := re.search(r"(?:os error |code: )(\d+)", str(error))) and int(found[1]) in _NO_ROOM:
            return int(found[1]), error
        if getattr(error, "sqlite_errorcode", None) == 13:
            return errno.ENOSPC, error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _free(place: Path) -> str:
    """What is free where ``place`` is, or would be."""
    there = next((path for path in (place, *place.absolute().parents) if path.exists()), None)
    if there is None:
        return ""
    stat = os.statvfs(there)
    no_names = stat.f_files > 0 and stat.f_favail == 0
    return f"{_megabytes(stat.f_bavail * stat.f_frsize)} free" + (", but no file more may be there" * no_names)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{1 if count >= 1e5 else 3}f} MB"


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
    with whole_file(path, 8 + len(text) + end) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = tensors[key].detach().to("cpu", typed[key]).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
