"""Data sets that the tools themselves wrote, in ``packed_by_their_tools.zip``; neither tool is needed to read them.

Made by ``python -m tests.packed_by_their_tools`` with datasets 5.2.0 and webdataset 1.0.2, which read the rows back.
"""

from __future__ import annotations

import importlib
import io
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".zip")
CHOSEN = [4, 0, 2, 1]
"""Rows that the data sets of ``datasets`` have, in their order; 3 is the split ``test`` of ``splits``."""


def packed_by_their_tools(place: Path) -> Path:
    """``webdataset.tar``; ``saved``, ``splits`` and ``datasets.parquet``, in ``place``."""
    with zipfile.ZipFile(FILE) as file:
        file.extractall(place)
    return place


def make(place: Path) -> None:
    """Write all of them. Raises ``AssertionError`` where the tools read other rows than were written."""
    sys.path.insert(0, str(FILE.parent))
    from concept_folders import picture

    datasets, webdataset = importlib.import_module("datasets"), importlib.import_module("webdataset")
    pictures, captions = [picture(i) for i in range(5)], [f"a {i} in [V] style" for i in range(5)]
    with webdataset.TarWriter(str(place / "webdataset.tar")) as writer:
        for i in range(5):
            content = io.BytesIO()
            pictures[i].save(content, "PNG")
            writer.write({"__key__": f"dir.v1/{i}", "png": content.getvalue(), "txt": captions[i], "cls": i})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    whole = datasets.Dataset.from_dict({"image": pictures, "text": captions}, features=features)
    chosen = whole.select(CHOSEN)  # an index over it, which saving flattens
    chosen.save_to_disk(str(place / "saved"), num_shards=2)
    datasets.DatasetDict({"train": chosen, "test": whole.select([3])}).save_to_disk(str(place / "splits"))
    chosen.to_parquet(str(place / "datasets.parquet"))
    read = list(webdataset.WebDataset(str(place / "webdataset.tar"), shardshuffle=False))
    assert [sample["txt"].decode() for sample in read] == captions
    for row, i in zip(datasets.load_from_disk(str(place / "saved")), CHOSEN, strict=True):
        assert row["text"] == captions[i]
        assert np.array_equal(np.asarray(row["image"]), np.asarray(pictures[i]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        shutil.make_archive(str(FILE.with_suffix("")), "zip", folder)
