"""Krea-2-Turbo, step-distilled.

Conventions hidden here: the transformer takes sigma and returns ``u``; latents are the autoencoder's ``[B, 16, h, w]``,
normalised per channel and packed in patches of 2 x 2; a caption is a stack of twelve of the encoder's layers. The text
encoder is a whole Qwen3-VL, so it is the teacher's eye as well (context ``vlm``). Source: diffusers' ``Krea2Pipeline``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from . import lora_files, qwen_vl
from .base import (
    Conditioning,
    Configs,
    ContextName,
    Family,
    Loader,
    Part,
    Request,
    Shapes,
    Teaching,
    check_lengths,
    shift_levels,
)  # fmt: skip
from .loading import Where, load, standard_loaders
from .sources import Source

MAX_CONTEXT_TOKENS = 1024
CAPTION = "caption"
"""The one tensor of a conditioning: ``[tokens, layers, hidden]``, padding left out, the turn's end in the last rows."""
_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
_PREFIX_TOKENS, _SUFFIX_TOKENS = 34, 5
_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
_PATCH = 2
_MU = 1.15
"""The shift of the distilled model, at every size."""


class Krea2(Family):
    """The Krea-2 family (see :class:`dopsd.models.base.Family`)."""

    pipeline = "Krea2Pipeline"
    components: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        "text_encoder": ("Qwen3VLModel", "Qwen3VLForConditionalGeneration"),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
        "transformer": ("Krea2Transformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
    }
    published = "krea/Krea-2-Turbo"
    says_distilled = True
    few_steps = 8
    many_steps = 16
    longest_prompt = 512
    kinds = ("lora", "dora")
    contexts: ClassVar[tuple[ContextName, ...]] = ("vlm", "enhanced-prompt")
    lora_targets = (
        r"transformer_blocks\.\d+\.attn\.to_q",
        r"transformer_blocks\.\d+\.attn\.to_k",
        r"transformer_blocks\.\d+\.attn\.to_v",
        r"transformer_blocks\.\d+\.attn\.to_gate",
        r"transformer_blocks\.\d+\.attn\.to_out\.0",
        r"transformer_blocks\.\d+\.ff\.(gate|up|down)",
        r"text_fusion\..*\.attn\.to_(q|k|v|gate|out\.0)",
        r"text_fusion\..*\.ff\.(gate|up|down)",
        r"text_fusion\.projector",
    )

    @classmethod
    def loaders(cls, base: Source, vlm: Source | None, teaching: Teaching, where: Where) -> Mapping[Part, Loader]:
        def text_encoder(_: Any) -> Any:
            from transformers import Qwen3VLModel

            return load(Qwen3VLModel, base.folder / "text_encoder", where)

        loaders = standard_loaders(base.folder, "Krea2Transformer2DModel", "AutoencoderKLQwenImage", where)
        return loaders | {
            "text_encoder": text_encoder,
            "image_processor": lambda parts: qwen_vl.image_processor_of(parts["text_encoder"].config.vision_config),
        }

    @classmethod
    def shapes(cls, configs: Configs, teaching: Teaching, tokens: int, height: int, width: int) -> Shapes:
        transformer, side = configs["transformer"], 2 ** len(configs["vae"]["temperal_downsample"])
        states = transformer["num_text_layers"], transformer["text_hidden_dim"]
        caption, shown = tokens + _SUFFIX_TOKENS, 0
        if picture := cls.picture_tokens(configs, teaching, None):
            shown = _PREFIX_TOKENS + picture + caption
        context = (shown or cls.longest_prompt + _PREFIX_TOKENS) - _PREFIX_TOKENS
        return Shapes(
            {CAPTION: (caption, *states)}, {CAPTION: (context, *states)},
            (transformer["in_channels"] // _PATCH**2, height // side, width // side),
            cls.longest_prompt + _PREFIX_TOKENS, shown,
        )  # fmt: skip

    @classmethod
    def prompt_lengths(cls, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        """Without the fixed prefix, whose states are dropped, and with the turn's end."""
        turns = tokenizer([_PREFIX + text for text in captions]).input_ids
        return [len(ids) - _PREFIX_TOKENS + _SUFFIX_TOKENS for ids in turns]

    @classmethod
    def longest_context(cls, configs: Configs) -> int:
        return MAX_CONTEXT_TOKENS

    @classmethod
    def picture_tokens(cls, configs: Configs, teaching: Teaching, size: tuple[int, int] | None) -> int:
        if teaching.context != "vlm" or "text_encoder" not in configs:
            return 0
        return qwen_vl.picture_tokens(configs["text_encoder"]["vision_config"], teaching.pixels, size)

    @staticmethod
    def call(request: Request, height: int, width: int, num_steps: int, noise: Tensor | None = None) -> dict[str, Any]:
        arguments = {"prompt": request.caption, "height": height, "width": width, "num_inference_steps": num_steps}
        # any guidance above 0 would switch the undistilled model's guidance on
        return arguments | {"guidance_scale": 0.0} | ({} if noise is None else {"latents": _packed(noise)})

    @staticmethod
    def comfyui_lora(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        return lora_files.krea_comfyui(tensors, rank)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** len(self.parts.configs["vae"]["temperal_downsample"])

    @property
    def layers(self) -> tuple[int, ...]:
        """Which of the encoder's hidden states a caption is made of."""
        return tuple(self.parts.configs.get("index", {}).get("text_encoder_select_layers") or _LAYERS)

    def shift(self, levels: Sequence[float], num_steps: int, height: int, width: int) -> Tensor:
        return shift_levels(self.parts["scheduler"], levels, _MU)

    def encode_prompt(self, requests: Sequence[Request]) -> list[Conditioning]:
        """Captions as ``Krea2Pipeline`` encodes them, ``[tokens, layers, hidden]`` each, without the padding."""
        tokenizer, encoder = self.parts["tokenizer"], self.parts["text_encoder"]
        room = self.longest_prompt + _PREFIX_TOKENS - _SUFFIX_TOKENS
        captions = [request.caption for request in requests]
        lengths = self.prompt_lengths(tokenizer, captions)
        check_lengths(lengths, requests, self.longest_prompt, "the prompt", "shorten the caption")
        texts = [_PREFIX + text for text in captions]
        head = tokenizer(texts, padding="max_length", max_length=room, return_tensors="pt")
        tail = tokenizer([_SUFFIX] * len(texts), return_tensors="pt")
        ids = torch.cat([head.input_ids, tail.input_ids], dim=1).to(encoder.device)
        mask = torch.cat([head.attention_mask, tail.attention_mask], dim=1).bool().to(encoder.device)
        # the padding stands before the turn's end and takes no positions
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0).unsqueeze(0).expand(3, -1, -1)
        with torch.no_grad():
            states = encoder(
                input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True
            ).hidden_states
        stack = torch.stack([states[layer] for layer in self.layers], dim=2)[:, _PREFIX_TOKENS:]
        return [{CAPTION: s[m].clone()} for s, m in zip(stack, mask[:, _PREFIX_TOKENS:], strict=True)]

    def encode_context(self, requests: Sequence[Request], targets: Sequence[Image]) -> list[Conditioning]:
        """The same turn with the target picture before the caption, as Qwen3-VL is shown pictures."""
        return [self._context(request, target) for request, target in zip(requests, targets, strict=True)]

    def _context(self, request: Request, target: Image) -> Conditioning:
        tokenizer, encoder, processor = (
            self.parts["tokenizer"], self.parts["text_encoder"], self.parts["image_processor"],
        )  # fmt: skip
        pixels = qwen_vl.pixels_of(processor, [*request.references, target], self.teaching.pixels)
        pictures = "".join(qwen_vl.image_blocks(pixels["image_grid_thw"], processor.merge_size))
        ids = tokenizer(
            _PREFIX + pictures + request.caption + self.teaching.suffix + _SUFFIX, return_tensors="pt"
        ).input_ids
        check_lengths(
            [ids.shape[1] - _PREFIX_TOKENS], [request], self.longest_context(self.parts.configs),
            "the teacher's context", "shorten the caption or lower model.context_pixels",
        )  # fmt: skip
        encoder.rope_deltas = None  # a cache for generation; stale values of another picture must not be reused
        with torch.no_grad():
            states = encoder(
                input_ids=ids.to(encoder.device), attention_mask=torch.ones_like(ids).to(encoder.device),
                mm_token_type_ids=qwen_vl.token_types(tokenizer, ids).to(encoder.device),
                pixel_values=pixels["pixel_values"].to(encoder.device, encoder.dtype),
                image_grid_thw=pixels["image_grid_thw"].to(encoder.device), output_hidden_states=True, use_cache=False,
            ).hidden_states  # fmt: skip
        return {CAPTION: torch.stack([states[layer][0] for layer in self.layers], dim=1)[_PREFIX_TOKENS:].clone()}

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Clean latents ``float32 [B, 16, h, w]`` (the posterior's mode, normalised) of images of one size."""
        from diffusers.image_processor import VaeImageProcessor

        vae = self.parts["vae_encoder"]
        pixels = VaeImageProcessor(vae_scale_factor=_PATCH * self.vae_factor).preprocess(list(images))
        with torch.no_grad():
            z = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist.mode()
        mean, std = _statistics(vae, z)
        return ((z - mean) / std).squeeze(2).float()

    def initial_latents(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Standard normal ``float32 [B, 16, h, w]`` drawn on the generator's device, moved to the model's."""
        channels = self.parts.configs["transformer"]["in_channels"] // _PATCH**2
        shape = (batch, channels, height // self.vae_factor, width // self.vae_factor)
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def predict_velocity(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """``dx/dsigma`` as float32 ``[B, C, h, w]``. Captions are padded to 512 rows as the pipeline pads them."""
        rows = max(self.longest_prompt, *(len(tensors[CAPTION]) for tensors in conditioning))
        captions, mask = zip(*(_padded(tensors[CAPTION], rows) for tensors in conditioning), strict=True)
        height, width = latents.shape[2] // _PATCH, latents.shape[3] // _PATCH
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        u = self.transformer(
            hidden_states=_packed(latents.to(self.dtype)),
            encoder_hidden_states=torch.stack(captions).to(latents.device, self.dtype),
            timestep=(sigma * 1000 / 1000).to(self.dtype),  # as the pipeline rounds it
            position_ids=_positions(rows, height, width, latents.device),
            encoder_attention_mask=torch.stack(mask).to(latents.device),
            return_dict=False,
        )[0]
        folded = u.float().transpose(1, 2).reshape(len(latents), -1, height, width)
        return torch.nn.functional.pixel_shuffle(folded, _PATCH)

    def decode(self, latents: Tensor) -> list[Image]:
        """Latents ``[B, 16, h, w]`` to pictures, as the pipeline decodes them."""
        from diffusers.image_processor import VaeImageProcessor

        vae = self.parts["vae_decoder"]
        z = latents.to(vae.device, vae.dtype).unsqueeze(2)
        mean, std = _statistics(vae, z)
        with torch.no_grad():
            # multiplied as the pipeline does it: by dividing through the inverse
            pixels = vae.decode(z / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        return VaeImageProcessor(vae_scale_factor=_PATCH * self.vae_factor).postprocess(pixels, output_type="pil")


def _padded(states: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """``[rows, layers, hidden]`` and which of them are real: zeros stand before the turn's end."""
    empty = states.new_zeros(rows - len(states), *states.shape[1:])
    real = torch.ones(rows, dtype=torch.bool)
    real[len(states) - _SUFFIX_TOKENS : rows - _SUFFIX_TOKENS] = False
    return torch.cat([states[:-_SUFFIX_TOKENS], empty, states[-_SUFFIX_TOKENS:]]), real


@lru_cache(maxsize=64)
def _positions(text: int, height: int, width: int, device: torch.device) -> Tensor:
    from diffusers.pipelines.krea2.pipeline_krea2 import Krea2Pipeline

    return Krea2Pipeline.prepare_position_ids(text, height, width, device)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[1, 16, 1, 1, 1]`` of the latents."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like.device, like.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _packed(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` to tokens ``[B, h/2 w/2, 4 C]``, channels ordered (c, dy, dx)."""
    return torch.nn.functional.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2)
