"""The heart of the project: the student's own roll-out, with the teacher beside it at every state (docs/method.md).

For each noise level of the pipeline's own grid the teacher, which was shown the target image, answers at the state
that the student has reached by itself; the student learns that answer, and then walks on by its own.

Each step is back-propagated at once, so that one step's graph is alive at a time. The states are detached, hence the
sum of the per-step gradients is the gradient of the whole loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dopsd.distill.flow import euler_step
from dopsd.distill.loss import LossKind, distillation_loss
from dopsd.distill.pair import Pair, Selection
from dopsd.models.base import Conditioning, Family

Velocity = Callable[[Tensor, Tensor, Sequence[Conditioning]], Tensor]
"""``(latents [B, C, h, w], sigma, conditioning of B examples) -> dx/dsigma [B, C, h, w]`` under whatever adapter is
selected: ``family.velocity``."""


@torch.no_grad()
def sample(
    family: Family,
    conditioning: Sequence[Conditioning],
    num_steps: int,
    height: int,
    width: int,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Plain few-step Euler sampling with the adapter that is selected: latents ``[B, C, h, w]``, one per conditioning.

    Starts from ``noise``, or from noise drawn with ``generator``; one of the two must be given.
    """
    if noise is None:
        if generator is None:
            raise TypeError("sample: pass noise or a generator; without either the images could not be reproduced")
        noise = family.initial_latents(len(conditioning), height, width, generator)
    x = noise.to(family.device)
    sigmas = family.sigmas(num_steps, height, width).to(x.device)
    for sigma, sigma_next in pairwise(sigmas):
        x = euler_step(x, family.velocity(x, sigma, conditioning), sigma, sigma_next)
    return x


@torch.no_grad()
def teacher_velocity(
    predict: Velocity,
    x: Tensor,
    sigma: Tensor,
    prompts: Sequence[Conditioning],
    contexts: Sequence[Conditioning],
    guidance: float,
) -> Tensor:
    """The teacher's answer at ``x``, pushed ``guidance`` times along what the context changes (1 is the paper).

    ``u_t + (g - 1) * (u_t - u_t0)``, with ``u_t0`` the same weights' text-only answer at the same state.
    """
    u = predict(x, sigma, contexts)
    if guidance == 1.0:
        return u
    return u + (guidance - 1.0) * (u - predict(x, sigma, prompts))


def distill_at(
    predict: Velocity,
    pair: Pair,
    x: Tensor,
    sigma: Tensor,
    prompts: Sequence[Conditioning],
    contexts: Sequence[Conditioning],
    *,
    teacher: Selection,
    loss: LossKind,
    guidance: float,
    weight: float,
    backward: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Teach the student at one state: ``backward(weight * loss)``; returns ``(u_s, loss)``, both detached.

    The teacher goes first. The student is selected last and stays so during ``backward``, because gradient
    checkpointing computes the forward again there, under the adapter that is selected then.
    """
    with pair.select(teacher):
        u_teacher = teacher_velocity(predict, x, sigma, prompts, contexts, guidance)
    with pair.select("student"):
        u_student = predict(x, sigma, prompts)
        value = distillation_loss(loss, u_student, u_teacher, sigma)
        backward(weight * value)
    return u_student.detach(), value.detach()


def rollout(
    predict: Velocity,
    pair: Pair,
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
) -> tuple[Tensor, Tensor]:
    """One roll-out of the student from ``noise`` ``[B, C, h, w]`` over ``sigmas`` ``[K + 1]``, taught at each state.

    ``prompts`` are what the student sees, ``contexts`` what the teacher sees; ``teacher`` says whose weights answer.
    Gradients of ``weight * mean_k loss_k`` are left in the student's parameters. Returns the end of the roll-out
    (the student's few-step sample, detached) and the loss before ``weight``.
    """
    x, total = noise, torch.zeros(())
    num_steps = len(sigmas) - 1
    for sigma, sigma_next in pairwise(sigmas):
        x = x.detach()
        u, value = distill_at(
            predict, pair, x, sigma, prompts, contexts, teacher=teacher, loss=loss, guidance=guidance,
            weight=weight / num_steps, backward=backward,
        )  # fmt: skip
        x = euler_step(x, u, sigma, sigma_next)
        total = total + value / num_steps
    return x, total
