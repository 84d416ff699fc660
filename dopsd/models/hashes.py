"""What a model's files are, by their content: 30 GB are read once, then known by size, time and inode."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .folder import INDEX, ModelError, Source, read_json

HASHES = Path(".cache/model-files.json")
"""In a project: what is remembered."""
_SAME_TICK = 2.0
"""A file younger than this may be written again without a change of size and time; its hash is not remembered."""
_BAR_FROM = 2**30


def identity(source: Source, cache: Path, parts: Sequence[str] | None = None) -> dict[str, str]:
    """What a source's components are, by name: the hub's name and commit, or a hash over names and whole contents.

    ``""`` is the index of a pipeline, else all files at the top. ``parts``: which components (``None``: all). Hashes of
    files are remembered in ``cache`` (JSON) by real path, size, time and inode, so that a base is read once.
    Raises :class:`ModelError` where a component is missing or cannot be read.
    """
    files = {part: _files(source, part) for part in (_parts(source) if parts is None else parts)}
    if source.name and source.revision:
        return {part: f"{source.name}@{source.revision}/{part}" for part in files}
    hashes = _hashes(source, {file for group in files.values() for file in group.values()}, cache)
    return {
        part: hashlib.sha256("".join(f"{name}\0{hashes[group[name]]}\n" for name in sorted(group)).encode()).hexdigest()
        for part, group in files.items()
    }


def content_hash(path: Path, cache: Path) -> str:
    """The hash of one file, or of a folder with its names, remembered in ``cache`` as :func:`identity` does. Raises
    :class:`ModelError`."""
    source = Source(path)
    if path.is_dir():
        return identity(source, cache, [""])[""]
    return _hashes(source, [path.resolve()], cache)[path.resolve()]


def _parts(source: Source) -> list[str]:
    if not source.folder.is_dir():
        raise ModelError(f"{source.shown}: no such folder")
    folders = sorted(p.name for p in source.folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if (source.folder / INDEX).is_file():  # pictures for the README, say, are no component
        index = read_json(source.folder / INDEX, f"{source.shown}: {INDEX}")
        folders = [name for name in folders if name in index or name == "vlm"]
    return ["", *folders]


def _files(source: Source, part: str) -> dict[str, Path]:
    """A component's files: real paths by name within its folder."""
    folder = source.folder / part
    if not folder.is_dir():
        raise ModelError(f"{source.shown}: the folder {part}/ is missing; {source.again(part)}")
    if part:
        found: Iterable[Path] = folder.rglob("*")
    else:
        found = [folder / INDEX] if (folder / INDEX).is_file() else folder.iterdir()
    files = {}
    for path in found:
        name = path.relative_to(folder)
        hidden = any(piece.startswith(".") for piece in name.parts)
        if hidden or path.suffix.lower() == ".md" or path.name.startswith("README") or path.is_dir():
            continue
        if not path.exists():
            raise ModelError(f"{source.shown}: {Path(part, name)} is a link to nothing; {source.again(part)}")
        files[name.as_posix()] = path.resolve()
    return files


def _hashes(source: Source, files: Collection[Path], cache: Path) -> dict[Path, str]:
    """The files' hashes, remembered or made; what was made is remembered even where a person interrupts."""
    known = _remembered(cache)
    hashes: dict[Path, str] = {}
    stats = {file: file.stat() for file in files}
    for file, stat in stats.items():
        entry = known.get(str(file))
        if isinstance(entry, list) and entry[:-1] == _stamp(stat) and re.fullmatch("[0-9a-f]{64}", str(entry[-1])):
            hashes[file] = entry[-1]
    missing = sorted(set(files) - set(hashes))
    computed: dict[str, list[int | str]] = {}
    total = sum(stats[file].st_size for file in missing)
    hidden = None if total > _BAR_FROM else True
    bar = tqdm(total=total, desc=f"hashing {source.shown}", unit="B", unit_scale=True, disable=hidden)
    try:
        for file in missing:
            begun = time.time()
            hashes[file], stat = _hash(source, file, bar)
            if abs(begun - stat.st_mtime) > _SAME_TICK:
                computed[str(file)] = [*_stamp(stat), hashes[file]]
    finally:
        bar.close()
        _remember(cache, computed)
    return hashes


def _hash(source: Source, file: Path, bar: Any) -> tuple[str, os.stat_result]:
    """A file's hash, and what the file was meanwhile."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as handle:
            before = os.fstat(handle.fileno())
            while chunk := handle.read(4 << 20):
                digest.update(chunk)
                bar.update(len(chunk))
            changed = _stamp(before) != _stamp(os.fstat(handle.fileno()))
    except OSError as error:
        raise ModelError(f"{source.shown}: {file.name} cannot be read ({error.strerror})") from None
    if changed:
        raise ModelError(f"{source.shown}: {file.name} is being written; wait until the copy is complete")
    return digest.hexdigest(), before


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _remembered(cache: Path) -> dict[str, Any]:
    try:
        files = json.loads(cache.read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _remember(cache: Path, computed: Mapping[str, list[int | str]]) -> None:
    """Add to the cache, whole or not at all. Of two processes the later wins: what the other made is made again."""
    if not computed:
        return
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"files": {**_remembered(cache), **computed}}, indent=1), "utf-8")
        partial.replace(cache)
    except OSError:  # a disk that cannot be written to costs time, no more
        with suppress(OSError):
            partial.unlink()
