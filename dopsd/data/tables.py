"""Tables of rows: JSON lines, CSV and parquet, in whichever dialect (:mod:`dopsd.data.dialects`) they are written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dialects import OWN, Reading, files_by_name, image_keys, reading_of
from .folders import HOLDOUT
from .images import EXTENSIONS
from .records import KEYS, MAX_TEXT_BYTES, SHOWN, Record, describe_unknown, read_text, shown, to_record

TABLES = (".jsonl", ".csv", ".parquet")
_MAX_BYTES = 256 << 20
_MAX_PARQUET_ROWS = 10_000_000
_TOGETHER = 1024
"""Rows of a parquet that are in memory beside those that were read."""
_Numbered = Iterable[tuple[int, Any]]
_Faults = list[tuple[str | None, str]]


@dataclass(frozen=True)
class Table:
    """``records``: the rows, and first what is wrong with the file as a whole. ``dialect``: whose words they are in.
    ``ignored``: the columns that were left aside."""

    records: list[Record]
    dialect: str = OWN
    ignored: tuple[str, ...] = ()


def read_rows(folder: Path, source: str, files: Sequence[str]) -> Table:
    """The rows of ``folder/source``; ``files``: the data set's, for the paths that are meant."""
    whole = Record(source, 0)
    read = {".csv": _csv, ".parquet": _parquet}.get(Path(source).suffix.lower(), _json_lines)
    try:
        numbered = list(read(folder, source, whole))
    except ValueError as error:
        whole.problems.append((None, str(error)))
        numbered = []
    if whole.problems and not numbered:
        return Table([whole])
    keys = dict.fromkeys(key for _, value in numbered if isinstance(value, dict) for key in value)
    reading = reading_of(keys)
    if reading.fault:
        return Table([Record(source, 0, problems=[*whole.problems, (None, reading.fault)])], reading.name)
    place, known = source.rpartition("/")[0], files_by_name(files)
    if folder.name == HOLDOUT and not (folder / HOLDOUT).exists():  # written from the data set's top
        known = {f"{HOLDOUT}/{name}": file for name, file in known.items()} | known
    records = [_record(source, number, value, reading, place, known) for number, value in numbered]
    return Table([*([whole] if whole.problems else []), *records], reading.name, reading.ignored)


def _record(source: str, number: int, value: Any, reading: Reading, place: str, known: Mapping[str, str]) -> Record:
    if isinstance(value, Record):
        return value
    return to_record(source, number, reading.row(value, place, known))


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _json_lines(folder: Path, source: str, whole: Record) -> Iterator[tuple[int, Any]]:
    """Number and value of every line that is not blank; a :class:`Record` where it is no JSON."""
    text = read_text(folder / source, whole, _MAX_BYTES)
    for number, line in enumerate((text or "").split("\n"), start=1):
        if line.strip():
            yield number, _value(source, number, line)


def _value(source: str, number: int, line: str) -> Any:
    try:
        value = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
        return _without_nulls(value) if isinstance(value, dict) else value
    except RecursionError:
        problem = "not valid JSON: nested too deeply; write one flat object"
    except ValueError as error:
        problem = f"not valid JSON: {shown(str(error), SHOWN)}; write one object a line"
    return Record(source, number, problems=[(None, problem)])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# --- tables with columns ----------------------------------------------------------------------------------------------


def _csv(folder: Path, source: str, whole: Record) -> Iterator[tuple[int, Any]]:
    """Number (as a spreadsheet has it: the header is 1) and value of every row; an empty cell is none. Commas, or what
    spreadsheets of other countries write."""
    text = read_text(folder / source, whole, _MAX_BYTES)
    if text is None:
        return
    lines = io.StringIO(text, newline=None)  # CR alone ends a line too: "CSV (Macintosh)"
    head = lines.readline()[:10_000]
    lines.seek(0)
    comma = next((sign for sign in ",;\t" if set(next(csv.reader([head], delimiter=sign), ())) & {*image_keys()}), ",")
    rows = csv.reader(lines, delimiter=comma, strict=True)
    try:
        names = next(rows, [])
        _check_columns(names)
        kept = {*_kept(names, whole)}
        for number, cells in enumerate(rows, start=2):
            if len(cells) > len(names):
                problem = (
                    f"has {len(cells)} cells, and there are {len(names)} columns; put a caption with commas in quotes"
                )
                yield number, Record(source, number, problems=[(None, problem)])
            elif cells:
                yield number, {name: cell for name, cell in zip(names, cells, strict=False)
                              if name in kept and cell.strip()}  # fmt: skip
    except csv.Error as error:
        raise ValueError(f"cannot be read as CSV: {error} (line {rows.line_num}); write it again") from None


