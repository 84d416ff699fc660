"""What the method asks of a model, and no more: the one seam between the two.

A family is one file beside this one and one line in :mod:`dopsd.models`; nothing outside of this folder asks which
family it has. All that is specific to a model is a class attribute or a method here: its pipeline's call, its noise
grid, the names in its adapter files, what it can be shown.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dopsd.config.groups import AdapterKind, ContextName

from .sources import ModelError, Source

if TYPE_CHECKING:
    from .loading import Where

__all__ = ["Conditioning", "ContextName", "Family", "ModelError", "Part", "Parts", "Request"]

Conditioning = Mapping[str, Tensor]
"""What the transformer is told besides latents and noise level: named tensors of one example, without a batch axis.
Opaque to everything but its family; savable as safetensors."""

Part = Literal[
    "tokenizer", "text_encoder", "vision", "image_processor", "vae_encoder", "vae_decoder", "transformer", "scheduler"
]
BATCH = 8
"""How many captions, contexts or pictures are encoded at once."""
ENCODERS: tuple[Part, ...] = ("text_encoder", "vision", "vae_encoder")
"""What is no longer needed once everything is encoded."""


_LARGE: frozenset[Part] = frozenset({"text_encoder", "vision", "transformer"})
"""Of which a device may hold only one: gigabytes each. A VLM that looks through the text encoder shares its weights,
and brings them along."""

Configs = Mapping[str, Mapping[str, Any]]
"""Part to its configuration; ``index`` is ``model_index.json``, ``vlm`` the VLM's."""


@dataclass(frozen=True)
class Shapes:
    """What encoding and training handle for one example, by sizes alone (:meth:`Family.shapes`)."""

    prompt: Mapping[str, tuple[int, ...]]
    """The conditioning that the student sees: tensor to shape."""
    context: Mapping[str, tuple[int, ...]]
    """The one that the teacher sees."""
    latents: tuple[int, ...]
    """``[C, h, w]``."""
    read: int
    """Tokens of a caption's turn, as the text encoder reads it, padding included."""
    shown: int = 0
    """Tokens of a turn with the picture in it, where the text encoder sees it by a VLM."""
    shown_together: int = 1
    """How many of those turns are read at once."""


@dataclass(frozen=True)
class Request:
    """What a person asks for: a caption and, where the family edits, the pictures to start from, in order."""

    caption: str
    references: tuple[Image, ...] = ()


class Parts:
    """A base model's components: each is loaded when it is first asked for, and freed by :meth:`release`.

    So a stage holds what it uses and nothing else: encoding never reads the transformer, training no text encoder.
    """

    def __init__(
        self, loaders: Mapping[Part, Loader], configs: Mapping[str, Mapping[str, Any]],
        in_turn: torch.device | None = None,
    ) -> None:  # fmt: skip
        """``configs``: the configurations of the folder's components, known without loading any. ``in_turn``: the
        device on which one large part is at a time; the others wait in host memory, released ones too."""
        self._loaders, self.configs, self._in_turn = dict(loaders), configs, in_turn
        self._loaded: dict[Part, Any] = {}

    @classmethod
    def of(cls, configs: Mapping[str, Mapping[str, Any]] | None = None, **modules: Any) -> Parts:
        """Parts that are there already; ``vae`` stands for both of its halves."""
        known = {
            name: {"_class_name": type(modules[name]).__name__, **modules[name].config}
            for name in ("vae", "transformer")
            if name in modules
        }
        if "vae" in modules:
            modules |= dict.fromkeys(("vae_encoder", "vae_decoder"), modules.pop("vae"))
        loaders = {cast(Part, name): _holder(module) for name, module in modules.items()}
        return cls(loaders, known | dict(configs or {}))

    def __contains__(self, name: Part) -> bool:
        return name in self._loaders

    def __getitem__(self, name: Part) -> Any:
        if self._in_turn is not None and name in _LARGE:
            self._wait(_LARGE - {name})
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name](self)
        elif self._in_turn is not None and name in _LARGE:
            self._loaded[name].to(self._in_turn)
        return self._loaded[name]

    def _wait(self, names: Collection[Part]) -> None:
        for name in set(names) & set(self._loaded):
            self._loaded[name].to("cpu")

    def loaded(self) -> set[Part]:
        """What is in memory now."""
        return set(self._loaded)

    def release(self, names: Collection[Part]) -> None:
        """Free these parts; asked for again, they are loaded again, or come from where they wait."""
        if self._in_turn is not None:
            self._wait(_LARGE & set(names))
            names = set(names) - _LARGE
        for name in names:
            self._loaded.pop(name, None)


