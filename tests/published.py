"""Stand-ins of the published few-step models: their folders file by file, at narrow width, with random weights.

What a user downloads differs from what today's libraries would save of the same model: older keys in configurations,
shards with an index, a causal model's keys under an encoder without a head, mixed types, a chat template that knows no
pictures. So every file is written here as the publishers have it (:mod:`tests.published_configs`), and none by a
library's saving; only widths and numbers of layers are others. The weights depend on ``seed`` alone and are drawn so
that every layer counts: fresh models gate their blocks with values near 0.

Token ids are the tiny tokenizer's, unless a writer is given ``tokenizer``, a folder with the published
``tokenizer.json`` (:func:`published_tokenizer`): then they are the real ones, and embeddings have 151,936 rows.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from safetensors.torch import save_file

from tests.published_configs import CARDS, PUBLISHED, SHARDS, Config, shard_names
from tests.published_tokens import (
    SPECIAL_TOKENS,
    VISION_TEMPLATE,
    Vocabulary,
    Wording,
    published_tokenizer,
    text_template,
    write_json,
    write_text,
)

__all__ = ["published_tokenizer", "write_klein", "write_krea2_turbo", "write_qwen3_vl", "write_z_image_turbo"]

# --- weights ----------------------------------------------------------------------------------------------------------


def _draw(name: str, like: torch.Tensor, generator: torch.Generator, *, centred: bool) -> torch.Tensor:
    """A random value for a weight: layers keep the scale of what they are given, norms are near 1, biases near 0.

    ``centred``: the model's norms multiply by ``1 + weight``.
    """
    value = torch.randn(like.shape, generator=generator)
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(1000)
    if leaf == "running_var":
        return 0.5 + value.square()
    if leaf in ("running_mean", "scale_shift_table", "x_pad_token", "cap_pad_token"):
        return 0.5 * value
    if leaf == "bias":
        return 0.1 * value
    if leaf == "gamma" or like.ndim == 1:
        return 0.1 * value + (0.0 if centred else 1.0)
    if "embed_tokens" in name or "pos_embed" in name:
        return 0.5 * value
    if name.endswith(("timestep_embedder.linear_1.weight", "time_embed.linear_1.weight", "t_embedder.mlp.0.weight")):
        # models change slowly with time: else a time rounded to bfloat16 would make another picture
        frequency = 10000 ** -torch.linspace(0, 1, like.shape[1] // 2)
        value = 2 * value / (1 + 100 * frequency).repeat(2)
    gain = 4.0 if "stream_modulation" in name or "time_mod_proj" in name else 1.0  # their gates open with it
    return gain * value / math.sqrt(math.prod(like.shape[1:]))


def _write_weights(
    stem: Path,
    build: Callable[[], torch.nn.Module],
    seed: int,
    *,
    dtype: torch.dtype,
    shards: int = 1,
    leave_out: str = "",
    keep_float: tuple[str, ...] = (),
    centred: bool = False,
) -> None:
    """Random weights for the model that ``build`` makes, in ``shards`` files with an index.

    ``leave_out`` is a key that is not stored (a tied head), modules named in ``keep_float`` are stored in float32.
    """
    with torch.device("meta"):
        wanted = build().state_dict()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, like in wanted.items():
        value = _draw(name, like, generator, centred=centred)
        as_float = bool(set(name.split(".")) & set(keep_float))
        if name != leave_out:
            tensors[name] = value.to(torch.float32 if as_float else dtype) if value.is_floating_point() else value
    names = shard_names(stem.name, shards)
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for number, (name, tensor) in enumerate(tensors.items()):
        files[number * shards // len(tensors)][name] = tensor
    stem.parent.mkdir(parents=True, exist_ok=True)
    for file, content in zip(names, files, strict=False):
        save_file(content, stem.parent / file, metadata={"format": "pt"})
    if shards > 1:
        where = {name: file for file, content in zip(names, files, strict=False) for name in content}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(stem.parent / names[-1], index)


# --- parts ------------------------------------------------------------------------------------------------------------


def _diffusers_part(folder: Path, config: Config, seed: int, **more: Any) -> None:
    """A model of diffusers; ``more`` goes to :func:`_write_weights`."""
    write_json(folder / "config.json", config)
    kind = getattr(diffusers, config["_class_name"])
    known = {key: value for key, value in config.items() if key in inspect.signature(kind).parameters}
    _write_weights(folder / "diffusion_pytorch_model", lambda: kind(**known), seed, **more)


def _transformers_part(folder: Path, config: Config, seed: int, shards: int) -> None:
    """A language model or VLM in bfloat16, under the keys of the class its configuration names, without a tied head."""
    write_json(folder / "config.json", config)
    kind = getattr(transformers, config["architectures"][0])
    tied = "lm_head.weight" if config["tie_word_embeddings"] else ""
    _write_weights(
        folder / "model", lambda: kind(kind.config_class.from_dict(config)), seed,
        dtype=torch.bfloat16, shards=shards, leave_out=tied,
    )  # fmt: skip


def _generation_config(vocabulary: Vocabulary) -> Config:
    start, end = vocabulary.added["<|endoftext|>"], vocabulary.added["<|im_end|>"]
    return {
        "bos_token_id": start, "do_sample": True, "eos_token_id": [end, start], "pad_token_id": start,
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0",
    }  # fmt: skip


def _narrow_text(config: Config, vocabulary: Vocabulary, hidden: int, layers: int) -> Config:
    """An encoder of another width with what the published ones have: 4 query heads to one of keys, wider than it is."""
    narrow = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": 32, "num_attention_heads": 4,
        "num_key_value_heads": 1, "num_hidden_layers": layers, "vocab_size": vocabulary.size,
    }  # fmt: skip
    listed = {"max_window_layers": layers, "layer_types": ["full_attention"] * layers}
    return vocabulary.ids(config | narrow | {k: v for k, v in listed.items() if k in config})


def _narrow_vision(width: int, layers: int, out: int) -> Config:
    """A vision half whose early, middle and late layers reach into the language half, as published."""
    return PUBLISHED["qwen3-vl-4b"]["model"]["vision_config"] | {
        "deepstack_visual_indexes": [layers // 4, layers // 2, 3 * layers // 4], "depth": layers, "hidden_size": width,
        "intermediate_size": 4 * width, "num_heads": 2, "out_hidden_size": out,
    }  # fmt: skip


def _repository(folder: Path, model: str) -> None:
    """The files that make a folder a repository of a model: its card, and which files are large."""
    front = "".join(f"{key}: {value}\n" for key, value in CARDS[model].items())
    write_text(folder / "README.md", f"---\n{front}---\n\n# A stand-in of {model}, narrow and random\n")
    write_text(folder / ".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def _single_file(path: Path) -> None:
    """The transformer once more, for other programs, under other names: nobody here may read it."""
    save_file({"not_the_weights_you_look_for": torch.zeros(1)}, path)


# --- the models -------------------------------------------------------------------------------------------------------


def write_z_image_turbo(
    folder: Path,
    *,
    dim: int = 64,
    layers: int = 2,
    hidden: int = 64,
    text_layers: int = 4,
    wording: Wording = "string",
    tokenizer: Path | None = None,
    seed: int = 0,
) -> Path:
    """Z-Image-Turbo: transformer ``dim`` wide (32 a head) in float32, text encoder ``hidden`` wide in bfloat16."""
    published, vocabulary = PUBLISHED["z-image-turbo"], Vocabulary(tokenizer)
    shards = SHARDS["z-image-turbo"]
    heads = dim // 32
    _repository(folder, "z-image-turbo")
    write_json(folder / "model_index.json", published["model_index"])
    write_json(folder / "scheduler" / "scheduler_config.json", published["scheduler"])
    text = _narrow_text(published["text_encoder"], vocabulary, hidden, text_layers)
    _transformers_part(folder / "text_encoder", text, seed + 1, shards["text_encoder"])
    write_json(folder / "text_encoder" / "generation_config.json", _generation_config(vocabulary))
    template = {"tokenizer_config.json": vocabulary.config(chat_template=text_template(wording))}
    vocabulary.write(folder / "tokenizer", {**template, **vocabulary.lists()})
    narrow = {
        "dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": heads, "axes_dims": [8, 12, 12],
        "cap_feat_dim": hidden,
    }  # fmt: skip
    _diffusers_part(
        folder / "transformer", published["transformer"] | narrow, seed + 2,
        dtype=torch.float32, shards=shards["transformer"],
    )  # fmt: skip
    vae = published["vae"] | {"block_out_channels": [32, 32, 32, 32]}
    _diffusers_part(folder / "vae", vae, seed + 3, dtype=torch.bfloat16)
    return folder


def write_qwen3_vl(
    folder: Path,
    text_config_of: Path | None = None,
    *,
    vision_hidden: int = 32,
    vision_layers: int = 4,
    tokenizer: Path | None = None,
    seed: int = 100,
) -> Path:
    """Qwen3-VL-4B-Instruct, with a language half that fits the text encoder of the model in ``text_config_of``.

    Without one it fits :func:`write_z_image_turbo`'s defaults. Its weights are other ones, and so is the base of its
    rope, which has three axes.
    """
    if tokenizer is None and text_config_of is not None:
        tokenizer = text_config_of / "tokenizer"
    published, vocabulary = PUBLISHED["qwen3-vl-4b"], Vocabulary(tokenizer)
    widths = _narrow_text(published["model"]["text_config"], vocabulary, 64, 4)
    if text_config_of is not None:
        fit = json.loads((text_config_of / "text_encoder" / "config.json").read_text(encoding="utf-8"))
        fit = fit.get("text_config", fit)
        sizes = (
            "head_dim", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
            "num_key_value_heads", "vocab_size",
        )  # fmt: skip
        widths |= {key: fit[key] for key in sizes}
    config = vocabulary.ids(published["model"]) | {
        "text_config": _narrow_mrope(widths),
        "vision_config": _narrow_vision(vision_hidden, vision_layers, widths["hidden_size"]),
    }
    _repository(folder, "qwen3-vl-4b")
    _transformers_part(folder, config, seed, SHARDS["qwen3-vl-4b"]["model"])
    write_json(folder / "generation_config.json", _generation_config(vocabulary))
    write_json(folder / "preprocessor_config.json", published["preprocessor"])
    video = published["preprocessor"] | {"video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(folder / "video_preprocessor_config.json", video)
    write_json(folder / "chat_template.json", {"chat_template": VISION_TEMPLATE})
    vocabulary.write(folder, {"tokenizer_config.json": vocabulary.config(), **vocabulary.lists()})
    return folder


def _narrow_mrope(config: Config) -> Config:
    """The three axes of the rope as they share a narrower head, wherever this version keeps them."""
    key = "rope_scaling" if "rope_scaling" in config else "rope_parameters"
    half = config["head_dim"] // 2
    side = 5 * half // 16
    return config | {key: config[key] | {"mrope_section": [half - 2 * side, side, side]}}


def write_klein(
    folder: Path,
    size: Literal["4b", "9b"] = "4b",
    *,
    dim: int = 64,
    blocks: tuple[int, int] = (2, 3),
    hidden: int = 32,
    is_distilled: bool = True,
    wording: Wording = "string",
    tokenizer: Path | None = None,
    seed: int = 200,
) -> Path:
    """FLUX.2-klein: ``blocks`` double and single blocks ``dim`` wide (32 a head), all in bfloat16.

    The encoder keeps its 36 layers: the states after 9, 18 and 27 are used. ``is_distilled=False`` is the base model,
    whose index does not name the flag.
    """
    model = f"klein-{size}"
    seed += 10 * (size == "9b")  # at one width the two would be one model
    published, vocabulary, shards = PUBLISHED[model], Vocabulary(tokenizer), SHARDS[model]
    _repository(folder, model)
    write_text(folder / "LICENSE.md", f"{CARDS[model].get('license_name', CARDS[model]['license'])}\n")
    _single_file(folder / f"flux-2-klein-{size}.safetensors")
    index = {k: v for k, v in published["model_index"].items() if is_distilled or k != "is_distilled"}
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", published["scheduler"])
    text = _narrow_text(published["text_encoder"], vocabulary, hidden, 36)
    _transformers_part(folder / "text_encoder", text, seed + 1, shards["text_encoder"])
    write_json(folder / "text_encoder" / "generation_config.json", _generation_config(vocabulary))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    files = {
        "tokenizer_config.json": vocabulary.config(),
        "chat_template.jinja": text_template(wording),
        "added_tokens.json": vocabulary.added,
        "special_tokens_map.json": {"additional_special_tokens": list(SPECIAL_TOKENS[1:]), **named},
        **vocabulary.lists(),
    }
    vocabulary.write(folder / "tokenizer", files)
    narrow = {
        "attention_head_dim": 32, "axes_dims_rope": [8, 8, 8, 8], "num_attention_heads": dim // 32,
        "joint_attention_dim": 3 * hidden, "num_layers": blocks[0], "num_single_layers": blocks[1],
    }  # fmt: skip
    _diffusers_part(
        folder / "transformer", published["transformer"] | narrow, seed + 2,
        dtype=torch.bfloat16, shards=shards["transformer"],
    )  # fmt: skip
    vae = published["vae"] | {"block_out_channels": [32, 32, 32, 32]}
    _diffusers_part(folder / "vae", vae, seed + 3, dtype=torch.bfloat16)
    return folder


def write_krea2_turbo(
    folder: Path,
    *,
    dim: int = 64,
    layers: int = 2,
    hidden: int = 32,
    vision_hidden: int = 32,
    vision_layers: int = 4,
    is_distilled: bool = True,
    tokenizer: Path | None = None,
    seed: int = 300,
) -> Path:
    """Krea-2-Turbo: transformer ``dim`` wide (16 a head) in bfloat16 with norms in float32, VAE in float32.

    The encoder is a whole Qwen3-VL, with 36 layers of text ``hidden`` wide, of which twelve are tapped; the repository
    has no image processor (:func:`write_qwen3_vl` has).
    """
    published, vocabulary, shards = PUBLISHED["krea-2"], Vocabulary(tokenizer), SHARDS["krea-2"]
    heads = dim // 16
    _repository(folder, "krea-2")
    _single_file(folder / "turbo.safetensors")
    write_json(folder / "model_index.json", published["model_index"] | {"is_distilled": is_distilled})
    write_json(folder / "scheduler" / "scheduler_config.json", published["scheduler"])
    text = _narrow_text(published["text_encoder"]["text_config"], vocabulary, hidden, 36)
    encoder = vocabulary.ids(published["text_encoder"]) | {
        "text_config": _narrow_mrope(text),
        "vision_config": _narrow_vision(vision_hidden, vision_layers, hidden),
    }
    _transformers_part(folder / "text_encoder", encoder, seed + 1, shards["text_encoder"])
    described = vocabulary.config()
    vocabulary.write(folder / "tokenizer", {"tokenizer_config.json": described, "chat_template.jinja": VISION_TEMPLATE})
    narrow = {
        "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4), "intermediate_size": 8 * dim // 3, "num_layers": layers,
        "text_hidden_dim": hidden, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
        "text_intermediate_size": 8 * hidden // 3,
    }  # fmt: skip
    kept = diffusers.Krea2Transformer2DModel._keep_in_fp32_modules
    _diffusers_part(
        folder / "transformer", published["transformer"] | narrow, seed + 2,
        dtype=torch.bfloat16, shards=shards["transformer"], keep_float=tuple(kept), centred=True,
    )  # fmt: skip
    _diffusers_part(folder / "vae", published["vae"] | {"base_dim": 8}, seed + 3, dtype=torch.float32)
    return folder