def _check_columns(names: Sequence[str]) -> None:
    if not set(names) & {*image_keys()}:
        columns = ", ".join(shown(name, SHOWN) for name in names[:8]) or "none"
        raise ValueError(f"no column names the pictures ({', '.join(image_keys())}); its columns are: {columns}")
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name; rename or remove one")


def _kept(names: Sequence[str], whole: Record) -> list[str]:
    """Of a table in this project's words the known columns: that others are there is one fault of the file."""
    unknown = [name for name in names if name not in KEYS] if reading_of(names).name == OWN else []
    if unknown:
        whole.problems.append((None, describe_unknown(unknown)))
    return [name for name in names if name not in unknown]


def _parquet(folder: Path, source: str, whole: Record) -> Iterator[tuple[int, Any]]:
    """Number and value of every row; of columns that are left aside the first row has the names alone."""
    import pyarrow.parquet

    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(folder / source) as file:
            names = file.schema_arrow.names
            _check_parquet(file.metadata)
            if len(set(names)) < len(names):
                raise ValueError("two columns have the same name")
            columns, ignored = _kept(names, whole), reading_of(names).ignored
            aside = [name for name in columns if shown(name, SHOWN) in ignored]
            columns = [name for name in columns if name not in aside]
            leaves = (file.schema.column(i) for i in range(len(file.schema)))
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # As dictionaries, as they lie there: one text that a thousand rows have takes no more room than one.
        with pyarrow.parquet.ParquetFile(folder / source, read_dictionary=texts) as file:
            size = 0
            for batch in file.iter_batches(_TOGETHER, columns=columns) if columns else ():
                size += sum(_size_of_texts(*named) for named in zip(batch.schema.names, batch.columns, strict=True))
                if size > _MAX_BYTES:
                    raise ValueError("far too large; it should hold captions and paths only")
                rows += batch.to_pylist(maps_as_pydicts="strict")
    # pyarrow raises errors of many kinds on damaged files, and all of them mean the same to a person.
    except Exception as error:
        problem = f"cannot be read as parquet: {shown(' '.join(str(error).split()), SHOWN)}; write it again"
        raise ValueError(problem) from None
    for number, row in enumerate(rows, start=1):
        yield number, _without_nulls(row | dict.fromkeys(aside if number == 1 else (), True))


def names_pictures(schema: Any, files: Sequence[str]) -> bool:
    """Whether a parquet with these columns, beside ``files``, is a table of rows, though it has bytes too (a hash): one
    of the keys that name a picture is a text there, no column holds pictures by its type or name, and pictures are
    there."""
    from pyarrow import types

    def holds(column: Any) -> bool:
        kind = column.type
        if types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return column.name in image_keys() and (types.is_binary(kind) or types.is_large_binary(kind))

    def names(column: Any) -> bool:
        kind = column.type
        kind = kind.value_type if types.is_list(kind) or types.is_dictionary(kind) else kind
        return column.name in image_keys() and (types.is_string(kind) or types.is_large_string(kind))

    pictured = any(Path(file).suffix.lower() in EXTENSIONS for file in files)
    return pictured and any(map(names, schema)) and not any(map(holds, schema))


def _check_parquet(about: Any) -> None:
    """Raises ``ValueError`` for more than captions and paths need: bytes, rows, or values of a list."""
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    values = (group.column(i).num_values for group in groups for i in range(about.num_columns))
    if (
        sum(group.total_byte_size for group in groups) > _MAX_BYTES
        or max([about.num_rows, *values]) > _MAX_PARQUET_ROWS
    ):
        raise ValueError("far too large; it should hold captions and paths only")


def _size_of_texts(name: str, array: Any) -> int:
    """Bytes of all texts of a column, also in lists and structs; raises ``ValueError`` for one that is no caption."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        sizes = compute.binary_length(array.dictionary).take(array.indices)
    elif types.is_struct(kind) or types.is_list(kind) or types.is_large_list(kind):
        inside = array.flatten()
        return sum(_size_of_texts(name, part) for part in (inside if types.is_struct(kind) else [inside]))
    elif types.is_map(kind):
        return _size_of_texts(name, array.keys) + _size_of_texts(name, array.items)
    else:
        return 0 if types.is_nested(kind) else int(array.nbytes)
    if (most := compute.max(sizes).as_py() or 0) > MAX_TEXT_BYTES:
        raise ValueError(f"{name} has {most >> 10:,} KiB in one cell, and {MAX_TEXT_BYTES >> 10} are read")
    return compute.sum(sizes).as_py() or 0


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table has every column in every row, and so have JSON lines that were made of one; a null there is no value."""
    present = {key: value for key, value in row.items() if value is not None}
    if isinstance(present.get("captions"), dict):
        present["captions"] = {key: value for key, value in present["captions"].items() if value is not None}
    return present
