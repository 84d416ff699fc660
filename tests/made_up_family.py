"""A fourth family, in one file: what it takes to teach this project a model that it does not know.

The classes are Lumina 2's as diffusers has them, at narrow width and with random weights; nobody distilled such a
model. Nothing outside of this file knows it, apart from the line that a test puts into the table of families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor

from dopsd.models.base import (
    Conditioning,
    ContextName,
    Family,
    Loader,
    Part,
    Request,
    Teaching,
    check_lengths,
    shift_levels,
)  # fmt: skip
from dopsd.models.loading import Where, load, standard_loaders
from dopsd.models.sources import Source

_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)


class MadeUp(Family):
    """Text to image; its encoder sees no pictures, so the teacher can only be told more."""

    pipeline = "Lumina2Pipeline"
    components: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scheduler": (), "text_encoder": ("Gemma2Model",), "tokenizer": (), "vae": ("AutoencoderKL",),
        "transformer": ("Lumina2Transformer2DModel",),
    }  # fmt: skip
    few_steps = 2
    many_steps = 4
    longest_prompt = 256
    contexts: ClassVar[tuple[ContextName, ...]] = ("enhanced-prompt",)
    lora_targets = (r"layers\.\d+\.attn\.to_(q|k|v|out\.0)", r"layers\.\d+\.feed_forward\.linear_[123]")

    @classmethod
    def loaders(cls, base: Source, vlm: Source | None, teaching: Teaching, where: Where) -> Mapping[Part, Loader]:
        from transformers import Gemma2Model

        parts = standard_loaders(base.folder, "Lumina2Transformer2DModel", "AutoencoderKL", where)
        return parts | {"text_encoder": lambda _: load(Gemma2Model, base.folder / "text_encoder", where)}

    @classmethod
    def prompt_lengths(cls, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer([_SYSTEM + text for text in captions]).input_ids]

    @staticmethod
    def call(request: Request, height: int, width: int, num_steps: int, noise: Tensor | None = None) -> dict[str, Any]:
        asked = {"prompt": request.caption, "height": height, "width": width, "num_inference_steps": num_steps}
        return asked | {"guidance_scale": 1.0} | ({} if noise is None else {"latents": noise.clone()})

    @staticmethod
    def comfyui_lora(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        return {f"diffusion_model.{key}": value.contiguous() for key, value in tensors.items()}

    def shift(self, levels: Sequence[float], num_steps: int, height: int, width: int) -> Tensor:
        return shift_levels(self.parts["scheduler"], levels, 0.5)

    def encode_prompt(self, requests: Sequence[Request]) -> list[Conditioning]:
        tokenizer, encoder = self.parts["tokenizer"], self.parts["text_encoder"]
        texts = [_SYSTEM + request.caption for request in requests]
        lengths = self.prompt_lengths(tokenizer, [request.caption for request in requests])
        check_lengths(lengths, requests, self.longest_prompt, "the prompt", "shorten the caption")
        inputs = tokenizer(texts, padding="max_length", max_length=self.longest_prompt, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**inputs, output_hidden_states=True).hidden_states[-2]
        return [{"caption": s[m.bool()].clone()} for s, m in zip(states, inputs.attention_mask, strict=True)]

    def encode_context(self, requests: Sequence[Request], targets: Sequence[Image]) -> list[Conditioning]:
        raise NotImplementedError("its only context is a caption")

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        vae = self.parts["vae_encoder"]
        with torch.no_grad():
            z = vae.encode(VaeImageProcessor(vae_scale_factor=16).preprocess(list(images))).latent_dist.mean
        return (z - vae.config.shift_factor) * vae.config.scaling_factor

    def initial_latents(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn(batch, self.parts.configs["transformer"]["in_channels"], height // 8, width // 8,
                           generator=generator)  # fmt: skip

    def predict_velocity(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        states = torch.zeros(len(latents), self.longest_prompt, conditioning[0]["caption"].shape[-1])
        mask = torch.zeros(len(latents), self.longest_prompt, dtype=torch.int64)
        for row, told in enumerate(conditioning):
            states[row, : len(told["caption"])], mask[row, : len(told["caption"])] = told["caption"], 1
        sigma = torch.as_tensor(sigma, dtype=torch.float32).expand(len(latents))
        return -self.transformer(
            hidden_states=latents, timestep=1 - sigma * 1000 / 1000, encoder_hidden_states=states,
            encoder_attention_mask=mask, return_dict=False,
        )[0].float()  # fmt: skip

    def decode(self, latents: Tensor) -> list[Image]:
        vae = self.parts["vae_decoder"]
        with torch.no_grad():
            pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return VaeImageProcessor(vae_scale_factor=16).postprocess(pixels, output_type="pil")


def write_made_up(folder: Path) -> Path:
    """A random base of these classes as a diffusers folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    from tests import tiny

    tokenizer = tiny.tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Gemma2Model(Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16,
        ))  # fmt: skip
        transformer = Lumina2Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=8, hidden_size=48, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(512, 64, 64),
            cap_feat_dim=32,
        )  # fmt: skip
        for name, parameter in transformer.named_parameters():
            if "norm" in name and "linear" in name:  # fresh modulations are near 0 and hide the layers behind them
                torch.nn.init.normal_(parameter, std=0.3)
        vae = tiny.tiny_parts()["vae"]
    Lumina2Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae, text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(folder)  # fmt: skip
    return folder
