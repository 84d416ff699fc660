"""Every family against diffusers' own pipeline over the same module objects: roll-outs, contexts, grids, levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from dopsd.distill.rollout import sample
from dopsd.models import load_family
from dopsd.models.base import Family, Request
from tests.family_folders import NAMES, settings_of

CAPTIONS = ("a fox", "a red boat in [V] style at dawn", "an owl")
SIZES = ((128, 128), (96, 160))


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


def drawn(pipeline: Any, call: Mapping[str, Any], like: Tensor) -> tuple[Tensor, list[Image]]:
    """What a pipeline's own call ends with: its latents, in the layout of ``like`` ``[B, C, h, w]``, and its pictures.

    Some pipelines have tokens ``[B, N, C]``, and Krea's are patches of 2 x 2 with channels ordered (c, dy, dx).
    """
    ends = []

    def keep(_: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ends.append(tensors["latents"].clone())
        return tensors

    with torch.no_grad():
        pictures = pipeline(**call, callback_on_step_end=keep).images
    assert len(ends) == call["num_inference_steps"]
    latents, (batch, channels, height, width) = ends[-1], like.shape
    if latents.ndim == 3:
        patch = {1: 1, 4: 2}[latents.shape[2] // channels]
        latents = latents.transpose(1, 2).reshape(batch, -1, height // patch, width // patch)
        latents = torch.nn.functional.pixel_shuffle(latents, patch)
    return latents, pictures


def levels(picture: Image) -> Tensor:
    """Pixels as whole numbers of either sign."""
    return torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.int)


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
    latents, pictures = drawn(pipeline, call, noise)
    assert torch.equal(pipeline.scheduler.sigmas.float(), family.sigmas(steps, height, width))
    assert torch.equal(ours, latents)
    for mine, its in zip(family.decode(ours), pictures, strict=True):
        assert mine.tobytes() == its.tobytes()


@pytest.mark.parametrize(("steps", "size"), [(4, SIZES[1]), (8, SIZES[0])])
def test_z_images_plain_call_differs_by_rounding_alone(families, steps, size):
    """The call as a person makes it, with the text of the prompts and nothing encoded before."""
    family, (height, width) = families["z-image"], size
    requests = [Request(caption) for caption in CAPTIONS]
    noise = noise_of(family, 3, height, width)
    ours = sample(family, family.encode_prompt(requests), steps, height, width, noise)
    call = family.call(requests[0], height, width, steps, noise) | {"prompt": list(CAPTIONS)}
    latents, pictures = drawn(pipeline_of(family), call, noise)
    torch.testing.assert_close(ours, latents, rtol=1e-3, atol=1e-3)
    for mine, its in zip(family.decode(ours), pictures, strict=True):
        assert mine.size == its.size == (width, height)
        assert (levels(mine) - levels(its)).abs().max() <= 2, "levels of 255"
        assert levels(mine).float().std() > 10, "a picture, not a plain colour"


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_as_its_examples_one_by_one(families, name):
    family = families[name]
    requests = [Request(caption) for caption in CAPTIONS]
    told, noise = family.encode_prompt(requests), noise_of(family, 3, 96, 160)
    together = sample(family, told, 2, 96, 160, noise)
    for number in range(3):
        alone = sample(family, [told[number]], 2, 96, 160, noise[number : number + 1])
        torch.testing.assert_close(together[number], alone[0], rtol=1e-3, atol=1e-4)
