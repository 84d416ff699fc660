"""Data sets that pack their pictures: WebDataset's shards, Hugging Face's arrow and parquet files.

``dopsd concept add`` unpacks them into an ordinary concept folder, pictures and ``metadata.jsonl``. Nothing is written
under a path that stands there, no code is run, and neither rows nor bytes are without a limit. A layout is one entry of
:data:`PACKINGS`.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dialects import CAPTIONS
from .folders import is_leftover, kohya_repeats, says_held_out, says_regularisation
from .images import EXTENSIONS
from .records import MAX_TEXT_BYTES, SHOWN, shown
from .tables import names_pictures
from .text import decoded, folded

MAX_ROWS = 100_000
MAX_BYTES = 64 << 30
"""Of all that is read of a data set."""
_MAX_PICTURE_BYTES = 1 << 30
_MAX_JSON_BYTES = 1 << 20
_TOGETHER = 16
"""Rows whose pictures are in memory at once."""
_STARTS = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"RIFF": ".webp"}
_TAR_TEXTS = ("txt", "caption", "text")
_ROW_KEYS = ("captions", "repeats")
"""Columns that mean here what they are called."""
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""What arrow's stream of rows ends with."""


class PackedError(ValueError):
    """What is wrong with a packed data set: where, and what to do, in one line without the data set's name."""


@dataclass(frozen=True)
class Item:
    """A row with its picture. ``name``: what it is called there; ``ending``: of the picture's file. ``row``: what of
    it is kept; ``held_out``: whose name says that it is for testing, empty where none does."""

    name: str
    ending: str
    content: bytes
    row: Mapping[str, Any]
    held_out: str


@dataclass
class Seen:
    """What reading met beside the rows: columns that were ``ignored``, in order, and how many bytes it has read."""

    ignored: dict[str, None] = field(default_factory=dict)
    bytes: int = 0

    def take(self, name: str, size: int, most: int) -> None:
        """Count what is about to be read. Raises :class:`PackedError` where it is too much."""
        self.bytes += size
        if size > most:
            raise PackedError(f"{shown(name, SHOWN)}: {size:,} bytes, at most {most:,} are read; take it out")
        if self.bytes > MAX_BYTES:
            raise PackedError(f"more than {MAX_BYTES >> 30} GiB in all; give a part of it")


@dataclass(frozen=True)
class Packing:
    """``files``: of a path's files, relative, those that this layout is made of, or none. ``items``: their rows.
    Both raise :class:`PackedError`. ``beside``: names of files that go with them and hold no rows, as patterns."""

    name: str
    files: Callable[[Path, Sequence[str]], list[str]]
    items: Callable[[Path, str, Seen], Iterator[Item]]
    beside: tuple[str, ...] = ()


def _by_place(file: str, row: dict[str, Any], key: str = "") -> str:
    """Whose name says that a row is for testing; empty where none does. Its repeats are written into ``row`` where a
    folder is called as kohya's ``10_fox``. ``key``: its path in the file. Raises :class:`PackedError` for what folders
    of pictures are refused for too."""
    inside = key.rpartition("/")[0]
    folders, name = [*file.split("/")[:-1], *inside.split("/")], Path(file).name.partition(".")[0]
    repeats = next(iter(kohya_repeats(["/".join([*folders, ""])]).values()), None)
    regularisation = any(map(says_regularisation, (*folders, name)))
    if regularisation or repeats == 0:
        what = "regularisation pictures, which nothing here uses" if regularisation else "0 repeats, so leave it out"
        place = f"{file}: {shown(key, SHOWN)}" if key else file
        raise PackedError(f"{place}: a name there says {what}; pack it again without, or under another name")
    if repeats is not None:
        row.setdefault("repeats", repeats)
    return file if says_held_out(file) else f"{file}: {shown(inside, SHOWN)}/" if says_held_out(inside) else ""


# --- WebDataset -------------------------------------------------------------------------------------------------------


def _shards(root: Path, files: Sequence[str]) -> list[str]:
    return [file for file in files if file.lower().endswith((".tar", ".tar.gz", ".tgz"))]


