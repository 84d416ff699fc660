"""The families of models that the method runs on. Adding one: a file here, and a line in :data:`FAMILIES`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from dopsd.config import Settings
from dopsd.config.groups import EvaluationSettings, ModelSettings
from dopsd.data.images import MULTIPLE
from dopsd.versions import ENCODING_VERSION

from .base import Family, Loader, Part, Parts, Teaching
from .checkpointing import Checkpointing, checkpoint_blocks
from .folder import CONFIG, read_json
from .hashes import HASHES
from .loading import Where, compile_blocks, use_plain_attention
from .quantized import check_installed
from .sources import ModelError, Source, check_pipeline, check_vlm, identity, licence_of, locate

FAMILIES = {
    "z-image": "dopsd.models.z_image:ZImage",
    "flux2-klein": "dopsd.models.flux2_klein:Flux2Klein",
    "krea-2": "dopsd.models.krea2:Krea2",
}
"""Name in the settings to module and class."""

PUBLISHED = ("dinov3", "clip", "lpips", "judge")
"""The backbones of the published protocol, where the settings name none."""
Use = Literal["train", "draw", "teach"]
"""What a base is opened for: training needs no encoders, drawing no VLM, teaching all of it."""
_TRAINED: tuple[str, ...] = ("transformer", "vae", "scheduler")

COMMITS = Path(".cache/hub-commits.json")
"""Which commit a hub's name meant when the base was last identified: no stage may take another one than that."""

__all__ = [
    "FAMILIES", "Base", "Family", "ModelError", "Use", "family_class", "known_commit", "licence_of", "load_family",
    "open_base", "references_rule", "remember_commits", "resolved", "teaching_of",
]  # fmt: skip


def family_class(model: ModelSettings) -> type[Family]:
    """The class of the settings' family; :class:`ModelError` where there is none of that name."""
    place = FAMILIES.get(model.family)
    if place is None:
        raise ModelError(f"model.family: {model.family!r} is unknown; there are {', '.join(FAMILIES)}")
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


# --- what the settings leave to the family ----------------------------------------------------------------------------


def resolved(settings: Settings) -> Settings:
    """The settings with everything that they leave to the family filled in; done twice it is the same.

    Raises :class:`ModelError` for a family or context that there is not, or steps that do not fit.
    """
    family, model, evaluation = family_class(settings.model), settings.model, settings.evaluation
    context = teaching_of(model).context
    if settings.data.resolution % MULTIPLE:
        raise ModelError(f"data.resolution ({settings.data.resolution}) must be a multiple of {MULTIPLE}")
    if settings.train.lora.kind not in family.kinds:
        raise ModelError(f"train.lora.kind: diffusers loads no {settings.train.lora.kind} for {model.family}; there "
                         f"are {', '.join(family.kinds)}")  # fmt: skip
    few = evaluation.few_steps or family.few_steps
    if few not in evaluation.steps:
        raise ModelError(f"evaluation.few_steps ({few}) must be one of evaluation.steps")
    own = family.many_steps if family.many_steps in evaluation.steps and family.many_steps > few else 0
    many = evaluation.many_steps or own or max(evaluation.steps)
    if missing := evaluation.missing_for(settings.registry, few, many):
        raise ModelError(missing)
    backbones = evaluation.backbones
    if evaluation.protocol == "published" and backbones == EvaluationSettings().backbones:
        backbones = PUBLISHED
    # a teacher that only reads more has nothing to follow
    kind = settings.train.teacher.kind or ("frozen" if context == "enhanced-prompt" else "ema")
    teacher = settings.train.teacher.model_copy(update={"kind": kind})
    return settings.model_copy(update={
        "model": model.model_copy(update={"context": context}),
        "evaluation": evaluation.model_copy(update={"few_steps": few, "many_steps": many, "backbones": backbones}),
        "train": settings.train.model_copy(update={"teacher": teacher}),
    })  # fmt: skip


def teaching_of(model: ModelSettings) -> Teaching:
    """What the teacher is shown. Raises :class:`ModelError` where the family cannot be shown that."""
    family = family_class(model)
    context = model.context or family.contexts[0]
    if context not in family.contexts:
        raise ModelError(f"model.context: {model.family} cannot be taught by {context}; it can by "
                         f"{', '.join(family.contexts)}")  # fmt: skip
    if model.context_suffix is not None and context == "enhanced-prompt":
        raise ModelError("model.context_suffix: enhanced-prompt takes the row's caption as it is; remove the suffix")
    suffix = family.suffixes.get(context, "") if model.context_suffix is None else model.context_suffix
    return Teaching(context, suffix, model.context_pixels, model.vlm_positions)


