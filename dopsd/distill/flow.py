"""Flow matching on tensors: pure functions, no model, no state.

``x_sigma = (1 - sigma) * x0 + sigma * eps`` with ``eps ~ N(0, I)``; the velocity is ``u = dx/dsigma = eps - x0``.
Latents are ``[B, C, h, w]``; a sigma is a scalar, or ``[B]`` with one noise level per example.
"""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast(sigma: Tensor | float, x: Tensor) -> Tensor:
    """``sigma`` shaped so that it multiplies ``x``: a scalar stays one, ``[B]`` becomes ``[B, 1, 1, 1]``."""
    sigma = torch.as_tensor(sigma, device=x.device)
    return sigma if sigma.ndim == 0 else sigma.reshape(-1, *[1] * (x.ndim - 1))


def euler_step(x: Tensor, u: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """The state at ``sigma_next``, reached in a straight line from ``x`` at ``sigma``."""
    return x + (broadcast(sigma_next, x) - broadcast(sigma, x)) * u


def clean_estimate(x: Tensor, u: Tensor, sigma: Tensor | float) -> Tensor:
    """``x0_hat = x - sigma * u``: where the straight line from ``x`` ends."""
    return x - broadcast(sigma, x) * u


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """The state at ``sigma`` on the line from ``x0`` to ``eps``."""
    level = broadcast(sigma, x0)
    return (1 - level) * x0 + level * eps


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """What flow matching regresses: ``eps - x0``."""
    return eps - x0