def _of_shard(root: Path, shard: str, seen: Seen) -> Iterator[Item]:
    """Members of one key (the path up to the first dot of the name) that follow each other are a row."""
    try:
        with tarfile.open(root / shard, "r:") as file:
            key, sample = "", dict[str, bytes]()
            for member in file:
                own, ending = _key_of(shard, member)
                if not own:
                    continue
                if own != key and sample:
                    yield from _of_sample(shard, key, sample, seen)
                    sample = {}
                key = own
                if ending in sample:
                    raise PackedError(f"{shown(member.name, SHOWN)} is there twice; pack it again")
                content = _content(shard, file, member, ending, seen)
                if content is not None:
                    sample[ending] = content
            _check_end(root, shard, file.offset, seen)  # before the last row, which a damaged shard has half of
            if sample:
                yield from _of_sample(shard, key, sample, seen)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        problem = f"{shard}: cannot be read as a plain .tar ({shown(str(error), SHOWN)})"
        raise PackedError(f"{problem}; gunzip a compressed one, or fetch it again") from None


def _check_end(root: Path, shard: str, end: int, seen: Seen) -> None:
    """Two blocks of zeros or more end a tar: the library stops without a word at a damaged or a missing header too."""
    with (root / shard).open("rb") as file:
        seen.take(shard, max(0, os.fstat(file.fileno()).st_size - end), _MAX_PICTURE_BYTES)
        file.seek(end)
        read = 0
        while part := file.read(1 << 20):
            if part.count(0) < len(part):
                raise PackedError(f"{shard}: is damaged at byte {end:,}, or another .tar was added to it there; fetch "
                                  "it again, or give each .tar as a file of its own")  # fmt: skip
            read += len(part)
    if read < 2 * tarfile.BLOCKSIZE:
        raise PackedError(f"{shard}: ends too early, at byte {end:,}; fetch it again")


