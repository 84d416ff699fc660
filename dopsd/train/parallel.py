"""Several processes, one training: each works on its share of every batch, and they speak once per optimizer step.

No model is wrapped: a roll-out has K backward passes, and a wrapper would exchange gradients in each of them, or need
to be told not to. An adapter's gradients are small, so one flat vector carries all of them, and the losses too; those
of a whole model take several, so that they are not held twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

T = TypeVar("T")

_TOGETHER = 2**28
"""Numbers in one vector: all of an adapter's."""


def share(items: Sequence[T], rank: int, ranks: int) -> Sequence[T]:
    """The items that process ``rank`` of ``ranks`` works on; the shares differ in length by one at most."""
    return items[rank::ranks]


def exchange(
    accelerator: Accelerator, parameters: Sequence[nn.Parameter], sums: Mapping[str, Tensor], seconds: float
) -> tuple[dict[str, float], float]:
    """Add up gradients and ``sums`` over all processes: a reduction for each vector, none where there is one process.

    Every process leaves with the same bits in ``parameters``' gradients. Returns the sums and the first process's
    ``seconds``, so that a limit in minutes ends all of them after the same step.
    """
    if accelerator.num_processes == 1:
        return {key: float(value) for key, value in sums.items()}, seconds
    device = parameters[0].device
    clock = torch.tensor([seconds if accelerator.is_main_process else 0.0], device=device)
    numbers = torch.cat([*(value.reshape(1).to(device) for value in sums.values()), clock])
    for group in _groups(parameters):
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in group]
        last = group[-1] is parameters[-1]
        total = accelerator.reduce(torch.cat([*flat, numbers] if last else flat), reduction="sum")
        for parameter, piece in zip(
            group, total.split([p.numel() for p in group] + [len(numbers)] * last), strict=False
        ):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    found = total[-len(numbers) :].tolist()
    return dict(zip(sums, found, strict=False)), found[-1]


def _groups(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in order, as many together as one vector carries."""
    groups: list[list[nn.Parameter]] = []
    size = _TOGETHER
    for parameter in parameters:
        if size + parameter.numel() > _TOGETHER:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.numel()
    return groups
