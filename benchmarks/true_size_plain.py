"""Published models at their true widths with random weights, and D-OPSD's step on them: ours, and written plainly.

Part of ``benchmarks/true_size.py``, which says how to run it. Nothing is downloaded: modules are built on the device
from the published configurations and filled with numbers of the scale that trained weights have, so that time and
memory are the real model's while the pictures are noise. ``scale="tiny"`` keeps everything but the widths.

Plainly, as the authors' released code has it: text encoder, VLM and autoencoder stay on the device and run in every
step, gradient checkpointing is on, peft's own ``set_adapter`` switches between student and teacher, its adapters cast
their input, and one backward follows the K steps of the roll-out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model, Qwen3VLConfig, Qwen3VLModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the project is not installed

from dopsd.config.groups import ModelSettings  # noqa: E402
from dopsd.distill.adapters import AdapterPair  # noqa: E402
from dopsd.distill.rollout import Velocity, rollout  # noqa: E402
from dopsd.models import family_class, qwen_vl, sizes, teaching_of  # noqa: E402
from dopsd.models.base import Conditioning, Family, Parts  # noqa: E402
from dopsd.models.flux2_klein import LAYERS, Flux2Klein  # noqa: E402
from dopsd.models.loading import compile_blocks, frozen, place, use_plain_attention  # noqa: E402
from dopsd.models.quantized import blocks_of, check_installed  # noqa: E402
from dopsd.models.z_image import ZImage, context_states  # noqa: E402
from dopsd.sizing.runs import CAPTION_TOKENS  # noqa: E402

Config = dict[str, Any]
Encode = Callable[[], tuple[list[Conditioning], list[Conditioning]]]
"""Conditionings of one example: what the student sees, what the teacher sees."""
Step = Callable[[Tensor], Tensor]
"""Noise to the loss, gradients left in the student's parameters."""

BASES = {
    "z-image-turbo": ModelSettings(family="z-image", path=ZImage.published, vlm=ZImage.published_vlm),
    "klein-4b": ModelSettings(family="flux2-klein", path=Flux2Klein.published, vlm=ZImage.published_vlm),
}
"""What a person would write for each; klein has no use for the VLM."""
TINY = {
    "z-image-turbo": {"caption": 12, "context": 20, "patches": 4},
    "klein-4b": {"caption": 24, "context": 24},
}
"""As :func:`sizes_of`."""

_TINY_TEXT = {
    "head_dim": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 400,
}  # fmt: skip
_TINY: dict[str, dict[str, Config]] = {
    "z-image-turbo": {
        "transformer": {
            "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12],
            "cap_feat_dim": 64,
        },
        "text_encoder": _TINY_TEXT | {"hidden_size": 64, "num_hidden_layers": 4, "max_window_layers": 4},
        "vae": {"block_out_channels": [32] * 4},
    },
    "klein-4b": {
        "transformer": {
            "attention_head_dim": 32, "axes_dims_rope": [8] * 4, "num_attention_heads": 2, "joint_attention_dim": 96,
            "num_layers": 1, "num_single_layers": 2,
        },
        "text_encoder": _TINY_TEXT | {"hidden_size": 32},
        "vae": {"block_out_channels": [32] * 4},
    },
}  # fmt: skip
_TINY_VISION = {
    "deepstack_visual_indexes": [1, 2, 3], "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
    "out_hidden_size": 64,
}  # fmt: skip
_TINY_IDS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
_FIRST_WORD = 10
"""Token ids from here on are words in either scale."""


# --- models -----------------------------------------------------------------------------------------------------------


def configurations(model: str, scale: str) -> dict[str, Config]:
    """The published configurations by part, and under ``vlm`` the one of the VLM; narrowed for ``scale="tiny"``."""
    found = sizes.configurations(BASES[model], ROOT)
    assert found is not None
    published: dict[str, Config] = {part: dict(config) for part, config in found.items()}
    if scale == "true":
        return published
    narrow, vlm = {part: published[part] | changes for part, changes in _TINY[model].items()}, published["vlm"]
    text = vlm["text_config"] | _TINY["z-image-turbo"]["text_encoder"]
    text |= {"rope_scaling": text["rope_scaling"] | {"mrope_section": [6, 5, 5]}}
    vlm = vlm | _TINY_IDS | {"text_config": text, "vision_config": vlm["vision_config"] | _TINY_VISION}
    return published | narrow | {"vlm": vlm}


