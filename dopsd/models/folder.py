"""The files of a model on this machine: where they came from, and whether they are there and whole.

Nothing here loads weights, or imports a library that does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
CONFIG = "config.json"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
"""What the libraries open, in the order in which they look (diffusers prefers an index, transformers does not)."""


class ModelError(ValueError):
    """A base model that is missing, incomplete or asked for something it cannot do; one line a person can act on."""


class HubAway(ModelError):
    """The hub does not answer, or broke off: another try may find it."""

    away = True
    """Flows read this: importing the class would bring torch along into every flow run."""


@dataclass(frozen=True)
class Source:
    """Files of a model on this machine; ``name`` and ``revision`` (a commit) where they came from the hub."""

    folder: Path
    name: str | None = None
    revision: str | None = None

    @property
    def shown(self) -> str:
        """For messages and model cards: the hub's name, else the folder's last name; never a path of this machine."""
        if self.name:
            return self.name
        cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$", self.folder.as_posix())
        return f"{cached[1]}/{cached[2]}" if cached else self.folder.name or "model"

    def again(self, part: str = "") -> str:
        """What to do about files (of one component) that are missing or damaged."""
        if self.name is None:
            return "copy the folder again"
        revision = f" --revision {self.revision}" if self.revision else ""
        include = f' --include "{part}/*"' if part else ""
        return f"fetch it anew: `hf download {self.name}{revision}{include} --force-download`"


def need(source: Source, part: str, *names: str, shown: str = "") -> None:
    """Raise :class:`ModelError` unless one of ``names`` is in that component's folder."""
    if not any((source.folder / part / name).is_file() for name in names):
        where = f"{part}/" if part else ""
        raise ModelError(f"{shown or source.shown}: {where}{' or '.join(names)} is missing; {source.again(part)}")


def tensors_of(source: Source, part: str, shown: str = "") -> Iterable[str]:
    """Names of all tensors of a component. Raises :class:`ModelError` unless its files are all there and whole.

    ``part`` is ``""`` for a model that is a folder of its own; ``shown`` begins the message.
    """
    folder, where, shown = source.folder / part, f"{part}/" if part else "", shown or source.shown
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        others = sorted(p.name for p in folder.glob("*.safetensors"))
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if others:
            found = f"has {others[0]}, but none of {', '.join(_WEIGHTS[:3])}"
        elif pickles:
            found = f"has only {pickles[0]}, and safetensors are needed (pickled weights are never read)"
        else:
            found = "has no weights (*.safetensors)"
        raise ModelError(f"{shown}: {where or 'the folder'} {found}; {source.again(part)}")
    if first.suffix == ".safetensors":
        return _whole(first, source, part, shown)
    tensors = read_json(first, f"{shown}: {where}{first.name}").get("weight_map")
    if not isinstance(tensors, dict) or not tensors:
        raise ModelError(f"{shown}: {where}{first.name} lists no files; {source.again(part)}")
    for shard in sorted({str(name) for name in tensors.values()}):
        if not (folder / shard).is_file():
            raise ModelError(f"{shown}: {where}{quoted(shard)} is missing; {source.again(part)}")
        _whole(folder / shard, source, part, shown)
    return tensors


def _whole(file: Path, source: Source, part: str, shown: str) -> Iterable[str]:
    """Names of a safetensors file's tensors, from its head; a copy that was cut short is an error."""
    where = f"{shown}: {part}/{file.name}" if part else f"{shown}: {file.name}"
    try:
        with file.open("rb") as handle:
            start = handle.read(8)
            if start == b"version ":
                raise ModelError(f"{where}: a pointer of git-lfs, not the weights; `git lfs pull` there")
            length = int.from_bytes(start, "little")
            head = json.loads(handle.read(length)) if 0 < length < 100_000_000 else {}
        end = max((entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"), default=None)
    except ModelError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        end = None
    except OSError as error:
        raise ModelError(f"{where}: cannot be read ({error.strerror})") from None
    if end is None or file.stat().st_size < 8 + length + end:
        raise ModelError(f"{where}: damaged or cut short; {source.again(part)}")
    return head


def read_json(file: Path, shown: str) -> dict[str, Any]:
    """The JSON object in a file, which is called ``shown`` where :class:`ModelError` is raised."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{shown}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ModelError(f"{shown}: not a valid JSON object; copy or fetch the file again")
    return content


def quoted(value: object) -> str:
    """What a file or a person wrote, fit for a line."""
    return " ".join(str(value).split())[:100]
