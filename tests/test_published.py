"""The stand-ins of the published models are what they stand for: files, keys, types, templates, pipelines that draw.

And the configurations they are made from are the real models', by their numbers of parameters.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import jinja2
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests import published
from tests.published_configs import FILES, PARAMETERS, PUBLISHED, VISION_PARAMETERS
from tests.published_tokens import TOKENIZER_SHA256, text_template

PIPELINES = {
    "z-image-turbo": diffusers.ZImagePipeline,
    "klein-4b": diffusers.Flux2KleinPipeline,
    "klein-9b": diffusers.Flux2KleinPipeline,
    "krea-2": diffusers.Krea2Pipeline,
}
TURN = [{"role": "user", "content": "a fox"}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a fox"}]}]
SHOWN = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a fox<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    z_image = published.write_z_image_turbo(root / "z")
    return {
        "z-image-turbo": z_image,
        "klein-4b": published.write_klein(root / "klein-4b", "4b"),
        "klein-9b": published.write_klein(root / "klein-9b", "9b"),
        "krea-2": published.write_krea2_turbo(root / "krea"),
        "qwen3-vl-4b": published.write_qwen3_vl(root / "vlm", z_image),
    }


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = published.published_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    if folder is None:
        pytest.skip("npm does not answer, so there is no published tokenizer here")
    return folder


def pipeline(folder: Path, model: str, dtype: torch.dtype = torch.float32) -> Any:
    pipe = PIPELINES[model].from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str | None, **more: Any) -> Any:
    values = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent"}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), **(values | more)).images


def types(folder: Path) -> dict[str, str]:
    """Type of every stored tensor by its key, over all shards."""
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - it is no mapping
    return found


# --- the real models' configurations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "part"), PARAMETERS)
def test_the_published_configuration_has_the_real_models_parameters(model: str, part: str) -> None:
    config = PUBLISHED[model][part]
    with torch.device("meta"):
        if "_class_name" in config:
            built = getattr(diffusers, config["_class_name"]).from_config(config)
        else:
            kind = getattr(transformers, config["architectures"][0])
            built = kind(kind.config_class.from_dict(config))
            built.tie_weights()
    assert sum(p.numel() for p in built.parameters()) == PARAMETERS[model, part]
    vision = sum(p.numel() for name, p in built.named_parameters() if "visual." in name)
    assert vision == (VISION_PARAMETERS if "vision_config" in config else 0)


PUBLISHED_FILES = {
    ("klein-4b", "model_index"): "51a76cb1cf3ed37423a1128c79c22faee8e6fbe7f5aaeb737f0a258930dbaac0",
    ("klein-4b", "scheduler"): "067afb012cef64553a763447d1efd93daeffcc0123ca7e25b09f8de20b90762e",
    ("klein-4b", "text_encoder"): "214b4c29a0d975e9fddf9994a5673f22cb2c4c5750352f9227c2c3251ebeab40",
    ("klein-4b", "vae"): "0d6dfb69ae95a5e2ac9836284bbb63d8b38ce67b25ba2dff380752b2a10ab948",
    ("z-image-turbo", "text_encoder"): 726,
    ("z-image-turbo", "scheduler"): 173,
    ("z-image-turbo", "transformer"): 473,
    ("z-image-turbo", "vae"): 805,
}
"""Hashes or sizes of files as they are on the hub; sorted by key, laid out with two spaces."""


@pytest.mark.parametrize(("model", "part"), PUBLISHED_FILES)
def test_the_published_configuration_is_the_file(model: str, part: str) -> None:
    text = json.dumps(PUBLISHED[model][part], indent=2, sort_keys=True)
    files = [text.encode(), f"{text}\n".encode()]  # diffusers ends its files with a new line, a person may not
    known = PUBLISHED_FILES[model, part]
    assert known in [len(file) if isinstance(known, int) else hashlib.sha256(file).hexdigest() for file in files]


def test_z_image_turbo_samples_with_a_static_shift_and_the_others_with_a_dynamic_one(folders: dict[str, Path]) -> None:
    read = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained
    assert json.loads((folders["z-image-turbo"] / "scheduler/scheduler_config.json").read_text()) == {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.36.0.dev0",
        "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False,
    }  # fmt: skip
    for model in ("klein-4b", "klein-9b", "krea-2"):
        config = read(folders[model], subfolder="scheduler").config
        assert config.use_dynamic_shifting
        assert config.time_shift_type == "exponential"


# --- the folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", FILES)
def test_a_folder_has_the_published_files_and_is_small(folders: dict[str, Path], model: str) -> None:
    files = [path for path in folders[model].rglob("*") if path.is_file()]
    assert {path.relative_to(folders[model]).as_posix() for path in files} == FILES[model]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert (folders[model] / "README.md").read_text().startswith("---\nlicense: ")


def test_a_folder_is_the_same_whenever_it_is_written(folders: dict[str, Path], tmp_path: Path) -> None:
    again = published.write_klein(tmp_path / "again", "4b")
    other = published.write_klein(tmp_path / "other", "4b", seed=1)
    for name in FILES["klein-4b"]:
        assert (again / name).read_bytes() == (folders["klein-4b"] / name).read_bytes(), name
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (other / weights).read_bytes() != (again / weights).read_bytes()


@pytest.mark.parametrize("model", PIPELINES)
def test_the_pipelines_class_loads_the_folder_whole_and_draws(folders: dict[str, Path], model: str) -> None:
    pipe = pipeline(folders[model], model)
    image = draw(pipe, "a fox", output_type="np")
    assert image.shape == (1, 64, 64, 3)
    assert 0.1 < image.std() < 0.4  # neither flat nor black and white
    assert abs(image - draw(pipe, "an owl", output_type="np")).mean() > 1e-3
    assert draw(pipe, "a fox", height=128, output_type="pil")[0].size == (64, 128)
    for name in ("transformer", "vae"):
        kind = type(getattr(pipe, name))
        _, report = kind.from_pretrained(folders[model], subfolder=name, output_loading_info=True)
        assert not report["missing_keys"] + report["unexpected_keys"] + report["mismatched_keys"]
    kind = type(pipe.text_encoder)
    _, report = kind.from_pretrained(folders[model] / "text_encoder", output_loading_info=True)
    assert not {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}


def test_what_the_pipelines_index_says_reaches_the_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    for model in ("klein-4b", "klein-9b", "krea-2"):
        assert pipeline(folders[model], model).config.is_distilled is True
    assert pipeline(folders["krea-2"], "krea-2").text_encoder_select_layers == tuple(range(2, 36, 3))
    base = published.write_klein(tmp_path / "base", is_distilled=False)
    assert "is_distilled" not in json.loads((base / "model_index.json").read_text())
    assert pipeline(base, "klein-4b").config.is_distilled is False


@pytest.mark.parametrize("model", PIPELINES)
def test_bfloat16_draws_nearly_the_same_picture(folders: dict[str, Path], model: str) -> None:
    """As with a real model: a stand-in that is chaotic could not tell a fault from rounding."""
    before, after = (
        draw(pipeline(folders[model], model, dtype), "a fox").float() for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < (after - before).std() / before.std() < 0.1


def test_klein_edits_a_picture(folders: dict[str, Path]) -> None:
    pipe, picture = pipeline(folders["klein-4b"], "klein-4b"), Image.new("RGB", (96, 64), "orange")
    assert (draw(pipe, "a fox", image=picture) - draw(pipe, "a fox")).abs().mean() > 1e-3


def test_weights_have_the_published_types_and_keys(folders: dict[str, Path]) -> None:
    z_image, klein, krea = folders["z-image-turbo"], folders["klein-4b"], folders["krea-2"]
    assert set(types(z_image / "transformer").values()) == {"F32"}
    assert set(types(klein / "transformer").values()) == {"BF16"}
    for folder in (z_image, klein, folders["klein-9b"], krea):
        assert set(types(folder / "text_encoder").values()) == {"BF16"}
    assert set(types(z_image / "vae").values()) == {"BF16"}
    assert {k: t for k, t in types(klein / "vae").items() if t != "BF16"} == {"bn.num_batches_tracked": "I64"}
    assert set(types(krea / "vae").values()) == {"F32"}
    floats = {key for key, kind in types(krea / "transformer").items() if kind == "F32"}
    assert floats == {key for key in types(krea / "transformer") if "norm" in key}

    assert all(key.startswith("model.") for key in types(z_image / "text_encoder"))
    assert "lm_head.weight" not in types(klein / "text_encoder")
    assert "lm_head.weight" in types(folders["klein-9b"] / "text_encoder")
    assert {key.partition(".")[0] for key in types(krea / "text_encoder")} == {"language_model", "visual"}
    halves = {".".join(key.split(".")[:2]) for key in types(folders["qwen3-vl-4b"])}
    assert halves == {"model.language_model", "model.visual"}


def test_an_index_says_where_every_tensor_is(folders: dict[str, Path]) -> None:
    for index in (p for folder in folders.values() for p in folder.rglob("*.index.json")):
        content = json.loads(index.read_text())
        found: dict[str, str] = {}
        for path in index.parent.glob("*-of-*.safetensors"):
            tensors = load_file(path)
            assert tensors, "an empty shard"
            found |= dict.fromkeys(tensors, path.name)
        assert content["weight_map"] == found
        assert content["metadata"]["total_size"] > 0


@pytest.mark.parametrize(("model", "last"), [("z-image-turbo", 2), ("klein-4b", 26), ("krea-2", 34)])
def test_every_layer_that_is_used_counts(folders: dict[str, Path], model: str, last: int) -> None:
    """Without it the picture is another: what a test says of the whole is then said of every part.

    ``last`` is the last layer of the encoder that is asked for anything.
    """
    pipe = pipeline(folders[model], model)

    @torch.no_grad()
    def encoded() -> dict[str, Any]:
        """The prompt's states; of klein's 512 a few, which are quicker to draw with, and of Krea's those that count."""
        more = {"do_classifier_free_guidance": False} if model == "z-image-turbo" else {}
        states, second = pipe.encode_prompt(prompt="a fox", **more)
        if model == "krea-2":
            return {"prompt_embeds": states[:, second[0]], "prompt_embeds_mask": second[:, second[0]]}
        return {"prompt_embeds": states[:, :32] if model == "klein-4b" else states}

    def change_without(layer: Any, result: Any) -> float:
        before, kept = result(), layer.weight.data
        layer.weight.data = torch.zeros_like(kept)
        after = result()
        layer.weight.data = kept
        return float((after - before).std() / before.std())

    prompt = encoded()
    layers = [layer for layer in pipe.transformer.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        change = change_without(layer, lambda: draw(pipe, None, height=32, width=32, num_inference_steps=1, **prompt))
        assert change > 1e-3, f"{model}: {layer}"

    inner = getattr(pipe.text_encoder, "model", pipe.text_encoder)
    text = getattr(inner, "language_model", inner).layers
    for number in (0, last, last + 1):
        change = change_without(text[number].mlp.down_proj, lambda: torch.cat([*encoded()["prompt_embeds"]]))
        assert (change > 1e-3) == (number <= last)


# --- the VLM beside Z-Image-Turbo -------------------------------------------------------------------------------------


def test_the_vlms_language_half_fits_the_text_encoder_and_is_another(folders: dict[str, Path]) -> None:
    text = transformers.Qwen3Model.from_pretrained(folders["z-image-turbo"] / "text_encoder", dtype=torch.float32)
    whole, report = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folders["qwen3-vl-4b"], dtype=torch.float32, output_loading_info=True
    )
    assert not {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}
    half = whole.model.language_model
    assert {k: v.shape for k, v in text.state_dict().items()} == {k: v.shape for k, v in half.state_dict().items()}
    assert not torch.allclose(text.embed_tokens.weight, half.embed_tokens.weight, atol=0.1)
    assert text.config.rope_parameters["rope_theta"] == 1_000_000
    assert half.config.rope_parameters["rope_theta"] == 5_000_000
    assert sum(half.config.rope_parameters["mrope_section"]) == half.config.head_dim // 2
    assert not torch.allclose(text.rotary_emb.inv_freq, half.rotary_emb.inv_freq)


