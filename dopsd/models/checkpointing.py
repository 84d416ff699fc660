"""Gradient checkpointing: which blocks of a transformer forget their activations and compute them again."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .quantized import blocks_of

Checkpointing = Literal["none", "every-second", "every"]


def checkpoint_blocks(transformer: Any, which: Checkpointing) -> None:
    """Switch it on or off; ``every-second`` takes half of the extra time for half of the saving."""
    if which == "none":
        transformer.disable_gradient_checkpointing()
        return
    kept = {id(block) for block in blocks_of(transformer)[1::2]} if which == "every-second" else set()

    def run(block: nn.Module, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        if id(block) in kept:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(run)
