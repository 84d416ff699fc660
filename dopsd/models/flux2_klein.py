"""FLUX.2-klein 4B and 9B, step-distilled: text to image, and editing.

Conventions hidden here: latents are ``[B, 128, H/16, W/16]``, patches of 2 x 2 normalised by the autoencoder's
batch-norm statistics; the transformer takes sigma and returns ``u``; pictures in the context are clean latents behind
the noise, each at a time of its own; captions are always 512 states, because the padding is attended too. Both teacher
contexts are the model's own editing branch: ``edit`` shows it the target, ``edit-reference`` the references and then
the target. Source: diffusers' ``Flux2KleinPipeline``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from . import lora_files
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
from .folder import CONFIG, read_json
from .loading import Where, load, standard_loaders
from .sources import ModelError, Source

LAYERS = (9, 18, 27)
"""The encoder's hidden states that a caption is made of."""
CAPTION, REFERENCE = "caption", "reference/"
"""Tensors of a conditioning: ``caption`` ``[512, 3 * hidden]``, and ``reference/0`` ... ``[128, h, w]`` in order."""
_PATCH = 2


class Flux2Klein(Family):
    """The FLUX.2-klein family (see :class:`dopsd.models.base.Family`)."""

    pipeline = "Flux2KleinPipeline"
    components: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        "text_encoder": ("Qwen3ForCausalLM", "Qwen3Model"),
        "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"),
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
    }
    refused: ClassVar[Mapping[str, str]] = {
        "Flux2KleinKVPipeline": "its transformer keeps references in a cache and is another model; take FLUX.2-klein",
        "Flux2Pipeline": "FLUX.2-dev is not step-distilled and has another text encoder; take FLUX.2-klein",
    }
    published = "black-forest-labs/FLUX.2-klein-4B"
    says_distilled = True
    few_steps = 4
    many_steps = 8
    longest_prompt = 512
    contexts: ClassVar[tuple[ContextName, ...]] = ("edit", "edit-reference", "enhanced-prompt")
    suffixes: ClassVar[Mapping[ContextName, str]] = {
        "edit": " Keep the identity and the details of the subject, the background and the composition of the "
        "reference image.",
        "edit-reference": " The last image is the desired result: come as close to it as possible, starting from the "
        "other images and following the instruction.",
    }
    edits = True
    lora_targets = (
        r"attn\.to_q",
        r"attn\.to_k",
        r"attn\.to_v",
        r"attn\.to_out\.0",
        r"attn\.add_q_proj",
        r"attn\.add_k_proj",
        r"attn\.add_v_proj",
        r"attn\.to_add_out",
        r"ff\.linear_in",
        r"ff\.linear_out",
        r"ff_context\.linear_in",
        r"ff_context\.linear_out",
        r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj",
        r"single_transformer_blocks\.\d+\.attn\.to_out",
    )

    @classmethod
    def loaders(cls, base: Source, vlm: Source | None, teaching: Teaching, where: Where) -> Mapping[Part, Loader]:
        def text_encoder(_: Any) -> Any:
            from transformers import Qwen3Config, Qwen3Model

            folder, needed = base.folder / "text_encoder", max(LAYERS) + 1
            config = read_json(folder / CONFIG, f"{base.shown}: text_encoder/{CONFIG}")
            found = config.get("num_hidden_layers", needed)
            if found < needed:
                raise ModelError(f"{base.shown}: its text encoder has {found} layers, klein's captions need {needed}")
            # without the head, whose logits nobody reads
            return load(Qwen3Model, folder, where, config=Qwen3Config.from_dict(dict(cls.encoder_config(config))))

        loaders = standard_loaders(base.folder, "Flux2Transformer2DModel", "AutoencoderKLFlux2", where)
        return loaders | {"text_encoder": text_encoder}

    @classmethod
    def encoder_config(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without the layers above the last state that is used: one more than that is needed, because the last of all
        hidden states comes out normalised."""
        needed = max(LAYERS) + 1
        types = (config.get("layer_types") or [])[:needed] or None
        return {**config, "num_hidden_layers": needed, "layer_types": types}

    @classmethod
    def shapes(cls, configs: Configs, teaching: Teaching, tokens: int, height: int, width: int) -> Shapes:
        transformer, cell = configs["transformer"], _PATCH * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        latents = (transformer["in_channels"], height // cell, width // cell)
        caption = {CAPTION: (cls.longest_prompt, transformer["joint_attention_dim"])}
        references = {"edit": (0, 1), "edit-reference": (1, 2)}.get(teaching.context, (0, 0))
        prompt, context = (
            caption | {f"{REFERENCE}{number}": latents for number in range(count)} for count in references
        )
        return Shapes(prompt, context, latents, cls.longest_prompt)

    @classmethod
    def prompt_lengths(cls, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(_turns(tokenizer, captions)).input_ids]

    @staticmethod
    def call(request: Request, height: int, width: int, num_steps: int, noise: Tensor | None = None) -> dict[str, Any]:
        arguments = {"prompt": request.caption, "height": height, "width": width, "num_inference_steps": num_steps}
        arguments |= {"guidance_scale": 1.0} | ({} if noise is None else {"latents": noise.clone()})
        return arguments | ({"image": list(request.references)} if request.references else {})

    @staticmethod
    def comfyui_lora(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        return lora_files.klein_comfyui(tensors, rank)

    @property
    def cell(self) -> int:
        """Pixels per token along one side."""
        return _PATCH * 2 ** (len(self.parts.configs["vae"]["block_out_channels"]) - 1)

    def shift(self, levels: Sequence[float], num_steps: int, height: int, width: int) -> Tensor:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        tokens = (height // self.cell) * (width // self.cell)
        return shift_levels(self.parts["scheduler"], levels, compute_empirical_mu(tokens, num_steps))

    def encode_prompt(self, requests: Sequence[Request]) -> list[Conditioning]:
        """Caption states ``[512, 3 * hidden]``, padding included, and the latents of the references, by the pipeline's
        rule for their size."""
        captions = self._encode_text(requests, "")
        return [
            {CAPTION: states} | self._latents_of([self._fitted(image) for image in request.references])
            for states, request in zip(captions, requests, strict=True)
        ]

    def encode_context(self, requests: Sequence[Request], targets: Sequence[Image]) -> list[Conditioning]:
        """The request with the suffix, its references, and last the target at its own size: it must lie on the noise's
        grid, and the pipeline's rule would shrink what is larger than a megapixel."""
        captions = self._encode_text(requests, self.teaching.suffix)
        return [
            {CAPTION: states} | self._latents_of([*(self._fitted(image) for image in request.references), target])
            for states, request, target in zip(captions, requests, targets, strict=True)
        ]

    def _encode_text(self, requests: Sequence[Request], suffix: str) -> list[Tensor]:
        tokenizer, encoder = self.parts["tokenizer"], self.parts["text_encoder"]
        captions = [request.caption + suffix for request in requests]
        check_lengths(
            self.prompt_lengths(tokenizer, captions), requests, self.longest_prompt,
            "the teacher's prompt" if suffix else "the prompt",
            "shorten the caption" + (" or model.context_suffix" if suffix else ""),
        )  # fmt: skip
        inputs = tokenizer(
            _turns(tokenizer, captions), padding="max_length", max_length=self.longest_prompt, return_tensors="pt"
        )
        inputs = inputs.to(encoder.device)
        with torch.no_grad():
            states = encoder(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, output_hidden_states=True,
                use_cache=False,
            ).hidden_states  # fmt: skip
        return list(torch.cat([states[layer] for layer in LAYERS], dim=-1).unbind(0))

    def _fitted(self, image: Image) -> Tensor:
        """A reference's pixels ``[1, 3, H, W]`` by the pipeline's rule: at most a megapixel, sides multiples of 16."""
        from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

        processor = Flux2ImageProcessor(vae_scale_factor=self.cell)
        try:
            processor.check_image_input(image)
        except ValueError as error:
            raise ModelError(f"a reference of {image.width} x {image.height} pixels: {error}") from None
        image = processor._resize_if_exceeds_area(image)
        width, height = (side // self.cell * self.cell for side in image.size)
        return processor.preprocess(image, height=height, width=width, resize_mode="crop")

    def _latents_of(self, pictures: Sequence[Image | Tensor]) -> dict[str, Tensor]:
        return {f"{REFERENCE}{number}": self._encode(picture)[0] for number, picture in enumerate(pictures)}

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Clean latents ``float32 [B, 128, h, w]`` (the posterior's mean, patched and normalised)."""
        return torch.cat([self._encode(image) for image in images]).float()

    def _encode(self, picture: Image | Tensor) -> Tensor:
        from diffusers.image_processor import VaeImageProcessor

        vae = self.parts["vae_encoder"]
        processor = VaeImageProcessor(vae_scale_factor=self.cell)
        pixels = picture if isinstance(picture, Tensor) else processor.preprocess(picture)
        with torch.no_grad():
            z = _patched(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode())
        mean, std = _statistics(vae, z)
        return (z - mean) / std

    def initial_latents(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Standard normal ``float32 [B, 128, h, w]`` drawn on the generator's device, moved to the model's."""
        shape = (batch, self.parts.configs["transformer"]["in_channels"], height // self.cell, width // self.cell)
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def predict_velocity(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """``dx/dsigma`` as float32 ``[B, C, h, w]``. Examples whose references differ in shape run one after the other:
        the transformer has one geometry per forward."""
        groups: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for number, tensors in enumerate(conditioning):
            groups[_shapes(tensors)].append(number)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        if len(groups) == 1:
            return self._predict(latents, sigma, conditioning)
        out: list[Tensor] = [latents] * len(latents)
        for rows in groups.values():
            answers = self._predict(latents[rows], sigma[rows], [conditioning[row] for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                out[row] = answer
        return torch.stack(out)

    def _predict(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        noise = _packed(latents.to(self.dtype))
        sequences = [noise]
        for number in range(len(references_of(conditioning[0]))):
            reference = torch.stack([tensors[f"{REFERENCE}{number}"] for tensors in conditioning])
            sequences.append(_packed(reference.to(latents.device, self.dtype)))
        captions = torch.stack([tensors[CAPTION] for tensors in conditioning]).to(latents.device, self.dtype)
        shapes = ((latents.shape[2], latents.shape[3]), *_shapes(conditioning[0]))
        u = self.transformer(
            hidden_states=torch.cat(sequences, dim=1),
            # as the pipeline rounds it: the time, and not the noise level, is what is cast
            timestep=(sigma * 1000).to(self.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=captions,
            txt_ids=_text_ids(captions.shape[1], latents.device),
            img_ids=_image_ids(shapes, latents.device),
            return_dict=False,
        )[0][:, : noise.shape[1]]
        return u.float().transpose(1, 2).reshape(latents.shape)

    def decode(self, latents: Tensor) -> list[Image]:
        """Latents ``[B, 128, h, w]`` to pictures, as the pipeline decodes them."""
        from diffusers.image_processor import VaeImageProcessor

        vae = self.parts["vae_decoder"]
        z = latents.to(vae.device, vae.dtype)
        mean, std = _statistics(vae, z)
        with torch.no_grad():
            pixels = vae.decode(_unpatched(z * std + mean), return_dict=False)[0]
        return VaeImageProcessor(vae_scale_factor=self.cell).postprocess(pixels, output_type="pil")


def _turns(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """Captions in Qwen's chat template as the pipeline uses it (no thinking, generation prompt)."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for text in captions
    ]


def references_of(conditioning: Conditioning) -> list[Tensor]:
    """The reference latents of a conditioning, in order."""
    count = sum(key.startswith(REFERENCE) for key in conditioning)
    return [conditioning[f"{REFERENCE}{number}"] for number in range(count)]


@lru_cache(maxsize=8)
def _text_ids(length: int, device: torch.device) -> Tensor:
    """``[tokens, 4]``: (0, 0, 0, place)."""
    return torch.nn.functional.pad(torch.arange(length)[:, None], (3, 0)).to(device)


@lru_cache(maxsize=256)
def _image_ids(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """``[tokens, 4]`` (time, row, column, 0): the noise at time 0, reference ``i`` at ``10 + 10 i``."""
    grids = [
        torch.cartesian_prod(torch.tensor([10 * number]), torch.arange(h), torch.arange(w), torch.arange(1))
        for number, (h, w) in enumerate(shapes)
    ]
    return torch.cat(grids).to(device)


def _shapes(conditioning: Conditioning) -> tuple[tuple[int, int], ...]:
    """(height, width) in tokens of each reference."""
    return tuple((r.shape[1], r.shape[2]) for r in references_of(conditioning))


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[1, 128, 1, 1]`` of the patched latents, as the pipeline rounds them."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(like.device, like.dtype)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(like.device, like.dtype)
    return mean, std


def _packed(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` to tokens ``[B, h w, C]``."""
    return latents.flatten(2).transpose(1, 2)


def _patched(z: Tensor) -> Tensor:
    """``[B, C, h, w]`` to ``[B, 4 C, h/2, w/2]``, channels ordered (c, dy, dx)."""
    return torch.nn.functional.pixel_unshuffle(z, _PATCH)


def _unpatched(z: Tensor) -> Tensor:
    return torch.nn.functional.pixel_shuffle(z, _PATCH)
