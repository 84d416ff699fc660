"""One optimizer step: what each of several processes does of it, what it refuses, and in which precision it runs."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from dopsd.models.base import Family
from dopsd.train import trainer
from dopsd.train.trainer import TrainError
from tests import tiny


class OneOfSome(Accelerator):
    """What a process is told that is number ``rank`` of ``ranks``; nothing is exchanged."""

    rank, ranks = 0, 1
    process_index = property(lambda self: self.rank)
    num_processes = property(lambda self: self.ranks)
    is_main_process = property(lambda self: self.rank == 0)


def _step_of(monkeypatch, folder, rank, ranks, **changes):
    """``(gradients, sums, seconds)`` that a process has to exchange in its first step, and the result."""
    kept = []

    def exchange(accelerator, parameters, sums, seconds):
        kept.append(([p.grad.clone() for p in parameters], dict(sums), seconds))
        return {key: float(value) for key, value in sums.items()}, 7.5

    monkeypatch.setattr(trainer, "Accelerator", type("This", (OneOfSome,), {"rank": rank, "ranks": ranks}))
    monkeypatch.setattr(trainer, "exchange", exchange)
    settings = tiny.tiny_settings(
        max_steps=1, rollout_steps=1, replay={"weight": 0.5, "prompts": ["x"]},
        teacher={"decay": 0.9, "gain_images": 1}, **changes,
    )  # fmt: skip
    result = tiny.run_tiny("d-opsd", folder, settings)
    return *kept[0], result


@pytest.mark.parametrize(("batch", "accumulation"), [(3, 1), (1, 3)], ids=["one pass", "example by example"])
def test_what_two_processes_do_adds_up_to_what_one_does(monkeypatch, tmp_path, batch, accumulation):
    """Three examples: two of them are the first one's and one is the second's."""
    before = time.monotonic()
    run = {"batch_size": batch, "accumulation": accumulation}
    whole, losses, seconds, result = _step_of(monkeypatch, tmp_path / "alone", 0, 1, **run)
    assert 0 < seconds < time.monotonic() - before
    assert result.seconds == 7.5, "the clock that counts is the one that was exchanged"
    parts = [_step_of(monkeypatch, tmp_path / str(rank), rank, 2, **run) for rank in (0, 1)]
    assert losses.keys() == {"train/loss", "train/replay_loss"}
    assert losses["train/replay_loss"] == 0, "the student still is the base"
    first, second = (part[1]["train/loss"] for part in parts)
    torch.testing.assert_close(first + second, losses["train/loss"], rtol=1e-5, atol=1e-8)
    assert 0 < float(second) < float(losses["train/loss"])
    scale = max(float(g.abs().max()) for g in whole)
    for one, first, second in zip(whole, parts[0][0], parts[1][0], strict=True):
        torch.testing.assert_close(first + second, one, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_a_gradient_that_is_not_finite_ends_the_run_before_it_is_learnt(monkeypatch, tmp_path, what):
    """Either alone: where processes exchange, one may overflow while the other does not."""

    def exchange(accelerator, parameters, sums, seconds):
        if what == "gradient":
            parameters[0].grad.fill_(float("inf"))
        return {key: float("nan" if what == "loss" else value) for key, value in sums.items()}, seconds

    monkeypatch.setattr(trainer, "exchange", exchange)
    with pytest.raises(TrainError, match="not finite at step 1;"):
        tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=1))
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_runs_in_the_bases_precision_whatever_the_processs_is(dtype):
    """Autocast to bfloat16 beside a bfloat16 base, also where the process's own choice is float16; none in float32."""
    seen = []

    def predict_velocity(latents, sigma, conditioning):
        seen.append((latents, sigma, conditioning, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return "velocity"

    family = SimpleNamespace(dtype=dtype, predict_velocity=predict_velocity)
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        latents, sigma, told = torch.zeros(1), torch.ones(1), [{"caption": torch.zeros(1)}]
        assert Family.velocity(family, latents, sigma, told) == "velocity"
    finally:
        torch.set_autocast_dtype("cpu", before)
    ((x, s, c, enabled, chosen),) = seen
    assert (x is latents, s is sigma, c is told) == (True, True, True)
    assert enabled == (dtype == torch.bfloat16)
    assert not enabled or chosen == torch.bfloat16
