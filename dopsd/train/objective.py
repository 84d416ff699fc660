"""What one example costs: its random draws, and each method's loss with its gradients left in the student.

Draws are made per example, one after the other from one generator on the CPU, whatever the batches are: batch 1 with
accumulation 4 sees the numbers that batch 4 sees, and a resumed run those that the unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dopsd.config.groups import Method, TrainSettings
from dopsd.data.dataset import Example
from dopsd.distill import baselines
from dopsd.distill.pair import Pair
from dopsd.distill.rollout import Velocity, rollout
from dopsd.models.base import Conditioning, Family

_FLOW_MATCHING = ("sft", "sft-teacher")
_RESIDENT = 2**30
"""Bytes of encodings that are kept where the model is; more are copied there as they are drawn."""


@dataclass(frozen=True)
class Draw:
    """One example and everything random about its turn."""

    index: int
    noise: Tensor
    """``[1, C, h, w]``: start of the roll-out, or the noise of flow matching."""
    level: Tensor | None = None
    """``[1]`` uniform, for flow matching."""
    replay: int | None = None
    """Which of the base's own prompts is replayed beside the example; ``None`` without replay."""
    replay_noise: Tensor | None = None


class Objective:
    """The loss of one method over draws of one image size."""

    def __init__(
        self,
        method: Method,
        settings: TrainSettings,
        family: Family,
        predict: Velocity,
        pair: Pair,
        examples: Sequence[Example],
        targets: Sequence[Tensor | None],
        replay: Sequence[Conditioning],
    ) -> None:
        """``targets``: clean latents ``[C, h, w]`` per example, for the methods that look at one."""
        self._method, self._settings, self._family = method, settings, family
        self._predict, self._pair = predict, pair
        self._examples, self._targets = examples, targets
        # a copy in each roll-out would wait for all that the device still has to do
        self._prompts, self._contexts, self._replay = _held(
            [e.prompt for e in examples], [e.context for e in examples],
            replay if settings.replay.weight > 0 else (), device=family.device,
        )  # fmt: skip
        self._grids: dict[tuple[int, int, int], Tensor] = {}

    def draw(self, index: int, generator: torch.Generator) -> Draw:
        """The random numbers of one turn of example ``index``."""
        height, width = self._examples[index].height, self._examples[index].width
        noise = self._family.initial_latents(1, height, width, generator)
        level = torch.rand(1, generator=generator) if self._method in _FLOW_MATCHING else None
        if not self._replay:
            return Draw(index, noise, level)
        chosen = int(torch.randint(len(self._replay), (1,), generator=generator))
        return Draw(index, noise, level, chosen, self._family.initial_latents(1, height, width, generator))

    def backward(self, draws: Sequence[Draw], weight: float, backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Add the gradients of ``weight * loss`` to the student; returns the parts of the loss, detached.

        Replay is added to every method alike, so that a comparison of two methods is not one of with and without it.
        """
        parts = {"train/loss": self._backward_method(draws, weight, backward)}
        if self._replay:
            parts["train/replay_loss"] = self._backward_replay(draws, weight, backward)
        return parts

    def _backward_method(self, draws: Sequence[Draw], weight: float, backward: Callable[[Tensor], None]) -> Tensor:
        """The method's own loss, on the examples."""
        noise = torch.cat([draw.noise for draw in draws])
        prompts = [_to(self._prompts[draw.index], noise.device) for draw in draws]
        height, width = self._examples[draws[0].index].height, self._examples[draws[0].index].width
        if self._method in _FLOW_MATCHING:
            uniform = torch.cat([draw.level for draw in draws if draw.level is not None])
            sigma = self._family.levels(uniform, self._settings.rollout_steps, height, width).to(noise.device)
            return baselines.flow_matching(
                self._predict, self._pair, self._latents(draws, noise), noise, sigma, prompts,
                weight=weight, backward=backward,
            )  # fmt: skip
        sigmas = self._grid(self._settings.rollout_steps, height, width)
        contexts = [_to(self._contexts[draw.index], noise.device) for draw in draws]
        teacher, loss_kind, guidance = self._pair.teacher, self._settings.loss, self._settings.teacher.guidance
        if self._method == "off-policy":
            return baselines.off_policy(
                self._predict, self._pair, self._latents(draws, noise), noise, sigmas, prompts, contexts,
                teacher=teacher, loss=loss_kind, guidance=guidance, weight=weight, backward=backward,
            )  # fmt: skip
        _, loss = rollout(
            self._predict, self._pair, noise, sigmas, prompts, contexts, teacher=teacher, loss=loss_kind,
            guidance=guidance, weight=weight, backward=backward,
        )  # fmt: skip
        return loss

    def _backward_replay(self, draws: Sequence[Draw], weight: float, backward: Callable[[Tensor], None]) -> Tensor:
        """A roll-out on the base's own prompts: the frozen base, shown no image, says what is to be kept."""
        noise = torch.cat([draw.replay_noise for draw in draws if draw.replay_noise is not None])
        prompts = [_to(self._replay[draw.replay], noise.device) for draw in draws if draw.replay is not None]
        example = self._examples[draws[0].index]
        sigmas = self._grid(self._settings.rollout_steps, example.height, example.width)
        _, loss = rollout(
            self._predict, self._pair, noise, sigmas, prompts, prompts, teacher=None, loss=self._settings.loss,
            weight=weight * self._settings.replay.weight, backward=backward,
        )  # fmt: skip
        return loss

    def _latents(self, draws: Sequence[Draw], like: Tensor) -> Tensor:
        targets = [self._targets[draw.index] for draw in draws]
        return torch.stack([target for target in targets if target is not None]).to(like, non_blocking=True)

    def _grid(self, num_steps: int, height: int, width: int) -> Tensor:
        key = (num_steps, height, width)
        if key not in self._grids:
            self._grids[key] = self._family.sigmas(*key).to(self._family.device)
        return self._grids[key]


def _held(*groups: Sequence[Conditioning], device: torch.device) -> list[Sequence[Conditioning]]:
    """The same where the model is, if they are few enough."""
    size = sum(value.nbytes for group in groups for told in group for value in told.values())
    return [[_to(told, device) for told in group] for group in groups] if size <= _RESIDENT else list(groups)


def _to(told: Conditioning, device: torch.device) -> Conditioning:
    return {key: value.to(device, non_blocking=True) for key, value in told.items()}
