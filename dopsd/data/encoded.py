"""What stage encode leaves for stage train: a folder that is read without any encoder.

``tensors.safetensors`` holds ``example/<n>/prompt:<name>``, ``example/<n>/context:<name>``, ``latents:<image>``,
``preview/<n>:<name>`` and ``replay/<n>:<name>``; ``index.json`` says what they belong to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dopsd.files import whole_folder, write_tensors

from .cache import Conditioning, checksum
from .dataset import Example, Preview

SEPARATOR = ":"
"""Between what a tensor belongs to and its own name, which its family chose."""
TENSORS, INDEX = "tensors.safetensors", "index.json"


class EncodedError(ValueError):
    """No usable encodings: one line saying where they were looked for and how to make them."""


@dataclass(frozen=True)
class Encoded:
    """All that training needs to know of a concept."""

    examples: tuple[Example, ...]
    previews: tuple[Preview, ...]
    replay: tuple[tuple[str, Conditioning], ...]
    """Prompts of the base's own domain."""
    images: int
    content_hash: str
    """Of the data set that was encoded."""

    def identity(self, replayed: bool) -> str:
        """Hash of all that is learnt from: the examples, and the prompts that are replayed where they count."""
        digest = hashlib.sha256()
        groups: list[tuple[object, Conditioning]] = []
        for e in self.examples:
            latents = {} if e.latents is None else {"latents": e.latents}
            drawn = (e.height, e.width, e.image_index, e.caption, *_repeated(e).values())
            groups += [(drawn, e.prompt), ((), e.context), ((), latents)]
        for entry, tensors in [*groups, *(self.replay if replayed else ())]:
            digest.update(f"{json.dumps(entry)}:{checksum(tensors)}".encode())
        return digest.hexdigest()[:32]


def write_encoded(folder: Path, encoded: Encoded) -> None:
    """Write ``encoded`` as ``folder``, whole or not at all, replacing what was there."""
    tensors: dict[str, Tensor] = {}
    for number, example in enumerate(encoded.examples):
        _put(tensors, f"example/{number}/prompt", example.prompt)
        _put(tensors, f"example/{number}/context", example.context)
        if example.latents is not None:
            _put(tensors, "latents", {str(example.image_index): example.latents})
    for number, preview in enumerate(encoded.previews):
        _put(tensors, f"preview/{number}", preview.conditioning)
    for number, (_, conditioning) in enumerate(encoded.replay):
        _put(tensors, f"replay/{number}", conditioning)
    index = {
        "content_hash": encoded.content_hash,
        "images": encoded.images,
        "examples": [
            {"caption": e.caption, "image_index": e.image_index, "height": e.height, "width": e.width, **_repeated(e)}
            for e in encoded.examples
        ],
        "preview": [{"caption": p.caption, "height": p.height, "width": p.width} for p in encoded.previews],
        "replay": [text for text, _ in encoded.replay],
    }
    with whole_folder(folder) as partial:
        write_tensors(partial / TENSORS, tensors)
        (partial / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_encoded(folder: Path) -> Encoded:
    """Read what :func:`write_encoded` wrote. Raises :class:`EncodedError` where it is missing or damaged."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError:
        raise EncodedError(f"{folder}: nothing encoded there; run stage encode first") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise EncodedError(f"{folder}: damaged ({error}); run stage encode again") from None
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        group, _, name = key.partition(SEPARATOR)
        groups.setdefault(group, {})[name] = value
    latents = groups.get("latents", {})
    examples = tuple(
        Example(
            prompt=groups[f"example/{number}/prompt"],
            context=groups[f"example/{number}/context"],
            latents=latents.get(str(entry["image_index"])),
            **entry,
        )
        for number, entry in enumerate(index["examples"])
    )
    return Encoded(
        examples=examples,
        previews=tuple(
            Preview(conditioning=groups[f"preview/{number}"], **entry) for number, entry in enumerate(index["preview"])
        ),
        replay=tuple((text, groups[f"replay/{number}"]) for number, text in enumerate(index["replay"])),
        images=index["images"],
        content_hash=index["content_hash"],
    )


def _repeated(example: Example) -> dict[str, int]:
    """Nothing of one that is drawn once: repeats came later, and what was encoded before is still what it is."""
    return {"repeats": example.repeats} if example.repeats != 1 else {}


def _put(tensors: dict[str, Tensor], prefix: str, conditioning: Mapping[str, Tensor]) -> None:
    for name, value in conditioning.items():
        # equal captions share one tensor in memory, and safetensors refuses that
        tensors[f"{prefix}{SEPARATOR}{name}"] = value.detach().cpu().clone().contiguous()
