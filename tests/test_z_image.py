"""The Z-Image family against diffusers' own pipeline and against itself, one example at a time."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from PIL import Image

from dopsd.config.groups import ModelSettings
from dopsd.models import ModelError, load_family
from dopsd.models.base import Request
from emoji_turbo import architecture, pretrain
from tests.tiny import CAPTIONS, SIDE, tiny_family, tiny_parts


@pytest.fixture(scope="module")
def family():
    return tiny_family()


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 32])
def test_the_training_grid_is_the_one_the_pipeline_samples_with(family, steps):
    parts = tiny_parts()
    pipeline = ZImagePipeline(**{k: parts[k] for k in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")})
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a fox", height=SIDE, width=SIDE, num_inference_steps=steps, guidance_scale=0.0, output_type="latent")
    assert torch.equal(family.sigmas(steps, SIDE, SIDE), pipeline.scheduler.sigmas.float())


def test_the_four_step_grid_is_shift_three(family):
    assert torch.allclose(family.sigmas(4, SIDE, SIDE), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_asking_for_a_grid_leaves_the_familys_scheduler_alone(family):
    before = family.parts["scheduler"].sigmas.clone()
    family.sigmas(4, SIDE, SIDE)
    assert torch.equal(family.parts["scheduler"].sigmas, before)


def test_a_context_does_not_depend_on_what_shares_its_batch(family, pictures):
    requests = [Request(text) for text in CAPTIONS[:3]]
    together = family.encode_context(requests, pictures)
    for request, picture, batched in zip(requests, pictures, together, strict=True):
        (alone,) = family.encode_context([request], [picture])
        torch.testing.assert_close(batched["caption"], alone["caption"], rtol=1e-4, atol=1e-5)


def test_a_context_depends_on_its_picture_and_on_its_caption(family, pictures):
    (a,) = family.encode_context([Request(CAPTIONS[0])], [pictures[0]])
    (b,) = family.encode_context([Request(CAPTIONS[0])], [pictures[1]])
    (c,) = family.encode_context([Request(CAPTIONS[2])], [pictures[0]])
    assert (a["caption"] - b["caption"]).abs().max() > 1e-3
    assert a["caption"].shape != c["caption"].shape or (a["caption"] - c["caption"]).abs().max() > 1e-3


def test_references_come_before_the_target(family, pictures):
    (one,) = family.encode_context([Request(CAPTIONS[0])], [pictures[0]])
    (two,) = family.encode_context([Request(CAPTIONS[0], (pictures[1],))], [pictures[0]])
    (swapped,) = family.encode_context([Request(CAPTIONS[0], (pictures[0],))], [pictures[1]])
    image_tokens = (SIDE // 16) ** 2 + 2
    assert len(two["caption"]) == len(one["caption"]) + image_tokens
    assert (two["caption"] - swapped["caption"]).abs().max() > 1e-3


def test_a_context_that_is_too_long_is_refused_not_cut(family, pictures):
    with pytest.raises(ModelError, match="tokens long"):
        family.encode_context([Request("fox " * 1100)], [pictures[0]])


def test_the_language_half_is_the_text_encoder(family, pictures):
    """Text states of the VLM and of the pipeline's encoder are the same, weight for weight."""
    parts = tiny_parts()
    ids = parts["tokenizer"](CAPTIONS[0], return_tensors="pt")
    with torch.no_grad():
        a = parts["text_encoder"](**ids, output_hidden_states=True).hidden_states[-2]
        b = parts["vlm"].language_model(**ids, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(a, b)


def test_a_folder_round_trip_keeps_the_family(tmp_path, pictures):
    """What ``save_folder`` writes loads as a family and as a plain pipeline, with the same encodings."""
    parts = tiny_parts()
    architecture.save_folder(
        tmp_path / "base", vae=parts["vae"], tokenizer=parts["tokenizer"], vlm=parts["vlm"],
        transformer=parts["transformer"],
    )  # fmt: skip
    loaded = load_family(ModelSettings(path=str(tmp_path / "base"), device="cpu", context_pixels=(4096, 4096)))
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    states, _ = pipeline.encode_prompt([CAPTIONS[0]], do_classifier_free_guidance=False)
    (told,) = loaded.encode_prompt([Request(CAPTIONS[0])])
    torch.testing.assert_close(told["caption"], states[0], rtol=1e-4, atol=1e-5)
    (context,) = loaded.encode_context([Request(CAPTIONS[0])], [pictures[0]])
    (original,) = tiny_family().encode_context([Request(CAPTIONS[0])], [pictures[0]])
    torch.testing.assert_close(context["caption"], original["caption"], rtol=0.02, atol=0.02)  # half precision
    names = {p.name for p in (tmp_path / "base" / "vlm").glob("*.safetensors")}
    assert names == {"model.safetensors"}


def test_a_missing_base_is_one_clear_line(tmp_path):
    with pytest.raises(ModelError, match=r"^model\.path: .* an empty folder; .*$"):
        load_family(ModelSettings(path=str(tmp_path), device="cpu"), tmp_path)


def test_the_build_cuts_pictures_as_the_image_processor_does(pictures):
    processor = architecture.make_image_processor()
    theirs = processor(images=pictures, return_tensors="pt")
    pixels = torch.stack([torch.tensor(list(p.tobytes())).view(SIDE, SIDE, 3).permute(2, 0, 1) for p in pictures])
    patches, grid = pretrain.patchify(pixels.float() / 127.5 - 1)
    assert torch.equal(grid, theirs["image_grid_thw"])
    torch.testing.assert_close(patches, theirs["pixel_values"], rtol=0, atol=1e-5)
