"""Backbones of transformers: DINOv2 and DINOv3; CLIP and SigLIP, and rewards made of them.

DINO is shown pictures in their shapes, at the area it was trained at: its positions are interpolated. CLIP and SigLIP
know one square; pictures stand whole in its middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .base import BackboneError, Held, checked
from .pictures import area_size, at_size, letterboxed, normalised, rows

_MOST_SIDE = 4096


@dataclass(frozen=True)
class Pixels:
    """How a model wants its pictures: side of the square it was trained at, statistics, filter."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def of(cls, processor: Mapping[str, Any], shown: str) -> Pixels:
        """From a model's ``preprocessor_config.json``. Raises :class:`BackboneError` where it does not say."""
        cropped = processor.get("do_center_crop", "crop_size" in processor)
        size = processor.get("crop_size" if cropped else "size") or processor.get("size")
        side = min(size.values(), default=None) if isinstance(size, dict) else size
        try:
            mean, std = (tuple(map(float, processor[key])) for key in ("image_mean", "image_std"))
            if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or not 0 < int(side) <= _MOST_SIDE:  # type: ignore[arg-type]
                raise ValueError
            return cls(int(side), mean, std, Image.Resampling(processor.get("resample", 3)))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError):
            raise BackboneError(f"{shown}: its preprocessor_config.json names no usable size, image_mean and "
                                "image_std; copy or fetch the model again") from None  # fmt: skip


def _style_layers(count: int) -> list[int]:
    """Of so many layers those in the first two thirds whose channels' statistics are the style: after them a
    transformer's states say what is drawn. (The fractions are EfficientNet's; nobody has fitted them.)"""
    return sorted({max(1, round(count * part)) for part in (1 / 6, 1 / 3, 1 / 2, 2 / 3)})


def _style(hidden: Sequence[Tensor], layers: Sequence[int], first: int) -> list[Tensor]:
    """Mean and deviation of the channels over the patches, of each of ``layers``."""
    states = [hidden[layer][:, first:].float() for layer in layers]
    return [part for state in states for part in (state.mean(1), state.std(1))]


class PatchFeatures(Held):
    """DINOv2 or DINOv3. *Content*: the mean of the last layer's patch tokens (neither class nor register tokens), of
    which 1 - cosine is the published DINO-D. *Style*: mean and deviation of the patches' channels in four layers."""

    def __init__(self, name: str, net: Any, pixels: Pixels, device: torch.device) -> None:
        self.name, self.net, self.pixels, self.device = name, net, pixels, device
        config = net.config
        self.patch = int(config.patch_size)
        self.first = 1 + getattr(config, "num_register_tokens", 0)
        self.layers = _style_layers(config.num_hidden_layers)
        self.content_dim, self.style_dim = config.hidden_size, 2 * config.hidden_size * len(self.layers)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        sizes = [area_size(image.size, self.pixels.side**2, multiple=self.patch) for image in images]

        @torch.no_grad()
        def features(numbers: list[int]) -> Tensor:
            shown = [at_size(images[n], sizes[n], self.pixels.resample) for n in numbers]
            x = normalised(shown, self.pixels.mean, self.pixels.std).to(self.device, self.net.dtype)
            out = self.net(pixel_values=x, output_hidden_states=True)
            content = out.last_hidden_state[:, self.first :].float().mean(1)
            return checked(torch.cat([content, *_style(out.hidden_states, self.layers, self.first)], 1), self.name)

        return rows(sizes, self.content_dim + self.style_dim, features)


class ImageText(Held):
    """A CLIP or SigLIP with its tokenizer: pictures and texts to embeddings of one space."""

    def __init__(self, name: str, net: Any, tokenizer: Any, pixels: Pixels, device: torch.device) -> None:
        self.name, self.net, self.tokenizer, self.pixels, self.device = name, net, tokenizer, pixels, device
        vision = net.config.vision_config
        self.side = int(vision.image_size)  # the square that it has positions for
        self.sigmoid = net.config.model_type == "siglip"
        self.layers, self.first = _style_layers(vision.num_hidden_layers), 0 if self.sigmoid else 1
        self.content_dim = vision.hidden_size if self.sigmoid else net.config.projection_dim
        self.style_dim = 2 * vision.hidden_size * len(self.layers)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """``float32 [N, content_dim + style_dim]``: the image embedding, and the patches' statistics behind it."""

        @torch.no_grad()
        def features(numbers: list[int]) -> Tensor:
            shown = [letterboxed(images[n], self.side, self.pixels.mean, self.pixels.resample) for n in numbers]
            x = normalised(shown, self.pixels.mean, self.pixels.std).to(self.device, self.net.dtype)
            out = self.net.get_image_features(pixel_values=x, output_hidden_states=True)
            style = _style(out.hidden_states, self.layers, self.first)
            return checked(torch.cat([out.pooler_output.float(), *style], 1), self.name)

        return rows([(self.side, self.side)] * len(images), self.content_dim + self.style_dim, features)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """``float32 [N, content_dim]``. What is longer than the model reads (CLIP: 77 tokens, SigLIP: 64) is cut."""
        most, out = self.net.config.text_config.max_position_embeddings, [torch.empty(0, self.content_dim)]
        for start in range(0, len(texts), 64):
            part, options = list(texts[start : start + 64]), {"truncation": True, "max_length": most}
            if self.sigmoid:  # as it was trained: small letters, filled up, and the filling read along
                part = [text.lower() for text in part]
                tokens = self.tokenizer(part, padding="max_length", return_tensors="pt", **options)
                inputs = {"input_ids": tokens["input_ids"]}
            else:
                tokens = self.tokenizer(part, padding=True, return_tensors="pt", **options)
                inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
            found = self.net.get_text_features(**{key: value.to(self.device) for key, value in inputs.items()})
            out.append(checked(found.pooler_output, self.name))
        return torch.cat(out)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Of each picture's and its text's embeddings, ``float32 [N]``."""
        if len(images) != len(texts):
            raise ValueError(f"{self.name}: {len(images)} pictures and {len(texts)} texts; one for each is needed")
        embedded = self.images(images)[:, : self.content_dim]
        return torch.cosine_similarity(embedded, self.texts(texts))


class ImageTextFeatures:
    """The image half as a :class:`~.base.Backbone`. *Content*: the image embedding."""

    def __init__(self, model: ImageText) -> None:
        self.model, self.name = model, model.name
        self.content_dim, self.style_dim = model.content_dim, model.style_dim

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return self.model.images(images)


class ClipScore:
    """CLIP-S as a :class:`~.base.TextScore`: the cosine of a picture's and its text's embeddings."""

    def __init__(self, model: ImageText) -> None:
        self.model, self.name = model, model.name

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        return self.model.cosines(images, texts)


class Reward(ClipScore):
    """A reward as a :class:`~.base.TextScore`: a CLIP tuned on which of two pictures people preferred for a prompt.

    The default is PickScore (arXiv 2305.01569), a ViT-H/14: its cosine by its own logit scale, about 15 to 25. A
    difference of 1 means odds of e for the better one. Its makers crop a picture to a square; here it stays whole.
    """

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        return self.model.cosines(images, texts) * self.model.net.logit_scale.detach().float().exp().cpu()