def _key_of(shard: str, member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and ending (lower case) of a member; empty for what is no part of the data. Raises :class:`PackedError` for
    what no shard has: links, devices, paths that leave."""
    name = shown(member.name, SHOWN)
    parts = member.name.replace("\\", "/").split("/")
    if member.name.startswith(("/", "\\")) or ".." in parts or re.match("[A-Za-z]:", parts[0]) or "\0" in member.name:
        raise PackedError(f"{shard}: {name} leaves the folder; pack it again with paths inside")
    if not (member.isfile() or member.isdir()):
        raise PackedError(f"{shard}: {name} is a link or a device; pack the file itself")
    meta = re.match(r"__[^/]*__($|/)", member.name)
    found = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name, re.DOTALL)
    if member.isdir() or meta or found is None or any(is_leftover(part) for part in parts if part != "."):
        return "", ""
    return found[1], found[2].lower()


def _content(shard: str, file: tarfile.TarFile, member: tarfile.TarInfo, ending: str, seen: Seen) -> bytes | None:
    """What is needed of a member; nothing of others, whose endings are noted."""
    texts = dict.fromkeys(_TAR_TEXTS, MAX_TEXT_BYTES) | {"json": _MAX_JSON_BYTES}
    picture = f".{ending}" in EXTENSIONS
    place, last = f"{shard}: {shown(member.name, SHOWN)}", ending.rpartition(".")[2]
    if last != ending and (f".{last}" in EXTENSIONS or last in _TAR_TEXTS):
        raise PackedError(f"{place}: has a dot in its name, at the first of which its ending begins; rename it")
    if not picture and ending not in texts:
        seen.ignored[shown(ending, SHOWN)] = None
        return None
    seen.take(member.name, member.size, _MAX_PICTURE_BYTES if picture else texts[ending])
    stream = file.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) < member.size:
        raise PackedError(f"{place} ends too early; fetch the shard again")
    return content


def _of_sample(shard: str, key: str, sample: Mapping[str, bytes], seen: Seen) -> Iterator[Item]:
    pictures = [ending for ending in sample if f".{ending}" in EXTENSIONS]
    texts = [ending for ending in _TAR_TEXTS if ending in sample]
    place = f"{shard}: {shown(key, SHOWN)}"
    if len(pictures) != 1 or len(texts) > 1:
        found = ", ".join(shown(ending, SHOWN) for ending in sample)
        raise PackedError(f"{place} has {found}: a row is one picture and one caption (.txt or .json), one after the "
                          "other (tar --sort=name)")  # fmt: skip
    values: Any = {}
    try:
        values = json.loads(decoded(sample["json"])) if "json" in sample else {}
        text = decoded(sample[texts[0]]) if texts else None
    except (ValueError, RecursionError) as error:
        raise PackedError(f"{place}: {shown(str(error), SHOWN)}; pack it again") from None
    values = values if isinstance(values, dict) else {"json": values}
    row = _row_of(values, place, seen, text, "json.")
    yield Item(key, f".{pictures[0]}", sample[pictures[0]], row, _by_place(shard, row, key))


def _row_of(values: Mapping[str, Any], place: str, seen: Seen, text: str | None = None, prefix: str = "") -> dict:
    """What of a row's columns is kept: its caption (``text``, where that is given beside them), and what has the same
    name here."""
    named = [name for name in CAPTIONS if isinstance(values.get(name), str)]
    row = {key: values[key] for key in _ROW_KEYS if values.get(key) is not None}
    if text is None and len(named) > 1:
        raise PackedError(f"{place}: {' and '.join(named)} are captions, each of them; leave one")
    if text is not None or named:
        row["caption"] = folded(values[named[0]] if text is None else text)
    used = {*_ROW_KEYS, *(named if text is None else ())}
    seen.ignored |= dict.fromkeys(prefix + shown(str(key), SHOWN) for key in values if key not in used)
    if not {"caption", "captions"} & set(row):
        known = ", ".join(shown(str(key), SHOWN) for key in list(values)[:8]) or "nothing else"
        raise PackedError(f"{place} has no caption ({', '.join(CAPTIONS)}); there is {known}")
    return row


# --- Hugging Face: arrow files of save_to_disk, and parquet with pictures in it ---------------------------------------


def _saved(root: Path, files: Sequence[str]) -> list[str]:
    """A folder that ``save_to_disk`` wrote: one with ``state.json``, or several below ``dataset_dict.json``. Raises
    :class:`PackedError` where a file that those name is missing."""
    listed, present = [], set(files)
    for about in (file for file in files if Path(file).name == "dataset_dict.json"):
        splits = _json_of(root, about).get("splits")
        listed += [about.replace("dataset_dict.json", f"{split}/state.json") for split in _texts(splits)]
    found = []
    for about in (file for file in files if Path(file).name == "state.json"):
        folder = about.removesuffix("state.json")
        if f"{folder}dataset_info.json" not in present:
            continue
        ones = _json_of(root, about).get("_data_files")
        ones = ones if isinstance(ones, list) else []
        names = _texts([one.get("filename") for one in ones if isinstance(one, dict)])
        if not names:
            raise PackedError(f"{about}: names no files of rows; save it again with save_to_disk")
        found += [folder + name for name in names]
    missing = [name for name in (*listed, *found) if name not in present]
    if missing:
        raise PackedError(f"{shown(missing[0], SHOWN)} is missing, {len(missing)} of {len(listed) + len(found)} files "
                          "that the data set names; copy all of it, or save it again with save_to_disk")  # fmt: skip
    return found


def _texts(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _json_of(root: Path, file: str) -> dict[str, Any]:
    """The object in a file. Raises :class:`PackedError` where there is none, or it is huge or nested without end."""
    with (root / file).open("rb") as stream:
        content = stream.read(_MAX_JSON_BYTES + 1)
    try:
        if len(content) > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(decoded(content))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise PackedError(f"{file}: cannot be read ({shown(str(error), SHOWN)}); save it again") from None
    return value


def _parquets(root: Path, files: Sequence[str]) -> list[str]:
    """Parquet whose pictures are in it; one with their paths is a table of a concept folder."""
    import pyarrow.parquet

    found = []
    for file in (file for file in files if file.lower().endswith(".parquet")):
        try:
            schema = pyarrow.parquet.read_schema(root / file)
            packs = _picture_columns(schema) and not names_pictures(schema, files)
        except Exception:  # pyarrow raises many kinds; what is wrong is said where it is read
            continue
        if packs:
            found.append(file)
    return found


def _picture_columns(schema: Any) -> list[str]:
    """Columns of bytes, or of Hugging Face's ``Image``: bytes and a path."""
    from pyarrow import types

    def packs(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(i).name == "bytes" and packs(kind.field(i).type) for i in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind)

    return [column.name for column in schema if packs(column.type)]


def _of_arrow(root: Path, file: str, seen: Seen) -> Iterator[Item]:
    import pyarrow

    if _json_of(root, Path(file).with_name("state.json").as_posix()).get("_indices_data_files"):
        raise PackedError(f"{file}: has an index beside it, as old versions wrote; save it again with save_to_disk")
    with pyarrow.memory_map(str(root / file)) as source, pyarrow.ipc.open_stream(source) as stream:
        yield from _of_batches(file, stream.schema, stream, seen)
        end = source.tell()
        source.seek(max(0, end - len(_END_OF_STREAM)))
        if source.read() != _END_OF_STREAM:  # the library takes any end of the file for the end of the rows
            raise PackedError(f"{file}: ends too early or is damaged at byte {end:,}; copy it again")


def _of_parquet(root: Path, file: str, seen: Seen) -> Iterator[Item]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(root / file) as source:
        about = source.metadata
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        if sum(group.num_rows for group in groups) != about.num_rows:  # the library reads as many as its groups say
            raise PackedError(f"{file}: is damaged: its parts have more or fewer rows than it has; fetch it again")
        if sum(group.total_byte_size for group in groups) > MAX_BYTES:
            raise PackedError(f"{file}: more than {MAX_BYTES >> 30} GiB; give a part of it")
        yield from _of_batches(file, source.schema_arrow, source.iter_batches(_TOGETHER), seen)


def _of_batches(file: str, schema: Any, batches: Any, seen: Seen) -> Iterator[Item]:
    columns, number = _picture_columns(schema), 0
    column = "image" if "image" in columns else columns[0] if len(columns) == 1 else ""
    if not column:
        found = ", ".join(columns) or "no column of pictures"
        raise PackedError(f"{file}: which column is the picture? It has {found}; rename that to image")
    kept = [name for name in schema.names if name in (column, *CAPTIONS, *_ROW_KEYS)]
    seen.ignored |= dict.fromkeys(shown(name, SHOWN) for name in schema.names if name not in kept)
    for batch in batches:
        batch.validate(full=True)
        few = (batch.slice(start, _TOGETHER) for start in range(0, batch.num_rows, _TOGETHER))
        for values in (row for part in few for row in part.select(kept).to_pylist(maps_as_pydicts="strict")):
            number += 1
            place = f"{file}, row {number}"
            picture = values.pop(column)
            path = (picture.get("path") or "") if isinstance(picture, dict) else ""
            content = picture.get("bytes") if isinstance(picture, dict) else picture
            if not content:
                raise PackedError(f"{place}: no picture in column {column}, only a path or nothing; save it with them")
            seen.take(place, len(content), _MAX_PICTURE_BYTES)
            texts = json.dumps(values, ensure_ascii=False, default=str).encode()
            seen.take(f"{place}, text", len(texts), MAX_TEXT_BYTES)  # a dictionary's one text is many in its rows
            present = {key: value for key, value in values.items() if value is not None}
            row = _row_of(present, place, seen)
            yield Item(Path(path).stem, _ending(path, content), content, row, _by_place(file, row))


def _ending(path: str, content: bytes) -> str:
    own = Path(path).suffix.lower()
    found = (ending for start, ending in _STARTS.items() if content.startswith(start))
    return own if own in EXTENSIONS else next(found, ".png")


PACKINGS = (
    Packing("WebDataset", _shards, _of_shard),
    Packing("Hugging Face data set on disk", _saved, _of_arrow,
            ("state.json", "dataset_info.json", "dataset_dict.json", "cache-*.arrow")),
    Packing("parquet with pictures", _parquets, _of_parquet),
)  # fmt: skip
