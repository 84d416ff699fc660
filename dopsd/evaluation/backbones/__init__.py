"""What the evaluation sees pictures with, by name: features, distances, scores against a text, and judges.

``evaluation.backbones`` names them; docs/evaluation.md has the table. :func:`check_backbones` finds (or fetches) their
files and says in one line what is wrong, before anything is drawn; :func:`load_backbones` loads them. No weight of a
backbone is ever used in training: the scores know nothing of the training loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dopsd.config.groups import EvaluationSettings
from dopsd.models.folder import read_json
from dopsd.models.loading import frozen
from dopsd.models.whole import load_whole
from dopsd.params import NOTHING_SEEN, Seen

from . import efficientnet, lpips, vision
from .base import Backbone as Backbone
from .base import BackboneError as BackboneError
from .base import Distance, Judge, TextScore
from .base import kind_of as kind_of
from .judge import VisionJudge, read_rubric, rubric_of
from .sources import KINDS, Found, find
from .store import FeatureStore as FeatureStore
from .store import picture_key as picture_key


@dataclass(frozen=True)
class Backbones:
    """What was named, by what it does, each group in the order of the names. The first of ``features`` is the primary
    one. A CLIP or SigLIP is in two groups, and loaded once."""

    features: tuple[Backbone, ...]
    distances: tuple[Distance, ...] = ()
    texts: tuple[TextScore, ...] = ()
    judges: tuple[Judge, ...] = ()
    held: tuple[Any, ...] = ()
    """Whatever of these holds memory."""

    def release(self) -> None:
        """Free the memory of all of them; afterwards only judges can be used again."""
        for one in self.held:
            one.release()


def check_backbones(names: Sequence[str], root: Path = Path(), rubric: str | None = None) -> tuple[Found, ...]:
    """Find the files of all that is named, or fetch them, and check them; no weights are loaded. ``root``: what a
    relative folder is relative to. Raises :class:`BackboneError` or ``ModelError``, one line, for the first fault."""
    found = tuple(find(name, root) for name in names)
    names_found = [one.name for one in found]
    if twice := next((name for name in names_found if names_found.count(name) > 1), None):
        raise BackboneError(f"evaluation.backbones: {twice} is there twice; name each once")
    if any(one.kind == "judge" for one in found):
        read_rubric(rubric, root)
    return found


def seen_of(evaluation: EvaluationSettings, root: Path) -> Seen:
    """What an evaluation sees with, for its plan: nothing to say of the embedded backbone alone. Files of others are
    found, or fetched. Raises as :func:`check_backbones`."""
    if evaluation.backbones == (efficientnet.NAME,):
        return NOTHING_SEEN
    found = check_backbones(evaluation.backbones, root, evaluation.rubric)
    return Seen(tuple(one.name for one in found), rubric_of(evaluation, root))


def load_backbones(
    names: Sequence[str], device: torch.device, root: Path = Path(), rubric: str | None = None
) -> Backbones:
    """All that is named, on ``device``; a judge loads itself when it is first asked. Raises as :func:`check_backbones`,
    and ``ModelError`` where weights do not fit their configuration."""
    groups: dict[str, list[Any]] = {"features": [], "distances": [], "texts": [], "judges": [], "held": []}
    for found in check_backbones(names, root, rubric):
        for group, scorer in _loaded(found, device, root, rubric).items():
            groups[group].append(scorer)
    return Backbones(**{group: tuple(scorers) for group, scorers in groups.items()})


def load_backbone(name: str = efficientnet.NAME, device: torch.device | None = None, root: Path = Path()) -> Backbone:
    """The features of that name, ready to use. Raises :class:`BackboneError` or ``ModelError``."""
    features = load_backbones([name], device or torch.device("cpu"), root).features
    if not features:
        raise BackboneError(f"backbone {name!r}: gives no features; choose efficientnet-lite0, dinov2, dinov3, clip "
                            "or siglip")  # fmt: skip
    return features[0]


def _loaded(found: Found, device: torch.device, root: Path, rubric: str | None) -> dict[str, Any]:
    """One backbone, under each group that it belongs to."""
    if found.kind == efficientnet.NAME:
        features = efficientnet.load_efficientnet(device)
        return {"features": features, "held": features}
    if found.captioner is not None:
        judge = VisionJudge(found.name, found.captioner, read_rubric(rubric, root), device)
        return {"judges": judge, "held": judge}
    if found.kind == "lpips":
        distance = lpips.Lpips(found.name, _tensors(found, tuple(lpips.TENSORS)), device)
        return {"distances": distance, "held": distance}
    pixels = vision.Pixels.of(read_json(found.folder / "preprocessor_config.json", found.name), found.name)
    net, tokenizer = _load_transformer(found, device)
    if not KINDS[found.kind].tokenizer:
        patches = vision.PatchFeatures(found.name, net, pixels, device)
        return {"features": patches, "held": patches}
    model = vision.ImageText(found.name, net, tokenizer, pixels, device)
    if found.kind == "reward":
        return {"texts": vision.Reward(model), "held": model}
    return {"features": vision.ImageTextFeatures(model), "texts": vision.ClipScore(model), "held": model}


def _tensors(found: Found, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """These tensors of a folder's one file, in float32; the rest of it is not read."""
    with safe_open(found.folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).float() for name in names}


def _load_transformer(found: Found, device: torch.device) -> tuple[Any, Any]:
    import transformers

    kind = KINDS[found.kind]
    assert found.source is not None
    shown = f"evaluation.backbones, {found.kind}: {found.source.shown}"
    net, tokenizer = load_whole(
        getattr(transformers, kind.cls), found.folder, shown, _dtype(found, device),
        f"give another one, {found.kind}:{kind.default} for example",
        lambda net: _tokenizer(found.folder, net) if kind.tokenizer else None,
    )  # fmt: skip
    return frozen(net, device), tokenizer


def _tokenizer(folder: Path, net: Any) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if net.config.model_type == "siglip":  # its own class wants sentencepiece, for the same tokens
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _dtype(found: Found, device: torch.device) -> torch.dtype:
    """Half precision on a GPU: float16, whose cosines are eight times finer than bfloat16's; DINOv3 has states that are
    too large for it."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if found.kind == "dinov3" else torch.float16
