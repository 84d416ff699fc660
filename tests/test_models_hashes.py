"""What a base model is, by its content: every byte counts, and is read once."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from dopsd.models import hashes
from dopsd.models.sources import ModelError, Source, identity
from tests.fake_hub import COMMIT
from tests.model_folders import COMPONENTS, NAME, copied, edit, one_line


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded base to break."""
    return copied(tmp_path / "base")


@pytest.fixture
def old(base):
    """A base whose files are a day old, as those are that are not just being made."""
    age(base)
    return base


def age(folder: Path) -> None:
    day = time.time() - 86400
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file, (day, day))


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are read whole."""
    names: list[str] = []
    hash_file = hashes._hash
    monkeypatch.setattr(
        hashes, "_hash", lambda source, file, bar: names.append(file.name) or hash_file(source, file, bar)
    )
    return names


def test_a_base_is_read_once(old, tmp_path, read):
    cache = tmp_path / "deep" / "cache.json"
    first = identity(Source(old), cache)
    assert set(first) == {"", *COMPONENTS, "vlm"}
    assert all(len(value) == 64 for value in first.values())
    assert read
    read.clear()
    assert identity(Source(old), cache) == first
    assert read == [], "the second time nothing is read"
    assert identity(Source(old), cache, ["vae", ""]) == {"vae": first["vae"], "": first[""]}
    assert identity(Source(Path(shutil.copytree(old, tmp_path / "copy"))), tmp_path / "other.json") == first
    assert [p.name for p in cache.parent.iterdir()] == ["cache.json"], "nothing is left beside the cache"


def test_one_byte_in_the_middle_of_a_large_file_counts_and_the_time_does_not(old, tmp_path, read):
    large, cache = old / "transformer" / "large.safetensors", tmp_path / "cache.json"
    with large.open("wb") as handle:
        handle.truncate(65 << 20)
    age(old)
    first = identity(Source(old), cache)
    os.utime(large)
    assert identity(Source(old), cache) == first
    with large.open("r+b") as handle:
        handle.seek(33 << 20)
        handle.write(b"x")
    second = identity(Source(old), cache)
    assert {part for part in first if first[part] != second[part]} == {"transformer"}
    assert set(read[-2:]) == {"large.safetensors"}


def test_a_file_that_was_just_written_is_not_taken_for_known(old, tmp_path):
    """Two writes within the clock's tick have one size and one time."""
    file, cache = old / "vae" / "config.json", tmp_path / "cache.json"
    before = file.read_text()
    file.write_text(before.replace("true", "TRUE"))
    stat = file.stat()
    first = identity(Source(old), cache)
    file.write_text(before)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(Source(old), cache)["vae"] != first["vae"]


def test_names_count_and_notes_do_not(old, tmp_path):
    first = identity(Source(old), tmp_path / "cache.json")
    for note in (
        "vae/README.md",
        "vae/notes.MD",
        "vae/.hidden",
        ".cache/huggingface/x",
        "README",
        "assets/a.png",
        "top.txt",
    ):
        (old / note).parent.mkdir(parents=True, exist_ok=True)
        (old / note).write_text("x")
    assert identity(Source(old), tmp_path / "cache.json") == first
    (old / "vae" / "config.json").rename(old / "vae" / "config2.json")
    edit(old / "model_index.json", _diffusers_version="0")
    second = identity(Source(old), tmp_path / "cache.json")
    assert {part for part in first if first[part] != second[part]} == {"", "vae"}


def test_a_model_that_is_no_pipeline_has_its_files_at_the_top(old, tmp_path):
    vlm = Source(old / "vlm")
    first = identity(vlm, tmp_path / "cache.json")
    assert set(first) == {""}
    assert first[""] == identity(Source(old), tmp_path / "cache.json")["vlm"]
    edit(old / "vlm" / "preprocessor_config.json", patch_size=16)
    assert identity(vlm, tmp_path / "cache.json") != first