def make_family(model: str, scale: str, device: torch.device, dtype: torch.dtype, settings: ModelSettings) -> Family:
    """The project's own family over random weights; as in a run, a part is in memory from its first use on.

    Of ``settings`` this is what decides how the transformer is stored and run; checkpointing is switched later. Raises
    :class:`dopsd.models.base.ModelError` where a library that it takes is not installed.
    """
    check_installed(settings.quantization)
    configs, kind = configurations(model, scale), family_class(BASES[model])

    def transformer(_: Parts) -> Any:
        make = partial(sizes.of_diffusers, configs["transformer"])
        if settings.quantization == "none" and settings.offload == "none":
            made = build(make, device, dtype)
        else:
            made = build_in_blocks(make, device, dtype, settings)
        if settings.compile:
            compile_blocks(made)
        return use_plain_attention(made) if device.type == "cpu" else made

    def vae(_: Parts) -> Any:
        return build(partial(sizes.of_diffusers, configs["vae"]), device, dtype)

    def text_encoder(_: Parts) -> Any:
        config = dict(kind.encoder_config(configs["text_encoder"]))
        return build(lambda: Qwen3Model(Qwen3Config.from_dict(config)), device, dtype)

    loaders: dict[Any, Any] = {
        "transformer": transformer, "vae_encoder": vae, "vae_decoder": vae, "text_encoder": text_encoder,
        "vision": lambda parts: _vision(configs["vlm"], parts["text_encoder"], device, dtype),
        "scheduler": lambda _: diffusers.FlowMatchEulerDiscreteScheduler.from_config(configs["scheduler"]),
    }  # fmt: skip
    return kind(Parts(loaders, configs), teaching_of(BASES[model]), device, dtype, fingerprint="random")


