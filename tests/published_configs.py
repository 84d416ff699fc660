"""What the publishers of the few-step models ship, as facts: configurations at true widths, file lists, sizes.

Written out rather than left to defaults, because the classes' defaults are other models (``axes_lens`` 1024 instead of
1536, guidance embeddings, a wider Qwen3-VL). ``PARAMETERS`` says how many parameters each must have, so a wrong number
here does not stay unseen. :mod:`tests.published` makes narrow folders from these dictionaries.

Of klein 4B all but the transformer's configuration is the published file to the byte, of Z-Image-Turbo to the byte
count; klein 9B and Krea are put together from what others say of them.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_DOWN, _UP = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4

_QWEN3_4B: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# a later version of the library saved the same encoder: the type has another key, every layer says what it attends to
_QWEN3_4B_KLEIN: Config = {
    **{k: v for k, v in _QWEN3_4B.items() if k != "torch_dtype"},
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 36,
    "transformers_version": "4.56.1",
}
_QWEN3_8B: Config = {
    **_QWEN3_4B_KLEIN,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}

_VISION: Config = {
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2560,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_ONLY_QWEN3 = (
    "architectures", "max_window_layers", "rope_scaling", "rope_theta", "sliding_window", "torch_dtype",
    "transformers_version", "use_sliding_window",
)  # fmt: skip
_VL_TEXT: Config = {
    **{k: v for k, v in _QWEN3_4B.items() if k not in _ONLY_QWEN3},
    "dtype": "bfloat16",
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
}
_MROPE: Config = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
_VL_IDS: Config = {
    "image_token_id": 151655,
    "tie_word_embeddings": True,
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}

_FLUX2_VAE: Config = {
    "_class_name": "AutoencoderKLFlux2",
    "_diffusers_version": "0.37.0.dev0",
    "_name_or_path": "black-forest-labs/FLUX.2-dev",
    "act_fn": "silu",
    "batch_norm_eps": 0.0001,
    "batch_norm_momentum": 0.1,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": _DOWN,
    "force_upcast": True,  # the class does not know it, and says so when it loads
    "in_channels": 3,
    "latent_channels": 32,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "patch_size": [2, 2],
    "sample_size": 1024,
    "up_block_types": _UP,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_DYNAMIC: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.37.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def _model_index(
    pipeline: str, version: str, *, text_encoder: str, tokenizer: str, transformer: str, vae: str, **values: Any
) -> Config:
    """``model_index.json``: the pipeline's class, its parts' classes, what else its constructor takes."""
    return {
        "_class_name": pipeline,
        "_diffusers_version": version,
        **values,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", text_encoder],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", vae],
    }


def _klein(heads: int, blocks: tuple[int, int], encoder: Config) -> dict[str, Config]:
    return {
        "model_index": _model_index(
            "Flux2KleinPipeline", "0.37.0.dev0", is_distilled=True,
            text_encoder="Qwen3ForCausalLM", tokenizer="Qwen2TokenizerFast",
            transformer="Flux2Transformer2DModel", vae="AutoencoderKLFlux2",
        ),
        "scheduler": _DYNAMIC,
        "text_encoder": encoder,
        "transformer": {
            "_class_name": "Flux2Transformer2DModel",
            "_diffusers_version": "0.37.0.dev0",
            "attention_head_dim": 128,
            "axes_dims_rope": [32, 32, 32, 32],
            "eps": 1e-06,
            "guidance_embeds": False,
            "in_channels": 128,
            "joint_attention_dim": 3 * encoder["hidden_size"],  # the states of three layers beside each other
            "mlp_ratio": 3.0,
            "num_attention_heads": heads,
            "num_layers": blocks[0],
            "num_single_layers": blocks[1],
            "out_channels": None,
            "patch_size": 1,
            "rope_theta": 2000,
            "timestep_guidance_channels": 256,
        },
        "vae": _FLUX2_VAE,
    }  # fmt: skip


PUBLISHED: dict[str, dict[str, Config]] = {
    "z-image-turbo": {
        "model_index": _model_index(
            "ZImagePipeline", "0.36.0.dev0",
            text_encoder="Qwen3Model", tokenizer="Qwen2Tokenizer",
            transformer="ZImageTransformer2DModel", vae="AutoencoderKL",
        ),
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.36.0.dev0",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": False,
            "shift": 3.0,
        },
        "text_encoder": _QWEN3_4B,
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "_diffusers_version": "0.36.0.dev0",
            "all_f_patch_size": [1],
            "all_patch_size": [2],
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "cap_feat_dim": 2560,
            "dim": 3840,
            "in_channels": 16,
            "n_heads": 30,
            "n_kv_heads": 30,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "norm_eps": 1e-05,
            "qk_norm": True,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.36.0.dev0",
            "_name_or_path": "flux-dev",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": _DOWN,
            "force_upcast": True,
            "in_channels": 3,
            "latent_channels": 16,
            "latents_mean": None,
            "latents_std": None,
            "layers_per_block": 2,
            "mid_block_add_attention": True,
            "norm_num_groups": 32,
            "out_channels": 3,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "up_block_types": _UP,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
    },
    "klein-4b": _klein(24, (5, 20), _QWEN3_4B_KLEIN),
    "klein-9b": _klein(32, (8, 24), _QWEN3_8B),
    "krea-2": {
        "model_index": _model_index(
            "Krea2Pipeline", "0.39.0.dev0", is_distilled=True, patch_size=2,
            text_encoder_select_layers=list(range(2, 36, 3)),
            text_encoder="Qwen3VLModel", tokenizer="Qwen2Tokenizer",
            transformer="Krea2Transformer2DModel", vae="AutoencoderKLQwenImage",
        ),
        "scheduler": {
            **_DYNAMIC, "_diffusers_version": "0.39.0.dev0", "max_image_seq_len": 6400, "shift": 1.0,
        },
        "text_encoder": {
            "architectures": ["Qwen3VLModel"],
            "dtype": "bfloat16",
            "model_type": "qwen3_vl",
            "text_config": {**_VL_TEXT, "rope_parameters": {**_MROPE, "rope_theta": 5000000}},
            "vision_config": _VISION,
            **_VL_IDS,
        },
        "transformer": {
            "_class_name": "Krea2Transformer2DModel",
            "_diffusers_version": "0.39.0.dev0",
            "attention_head_dim": 128,
            "axes_dims_rope": [32, 48, 48],
            "in_channels": 64,
            "intermediate_size": 16384,
            "norm_eps": 1e-05,
            "num_attention_heads": 48,
            "num_key_value_heads": 12,
            "num_layers": 28,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "num_text_layers": 12,
            "rope_theta": 1000.0,
            "text_hidden_dim": 2560,
            "text_intermediate_size": 6912,
            "text_num_attention_heads": 20,
            "text_num_key_value_heads": 20,
            "timestep_embed_dim": 256,
        },
        "vae": {
            "_class_name": "AutoencoderKLQwenImage",
            "_diffusers_version": "0.39.0.dev0",
            "attn_scales": [],
            "base_dim": 96,
            "dim_mult": [1, 2, 4, 4],
            "dropout": 0.0,
            "latents_mean": [
                -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
            ],
            "latents_std": [
                2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
            ],
            "num_res_blocks": 2,
            "temperal_downsample": [False, True, True],
            "z_dim": 16,
        },
    },
    "qwen3-vl-4b": {
        "model": {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": {**_VL_TEXT, "rope_scaling": _MROPE, "rope_theta": 5000000},
            "transformers_version": "4.57.0.dev0",
            "vision_config": _VISION,
            **_VL_IDS,
        },
        "preprocessor": {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
    },
}  # fmt: skip
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
