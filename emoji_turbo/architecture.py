"""The parts of emoji-turbo, freshly initialised: the classes of Z-Image-Turbo at a thousandth of the size.

``text_encoder`` is the language half of ``vlm`` saved under Qwen3's name, with the same keys and weights, as with the
real pair (Qwen3-VL's ``language_model`` overwritten by the pipeline's Qwen3).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from .vae import LATENT_CHANNELS

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)

# Qwen's template for the turns this project uses: one user turn of text, or of parts with images among them.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|im_start|>{{ message.role }}\n"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>\n"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false -%}<think>\n\n</think>\n\n{%- endif -%}"
    "{%- endif -%}"
).replace("\n", "{{ '\\n' }}")

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(corpus: Iterable[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's pre-tokenizer, special tokens and chat template, trained on ``corpus``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # "user" and "assistant" stand in every prompt: 64 repetitions make each one token.
    tokenizer.train_from_iterator([*corpus, *["user", "assistant"] * 64], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="right",
        model_max_length=4096,
    )
    # As one token (with the space before it) the placeholder keeps picture and caption within the transformer's
    # 32-token granule; twice that would cost a quarter more per step.
    fast.add_tokens([AddedToken("[V]", lstrip=True, normalized=False)])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_vlm(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, vision_hidden: int, vision_layers: int
) -> Qwen3VLModel:
    """A fresh Qwen3-VL with vision patches of 8 px, 16 image tokens for a 64-px picture."""
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": hidden // 64,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden,
            "intermediate_size": 3 * vision_hidden,
            "num_heads": vision_hidden // 32,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [vision_layers // 2],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    config._attn_implementation = "sdpa"
    return Qwen3VLModel(config)


def language_half(vlm: Qwen3VLModel) -> Qwen3Model:
    """The VLM's language model as a plain ``Qwen3Model``: the same weights under the same keys."""
    text = vlm.config.text_config
    config = Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]},
        pad_token_id=text.pad_token_id,
    )
    model = Qwen3Model(config)
    model.load_state_dict(vlm.language_model.state_dict(), strict=True)
    return model.eval()


def make_image_processor() -> Qwen2VLImageProcessorPil:
    """The VLM's image processor: 8-px patches merged 2 x 2, pictures of 64 x 64 up to 128 x 128 pixels."""
    return Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=64 * 64,
        max_pixels=128 * 128,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def make_transformer(text_hidden: int, *, dim: int, layers: int, heads: int) -> ZImageTransformer2DModel:
    """A fresh Z-Image transformer for latents of the VAE's channels."""
    head = dim // heads
    along = 2 * (3 * head // 16)
    return ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=dim,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=text_hidden,
        axes_dims=[head - 2 * along, along, along],
        axes_lens=[1536, 64, 64],
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Z-Image-Turbo's scheduler: static shift 3."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False)


def save_folder(
    folder: Path,
    *,
    vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
    vlm: Qwen3VLModel,
    transformer: ZImageTransformer2DModel,
) -> None:
    """An ordinary diffusers folder in half precision, plus ``vlm/`` with its processor files.

    The VLM's language half is left out of ``vlm/``: it is the text encoder, and loading puts it there.
    """
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    tokenizer.backend_tokenizer.no_padding()  # what the last call asked for would be saved with it
    half = {k: m.to(torch.float16) for k, m in (("vae", vae), ("transformer", transformer))}
    pipeline = ZImagePipeline(
        scheduler=make_scheduler(),
        tokenizer=tokenizer,
        text_encoder=language_half(vlm).to(torch.float16),
        **half,
    )
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size="10MB")
    vision = {k: v for k, v in vlm.to(torch.float16).state_dict().items() if not k.startswith("language_model.")}
    vlm.save_pretrained(folder / "vlm", state_dict=vision, safe_serialization=True)
    tokenizer.save_pretrained(folder / "vlm")
    make_image_processor().save_pretrained(folder / "vlm")