def test_a_hub_model_is_its_commit(base, tmp_path, read):
    source = Source(base, NAME, COMMIT)
    assert identity(source, tmp_path / "cache.json", ["", "vae"]) == {
        "": f"{NAME}@{COMMIT}/", "vae": f"{NAME}@{COMMIT}/vae",
    }  # fmt: skip
    assert read == []
    assert not (tmp_path / "cache.json").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"files": 3}', '{"files": {"%s": 3}}', '{"files": {"%s": [1]}}', "\0"]
)
def test_a_damaged_cache_costs_time_only(old, tmp_path, content, read):
    right = identity(Source(old), tmp_path / "right.json")
    cache = tmp_path / "cache.json"
    cache.write_text(content.replace("%s", str(old / "vae" / "config.json")))
    assert identity(Source(old), cache) == right
    read.clear()
    assert identity(Source(old), cache) == right
    assert read == []


def test_a_cache_that_cannot_be_written_stops_nobody(old, tmp_path):
    (tmp_path / "file").write_text("x")
    assert identity(Source(old), tmp_path / "file" / "cache.json") == identity(Source(old), tmp_path / "cache.json")


def test_processes_share_a_cache(old, tmp_path, read):
    """What another process remembered meanwhile is kept."""
    cache = tmp_path / "cache.json"
    identity(Source(old), cache, ["vae"])
    hash_file = hashes._hash

    def meanwhile(source: Source, file: Path, bar: object) -> object:
        if file.parent.name == "tokenizer":
            hashes._remember(cache, {"/elsewhere/model.safetensors": [1, 2, 3, "0" * 64]})
        return hash_file(source, file, bar)

    hashes._hash = meanwhile
    try:
        identity(Source(old), cache, ["tokenizer"])
    finally:
        hashes._hash = hash_file
    known = hashes._remembered(cache)
    assert "/elsewhere/model.safetensors" in known
    assert {Path(name).parent.name for name in known} == {"vae", "tokenizer", "elsewhere"}


def test_what_was_hashed_before_an_interruption_is_kept(old, tmp_path, monkeypatch):
    cache, hash_file, done = tmp_path / "cache.json", hashes._hash, []

    def interrupted(source: Source, file: Path, bar: object) -> object:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(str(file))
        return hash_file(source, file, bar)

    monkeypatch.setattr(hashes, "_hash", interrupted)
    with pytest.raises(KeyboardInterrupt):
        identity(Source(old), cache)
    assert set(hashes._remembered(cache)) == set(done)


def test_faults_of_files_are_one_line(old, tmp_path, monkeypatch):
    cache = tmp_path / "cache.json"
    with pytest.raises(ModelError) as caught:
        identity(Source(old), cache, ["nothing"])
    one_line(caught.value, "base: the folder nothing/ is missing")
    with pytest.raises(ModelError) as caught:
        identity(Source(tmp_path / "nowhere"), cache)
    one_line(caught.value, "nowhere: no such folder")
    (old / "vae" / "lost.safetensors").symlink_to(tmp_path / "blobs" / "0")
    with pytest.raises(ModelError) as caught:
        identity(Source(old), cache)
    one_line(caught.value, "vae/lost.safetensors is a link to nothing")
    (old / "vae" / "lost.safetensors").unlink()

    class Growing:
        def update(self, _: int) -> None:
            with (old / "vae" / "config.json").open("a") as handle:
                handle.truncate(handle.tell() - 1)

    with pytest.raises(ModelError) as caught:
        hashes._hash(Source(old), old / "vae" / "config.json", Growing())
    one_line(caught.value, "config.json is being written", "wait")
    with pytest.raises(ModelError) as caught:
        hashes._hash(Source(old), old / "vae", Growing())
    one_line(caught.value, "vae cannot be read (Is a directory)")


def test_a_bar_is_shown_for_much_to_read_only(old, tmp_path, monkeypatch):
    shown = []
    bar = hashes.tqdm
    monkeypatch.setattr(hashes, "tqdm", lambda **options: shown.append(options["disable"]) or bar(**options))
    identity(Source(old), tmp_path / "a.json")
    monkeypatch.setattr(hashes, "_BAR_FROM", 10)
    identity(Source(old), tmp_path / "b.json")
    identity(Source(old), tmp_path / "b.json")
    assert shown == [True, None, True]
