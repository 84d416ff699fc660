"""Pure scores over features and pictures. What each one means, its direction and its name stand in ``naming.SCORES``.

Pictures are ``float32 [N, 3, H, W]`` in [0, 1]; features ``float32 [N, D]``. Not here: the LPIPS network of
``docs/emoji-turbo.md`` (``stlpips``), whose package is no dependency; :func:`structure` is the shift-tolerant score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

STRUCTURE_SIZE = 64
"""Side in pixels at which :func:`structure` compares; larger pictures are reduced to it."""
STRUCTURE_SHIFT = 2
_LEAST_SIDE = 16
"""Of a picture that is reduced: a banner keeps enough rows to be compared."""


def stack(images: Sequence[Image.Image], side: int | None = None) -> Tensor:
    """RGB images of one size as ``[N, 3, H, W]`` in [0, 1]; ``side`` reduces the longer side to it (area average), the
    shorter one to no less than 16 pixels."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    x = pixels.permute(0, 3, 1, 2).float() / 255
    height, width = x.shape[2:]
    if side is not None and max(height, width) > side:
        size = [max(each * side // max(height, width), min(each, _LEAST_SIDE)) for each in (height, width)]
        x = F.interpolate(x, size=size, mode="area")
    return x


def cosine(a: Tensor, b: Tensor, center: Tensor | None = None) -> Tensor:
    """Row by row cosine ``[N]`` of ``a`` and ``b`` ``[N, D]``, ``center`` (``[D]`` or ``[N, D]``) subtracted."""
    if center is not None:
        a, b = a - center, b - center
    return F.cosine_similarity(a, b, dim=1)


def retrieval_rank(features: Tensor, candidates: Tensor, truth: Tensor, center: Tensor | None = None) -> Tensor:
    """How many candidates are strictly nearer (by cosine) than the right one: ``int64 [N]``, 0 is a hit.

    ``candidates [M, D]``; ``truth`` ``int64 [N]`` indexes them. Top-k accuracy is the share of ranks below k.
    """
    if center is not None:
        features, candidates = features - center, candidates - center
    similarity = F.normalize(features, dim=1) @ F.normalize(candidates, dim=1).T
    right = similarity.gather(1, truth[:, None])
    return (similarity > right).sum(1)


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel inception distance: unbiased squared MMD of ``a [N, D]`` and ``b [M, D]``, kernel ``(x.y / D + 1)^3``.

    Zero on average where both come from one distribution (single values may be below it). Bińkowski et al. 2018.
    Raises ``ValueError`` where one side has fewer than two rows.
    """
    n, m = len(a), len(b)
    if n < 2 or m < 2:
        raise ValueError(f"KID needs at least two pictures on each side, got {n} and {m}")
    a, b = a.double(), b.double()
    dim = a.shape[1]
    aa, bb, ab = ((x @ y.T / dim + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within_a = (aa.sum() - aa.diagonal().sum()) / (n * (n - 1))
    within_b = (bb.sum() - bb.diagonal().sum()) / (m * (m - 1))
    return float(within_a + within_b - 2 * ab.mean())


def luminance(pictures: Tensor) -> Tensor:
    """``[N, 1, H, W]``, weights of ITU-R BT.601."""
    return (pictures * pictures.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def laplacian_energy(pictures: Tensor) -> Tensor:
    """Mean squared 4-neighbour Laplacian of the luminance, ``[N]``: high for crisp edges (and for noise)."""
    grey = luminance(pictures)
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernel).square().mean((1, 2, 3))


def pixel_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of two stacks, ``[N]``."""
    return (a - b).square().mean((1, 2, 3))


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Mean structural similarity ``[N]`` of the luminance over a uniform ``window`` (Wang et al. 2004)."""
    return _shifted_ssim(a, b, window, 0)


def structure(a: Tensor, b: Tensor, shift: int = STRUCTURE_SHIFT, window: int = 7) -> Tensor:
    """Shift-tolerant similarity ``[N]``: the best SSIM over whole-pixel shifts of up to ``shift`` in x and y.

    Two drawings of one thing rarely lie on each other to the pixel; plain SSIM and pixel error punish one pixel of
    displacement as much as a wrong drawing. All shifts compare the same central area of ``a``.
    """
    return _shifted_ssim(a, b, window, shift)


def _shifted_ssim(a: Tensor, b: Tensor, window: int, shift: int) -> Tensor:
    a, b = luminance(a), luminance(b)
    mean_a, mean_b = (F.avg_pool2d(x, window, 1) for x in (a, b))
    size = window * window
    unbias = size / (size - 1)
    var_a = (F.avg_pool2d(a * a, window, 1) - mean_a**2) * unbias
    var_b = (F.avg_pool2d(b * b, window, 1) - mean_b**2) * unbias
    height, width = (side - 2 * shift for side in mean_a.shape[2:])
    if height < 1 or width < 1:
        raise ValueError(f"pictures of {a.shape[2]} x {a.shape[3]} pixels are too small for a window of {window}")
    inner = slice(shift, shift + height), slice(shift, shift + width)
    core = a[:, :, shift : a.shape[2] - shift, shift : a.shape[3] - shift]
    mean_a, var_a = mean_a[:, :, inner[0], inner[1]], var_a[:, :, inner[0], inner[1]]
    c1, c2 = 0.01**2, 0.03**2
    best = torch.full((len(a),), -1.0)
    for dy in range(2 * shift + 1):
        for dx in range(2 * shift + 1):
            moved = b[:, :, dy : dy + core.shape[2], dx : dx + core.shape[3]]
            mean_m = mean_b[:, :, dy : dy + height, dx : dx + width]
            var_m = var_b[:, :, dy : dy + height, dx : dx + width]
            covariance = (F.avg_pool2d(core * moved, window, 1) - mean_a * mean_m) * unbias
            value = (2 * mean_a * mean_m + c1) * (2 * covariance + c2)
            value = value / ((mean_a**2 + mean_m**2 + c1) * (var_a + var_m + c2))
            best = torch.maximum(best, value.mean((1, 2, 3)))
    return best
