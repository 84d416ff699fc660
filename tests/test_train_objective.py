"""The objective by hand: latents of one number, a model of one weight, every loss and gradient worked out in Python."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dopsd.config.groups import Method
from dopsd.data.dataset import Example
from dopsd.train import objective as objectives
from dopsd.train.objective import Draw, Objective
from tests import tiny

METHODS = get_args(Method)

STUDENT, TEACHER, BASE = 0.3, 0.7, 0.1
"""The weight of who answers: ``u = weight * x + (1 + sigma) * what it is told``."""
TOLD, SHOWN, CLEAN, OLD = (0.5, -0.4), (1.1, 0.2), (0.8, -0.6), (0.25, -0.75, 0.45)
GRID = [1.0, 0.6, 0.2, 0.0]


class Toy:
    """Family, adapters and model in one, that keep what they are asked for."""

    teacher = "teacher"

    def __init__(self, device="cpu"):
        self.weight = torch.tensor(STUDENT, dtype=torch.float64, device=device, requires_grad=True)
        self.selected, self.grids, self.told, self.device = "student", [], [], device

    @contextmanager
    def select(self, name):
        before, self.selected = self.selected, name
        yield
        self.selected = before

    def sigmas(self, num_steps, height, width):
        self.grids.append((num_steps, height, width))
        return torch.tensor(GRID, dtype=torch.float64)

    def levels(self, uniform, num_steps, height, width):
        assert (num_steps, height, width) == (3, 64, 48)
        return uniform.double() ** 2

    def initial_latents(self, batch, height, width, generator):
        assert (batch, height, width) == (1, 64, 48)
        return torch.randn(1, 1, 1, 1, generator=generator, dtype=torch.float64).to(self.device)

    def predict(self, x, sigma, conditioning):
        self.told += [x.device, sigma.device, *[c["caption"].device for c in conditioning]]
        weight = {"student": self.weight, "teacher": TEACHER, None: BASE}[self.selected]
        told = torch.stack([c["caption"] for c in conditioning]).reshape(-1, 1, 1, 1)
        return weight * x + (1 + sigma.reshape(-1, 1, 1, 1)) * told


def _latents(value, *shape):
    return torch.full((*shape, 1, 1, 1), value, dtype=torch.float64)


def _told(value):
    return {"caption": torch.tensor(value, dtype=torch.float64)}


def _objective(toy, method, **changes):
    examples = [Example(_told(TOLD[i]), _told(SHOWN[i]), _latents(CLEAN[i]), 64, 48, i, "") for i in (0, 1)]
    settings = tiny.tiny_settings(rollout_steps=3, **changes)
    return Objective(
        method, settings, toy, toy.predict, toy, examples, [e.latents for e in examples], [_told(v) for v in OLD]
    )  # fmt: skip


def _replay(weight):
    return {"weight": weight, "prompts": ["x"]}


def _along(told, shown, kind, guidance, answers, start=None, fixed=None):
    """``(loss, d loss / d weight)`` of one example: a roll-out from ``start``, or at the ``fixed`` states."""
    loss, slope, x = 0.0, 0.0, start
    for k, (sigma, after) in enumerate(pairwise(GRID)):
        x = fixed[k] if fixed else x
        mine, target = STUDENT * x + (1 + sigma) * told, answers * x + (1 + sigma) * shown
        target += (guidance - 1) * (target - (answers * x + (1 + sigma) * told))
        factor = (sigma**2 if kind == "x0" else 1) / 3
        loss, slope = loss + factor * (mine - target) ** 2, slope + factor * 2 * (mine - target) * x
        x += (after - sigma) * mine
    return loss, slope


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["velocity", "x0"])
@pytest.mark.parametrize("method", METHODS)
def test_every_loss_and_gradient_is_what_it_is_by_hand(method, kind, guidance):
    toy = Toy()
    objective = _objective(toy, method, loss=kind, teacher={"guidance": guidance}, replay=_replay(0.5))
    noise, uniform, chosen, other = (0.9, -1.2), (0.75, 0.375), (2, 0), (-0.3, 1.4)
    draws = [
        Draw(i, _latents(noise[i], 1), torch.tensor([uniform[i]]).double(), chosen[i], _latents(other[i], 1))
        for i in (0, 1)
    ]
    parts = objective.backward(draws, 0.25, torch.Tensor.backward)
    own, kept = [], []
    for i in (0, 1):
        if method in ("sft", "sft-teacher"):
            sigma = uniform[i] ** 2
            x = (1 - sigma) * CLEAN[i] + sigma * noise[i]
            off = STUDENT * x + (1 + sigma) * TOLD[i] - (noise[i] - CLEAN[i])
            own.append((off**2, 2 * off * x))
        elif method == "off-policy":
            states = [(1 - sigma) * CLEAN[i] + sigma * noise[i] for sigma in GRID[:-1]]
            own.append(_along(TOLD[i], SHOWN[i], kind, guidance, TEACHER, fixed=states))
        else:
            own.append(_along(TOLD[i], SHOWN[i], kind, guidance, TEACHER, noise[i]))
        old = OLD[chosen[i]]
        kept.append(_along(old, old, kind, 1.0, BASE, other[i]))
    (loss, slope), (replay, pull) = ([sum(values) / 2 for values in zip(*pairs, strict=True)] for pairs in (own, kept))
    assert {key: float(value) for key, value in parts.items()} == pytest.approx(
        {"train/loss": loss, "train/replay_loss": replay}, rel=1e-6
    )
    assert float(toy.weight.grad) == pytest.approx(0.25 * (slope + 0.5 * pull), rel=1e-12)
    assert not any(value.requires_grad for value in parts.values())


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_an_examples_numbers_are_drawn_one_after_the_other(method, weight):
    """Noise, then the level where there is one, then the replayed prompt and its noise where there is replay."""
    generator, by_hand = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn = [_objective(Toy(), method, replay=_replay(weight)).draw(1, generator) for _ in range(9)]
    seen = set()
    for draw in drawn:
        assert draw.index == 1
        assert torch.equal(draw.noise, torch.randn(1, 1, 1, 1, generator=by_hand, dtype=torch.float64))
        if method in ("sft", "sft-teacher"):
            assert torch.equal(draw.level, torch.rand(1, generator=by_hand))
        else:
            assert draw.level is None
        if weight:
            assert draw.replay == int(torch.randint(3, (1,), generator=by_hand))
            assert torch.equal(draw.replay_noise, torch.randn(1, 1, 1, 1, generator=by_hand, dtype=torch.float64))
        else:
            assert (draw.replay, draw.replay_noise) == (None, None)
        seen.add(draw.replay)
    assert seen == ({0, 1, 2} if weight else {None})


class Copies(TorchDispatchMode):
    """Counts what is copied to another device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten._to_copy.default and made.device != args[0].device
        return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("resident", [0, 2**30], ids=["many", "few"])