def references_rule(model: ModelSettings) -> Literal["refused", "allowed", "required"]:
    """Whether rows of the data must, may or must not name reference pictures."""
    context, edits = teaching_of(model).context, family_class(model).edits
    if context == "edit-reference":
        return "required"
    return "allowed" if context == "enhanced-prompt" and edits else "refused"


# --- the base's files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A base model whose files are here and were checked. Nothing is hashed before an identity is asked for."""

    source: Source
    components: Sequence[str]
    index: dict[str, Any]
    """``model_index.json``."""
    hashes: Path
    vlm: Source | None = None
    thetas: dict[str, float | None] = field(default_factory=dict)
    """The rotary bases of VLM and text encoder, where there is a VLM beside the base."""

    @cached_property
    def identities(self) -> dict[str, str]:
        """Component (and ``vlm``) to a hash of its files, or their name and commit on the hub."""
        own = [name for name in ("world",) if (self.source.folder / name).is_dir()]  # the truth that it brings along
        known = identity(self.source, self.hashes, ["", *self.components, *own])
        return known | ({"vlm": self.vlm_identity} if self.vlm is not None else {})

    @property
    def identity(self) -> str:
        """Of the whole base."""
        return _hash(self.identities)

    @cached_property
    def vlm_identity(self) -> str:
        """Of the VLM; empty where there is none."""
        return _hash(identity(self.vlm, self.hashes)) if self.vlm is not None else ""

    @cached_property
    def encoders(self) -> str:
        """Of all that decides an encoding: every component but those that only draw, and the index's own settings."""
        parts = [name for name in self.components if name not in ("transformer", "scheduler")]
        values = {key: value for key, value in self.index.items() if not key.startswith("_")}
        return _hash([identity(self.source, self.hashes, parts), values])

    def differences(self) -> str:
        """What a person should know of VLM and text encoder before one looks through the other; mostly nothing."""
        vlm, encoder = self.thetas.get("vlm_theta"), self.thetas.get("encoder_theta")
        if vlm == encoder:
            return ""
        return (f"the VLM's rotary base is {vlm:,.0f}, the text encoder's {encoder:,.0f}: with model.vlm_positions vlm "
                "(as published) teacher and student place words differently; `dopsd gain` compares both")  # fmt: skip


def open_base(model: ModelSettings, root: Path, use: Use = "teach", fresh: bool = False) -> Base:
    """Find (or fetch) the files that ``use`` needs and check them before anything is loaded.

    A name on the hub means the commit that it meant when the base was last identified, unless ``fresh``.
    Raises :class:`ModelError` with the command that fetches what is missing.
    """
    family, teaching = family_class(model), teaching_of(model)
    names = [name for name in family.components if use != "train" or name in _TRAINED]
    patterns = ["model_index.json", *(f"{name}/*" for name in names)]
    revision = model.revision if fresh else known_commit(model.path, model.revision, root)
    try:
        source = locate(model.path, root, revision=revision, patterns=patterns)
        index = check_pipeline(
            source, family.pipeline, {name: family.components[name] for name in names},
            distilled=family.says_distilled, advice=family.refused,
        )  # fmt: skip
    except ModelError as error:
        raise _with_command(error, family.published) from None
    if use != "teach" or not family.needs_vlm(teaching):
        return Base(source, names, index, root / HASHES)
    vlm, thetas = _open_vlm(model, source, family, root, fresh)
    return Base(source, names, index, root / HASHES, vlm, thetas)


def _open_vlm(
    model: ModelSettings, base: Source, family: type[Family], root: Path, fresh: bool
) -> tuple[Source, dict[str, float | None]]:
    key = "model.vlm"
    try:
        if model.vlm is None and not (base.folder / "vlm").is_dir():
            raise ModelError(f"{key}: the teacher needs a Qwen3-VL to see with; give a folder or a hub name")
        vlm = Source(base.folder / "vlm")
        if model.vlm is not None:
            revision = model.vlm_revision if fresh else known_commit(model.vlm, model.vlm_revision, root)
            vlm = locate(model.vlm, root, revision=revision, patterns=["*.json", "*.safetensors", "*.txt"], key=key)
        return vlm, check_vlm(vlm, _config(base, "text_encoder"), key)
    except ModelError as error:
        raise _with_command(error, family.published_vlm) from None