def build(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A module made on the device and in that type at once: no copy passes through the host."""
    with torch.device(device), sizes.default_dtype(dtype):
        module = make()
    fill(module.named_parameters())
    return frozen(module, device)


def build_in_blocks(
    make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype, settings: ModelSettings
) -> Any:
    """The same through :func:`dopsd.models.loading.place`, which rounds a block, or has it wait on the host, before it
    asks for the next: each is drawn on the device at that moment, so that no two are there unrounded."""
    with torch.device("meta"), sizes.default_dtype(dtype):
        module = make().eval().requires_grad_(False)
    blocks = blocks_of(module)
    inside = {id(part) for block in blocks for part in block.modules()}
    for block in blocks:
        block.to = partial(_drawn, block)  # type: ignore[method-assign]
    for part in module.modules():
        if id(part) not in inside:
            for name, value in list(part.named_parameters(recurse=False)):
                part._parameters[name] = nn.Parameter(torch.empty_like(value, device=device), requires_grad=False)
            fill(part.named_parameters(recurse=False))
    return place(module, device, settings.quantization, "in turn" if settings.offload == "group" else "there")


def _drawn(block: Any, device: torch.device) -> None:
    """What ``block.to(device)`` is, once."""
    del block.to
    block.to_empty(device=device)
    fill(block.named_parameters())


@torch.no_grad()
def fill(parameters: Iterator[tuple[str, Tensor]]) -> None:
    """Layers that keep the scale of what they are given, norms of 1, no biases: nothing overflows or dies out."""
    for name, value in parameters:
        if value.ndim > 1:
            value.normal_(std=math.prod(value.shape[1:]) ** -0.5)
        else:
            value.fill_(0.0 if name.endswith("bias") else 1.0)


def _vision(config: Config, text_encoder: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The VLM over the text encoder's own tensors, as :func:`dopsd.models.qwen_vl.load_with` puts them together."""
    with init_empty_weights(include_buffers=False):
        settings = Qwen3VLConfig.from_dict(config)
        settings._attn_implementation = "sdpa"
        vlm = Qwen3VLModel(settings)
    seen = {key: torch.empty(value.shape, device=device, dtype=dtype) for key, value in vlm.visual.named_parameters()}
    fill(iter(seen.items()))
    vlm.visual.load_state_dict(seen, strict=False, assign=True)
    qwen_vl.share_language_half(vlm, text_encoder)
    return frozen(vlm, device)


# --- conditionings ----------------------------------------------------------------------------------------------------


def sizes_of(model: str, scale: str) -> dict[str, int]:
    """Tokens of a caption and of a context, and patches along a side of the picture that a VLM is shown (four a
    token): at true size what the family says of one example."""
    if scale == "tiny":
        return TINY[model]
    configs, teaching, family = configurations(model, scale), teaching_of(BASES[model]), family_class(BASES[model])
    shapes = family.shapes(configs, teaching, CAPTION_TOKENS, 1024, 1024)
    assert shapes is not None
    patches = math.isqrt(teaching.pixels[1]) // configs["vlm"]["vision_config"]["patch_size"]
    return {"caption": shapes.prompt["caption"][0], "context": shapes.context["caption"][0], "patches": patches}


def random_encodings(family: Family, sizes: dict[str, int], side: int) -> tuple[list[Conditioning], list[Conditioning]]:
    """What the cache of encodings holds for one example."""
    like = {"device": family.device, "dtype": family.dtype}
    config = family.parts.configs["transformer"]
    width = config["cap_feat_dim" if isinstance(family, ZImage) else "joint_attention_dim"]
    prompt = {"caption": torch.randn(sizes["caption"], width, **like)}
    context = {"caption": torch.randn(sizes["context"], width, **like)}
    if isinstance(family, Flux2Klein):
        cells = side // family.cell
        context["reference/0"] = torch.randn(config["in_channels"], cells, cells, **like)
    return [prompt], [context]


def noise_picture(side: int) -> Image.Image:
    """A target."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def word_ids(family: Family, rows: int, tokens: int) -> Tensor:
    """Random token ids that are words."""
    words = family.parts.configs["text_encoder"]["vocab_size"]
    return torch.randint(_FIRST_WORD, min(words, 100_000), (rows, tokens), device=family.device)


def plain_encoders(family: Family, sizes: dict[str, int], side: int) -> Encode:
    """Every encoder of the published code, resident; the call runs them on one example."""
    target, words = noise_picture(side), word_ids(family, 1, sizes["caption"])
    family.parts["vae_encoder"]  # resident before the first step
    if isinstance(family, ZImage):
        return _z_image_encoders(family, sizes, target, words)
    config = family.parts.configs["text_encoder"]
    # with its head, and all of its layers: the pipeline's own class runs them
    encoder = build(lambda: Qwen3ForCausalLM(Qwen3Config.from_dict(dict(config))), family.device, family.dtype)

    @torch.no_grad()
    def caption() -> Tensor:
        states = _states(encoder, words)
        return torch.cat([states[layer] for layer in LAYERS], dim=-1)[0]

    def encode() -> tuple[list[Conditioning], list[Conditioning]]:
        # twice: the teacher's caption has a suffix
        prompt, context = caption(), caption()
        return [{"caption": prompt}], [{"caption": context, "reference/0": family.encode_images([target])[0]}]

    return encode


def _z_image_encoders(family: ZImage, sizes: dict[str, int], target: Image.Image, words: Tensor) -> Encode:
    encoder, vlm, config = family.parts["text_encoder"], family.parts["vision"], family.parts["vision"].config
    seen, patches = config.vision_config, sizes["patches"]
    grid = torch.tensor([[1, patches, patches]], device=family.device)
    shown = patches**2 // seen.spatial_merge_size**2
    ids = word_ids(family, 1, sizes["context"])
    ids[:, 1], ids[:, 2 : 2 + shown], ids[:, 2 + shown] = (
        config.vision_start_token_id, config.image_token_id, config.vision_end_token_id,
    )  # fmt: skip
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }  # fmt: skip
    values = seen.in_channels * seen.temporal_patch_size * seen.patch_size**2
    pixels = torch.randn(patches**2, values, device=family.device, dtype=family.dtype)

    @torch.no_grad()
    def encode() -> tuple[list[Conditioning], list[Conditioning]]:
        prompt = _states(encoder, words)[-2][0]
        context = context_states(vlm, inputs, pixels, grid)[0]
        family.encode_images([target])  # for the shape of the noise, as the recipe does
        return [{"caption": prompt}], [{"caption": context}]

    return encode


def _states(encoder: Any, ids: Tensor) -> Sequence[Tensor]:
    mask = torch.ones_like(ids)
    return encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states


@torch.no_grad()
def encode_captions(family: Family, rows: int, tokens: int) -> Tensor:
    """The forward of ``family.encode_prompt`` on random ids, for which no tokenizer is needed."""
    states = _states(family.parts["text_encoder"], word_ids(family, rows, tokens))
    if isinstance(family, ZImage):
        return states[-2]
    return torch.cat([states[layer] for layer in LAYERS], dim=-1)


# --- the step ---------------------------------------------------------------------------------------------------------


def ours(predict: Velocity, adapters: AdapterPair, sigmas: Tensor, encode: Encode) -> Step:
    """The product's own roll-out on encodings made once."""
    prompts, contexts = encode()
    return lambda noise: rollout(predict, adapters, noise, sigmas, prompts, contexts, teacher=adapters.teacher)[1]


def plain(predict: Velocity, adapters: AdapterPair, sigmas: Tensor, encode: Encode) -> Step:
    """Everything in every step, peft's own two adapters, one backward at its end."""
    transformer = adapters.transformer

    def step(noise: Tensor) -> Tensor:
        prompts, contexts = encode()
        x, losses = noise, []
        for sigma, sigma_next in pairwise(sigmas):
            transformer.set_adapter("teacher")
            with torch.no_grad():
                target = predict(x, sigma, contexts)
            transformer.set_adapter("student")
            u = predict(x, sigma, prompts)
            losses.append(F.mse_loss(u, target))
            x = (x + (sigma_next - sigma) * u).detach()
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach()

    return step