Loader = Callable[[Parts], Any]
"""Makes a part; it may ask for others."""


def _holder(module: Any) -> Loader:
    return lambda _: module


@dataclass(frozen=True)
class Teaching:
    """How the teacher is shown its picture: the context's name and the text after the caption."""

    context: ContextName
    suffix: str = ""
    pixels: tuple[int, int] = (512 * 512, 768 * 768)
    """Least and most pixels of a picture shown to a VLM."""
    positions: Literal["vlm", "encoder"] = "vlm"
    vlm: str = ""
    """Identity of the VLM, where there is one beside the base."""


class Family(ABC):
    """A few-step image model, its own sign, time and packing conventions hidden.

    Latents are ``float32 [B, C, h, w]``; sigma is the noise level in [0, 1]; velocity is ``dx/dsigma = eps - x0``.
    """

    pipeline: ClassVar[str]
    """The class that ``model_index.json`` must name."""
    components: ClassVar[Mapping[str, tuple[str, ...]]]
    """Component of the folder to the classes it may have there."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Pipelines that look alike and are not this model, with what to say of them."""
    says_distilled: ClassVar[bool] = False
    """Whether ``model_index.json`` says if this is the distilled model; then it must be."""
    few_steps: ClassVar[int]
    """How many steps the published model is drawn with."""
    many_steps: ClassVar[int]
    """With how many its pictures are still what it was distilled for, to compare few steps with."""
    longest_prompt: ClassVar[int]
    """Most tokens of a caption's turn that are read. A longer one is refused: its end would be cut off unseen."""
    contexts: ClassVar[tuple[ContextName, ...]]
    """What its teacher can be shown; the first is the default."""
    suffixes: ClassVar[Mapping[ContextName, str]] = {}
    """What is added to the caption that the teacher reads."""
    edits: ClassVar[bool] = False
    """Whether a request may have references."""
    kinds: ClassVar[tuple[AdapterKind, ...]] = ("lora", "dora", "lokr")
    """Kinds of adapter that its diffusers pipeline loads."""
    published: ClassVar[str] = ""
    """Its name on the hub, for the command that fetches it."""
    published_vlm: ClassVar[str] = ""
    lora_targets: ClassVar[tuple[str, ...]]
    """Name patterns (regular expressions for the end of a module's name) of the layers that LoRA adapts by default."""

    def __init__(
        self, parts: Parts, teaching: Teaching, device: torch.device, dtype: torch.dtype, fingerprint: str
    ) -> None:
        """``fingerprint``: hash of the encoders' weights and templates, part of the key of every cached encoding."""
        self.parts, self.teaching, self.device, self.dtype, self.fingerprint = (
            parts, teaching, device, dtype, fingerprint,
        )  # fmt: skip

    # --- from a folder ------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def loaders(cls, base: Source, vlm: Source | None, teaching: Teaching, where: Where) -> Mapping[Part, Loader]:
        """How each part is loaded, from a folder that was checked."""

    @classmethod
    def needs_vlm(cls, teaching: Teaching) -> bool:
        """Whether the teacher sees by a VLM that is no component of the base."""
        return False

    # --- from configurations alone -----------------------------------------------------------------------------------

    @classmethod
    def encoder_config(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The text encoder's configuration, without what :meth:`loaders` does not load."""
        return config

    @classmethod
    def shapes(cls, configs: Configs, teaching: Teaching, tokens: int, height: int, width: int) -> Shapes | None:
        """What is handled for a caption of ``tokens`` tokens and a picture of ``height x width`` pixels; ``None`` where
        the family does not say, and nothing is counted in advance."""
        return None

    # --- what is read of a text, by the tokenizer alone ---------------------------------------------------------------

    @classmethod
    @abstractmethod
    def prompt_lengths(cls, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption's turn, as :attr:`longest_prompt` counts them."""

    @classmethod
    def longest_context(cls, configs: Configs) -> int:
        """Most tokens of the turn in which the teacher reads a caption with its suffix, the pictures in it included.
        ``configs``: those that are known."""
        return cls.longest_prompt

    @classmethod
    def picture_tokens(cls, configs: Configs, teaching: Teaching, size: tuple[int, int] | None) -> int:
        """How many of these a picture of (width, height) pixels takes, ``None``: any at most. 0 where the text encoder
        is shown none, or ``configs`` do not say."""
        return 0

    # --- what the pipeline does ---------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def call(request: Request, height: int, width: int, num_steps: int, noise: Tensor | None = None) -> dict[str, Any]:
        """Keywords of the family's own diffusers pipeline for one picture; ``noise`` ``[1, C, h, w]`` as here."""

    @staticmethod
    @abstractmethod
    def comfyui_lora(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """An adapter under the names that ComfyUI loads for this family; alpha equals rank."""

    @abstractmethod
    def shift(self, levels: Sequence[float], num_steps: int, height: int, width: int) -> Tensor:
        """Unshifted noise levels to those of the pipeline's grid of ``num_steps`` for that size: ``float32 [N]``."""

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The pipeline's own grid for images of that many pixels: ``float32 [num_steps + 1]``, from 1 down to 0."""
        return torch.cat([self.shift(self.unshifted(num_steps), num_steps, height, width), torch.zeros(1)])

    @staticmethod
    def unshifted(num_steps: int) -> list[float]:
        """The pipeline's levels before its shift, from 1 down to ``1 / num_steps``."""
        return np.linspace(1.0, 1 / num_steps, num_steps).tolist()

    def levels(self, uniform: Tensor, num_steps: int, height: int, width: int) -> Tensor:
        """Uniform ``[N]`` in [0, 1) to noise levels for flow matching, distributed as the few-step grid's shift says.

        The shift is that of ``num_steps``: klein's depends on the number of steps, and a fine grid's would put half of
        all levels below 0.03.
        """
        return self.shift(uniform.double().clamp(min=1e-6).tolist(), num_steps, height, width)

    # --- the method's questions ---------------------------------------------------------------------------------------

    @property
    def transformer(self) -> Any:
        """The module that carries the adapters (diffusers' ``ModelMixin`` and ``PeftAdapterMixin``)."""
        return self.parts["transformer"]

    @abstractmethod
    def encode_prompt(self, requests: Sequence[Request]) -> list[Conditioning]:
        """What inference sees. Raises :class:`ModelError` where a caption is longer than is read."""

    @abstractmethod
    def encode_context(self, requests: Sequence[Request], targets: Sequence[Image]) -> list[Conditioning]:
        """What the teacher sees: the request and its target picture, as :attr:`teaching` says.

        Raises :class:`ModelError` where an example is too long, rather than cutting its caption off.
        """

    @property
    def context_key(self) -> tuple[str, ...]:
        """All that decides a context besides the request, the target and the encoders themselves."""
        return tuple(str(value) for value in astuple(self.teaching))

    @abstractmethod
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Clean latents ``float32 [B, C, h, w]`` of images of one size (the posterior's mean)."""

    @abstractmethod
    def initial_latents(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Standard normal latents for images of ``height x width`` pixels, drawn on the generator's device."""

    @abstractmethod
    def predict_velocity(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """``dx/dsigma`` as float32 ``[B, C, h, w]``; ``sigma`` is a scalar or ``[B]``."""

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """:meth:`predict_velocity` in the precision that training and sampling share.

        Beside a bfloat16 base the adapters stay float32, because small steps vanish in bfloat16; their products are
        bfloat16, by autocast. One region per forward: a longer one would reuse the weights that it cast without
        gradient for the teacher. A float32 base is left alone, whatever the process's own precision is.
        """
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.predict_velocity(latents, sigma, conditioning)

    @abstractmethod
    def decode(self, latents: Tensor) -> list[Image]:
        """Latents to pictures, all at once; :func:`dopsd.distill.drawing.pictures` takes as many as fit."""

    def release_encoders(self) -> None:
        """Free text encoder, VLM and VAE encoder: after encoding, only transformer and decoder are needed."""
        self.parts.release(ENCODERS)


def shift_levels(scheduler: Any, levels: Sequence[float], mu: float | None) -> Tensor:
    """Noise levels as diffusers' flow-matching scheduler shifts them: ``float32 [N]``; the scheduler is left alone."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(sigmas=list(levels), mu=mu)
    return fresh.sigmas[:-1].to(torch.float32)


def check_lengths(lengths: Sequence[int], requests: Sequence[Request], limit: int, what: str, advice: str) -> None:
    """Raise :class:`ModelError` for the first request that is longer than is read: its end would be cut off unseen."""
    for length, request in zip(lengths, requests, strict=True):
        if length > limit:
            start = " ".join(request.caption.split())[:60]
            raise ModelError(f"{what} of {start!r} is {length} tokens long, at most {limit} are read: {advice}")
