"""Z-Image-Turbo, and emoji-turbo, which has the same classes.

Conventions hidden here: the transformer takes ``t = 1 - sigma`` and returns ``-u``; latents travel as lists of
``[C, 1, h, w]``; captions as lists of ``[tokens, dim]``. The teacher's context (``vlm`` in docs/method.md) comes from a
Qwen3-VL whose language half is overwritten by the pipeline's own text encoder, so that both speak one language.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from PIL.Image import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Model, Qwen3VLModel

from .base import Conditioning

MAX_PROMPT_TOKENS = 512
MAX_CONTEXT_TOKENS = 1024
CAPTION = "caption"
"""The one tensor of a Z-Image conditioning: ``[tokens, dim]``, the encoder's last but one hidden states."""


class ModelError(ValueError):
    """A base model that is missing, incomplete or asked for something it cannot do; one line a person can act on."""


class ZImage:
    """The Z-Image family (see :class:`dopsd.models.base.Family`)."""

    lora_targets: tuple[str, ...] = (
        r"attention\.to_q",
        r"attention\.to_k",
        r"attention\.to_v",
        r"attention\.to_out\.0",
        r"feed_forward\.w1",
        r"feed_forward\.w2",
        r"feed_forward\.w3",
    )

    def __init__(
        self,
        *,
        transformer: ZImageTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: Qwen3Model | None,
        tokenizer: PreTrainedTokenizerBase | None,
        vlm: Qwen3VLModel | None,
        image_processor: Any,
        context_pixels: tuple[int, int],
        fingerprint: str,
    ) -> None:
        self.transformer: Any = transformer
        self.scheduler = scheduler
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.vlm = vlm
        self.image_processor = image_processor
        self.context_pixels = context_pixels
        self.fingerprint = fingerprint
        if self.device.type == "cpu":
            use_plain_attention(transformer)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """The pipeline's own grid ``float32 [num_steps + 1]``: asked of its scheduler as ``ZImagePipeline`` asks."""
        from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        config = scheduler.config
        factor = 2 * self.vae_factor
        mu = calculate_shift(
            (height // factor) * (width // factor),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(num_steps), mu=mu)
        return scheduler.sigmas.to(torch.float32)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode_prompt(self, captions: Sequence[str]) -> list[Conditioning]:
        """Captions as ``ZImagePipeline.encode_prompt`` encodes them; ``captions`` is left as it is."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ModelError("the text encoder was released or not loaded; encode before training")
        texts = [prompt_text(self.tokenizer, caption) for caption in captions]
        inputs = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=MAX_PROMPT_TOKENS, return_tensors="pt"
        ).to(self.text_encoder.device)
        mask = inputs.attention_mask.bool()
        with torch.no_grad():
            output = self.text_encoder(
                input_ids=inputs.input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False
            )
        states = output.hidden_states[-2]
        return [{CAPTION: s[m].clone()} for s, m in zip(states, mask, strict=True)]

    def encode_context(
        self, captions: Sequence[str], targets: Sequence[Image], references: Sequence[Sequence[Image]]
    ) -> list[Conditioning]:
        """One user turn of ``[references..., target image, caption]``: at most 1,024 states ``[tokens, dim]``.

        Raises :class:`ModelError` where an example is longer, rather than cutting its caption off.
        """
        if self.vlm is None or self.tokenizer is None:
            raise ModelError(
                "this base has no VLM loaded, so there is no teacher context; set model.vlm to a Qwen3-VL folder"
            )
        images = [[*refs, target] for refs, target in zip(references, targets, strict=True)]
        flat = [image for group in images for image in group]
        low, high = self.context_pixels
        pixels = self.image_processor(
            images=flat, return_tensors="pt", size={"shortest_edge": low, "longest_edge": high}
        )
        inputs = context_inputs(
            self.tokenizer,
            captions,
            [len(group) for group in images],
            pixels["image_grid_thw"],
            self.image_processor.merge_size,
        )
        longest = inputs["input_ids"].shape[1]
        if longest > MAX_CONTEXT_TOKENS:
            raise ModelError(
                f"a teacher context is {longest} tokens long, at most {MAX_CONTEXT_TOKENS} are read: "
                "shorten the caption or lower model.context_pixels"
            )
        with torch.no_grad():
            states = context_states(
                self.vlm, {k: v.to(self.vlm.device) for k, v in inputs.items()},
                pixels["pixel_values"].to(self.vlm.device, self.vlm.dtype),
                pixels["image_grid_thw"].to(self.vlm.device),
            )  # fmt: skip
        return [{CAPTION: s.clone()} for s in states]

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Clean latents ``float32 [B, C, h, w]`` (the posterior's mean, shifted and scaled) of images of one size."""
        from diffusers.image_processor import VaeImageProcessor

        pixels = VaeImageProcessor(vae_scale_factor=2 * self.vae_factor).preprocess(list(images))
        with torch.no_grad():
            z = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mean
        return (z.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def initial_latents(self, batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Standard normal ``float32 [B, C, h, w]`` drawn on the generator's device, moved to the model's."""
        factor = 2 * self.vae_factor
        shape = (batch, self.transformer.config.in_channels, 2 * (height // factor), 2 * (width // factor))
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def predict_velocity(self, latents: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """``dx/dsigma`` as float32 ``[B, C, h, w]``: minus the transformer's output at ``t = 1 - sigma``."""
        t = (1 - torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)).expand(len(latents))
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

        z = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        with torch.no_grad():
            pixels = self.vae.decode(z, return_dict=False)[0]
        return VaeImageProcessor(vae_scale_factor=2 * self.vae_factor).postprocess(pixels, output_type="pil")

    def release_encoders(self) -> None:
        """Free text encoder and VLM; the VAE stays for previews (its encoder is a few per cent of the whole)."""
        self.text_encoder = None
        self.vlm = None


def use_plain_attention(transformer: ZImageTransformer2DModel) -> None:
    """Plain attention in this model: on a CPU the fused kernel's backward is several times slower for short sequences.

    Set on each layer, as ``set_attention_backend`` would, which changes the default of all other models as well.
    """
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = "_native_math"


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
    """
    pad = "<|image_pad|>"
    lengths = iter((grid.prod(-1) // merge**2).tolist())
    texts = []
    for caption, count in zip(captions, image_counts, strict=True):
        turn = [{"type": "image"}] * count + [{"type": "text", "text": caption}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        head, *parts = text.split(pad, count)
        texts.append(head + "".join(pad * next(lengths) + part for part in parts))
    inputs = tokenizer(texts, padding="longest", return_tensors="pt")
    image_id = tokenizer.convert_tokens_to_ids(pad)
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "mm_token_type_ids": (inputs.input_ids == image_id).int(),
    }


def context_states(vlm: Qwen3VLModel, inputs: dict[str, Tensor], pixels: Tensor, grid: Tensor) -> list[Tensor]:
    """The VLM's last but one hidden states of all unpadded tokens, one ``[tokens, dim]`` per example."""
    vlm.rope_deltas = None  # a cache for generation; stale values of another batch must not be reused
    output = vlm(
        **inputs, pixel_values=pixels, image_grid_thw=grid, output_hidden_states=True, use_cache=False, return_dict=True
    )
    mask = inputs["attention_mask"].bool()
    return [s[m] for s, m in zip(output.hidden_states[-2], mask, strict=True)]


def load(
    path: Path, *, vlm: Path | None, device: torch.device, dtype: torch.dtype, context_pixels: tuple[int, int],
    encoders: bool = True,
) -> ZImage:  # fmt: skip
    """Load a diffusers folder of the Z-Image classes; with ``encoders`` its text encoder and the VLM too.

    The VLM's language half is overwritten by the text encoder's weights (docs/method.md, table of contexts).
    """
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{path}: no base model there (no model_index.json); check model.path in the settings")
    text_encoder = tokenizer = vision = processor = None
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    if encoders:
        text_encoder = Qwen3Model.from_pretrained(path / "text_encoder", dtype=dtype).to(device).eval()
        vlm_path = vlm or path / "vlm"
        if vlm_path.is_dir():
            vision = load_vlm(vlm_path, text_encoder, dtype).to(device).eval()
            processor = load_image_processor(vlm_path)
    transformer = ZImageTransformer2DModel.from_pretrained(path / "transformer", torch_dtype=dtype).to(device)
    vae = AutoencoderKL.from_pretrained(path / "vae", torch_dtype=dtype).to(device)
    for module in (text_encoder, vision, transformer, vae):
        if module is not None:
            module.eval().requires_grad_(False)
    return ZImage(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        vlm=vision,
        image_processor=processor,
        context_pixels=context_pixels,
        fingerprint=fingerprint([path / "text_encoder", path / "tokenizer", path / "vae", vlm or path / "vlm"], dtype),
    )


def load_vlm(path: Path, text_encoder: Qwen3Model, dtype: torch.dtype) -> Qwen3VLModel:
    """The VLM with the text encoder as its language half; a folder may leave that half out (emoji-turbo's does)."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the half that is left out would be reported as missing; checked below instead
    try:
        vlm, report = Qwen3VLModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
    finally:
        logging.set_verbosity(level)
    missing = [key for key in report["missing_keys"] if not key.startswith("language_model.")]
    if missing:
        raise ModelError(f"{path}: the VLM's weights lack {missing[0]} and {len(missing) - 1} more; copy it again")
    share_language_half(vlm, text_encoder)
    return vlm


def share_language_half(vlm: Qwen3VLModel, text_encoder: Qwen3Model) -> None:
    """Make the VLM's language model use the text encoder's own tensors (no copy in memory); every key must match."""
    missing, unexpected = vlm.language_model.load_state_dict(text_encoder.state_dict(), strict=False, assign=True)
    if missing or unexpected:
        names = ", ".join([*missing, *unexpected][:4])
        raise ModelError(f"the VLM's language half does not fit the text encoder (keys {names})")


def load_image_processor(path: Path) -> Any:
    """The VLM's image processor; without torchvision the one that works on PIL images."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(path)
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(path)


def fingerprint(folders: Iterable[Path], dtype: torch.dtype) -> str:
    """Hash over the files that decide an encoding. Large weight files count by name, size and their first MiB."""
    digest = hashlib.sha256(str(dtype).encode())
    for folder in folders:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            size = file.stat().st_size
            with file.open("rb") as handle:
                head = handle.read() if size < 64 << 20 else handle.read(1 << 20)
            digest.update(f"{file.relative_to(folder.parent)}:{size}:".encode() + head)
    return digest.hexdigest()[:32]