def _with_command(error: ModelError, published: str) -> ModelError:
    """The same with the command that fetches the published model, where it names none."""
    if not published or "hf download" in str(error):
        return error
    return ModelError(f"{error}; `hf download {published} --local-dir DIR` fetches the published one")


def remember_commits(base: Base, root: Path) -> None:
    """Let every later stage take the commits that ``base`` was found at."""
    found = {s.name: s.revision for s in (base.source, base.vlm) if s is not None and s.name and s.revision}
    if found and (known := _commits(root)) | found != known:
        from dopsd.files import write_json

        write_json(root / COMMITS, known | found)


def known_commit(name: str, revision: str | None, root: Path) -> str | None:
    """The revision that a name on the hub stands for: as the settings say, else the commit that it was found at."""
    return revision or _commits(root).get(name)


def _commits(root: Path) -> dict[str, str]:
    path = root / COMMITS
    return read_json(path, f"{COMMITS}: remove it") if path.is_file() else {}


# --- loading ----------------------------------------------------------------------------------------------------------


def device_of(model: ModelSettings) -> torch.device:
    """Where the settings want the model; :class:`ModelError` where there is no such device."""
    name = model.device if model.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda but torch finds no CUDA device here; set it to auto or cpu")
    return torch.device(name)


def dtype_of(model: ModelSettings, device: torch.device) -> torch.dtype:
    """The type that the settings want a model in on ``device``."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return dtypes.get(model.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)


def load_family(
    model: ModelSettings, root: Path = Path(), use: Use = "teach", sharded: bool = False,
    fitting: Callable[[], Checkpointing] = lambda: "none",
) -> Family:  # fmt: skip
    """The base that the settings name. Nothing of it is in memory yet: each part is loaded when it is first used.

    ``root`` is what a relative path is relative to. ``sharded``: the processes of this training divide the transformer
    among them. ``fitting`` says what ``gradient_checkpointing: auto`` means for a training, and is asked when the
    transformer is loaded. Raises :class:`ModelError` for what is missing or does not fit.
    """
    from diffusers.utils import logging

    logging.disable_progress_bar()
    check_installed(model.quantization)
    base, device = open_base(model, root, use), device_of(model)
    dtype = dtype_of(model, device)
    family = family_class(model)
    teaching = replace(teaching_of(model), vlm=base.vlm_identity)
    where = Where(device, dtype, model.quantization, model.offload, sharded)
    loaders = dict(family.loaders(base.source, base.vlm, teaching, where))
    load_transformer = loaders["transformer"]

    def transformer(parts: Parts) -> Any:
        module = load_transformer(parts)
        which = model.gradient_checkpointing
        checkpoint_blocks(module, fitting() if which == "auto" else which)
        if model.compile and use == "train":
            compile_blocks(module)
        return use_plain_attention(module) if device.type == "cpu" else module

    configs = {name: _config(base.source, name) for name in _with_config(base)}
    shown = {name: _shown(name, load) for name, load in (loaders | {"transformer": transformer}).items()}
    parts = Parts(shown, configs | {"index": base.index}, device if model.offload == "model" else None)
    # what only trains encodes nothing, and need not have the encoders' files to say which they are
    rounded = [] if model.quantization == "none" else [model.quantization]
    made_of = [ENCODING_VERSION, str(dtype), base.encoders, family.pipeline, *rounded]
    fingerprint = "" if use == "train" else _hash(made_of)
    return family(parts, teaching, device, dtype, fingerprint)


def _shown(name: Part, load: Loader) -> Loader:
    """``load``, and what is loaded stands on the terminal meanwhile: the transformer takes a minute at true size."""

    def loaded(parts: Parts) -> Any:
        with tqdm(desc=f"loading {name}", bar_format="{desc} ...", leave=False, disable=None):
            return load(parts)

    return loaded


def _with_config(base: Base) -> Iterable[str]:
    return [name for name in base.components if (base.source.folder / name / CONFIG).is_file()]


def _config(source: Source, component: str) -> dict[str, Any]:
    return read_json(source.folder / component / CONFIG, f"{source.shown}: {component}/{CONFIG}")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
