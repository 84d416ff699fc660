"""What D-OPSD is compared with: the same adapters, data and trainer, other states or other targets (docs/method.md).

``sft``: flow matching on the target latents. ``sft-teacher``: the same on samples of the teacher, which takes the
target's pixels out of the comparison. ``off-policy``: D-OPSD's own loss, at noised targets instead of roll-outs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dopsd.distill.flow import add_noise, velocity_target
from dopsd.distill.loss import LossKind, flow_matching_loss
from dopsd.distill.pair import Pair, Selection
from dopsd.distill.rollout import Velocity, distill_at
from dopsd.models.base import Conditioning


def flow_matching(
    predict: Velocity,
    pair: Pair,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    prompts: Sequence[Conditioning],
    *,
    weight: float = 1.0,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Tensor:
    """Supervised fine-tuning: regress ``noise - latents`` at the state of noise level ``sigma`` ``[B]``.

    ``latents`` and ``noise`` are ``[B, C, h, w]``. Leaves the gradients in the student; returns the loss, detached.
    """
    with pair.select("student"):
        velocity = predict(add_noise(latents, noise, sigma), sigma, prompts)
        value = flow_matching_loss(velocity, velocity_target(latents, noise))
        backward(weight * value)
    return value.detach()


def off_policy(
    predict: Velocity,
    pair: Pair,
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    prompts: Sequence[Conditioning],
    contexts: Sequence[Conditioning],
    *,
    teacher: Selection,
    loss: LossKind = "velocity",
    guidance: float = 1.0,
    weight: float = 1.0,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Tensor:
    """D-OPSD's loss on the same grid ``sigmas`` ``[K + 1]``, at ``latents`` noised to each level.

    Only the states differ from :func:`dopsd.distill.rollout.rollout`: same levels, same forwards, same weights.
    """
    total, num_steps = torch.zeros(()), len(sigmas) - 1
    for sigma in sigmas[:-1]:
        _, value = distill_at(
            predict, pair, add_noise(latents, noise, sigma), sigma, prompts, contexts, teacher=teacher, loss=loss,
            guidance=guidance, weight=weight / num_steps, backward=backward,
        )  # fmt: skip
        total = total + value / num_steps
    return total
