"""Files are whole or absent, and equal content is equal bytes, in whatever process it was written."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dopsd.files import whole_file, whole_folder, write_json, write_tensors

ROOT = Path(__file__).parent.parent
METADATA = {"rank": "4", "alpha": "8.0", "format": "dopsd-lora", "targets": '["a \\"quoted\\" name", "é"]', "b": "\\"}
TENSORS = {"b.weight": torch.arange(5.0), "a.weight": torch.ones(3, 2, dtype=torch.bfloat16), "n": torch.tensor(3)}
SCRIPT = """
import sys
from pathlib import Path
from dopsd.files import write_tensors
from tests.test_files import METADATA, TENSORS
for number in range(4):
    write_tensors(Path(sys.argv[1]) / f"{number}.safetensors", TENSORS, METADATA)
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    hashes = set()
    for number in range(3):
        (folder := tmp_path / str(number)).mkdir()
        subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, check=True)
        hashes |= {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert len(hashes) == 1


def test_what_was_written_is_read_back(tmp_path):
    write_tensors(tmp_path / "t.safetensors", TENSORS, METADATA)
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == METADATA
        for key, value in TENSORS.items():
            assert torch.equal(file.get_tensor(key), value)


def fail_after(path: Path) -> None:
    """What a full disk does: some of it is written, and then no more."""
    path.write_text("half")
    raise RuntimeError


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        fail_after(partial)
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "out"
    with whole_folder(folder) as partial:
        (partial / "old").write_text("1")
    with pytest.raises(RuntimeError), whole_folder(folder) as partial:
        fail_after(partial / "new")
    assert [p.name for p in folder.iterdir()] == ["old"]
    with whole_folder(folder) as partial:
        (partial / "new").write_text("2")
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert not folder.with_name("out.partial").exists()


def test_a_folder_between_its_two_renamings_is_not_lost(tmp_path, monkeypatch):
    """A kill there leaves the old one under another name; a renaming that fails puts it back at once."""
    folder = tmp_path / "out"
    aside = folder.with_name("out.before.partial")
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(OSError, match="full"), whole_folder(folder):
        raise OSError(errno.ENOSPC, "full")
    assert [p.name for p in folder.iterdir()] == ["old"]
    rename = Path.rename

    def refused(self, target):
        if self.name == "out.partial":
            raise OSError(errno.EACCES, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="no"), whole_folder(folder) as partial:
        (partial / "new").touch()
    assert [(p.name, [q.name for q in p.iterdir()]) for p in tmp_path.iterdir()] == [("out", ["old"])]
