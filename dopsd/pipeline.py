"""What a stage's result depends on, read from ``dvc.yaml``: the one list of it, for both front doors.

DVC compares these itself; the flow asks :func:`inputs_hash` for the key of its cache and :func:`outputs_hash` to see
whether what the cache remembers is still there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dopsd.config import Settings

BASE = "runs/base.json"


def inputs_hash(stage: str, concept: str, settings: Settings, root: Path) -> str:
    """Hash of a stage's dependencies (files by content) and of the settings that it reads."""
    spec = _stages(root)[stage]
    values = settings.model_dump(mode="json")
    values["tuning"].setdefault(concept, {})  # a concept may be run that the settings do not list
    digest = hashlib.sha256(f"{stage}\n{concept}\n".encode())
    for key in spec.get("params", []):
        key = _filled(key, concept)
        digest.update(f"{key}={json.dumps(_lookup(values, key), sort_keys=True)}\n".encode())
    for dep in spec["deps"]:
        found = _base(settings, root) if dep == BASE else hash_path(root / _filled(dep, concept), root)
        digest.update(found.encode())
    return digest.hexdigest()


def _base(settings: Settings, root: Path) -> str:
    """What these settings' base is: the file that DVC reads may be of other settings."""
    from dopsd.models import description_of, open_base, resolved

    model = resolved(settings).model
    return json.dumps(description_of(open_base(model, root), model), sort_keys=True)


def outputs_hash(stage: str, concept: str, settings: Settings, root: Path) -> str | None:
    """Hash of what a stage made, by content; ``None`` where some of it is missing."""
    spec = _stages(root)[stage]
    digest = hashlib.sha256()
    for kind in ("outs", "metrics", "plots"):
        for out in spec.get(kind, []):
            name, how = next(iter(out.items())) if isinstance(out, Mapping) else (out, {})
            path = root / _filled(name, concept)
            if not path.exists():
                return None
            if not how.get("persist"):  # checkpoints may be thinned out afterwards; what counts of them is the adapters
                digest.update(hash_path(path, root).encode())
    return digest.hexdigest()


@cache
def _read(path: Path, changed: int) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["stages"]


def _stages(root: Path) -> dict[str, Any]:
    path = (root / "dvc.yaml").resolve()
    return _read(path, path.stat().st_mtime_ns)


def _filled(text: str, concept: str) -> str:
    """DVC's template that stages use."""
    return text.replace("${item.concept}", concept)


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def hash_path(path: Path, root: Path) -> str:
    """Hash of a file, or of a folder's files with their names; a missing one has a hash of its own."""
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode() if path.is_relative_to(root) else b"")
    if not path.exists():
        return digest.hexdigest() + "-missing"
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if "__pycache__" not in file.parts:
            about = file.stat()
            digest.update(f"{file.relative_to(path)}\n".encode())
            digest.update(_digest(file.resolve(), about.st_size, about.st_mtime_ns))
    return digest.hexdigest()


@cache
def _digest(file: Path, size: int, changed: int) -> bytes:
    """Of a file's content, once for each state of it: a flow run asks for a large base's many times."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
