"""Every family against diffusers' own pipeline over the same module objects: roll-outs, contexts, grids, levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dopsd.distill.rollout import sample
from dopsd.models import load_family
from dopsd.models.base import Family, Request
from tests.family_folders import NAMES, settings_of, write_families

CAPTIONS = ("a fox", "a red boat in [V] style at dawn", "an owl")
SIZES = ((128, 128), (96, 160))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A stand-in of each published layout."""
    return write_families(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def families(folders) -> dict[str, Family]:
    """Each loaded as the settings say; parts stay loaded, so that the pipelines share them."""
    return {name: load_family(settings_of(name, folders)) for name in NAMES}


def pipeline_of(family: Family) -> Any:
    """The family's pipeline over the very same modules: a re-loaded one differs in the last bits."""
    parts = family.parts
    vae = parts["vae_decoder"]
    if isinstance(vae.encoder, torch.nn.Identity):
        vae.encoder = parts["vae_encoder"].encoder
    about = {k: v for k, v in parts.configs["index"].items() if k in ("is_distilled", "patch_size")}
    if "text_encoder_select_layers" in parts.configs["index"]:
        about["text_encoder_select_layers"] = parts.configs["index"]["text_encoder_select_layers"]
    names = ("scheduler", "text_encoder", "tokenizer", "transformer")
    pipeline = getattr(diffusers, family.pipeline)(vae=vae, **{name: parts[name] for name in names}, **about)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(family: Family, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return family.initial_latents(batch, height, width, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_rollout_is_the_pipelines_call_bit_for_bit(families, name, steps, size, batch):
    family, (height, width) = families[name], size
    pipeline = pipeline_of(family)
    requests = [Request(caption) for caption in CAPTIONS[:batch]]
    noise = noise_of(family, batch, height, width)
    told = family.encode_prompt(requests)
    ours = sample(family, told, steps, height, width, noise)
    call = family.call(requests[0], height, width, steps, noise) | {"prompt": [r.caption for r in requests]}
    if name == "z-image":  # its pipeline pads captions to 512 and cuts the padding off again: rounding alone differs
        theirs, _ = pipeline.encode_prompt(list(call.pop("prompt")), do_classifier_free_guidance=False)
        for mine, states in zip(told, theirs, strict=True):
            torch.testing.assert_close(mine["caption"], states, rtol=1e-4, atol=1e-4)
        call["prompt_embeds"] = [mine["caption"] for mine in told]
    with torch.no_grad():
        theirs = pipeline(**call).images
    assert torch.equal(pipeline.scheduler.sigmas.float(), family.sigmas(steps, height, width))
    for a, b in zip(family.decode(ours), theirs, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_as_its_examples_one_by_one(families, name):
    family = families[name]
    requests = [Request(caption) for caption in CAPTIONS]
    told, noise = family.encode_prompt(requests), noise_of(family, 3, 96, 160)
    together = sample(family, told, 2, 96, 160, noise)
    for number in range(3):
        alone = sample(family, [told[number]], 2, 96, 160, noise[number : number + 1])
        torch.testing.assert_close(together[number], alone[0], rtol=1e-3, atol=1e-4)
