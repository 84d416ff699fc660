"""Hostile concept folders: whatever the bytes, a DataError and nothing else."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pandas as pd
import pytest
from concept_folders import SETTINGS, faults_of, make, picture, rows, write_rows
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dopsd.data.manifest import DataError, Fault
from dopsd.data.schema import validate_dataset


def faults_or_none(folder: Path) -> tuple[Fault, ...]:
    try:
        validate_dataset(folder, "test", SETTINGS)
    except DataError as error:
        return error.faults
    return ()


fuzz = hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("0.png"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image", "caption", "captions", "references"]) | st.text(), inner, max_size=4
        )
    ),
    max_leaves=12,
)
paths = st.one_of(
    st.text(st.characters(), max_size=30),
    st.lists(st.sampled_from(["..", ".", "", "~", "0.png", "holdout", "\\", "C:", "a", "\0", "\n"]), max_size=6).map(
        "/".join
    ),
    st.integers(1, 5000).map(lambda n: "a/" * n),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sound"))


@fuzz
@given(content=st.binary(max_size=200))
def test_random_bytes_as_metadata(sound, content):
    (sound / "metadata.jsonl").write_bytes(content)
    assert faults_of(sound)


@fuzz
@given(values=st.lists(json_values, max_size=4))
def test_random_json_as_metadata(sound, values):
    write_rows(sound, values)
    assert faults_of(sound)


@fuzz
@given(path=paths, reference=paths)
def test_weird_paths(sound, path, reference):
    write_rows(sound, [*rows(), {"image": path, "caption": "[V]", "references": [reference]}])
    assert all(row in (6, None) for _, row, _, _ in faults_of(sound))


@fuzz
@given(content=st.binary(max_size=300), keep=st.integers(0, 400), suffix=st.sampled_from(["png", "jpg", "webp"]))
def test_random_bytes_after_a_sound_start_of_an_image(tmp_path, content, keep, suffix):
    buffer = io.BytesIO()
    picture(7).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    start = buffer.getvalue()[: min(keep, len(buffer.getvalue()) - 30)]
    make(tmp_path, count=4)
    (tmp_path / f"x.{suffix}").write_bytes(start + content)
    write_rows(tmp_path, [*rows(4), {"image": f"x.{suffix}", "caption": "[V]"}])
    try:
        # A JPEG's pixels carry no checksum: it may decode.
        assert all(fault.row == 5 for fault in faults_or_none(tmp_path))
    finally:
        (tmp_path / f"x.{suffix}").unlink()


@fuzz
@given(content=st.binary(max_size=300), cut=st.integers(0, 2000), place=st.integers(0, 5000))
def test_damaged_parquet(tmp_path, content, cut, place):
    make(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    buffer = io.BytesIO()
    pd.DataFrame(rows()).to_parquet(buffer)
    whole = bytearray(buffer.getvalue())
    position = place % len(whole)
    whole[position : position + len(content) % 20] = content
    (tmp_path / "rows.parquet").write_bytes(bytes(whole[: len(whole) - cut % 3]))
    try:
        faults_or_none(tmp_path)
    finally:
        (tmp_path / "rows.parquet").unlink()


def test_a_caption_or_manifest_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    """The limits are of what is read, not of what a file's size says beforehand."""
    monkeypatch.setattr("dopsd.data.tables._MAX_BYTES", 2000)
    folder = make(tmp_path / "jsonl")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" * 3000)
    assert "larger than 1 KiB; it should hold captions and paths only" in str(faults_of(folder))
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copyfile(tmp_path / "jsonl/0.png", folder / "0.png")
    (folder / "0.txt").write_bytes(b"[V] " * (16 << 10) + b"!")
    assert "larger than 64 KiB" in str(faults_of(folder))
