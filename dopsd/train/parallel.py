"""Several processes, one training: each works on its share of every batch, and they speak once per optimizer step.

No model is wrapped: a roll-out has K backward passes, and a wrapper would exchange gradients in each of them, or need
to be told not to. The adapters' gradients are small, so one flat vector carries all of them, and the losses too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

T = TypeVar("T")


def share(items: Sequence[T], rank: int, ranks: int) -> Sequence[T]:
    """The items that process ``rank`` of ``ranks`` works on; the shares differ in length by one at most."""
    return items[rank::ranks]


def exchange(
    accelerator: Accelerator, parameters: Sequence[nn.Parameter], sums: Mapping[str, Tensor], seconds: float
) -> tuple[dict[str, float], float]:
    """Add up gradients and ``sums`` over all processes: one reduction of one vector, none where there is one process.

    Every process leaves with the same bits in ``parameters``' gradients. Returns the sums and the first process's
    ``seconds``, so that a limit in minutes ends all of them after the same step.
    """
    if accelerator.num_processes == 1:
        return {key: float(value) for key, value in sums.items()}, seconds
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    device = gradients[0].device
    clock = torch.tensor([seconds if accelerator.is_main_process else 0.0], device=device)
    parts = (
        [g.flatten().float() for g in gradients] + [value.reshape(1).to(device) for value in sums.values()] + [clock]
    )
    total = accelerator.reduce(torch.cat(parts), reduction="sum")
    pieces = total.split([p.numel() for p in parts])
    for parameter, piece in zip(parameters, pieces, strict=False):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    numbers = total[-1 - len(sums) :].tolist()
    return dict(zip(sums, numbers, strict=False)), numbers[-1]
