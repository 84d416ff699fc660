"""Muon for the build of the base: momentum whose matrices are made orthogonal (Jordan et al. 2024).

``torch.optim.Muon`` multiplies in bfloat16, which processors without AVX-512 do a hundred times slower than float32,
and takes one matrix at a time; this one works in the gradients' own precision on all matrices of one shape together.
On the encoders here it reaches AdamW's loss in about a third of the steps (docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For matrices ``[m, n]`` alone. Updates are scaled to AdamW's root mean square, 0.2 sqrt(max(m, n))."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            ready = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: tuple(p.shape))
            for shape, members in groupby(ready, key=lambda p: tuple(p.shape)):
                matrices = list(members)
                directions = orthogonal(torch.stack([self._push(p, group["momentum"]) for p in matrices]))
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, direction in zip(matrices, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-scale)

    def _push(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Take the gradient into the momentum; returns Nesterov's look ahead."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return torch.lerp(p.grad, state["momentum"], momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """About ``U V^T`` of each ``[N, m, n]``: singular values near 1, by a quintic Newton-Schulz iteration."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
