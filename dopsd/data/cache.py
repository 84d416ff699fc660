"""Encoded prompts and contexts on disk, so that no text or picture is encoded twice.

One safetensors file per encoding, named by a hash of everything that determines it: the kind, the family's fingerprint
(encoder weights and templates) and the caption's and pictures' own content. So nothing is ever stale: what changes has
another name. A file that is damaged is computed again, and a warning line says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ..files import whole_file

Conditioning = Mapping[str, Tensor]
"""As in :mod:`dopsd.models.base`: named tensors of one example, without a batch axis."""

logger = logging.getLogger(__name__)


class EncodingCache:
    """A folder of encodings, on the CPU. Any number of processes may read and write it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[str] = set()
        """Keys that :meth:`get_or_encode` was asked for."""

    def key(self, kind: str, fingerprint: str, *parts: bytes | str) -> str:
        """The name of an encoding: 64 hex digits. ``parts``: everything else that determines it, in order."""
        digest = hashlib.sha256()
        for part in (kind, fingerprint, *parts):
            content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            # Length and type before each part: ("ab", "c") and ("a", "bc") and b"ab" must not meet.
            digest.update(f"{'s' if isinstance(part, str) else 'b'}{len(content)}:".encode())
            digest.update(content)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """Where the encoding ``key`` lies, or will."""
        if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
            raise ValueError(f"not a key of EncodingCache.key: {key!r}")
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> Conditioning | None:
        """The encoding, or ``None`` where there is none or its file is damaged (a warning line says so)."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            self._warn(path, " ".join(str(error).split()))
            return None
        if metadata.get("key") != key or metadata.get("sha256") != checksum(tensors):
            self._warn(path, "its checksum does not match")
            return None
        return tensors

    def put(self, key: str, conditioning: Conditioning) -> Conditioning:
        """Write the encoding, whole or not at all. Returns what :meth:`get` will return: detached, on the CPU."""
        path = self.path(key)
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in conditioning.items()}
        content = save(tensors, metadata={"key": key, "sha256": checksum(tensors)})
        with whole_file(path, len(content)) as partial:
            partial.write_bytes(content)
        return tensors

    def get_or_encode(
        self,
        keys: Sequence[str],
        encode: Callable[[list[int]], list[Conditioning]],
        batch: int,
        description: str = "encoding",
    ) -> list[Conditioning]:
        """The encodings of ``keys``, in that order; only missing ones are computed, equal keys once.

        ``encode`` gets up to ``batch`` indices into ``keys`` and returns as many encodings. Each batch is on disk
        before the next is computed, so a run that is killed loses one batch.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.used.update(keys)
        known: dict[str, Conditioning] = {}
        missing: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key not in known and key not in missing:
                found = self.get(key)
                if found is None:
                    missing[key] = index
                else:
                    known[key] = found
        indices = list(missing.values())
        # disable=None: a bar on terminals only; no bar at all where there is no work.
        with tqdm(total=len(indices), desc=description, unit="encoding", disable=None if indices else True) as bar:
            for start in range(0, len(indices), batch):
                chunk = indices[start : start + batch]
                encodings = encode(list(chunk))
                if len(encodings) != len(chunk):
                    raise ValueError(f"encode returned {len(encodings)} encodings for {len(chunk)} inputs")
                for index, encoding in zip(chunk, encodings, strict=True):
                    known[keys[index]] = self.put(keys[index], encoding)
                bar.update(len(chunk))
        return [known[key] for key in keys]

    def _warn(self, path: Path, reason: str) -> None:
        logger.warning("%s is damaged (%s); it is computed again", path, reason)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes: safetensors itself does not notice a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
