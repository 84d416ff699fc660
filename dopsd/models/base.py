"""What the method asks of a model, and no more: the one seam between the two.

Adding a model is one file beside this one and one line in :mod:`dopsd.models`; nothing else asks which family it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

Conditioning = Mapping[str, Tensor]
"""What the transformer is told besides latents and noise level: named tensors of one example, without a batch axis.
Opaque to everything but its family; savable as safetensors."""


class Family(Protocol):
    """A few-step text-to-image model, its own sign, time and packing conventions hidden.

    Latents are ``float32 [B, C, h, w]``; sigma is the noise level in [0, 1]; velocity is ``dx/dsigma = eps - x0``.
    """

    transformer: Any
    """A module that carries the adapters (diffusers' ``ModelMixin`` and ``PeftAdapterMixin``)."""
    lora_targets: tuple[str, ...]
    """Name patterns (regular expressions for the end of a module's name) of the layers that LoRA adapts by default."""
    fingerprint: str
    """Hash of the encoders' weights and templates: part of the key of every cached encoding."""

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        ...

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The pipeline's own grid for images of that many pixels: ``float32 [num_steps + 1]``, from 1 down to 0."""
        ...

    def encode_prompt(self, captions: Sequence[str]) -> list[Conditioning]:
        """What inference sees. Never changes ``captions``."""
        ...

    def encode_context(
        self, captions: Sequence[str], targets: Sequence[Image], references: Sequence[Sequence[Image]]
    ) -> list[Conditioning]:
        """What the teacher sees: caption and target image (and references, where the family edits)."""
        ...

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Clean latents ``[B, C, h, w]`` of images of one size (the posterior's mean). Only the baselines need it."""
        ...

    def initial_latents(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Standard normal latents for images of ``height x width`` pixels, drawn on the generator's device."""
        ...

    def predict_velocity(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """``dx/dsigma`` as float32 ``[B, C, h, w]``; ``sigma`` is a scalar or ``[B]``."""
        ...

    def decode(self, latents: Tensor) -> list[Image]:
        """Latents to pictures."""
        ...

    def release_encoders(self) -> None:
        """Free text encoder, VLM and VAE encoder: after encoding, only transformer and decoder are needed."""
        ...
