"""Packed data sets made on the spot, and what comes of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from concept_folders import SETTINGS, picture
from PIL import Image

from dopsd.data.manifest import DataError
from dopsd.data.schema import validate_dataset
from dopsd.data.unpack import as_folder

CAPTIONS = [f"a {i} in [V] style" for i in range(5)]


def content(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def unpacked(source: Path) -> tuple[list[tuple[np.ndarray, str, int]], list[tuple[np.ndarray, str, int]], list[str]]:
    """(pixels, caption, repeats) of the rows, of the held-out rows, and what was said; nothing is left behind."""
    place, said = source.parent / ".place", list[str]()
    with as_folder(source, place, said.append) as (folder, was_packed):
        assert was_packed
        assert folder == place
        parts = [
            [(np.asarray(Image.open(row.image).convert("RGB")), dict(row.captions)["caption"], row.repeats)
             for row in table.rows] if table else []
            for table in validate_dataset(folder, "test", SETTINGS)
        ]  # fmt: skip
    assert not place.exists()
    return parts[0], parts[1], said


def is_as_packed(found: list[tuple[np.ndarray, str, int]], seeds: range) -> bool:
    assert [text for _, text, _ in found] == [CAPTIONS[i] for i in range(len(seeds))]
    return all(np.array_equal(one, np.asarray(picture(i))) for (one, *_), i in zip(found, seeds, strict=True))


def refused(source: Path) -> str:
    place = source.parent / ".place"
    with pytest.raises(DataError) as caught, as_folder(source, place, lambda line: None) as (folder, _):
        validate_dataset(folder, "test", SETTINGS)
    assert not place.exists()
    assert len(str(caught.value).split("\n")) == len(caught.value.faults)
    return str(caught.value)


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def samples(count: int = 5, first: int = 0, key: str = "set/{:04}") -> list[tuple[str, bytes]]:
    return [
        (f"{key.format(i)}.{ending}", data)
        for i in range(count)
        for ending, data in (("png", content(first + i)), ("txt", CAPTIONS[i].encode()))
    ]


PACKED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def rows_of(count: int = 5, first: int = 0, column: str = "image", caption: str = "text") -> pa.Table:
    """As ``datasets`` has an ``Image`` in arrow: bytes, and the path that it came from."""
    pictures = [{"bytes": content(first + i), "path": None if i % 2 else f"/x/{i}.png"} for i in range(count)]
    return pa.table({column: pictures, caption: CAPTIONS[:count], "label": list(range(count))})


def parquet(path: Path, table: pa.Table | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows_of() if table is None else table, path)
    return path.read_bytes()


def saved(folder: Path, table: pa.Table | None = None) -> Path:
    """As ``save_to_disk`` leaves a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = rows_of() if table is None else table
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as stream:
        stream.write_table(whole)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-abc.arrow").write_bytes(b"not of the data set")
    return folder