def test_the_vlm_sees_a_picture(folders: dict[str, Path]) -> None:
    folder = folders["qwen3-vl-4b"]
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.Qwen3VLModel.from_pretrained(folder, dtype=torch.float32).eval()
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    text = tokenizer.apply_chat_template(
        PARTS, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text == SHOWN
    states = []
    for color in ("orange", "navy"):
        pixels = processor(images=[Image.new("RGB", (96, 64), color)], return_tensors="pt")
        count = int(pixels["image_grid_thw"].prod() // 4)
        assert count >= 65536 // 32**2  # smaller pictures are enlarged to the least area it knows
        inputs = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
        kinds = (inputs.input_ids == model.config.image_token_id).int()
        with torch.no_grad():
            output = model(**inputs, mm_token_type_ids=kinds, **pixels)
        states.append(output.last_hidden_state[0, -1])
    assert (states[0] - states[1]).abs().mean() > 1e-3


def test_the_vlm_fits_krea_too(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = published.write_qwen3_vl(tmp_path / "vlm", folders["krea-2"])
    own = transformers.AutoConfig.from_pretrained(folders["krea-2"] / "text_encoder").text_config
    fit = transformers.AutoConfig.from_pretrained(folder).text_config
    assert (fit.hidden_size, fit.num_hidden_layers, fit.vocab_size) == (32, 36, own.vocab_size)
    assert fit.rope_parameters == own.rope_parameters


# --- tokenizers and templates -----------------------------------------------------------------------------------------


def check_words_and_ids(tokenizer: Any, krea: Any) -> None:
    """What pipelines count on: Krea's fixed turn is 34 and 5 tokens, and what Qwen added is one token each."""
    assert len(tokenizer(krea.prompt_template_encode_prefix).input_ids) == krea.prompt_template_encode_start_idx
    suffix = tokenizer(krea.prompt_template_encode_suffix).input_ids
    assert len(suffix) == krea.prompt_template_encode_num_suffix_tokens
    text = "<|im_start|><|im_end|><|endoftext|><|vision_start|><|vision_end|><|image_pad|><think></think>"
    assert len(tokenizer(text).input_ids) == 8
    assert tokenizer.decode(tokenizer("<think>\n\n</think>").input_ids, skip_special_tokens=True) == (
        "<think>\n\n</think>"  # no special token
    )
    assert tokenizer.pad_token == "<|endoftext|>"  # noqa: S105
    assert tokenizer.eos_token == "<|im_end|>"  # noqa: S105
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("model", PIPELINES)
def test_the_tiny_tokenizer_has_what_pipelines_count_on(folders: dict[str, Path], model: str) -> None:
    krea = pipeline(folders["krea-2"], "krea-2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[model] / "tokenizer")
    assert isinstance(tokenizer, transformers.Qwen2Tokenizer)
    check_words_and_ids(tokenizer, krea)
    config = transformers.AutoConfig.from_pretrained(folders[model] / "text_encoder")
    assert getattr(config, "text_config", config).vocab_size > len(tokenizer)


def check_template(tokenizer: Any, wording: str) -> None:
    """Qwen3's text-only template: strings pass, the switch of thinking, and what becomes of a turn with a picture."""

    def say(turns: list[dict], **more: Any) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **more)

    turn = "<|im_start|>user\na fox<|im_end|>\n"
    assert say(TURN) == turn
    prompt = turn + "<|im_start|>assistant\n"
    assert say(TURN, add_generation_prompt=True) == prompt
    assert say(TURN, add_generation_prompt=True, enable_thinking=True) == prompt
    assert say(TURN, add_generation_prompt=True, enable_thinking=False) == prompt + "<think>\n\n</think>\n\n"
    if wording == "string":
        assert say(PARTS) == "<|im_start|>user\n<|im_end|>\n"  # neither picture nor caption, and no word of it
    else:
        with pytest.raises(jinja2.exceptions.UndefinedError, match="has no attribute 'startswith'"):
            say(PARTS)


@pytest.mark.parametrize("wording", ["string", "startswith"])
def test_the_text_only_template_drops_pictures_or_fails(tmp_path: Path, wording: Any) -> None:
    folder = published.write_z_image_turbo(tmp_path / "z", wording=wording)
    check_template(transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"), wording)
    folder = published.write_klein(tmp_path / "klein", wording=wording)
    check_template(transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"), wording)


def test_the_published_tokenizer_behaves_as_the_tiny_one(real: Path, folders: dict[str, Path]) -> None:
    assert hashlib.sha256((real / "tokenizer.json").read_bytes()).hexdigest() == TOKENIZER_SHA256
    assert sorted(path.name for path in real.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(real)
    check_words_and_ids(tokenizer, pipeline(folders["krea-2"], "krea-2"))
    check_template(tokenizer, "startswith")
    tokenizer.chat_template = text_template("string")
    check_template(tokenizer, "string")
    ids = PUBLISHED["qwen3-vl-4b"]["model"]
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == ids["image_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|vision_start|>") == ids["vision_start_token_id"]


def test_a_stand_in_takes_the_published_tokenizer(real: Path, tmp_path: Path) -> None:
    folder = published.write_z_image_turbo(tmp_path / "z", hidden=32, tokenizer=real)
    vlm = published.write_qwen3_vl(tmp_path / "vlm", folder)
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == (real / "tokenizer.json").read_bytes()
    pipe = pipeline(folder, "z-image-turbo")
    assert pipe.text_encoder.config.vocab_size == 151_936
    assert pipe.tokenizer("a fox").input_ids == transformers.AutoTokenizer.from_pretrained(real)("a fox").input_ids
    assert draw(pipe, "a fox").shape == (1, 16, 8, 8)
    config = transformers.AutoConfig.from_pretrained(vlm)
    assert (config.image_token_id, config.text_config.hidden_size, config.text_config.vocab_size) == (
        151655, 32, 151_936,
    )  # fmt: skip


def test_without_npm_there_is_no_published_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.published_tokens.ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert published.published_tokenizer(tmp_path / "tokenizer") is None
    (tmp_path / "npm").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    assert published.published_tokenizer(tmp_path / "tokenizer") is None
