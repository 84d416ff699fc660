"""``model.compile``: blocks are compiled once per adapter, and switching between adapters compiles nothing anew.

With the backend ``aot_eager``: graphs, guards and the derivative are the real ones, without minutes of a C compiler.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from dopsd.distill import adapters
from dopsd.distill.rollout import rollout, sample
from dopsd.models import load_family
from tests import tiny
from tests.family_folders import settings_of


def _told(family, seed):
    """A prompt and a longer context of random states, as the family's own encoders shape them."""
    generator = torch.Generator().manual_seed(seed)
    if family.edits:  # klein: captions of a fixed length, and a picture beside the context
        width = family.transformer.config.joint_attention_dim
        caption = torch.randn(512, width, generator=generator)
        picture = torch.randn(family.transformer.config.in_channels, 6, 4, generator=generator)
        return {"caption": caption}, {"caption": caption.flip(0), "reference0": picture}
    width = family.transformer.config.cap_feat_dim
    return tuple({"caption": torch.randn(40 * n + 7 * seed, width, generator=generator)} for n in (1, 2))


class Steps:
    """Roll-outs of one family, each from noise and captions of its own seed."""

    def __init__(self, model, use):
        self.family = load_family(model, use=use)
        self.pair = tiny.trained_pair(self.family)

    def steps(self, seed):
        """Training, and a preview."""
        return [partial(self.rollout, seed), partial(self.sample, seed)]

    def rollout(self, seed):
        """Its end, its loss and its gradients."""
        prompt, context = _told(self.family, seed)
        noise = self.family.initial_latents(1, 64, 64, torch.Generator().manual_seed(seed))
        sigmas = self.family.sigmas(2, 64, 64)
        found = rollout(self.family.velocity, self.pair, noise, sigmas, [prompt], [context], teacher="teacher")
        gradients = [parameter.grad for parameter in self.pair.student_parameters()]
        for parameter in self.pair.student_parameters():
            parameter.grad = None
        return [*found, *gradients]

    def sample(self, seed):
        prompt, _ = _told(self.family, seed)
        noise = self.family.initial_latents(1, 64, 64, torch.Generator().manual_seed(seed))
        return [sample(self.family, [prompt], 2, 64, 64, noise)]


@pytest.mark.parametrize(("name", "graphs"), [("z-image", 11), ("flux2-klein", 7)])
def test_compiled_blocks_answer_as_they_did_and_no_switch_compiles_again(folders, monkeypatch, name, graphs):
    """With two live adapters, as on a GPU: for every kind of input (three and two) teacher, student, and student that
    only draws, and one more for each length or gradient that an input has or has not."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(adapters, "_MERGED_PARAMETERS", 0)
    plain, compiled = (Steps(settings_of(name, folders, compile=compile), "train") for compile in (False, True))
    expected = [step() for step in plain.steps(1)]
    assert not counters["stats"]
    found = [step() for step in compiled.steps(1)]
    for values, truth in zip(found, expected, strict=True):
        for value, true in zip(values, truth, strict=True):
            torch.testing.assert_close(value, true, rtol=1e-4, atol=1e-5 * float(true.abs().max()))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (4, 5):
            for step in compiled.steps(seed):
                step()


def test_only_training_compiles(folders):
    for use in ("train", "draw"):
        family = load_family(settings_of("z-image", folders, compile=True), use=use)
        compiled = [module for module in family.transformer.modules() if module._compiled_call_impl is not None]
        assert bool(compiled) == (use == "train")
