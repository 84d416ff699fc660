"""What the publishers of the few-step models ship, as facts: configurations at true widths, file lists, sizes.

Written out rather than left to defaults, because the classes' defaults are other models (``axes_lens`` 1024 instead of
1536, guidance embeddings, a wider Qwen3-VL). ``PARAMETERS`` says how many parameters each must have, so a wrong number
here does not stay unseen. :mod:`tests.published` makes narrow folders from these dictionaries.

Of klein 4B all but the transformer's configuration is the published file to the byte, of Z-Image-Turbo to the byte
count; klein 9B and Krea are put together from what others say of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

CONFIGURATIONS = Path(__file__).resolve().parents[1] / "dopsd" / "models" / "published.json"
"""The package's own, from which ``dopsd doctor`` counts what a base needs before it is here."""

PUBLISHED: dict[str, dict[str, Config]] = {
    model: entry["parts"] for model, entry in json.loads(CONFIGURATIONS.read_text(encoding="utf-8")).items()
}
"""Configurations by model and part, at true widths."""

PARAMETERS: dict[tuple[str, str], int] = {
    ("z-image-turbo", "transformer"): 6_154_908_736,
    ("z-image-turbo", "text_encoder"): 4_022_468_096,
    ("z-image-turbo", "vae"): 83_819_683,
    ("klein-4b", "transformer"): 3_875_544_576,
    ("klein-4b", "text_encoder"): 4_022_468_096,
    ("klein-4b", "vae"): 84_046_115,
    ("klein-9b", "transformer"): 9_078_581_248,
    ("klein-9b", "text_encoder"): 8_190_735_360,
    ("krea-2", "transformer"): 12_820_073_036,
    ("krea-2", "text_encoder"): 4_437_815_808,
    ("krea-2", "vae"): 126_892_531,
    ("qwen3-vl-4b", "model"): 4_437_815_808,
}
"""Parameters of each part, a tied head counted once."""
VISION_PARAMETERS = 415_347_712
"""Of them the vision half of Qwen3-VL-4B."""

_CONFIGS = ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json")
_TOKENIZER = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
_VOCABULARY = ("tokenizer/merges.txt", "tokenizer/vocab.json")
_ENCODER = ("text_encoder/config.json", "text_encoder/generation_config.json")
_VAE = "vae/diffusion_pytorch_model.safetensors"


def shard_names(stem: str, count: int) -> list[str]:
    """Names of a sharded weight file and of its index; of one shard the plain name."""
    if count == 1:
        return [f"{stem}.safetensors"]
    shards = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [*shards, f"{stem}.safetensors.index.json"]


SHARDS: dict[str, dict[str, int]] = {
    "z-image-turbo": {"transformer": 3, "text_encoder": 3},
    "klein-4b": {"transformer": 1, "text_encoder": 2},
    "klein-9b": {"transformer": 2, "text_encoder": 4},
    "krea-2": {"transformer": 3, "text_encoder": 1},
    "qwen3-vl-4b": {"model": 2},
}


def _files(model: str, *more: str) -> frozenset[str]:
    weights = [
        *shard_names("transformer/diffusion_pytorch_model", SHARDS[model]["transformer"]),
        *shard_names("text_encoder/model", SHARDS[model]["text_encoder"]),
    ]
    return frozenset([".gitattributes", "README.md", *_CONFIGS, *_TOKENIZER, _VAE, *weights, *more])


_KLEIN_TOKENIZER = tuple(
    f"tokenizer/{name}" for name in ("added_tokens.json", "chat_template.jinja", "special_tokens_map.json")
)
FILES: dict[str, frozenset[str]] = {
    "z-image-turbo": _files("z-image-turbo", *_ENCODER, *_VOCABULARY),
    "klein-4b": _files(
        "klein-4b", *_ENCODER, *_VOCABULARY, *_KLEIN_TOKENIZER, "LICENSE.md", "flux-2-klein-4b.safetensors"
    ),
    "klein-9b": _files(
        "klein-9b", *_ENCODER, *_VOCABULARY, *_KLEIN_TOKENIZER, "LICENSE.md", "flux-2-klein-9b.safetensors"
    ),
    "krea-2": _files("krea-2", "text_encoder/config.json", "tokenizer/chat_template.jinja", "turbo.safetensors"),
    "qwen3-vl-4b": frozenset(
        [
            ".gitattributes", "README.md", "chat_template.json", "config.json", "generation_config.json", "merges.txt",
            "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
            "vocab.json", *shard_names("model", SHARDS["qwen3-vl-4b"]["model"]),
        ]
    ),
}  # fmt: skip
"""All files of the repositories but pictures and PDFs."""

CARDS: dict[str, Config] = {
    "z-image-turbo": {"license": "apache-2.0", "pipeline_tag": "text-to-image", "library_name": "diffusers"},
    "klein-4b": {"license": "apache-2.0", "pipeline_tag": "image-to-image", "library_name": "diffusers"},
    "klein-9b": {
        "license": "other", "license_name": "flux-non-commercial-license", "license_link": "LICENSE.md",
        "pipeline_tag": "image-to-image", "library_name": "diffusers",
    },
    "krea-2": {
        "license": "other", "license_name": "krea-2-community-license", "license_link": "LICENSE.pdf",
        "pipeline_tag": "text-to-image", "library_name": "diffusers",
    },
    "qwen3-vl-4b": {"license": "apache-2.0", "pipeline_tag": "image-text-to-text", "library_name": "transformers"},
}  # fmt: skip
"""Front matter of the README files."""
