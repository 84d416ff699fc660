"""The two distillation losses (docs/method.md): pure functions.

``velocity`` is the paper's, ``mse(u_s, u_t)``. ``x0`` compares the clean estimates at the same state,
``mse(x - sigma u_s, x - sigma u_t) = sigma**2 * mse(u_s, u_t)``, and is what the authors' released code uses.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dopsd.distill.flow import broadcast

LossKind = Literal["velocity", "x0"]


def distillation_loss(kind: LossKind, student: Tensor, teacher: Tensor, sigma: Tensor | float) -> Tensor:
    """Mean over batch and elements of the weighted squared difference of two velocities ``[B, C, h, w]``.

    No gradient flows into ``teacher``.
    """
    squared = (student - teacher.detach()).square()
    if kind == "x0":
        squared = broadcast(sigma, squared).square() * squared
    return squared.mean()


def flow_matching_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """``mse(u, eps - x0)``: what supervised fine-tuning minimises."""
    return torch.nn.functional.mse_loss(velocity, target)