def test_all_that_the_model_is_given_lies_where_the_noise_lies(monkeypatch, method, resident):
    """Examples and prompts wait on the CPU; the ``meta`` device stands for a GPU. Few are there before they are drawn:
    only what flow matching and off-policy learn from is copied in a step."""
    monkeypatch.setattr(objectives, "_RESIDENT", resident)
    toy = Toy("meta")
    objective = _objective(toy, method, replay=_replay(0.5))
    generator = torch.Generator().manual_seed(0)
    draws = [objective.draw(i, generator) for i in (0, 1)]
    objective.backward(draws, 1.0, lambda loss: None)  # the grids, too, are taken there once
    with Copies() as copies:
        parts = objective.backward(draws, 1.0, lambda loss: None)
    told = {"d-opsd": 6, "off-policy": 6, "sft": 4, "sft-teacher": 4}[method]  # two prompts, contexts, replayed prompts
    drawn = {"d-opsd": 0, "off-policy": 1, "sft": 2, "sft-teacher": 2}[method]  # latents, levels
    assert copies.count == drawn + (0 if resident else told)
    assert {device.type for device in toy.told} == {"meta"}
    assert {value.device.type for value in parts.values()} == {"meta"}
    assert toy.weight.grad is None, "it is back-propagated by whom the trainer says, and this one does nothing"


def test_the_family_is_asked_for_a_grid_once_for_each_size_of_image():
    toy = Toy()
    objective = _objective(toy, "d-opsd", replay=_replay(0.5))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        objective.backward([objective.draw(0, generator)], 1.0, torch.Tensor.backward)
    assert toy.grids == [(3, 64, 48)]
