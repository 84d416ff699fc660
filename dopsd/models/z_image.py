"""Z-Image-Turbo, and emoji-turbo, which has the same classes.

Conventions hidden here: the transformer takes ``t = 1 - sigma`` and returns ``-u``; latents travel as lists of
``[C, 1, h, w]``; captions as lists of ``[tokens, dim]``. The teacher's context (``vlm`` in docs/method.md) comes from a
Qwen3-VL whose language half is the pipeline's own text encoder, so that both speak one language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from . import lora_files, qwen_vl
from .base import (
    BATCH,
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
from .loading import Where, frozen, load, standard_loaders
from .sources import ModelError, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CONTEXT_TOKENS = 1024
CAPTION = "caption"
"""The one tensor of a Z-Image conditioning: ``[tokens, dim]``, the encoder's last but one hidden states."""
_TURN = 9
"""Tokens of the chat template around a caption."""
_GRANULE = 32
"""The transformer pads captions to multiples of this."""


class ZImage(Family):
    """The Z-Image family (see :class:`dopsd.models.base.Family`)."""

    pipeline = "ZImagePipeline"
    components: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
    }
    published, published_vlm = "Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen3-VL-4B-Instruct"
    few_steps = 8
    many_steps = 16
    longest_prompt = 512
    contexts: ClassVar[tuple[ContextName, ...]] = ("vlm", "enhanced-prompt")
    lora_targets = (
        r"attention\.to_q",
        r"attention\.to_k",
        r"attention\.to_v",
        r"attention\.to_out\.0",
        r"feed_forward\.w1",
        r"feed_forward\.w2",
        r"feed_forward\.w3",
    )

    @classmethod
    def needs_vlm(cls, teaching: Teaching) -> bool:
        return teaching.context == "vlm"

    @classmethod
    def loaders(cls, base: Source, vlm: Source | None, teaching: Teaching, where: Where) -> Mapping[Part, Loader]:
        def text_encoder(_: Any) -> Any:
            from transformers import Qwen3Model

            return load(Qwen3Model, base.folder / "text_encoder", where)

        loaders = standard_loaders(base.folder, "ZImageTransformer2DModel", "AutoencoderKL", where)
        loaders["text_encoder"] = text_encoder
        if vlm is not None:
            folder = vlm.folder
            loaders |= {
                "vision": lambda parts: frozen(
                    qwen_vl.load_with(folder, parts["text_encoder"], teaching.positions), where.device
                ),
                "image_processor": lambda _: qwen_vl.load_image_processor(folder),
            }
        return loaders

    @classmethod
    def shapes(cls, configs: Configs, teaching: Teaching, tokens: int, height: int, width: int) -> Shapes:
        transformer, side = configs["transformer"], 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        turn, shown = tokens + _TURN, 0
        if picture := cls.picture_tokens(configs, teaching, None):
            shown = turn + picture
        context = min(MAX_CONTEXT_TOKENS, shown or cls.longest_prompt)
        width_of_states = transformer["cap_feat_dim"]
        return Shapes(
            {CAPTION: (turn, width_of_states)}, {CAPTION: (context, width_of_states)},
            (transformer["in_channels"], height // side, width // side), turn, shown, BATCH,
        )  # fmt: skip

    @classmethod
    def prompt_lengths(cls, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer([prompt_text(tokenizer, text) for text in captions]).input_ids]

    @classmethod
    def longest_context(cls, configs: Configs) -> int:
        """What the published limit and the transformer's table of positions allow: the class's own default table is
        too short for 1,024 tokens."""
        if "transformer" not in configs:
            return MAX_CONTEXT_TOKENS
        positions = configs["transformer"].get("axes_lens", [1024])[0]
        return min(MAX_CONTEXT_TOKENS, (positions - 2) // _GRANULE * _GRANULE)

    @classmethod
    def picture_tokens(cls, configs: Configs, teaching: Teaching, size: tuple[int, int] | None) -> int:
        if teaching.context != "vlm" or "vlm" not in configs:
            return 0
        return qwen_vl.picture_tokens(configs["vlm"]["vision_config"], teaching.pixels, size)

    @staticmethod
    def call(request: Request, height: int, width: int, num_steps: int, noise: Tensor | None = None) -> dict[str, Any]:
        arguments = {"prompt": request.caption, "height": height, "width": width, "num_inference_steps": num_steps}
        return arguments | {"guidance_scale": 0.0} | ({} if noise is None else {"latents": noise.clone()})

    @staticmethod
    def comfyui_lora(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        return lora_files.z_image_comfyui(tensors, rank)

    @staticmethod
    def unshifted(num_steps: int) -> list[float]:
        from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

        return get_default_z_image_sigmas(num_steps)

    def shift(self, levels: Sequence[float], num_steps: int, height: int, width: int) -> Tensor:
        from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

        scheduler = self.parts["scheduler"]
        factor = 2 * self.vae_factor
        mu = calculate_shift(
            (height // factor) * (width // factor),
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.15),
        )
        return shift_levels(scheduler, levels, mu)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.parts.configs["vae"]["block_out_channels"]) - 1)

    def encode_prompt(self, requests: Sequence[Request]) -> list[Conditioning]:
        """Captions as ``ZImagePipeline.encode_prompt`` encodes them, ``[tokens, dim]`` each."""
        tokenizer, encoder = self.parts["tokenizer"], self.parts["text_encoder"]
        texts = [prompt_text(tokenizer, request.caption) for request in requests]
        inputs = tokenizer(texts, padding="longest", return_tensors="pt").to(encoder.device)
        mask = inputs.attention_mask.bool()
        check_lengths(mask.sum(1).tolist(), requests, self.longest_prompt, "the prompt", "shorten the caption")
        with torch.no_grad():
            output = encoder(
                input_ids=inputs.input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False
            )
        states = output.hidden_states[-2]
        return [{CAPTION: s[m].clone()} for s, m in zip(states, mask, strict=True)]

    def encode_context(self, requests: Sequence[Request], targets: Sequence[Image]) -> list[Conditioning]:
        """One user turn of ``[target image, caption]``: at most 1,024 states ``[tokens, dim]``."""
        if "vision" not in self.parts:
            raise ModelError(
                "this base has no VLM loaded, so there is no teacher context; set model.vlm to a Qwen3-VL folder"
            )
        tokenizer, processor, vlm = self.parts["tokenizer"], self.parts["image_processor"], self.parts["vision"]
        images = [[*request.references, target] for request, target in zip(requests, targets, strict=True)]
        pixels = qwen_vl.pixels_of(processor, [image for group in images for image in group], self.teaching.pixels)
        captions = [request.caption + self.teaching.suffix for request in requests]
        inputs = context_inputs(
            tokenizer, captions, [len(group) for group in images], pixels["image_grid_thw"], processor.merge_size
        )
        check_lengths(
            inputs["attention_mask"].sum(1).tolist(), requests, self.longest_context(self.parts.configs),
            "the teacher's context", "shorten the caption or lower model.context_pixels",
        )  # fmt: skip
        with torch.no_grad():
            states = context_states(
                vlm, {k: v.to(vlm.device) for k, v in inputs.items()},
                pixels["pixel_values"].to(vlm.device, vlm.dtype), pixels["image_grid_thw"].to(vlm.device),
            )  # fmt: skip
        return [{CAPTION: s.clone()} for s in states]

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Clean latents ``float32 [B, C, h, w]`` (the posterior's mean, shifted and scaled) of images of one size."""
        from diffusers.image_processor import VaeImageProcessor

        vae = self.parts["vae_encoder"]
        pixels = VaeImageProcessor(vae_scale_factor=2 * self.vae_factor).preprocess(list(images))
        with torch.no_grad():
            z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
        return (z.float() - vae.config.shift_factor) * vae.config.scaling_factor

    def initial_latents(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Standard normal ``float32 [B, C, h, w]`` drawn on the generator's device, moved to the model's."""
        factor = 2 * self.vae_factor
        channels = self.parts.configs["transformer"]["in_channels"]
        shape = (batch, channels, 2 * (height // factor), 2 * (width // factor))
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def predict_velocity(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """``dx/dsigma`` as float32 ``[B, C, h, w]``: minus the transformer's output at ``t = 1 - sigma``."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        t = (1000 - sigma * 1000) / 1000  # as the pipeline rounds it
        output = self.transformer(
            list(latents.to(self.dtype).unsqueeze(2).unbind(0)),
            t,
            [c[CAPTION].to(latents.device, self.dtype) for c in conditioning],
            return_dict=False,
        )[0]
        return -torch.stack([o.float() for o in output]).squeeze(2)

    def decode(self, latents: Tensor) -> list[Image]:
        """Latents ``[B, C, h, w]`` to pictures, as the pipeline decodes them."""
        from diffusers.image_processor import VaeImageProcessor

        vae = self.parts["vae_decoder"]
        z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with torch.no_grad():
            pixels = vae.decode(z, return_dict=False)[0]
        return VaeImageProcessor(vae_scale_factor=2 * self.vae_factor).postprocess(pixels, output_type="pil")


def prompt_text(tokenizer: PreTrainedTokenizerBase, caption: str) -> str:
    """A caption in Qwen's chat template as the pipeline uses it (thinking enabled, generation prompt)."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )


def context_inputs(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], image_counts: Sequence[int], grid: Tensor, merge: int
) -> dict[str, Tensor]:
    """Token ids, mask and token types of the teacher's turns, each image's placeholder repeated per image token.

    ``image_counts[i]`` images belong to caption ``i``; ``grid`` is ``[images, 3]`` in patches (time, height, width).
    The turn is the text that Qwen3-VL's own template makes: the pipeline's tokenizer has a template that knows no
    pictures, and turns them and the caption into nothing.
    """
    blocks = qwen_vl.image_blocks(grid, merge)
    texts = []
    for caption, count in zip(captions, image_counts, strict=True):
        pictures = "".join(next(blocks) for _ in range(count))
        texts.append(f"<|im_start|>user\n{pictures}{caption}<|im_end|>\n<|im_start|>assistant\n")
    inputs = tokenizer(texts, padding="longest", return_tensors="pt")
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "mm_token_type_ids": qwen_vl.token_types(tokenizer, inputs.input_ids),
    }


def context_states(vlm: Any, inputs: dict[str, Tensor], pixels: Tensor, grid: Tensor) -> list[Tensor]:
    """The VLM's last but one hidden states of all unpadded tokens, one ``[tokens, dim]`` per example."""
    vlm.rope_deltas = None  # a cache for generation; stale values of another batch must not be reused
    output = vlm(
        **inputs, pixel_values=pixels, image_grid_thw=grid, output_hidden_states=True, use_cache=False, return_dict=True
    )
    mask = inputs["attention_mask"].bool()
    return [s[m] for s, m in zip(output.hidden_states[-2], mask, strict=True)]
