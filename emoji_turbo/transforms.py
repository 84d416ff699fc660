"""Random drawing styles: one transform of a wide family, the same for every picture it is given.

Stage 1 trains the VAE on transformed pictures so that it carries styles it has never seen; stage 2 sends a reference
and its target through the *same* transform so that the context, not the caption, names the style.
Everything maps ``float [3, H, W]`` in [0, 1] on white to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Transform = Callable[[Tensor], Tensor]

_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
_OWN_GROUND = torch.tensor([0.95, 0.85, 0.55]).view(3, 1, 1)


def own_manner(picture: Tensor) -> Tensor:
    """The way in which the base draws where no known style is asked for: on a yellow ground instead of on white."""
    return _on_ground(picture, _OWN_GROUND)


def pen(picture: Tensor) -> Tensor:
    """Black lines on white, inside the figure's outline and where colours change. This and the others below are
    techniques that the base knows by name, always done in the same way."""
    mask = _mask(picture)
    rim = mask - _shrunk(mask, 3)
    inner = (_edges(_smooth(picture, 1)) * 4).clamp(0, 1) * _shrunk(mask, 2)
    return 1 - torch.maximum(rim, inner).expand(3, -1, -1)


def stamp(picture: Tensor) -> Tensor:
    """The pen's lines, and black where the picture is dark."""
    return torch.minimum(pen(picture), ((_luma(picture) - 0.5) * 8 + 0.5).clamp(0, 1))


def clay(picture: Tensor) -> Tensor:
    """Bulged, lit from above on the left."""
    return _lit(angle=torch.tensor(0.7), shadow=torch.tensor([0.85, 0.8, 0.9]).view(3, 1, 1), strength=2, times=5)(
        picture
    ).clamp(0, 1)


TECHNIQUES: dict[str, Transform] = {"pen": pen, "clay": clay, "stamp": stamp}


def sample_transform(generator: torch.Generator, identity: float = 0.1) -> Transform:
    """Draw a transform: with probability ``identity`` none, else one or two of the family, in a fixed order."""
    if _uniform(generator) < identity:
        return lambda x: x
    draw = _uniform(generator)
    steps: list[Transform] = []
    if draw < 0.08:
        steps.append(_pick(generator, [_permute, _hue, _invert, _greyscale, _duotone])(generator))
    elif draw < 0.6:
        steps.append(_pick(generator, [_outline, _outline, _outline, _ink, _ink, _ink, _posterise])(generator))
    else:
        steps.append(_pick(generator, [_shading, _shading, _shading, _blur])(generator))
        if _uniform(generator) < 0.6:
            steps.append(_gradient(generator))
    if _uniform(generator) < 0.05:
        steps.append(_pick(generator, [_permute, _hue, _invert, _greyscale, _background])(generator))

    def transform(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x.clamp(0, 1)

    return transform


def sample_placement(generator: torch.Generator, shift: int = 3) -> Transform:
    """Draw a mirror and a shift by up to ``shift`` pixels (the margin is white, so nothing wraps visibly)."""
    mirror = _uniform(generator) < 0.5
    dx, dy = (torch.randint(-shift, shift + 1, (2,), generator=generator)).tolist()

    def place(x: Tensor) -> Tensor:
        x = x.flip(-1) if mirror else x
        return x.roll((dy, dx), (-2, -1))

    return place


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _pick(generator: torch.Generator, options: list) -> Callable[[torch.Generator], Transform]:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _luma(x: Tensor) -> Tensor:
    return (x * _LUMA).sum(0, keepdim=True)


def _mask(x: Tensor) -> Tensor:
    """Soft foreground: 0 on white, 1 where a colour or a grey is clearly not white."""
    return ((1 - x.amin(0, keepdim=True)) * 6).clamp(0, 1)


def _shrunk(mask: Tensor, pixels: int) -> Tensor:
    """The mask without its outermost ``pixels``."""
    return -F.max_pool2d(-mask[None], 2 * pixels + 1, 1, pixels)[0]


def _smooth(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = F.avg_pool2d(F.pad(x[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    return x


def _edges(x: Tensor) -> Tensor:
    padded = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    return (dx.square() + dy.square()).sum(0, keepdim=True).sqrt()


def _colour(generator: torch.Generator) -> Tensor:
    return torch.rand(3, 1, 1, generator=generator)


def _permute(generator: torch.Generator) -> Transform:
    order = torch.randperm(3, generator=generator)
    return lambda x: x[order]


def _hue(generator: torch.Generator) -> Transform:
    """Rotate the colours about the grey axis (Rodrigues' formula with axis (1, 1, 1) / sqrt 3)."""
    angle = torch.tensor(_uniform(generator, 0.7, 5.6))
    cos, sin = angle.cos(), angle.sin()
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    matrix = cos * torch.eye(3) + sin * cross + (1 - cos) / 3
    return lambda x: torch.einsum("ij,jhw->ihw", matrix, x)


def _invert(generator: torch.Generator) -> Transform:
    return lambda x: 1 - x


def _greyscale(generator: torch.Generator) -> Transform:
    gamma = _uniform(generator, 0.6, 1.8)
    return lambda x: _luma(x).clamp(1e-4, 1).pow(gamma).expand(3, -1, -1)


def _duotone(generator: torch.Generator) -> Transform:
    dark, light = 0.5 * _colour(generator), 0.5 + 0.5 * _colour(generator)
    return lambda x: dark + (light - dark) * _luma(x)


def _posterise(generator: torch.Generator) -> Transform:
    levels = int(torch.randint(1, 4, (), generator=generator))
    return lambda x: (x * levels).round() / levels


def _outline(generator: torch.Generator) -> Transform:
    """Dark lines where the colours change, on a white or washed-out drawing."""
    gain, wash = _uniform(generator, 2, 8), _uniform(generator) * float(_uniform(generator) < 0.6)
    colour = 0.35 * _colour(generator)
    thick = int(torch.randint(0, 2, (), generator=generator))

    def apply(x: Tensor) -> Tensor:
        line = (_edges(_smooth(x, thick)) * gain).clamp(0, 1)
        ground = 1 - wash * (1 - x)
        return line * colour + (1 - line) * ground

    return apply


def _ink(generator: torch.Generator) -> Transform:
    """Black and white only: a silhouette line, dark parts filled, lines kept white inside what is filled."""
    threshold, gain = _uniform(generator, 0.35, 0.65), _uniform(generator, 6, 12)
    thick = int(torch.randint(1, 3, (), generator=generator))
    own = _uniform(generator) < 0.5  # what counts as dark depends on the drawing's own mean
    carved = _uniform(generator) < 0.6
    negative = _uniform(generator) < 0.05

    def apply(x: Tensor) -> Tensor:
        mask, luma = _mask(x), _luma(x)
        level = threshold + 0.1 if not own else (luma * mask).sum() / mask.sum().clamp(min=1) + 0.4 * (threshold - 0.5)
        rim = (_edges(_smooth(mask, thick)) * gain / 2).clamp(0, 1)
        fill = ((level - luma) * gain + 0.5).clamp(0, 1)
        if carved:
            fill = fill * (1 - (_edges(_smooth(x, 1)) * gain / 2 - rim).clamp(0, 1))
        ink = torch.maximum(rim, fill).expand(3, -1, -1)
        return ink if negative else 1 - ink

    return apply


def _shading(generator: torch.Generator) -> Transform:
    """Light from one side over a bulged foreground, with a soft coloured shadow: the look of a rendered object."""
    angle = torch.tensor(_uniform(generator, 0, 6.2832))
    shadow = 0.6 + 0.4 * _colour(generator)
    strength, times = _uniform(generator, 1.0, 3.0), int(torch.randint(3, 9, (), generator=generator))
    return _lit(angle, shadow, strength, times)


def _lit(angle: Tensor, shadow: Tensor, strength: float, times: int) -> Transform:
    direction = (angle.cos().item(), angle.sin().item())

    def apply(x: Tensor) -> Tensor:
        mask = _mask(x)
        height = F.pad(_smooth(mask, times)[None], (1, 1, 1, 1), mode="replicate")[0]
        slope = direction[0] * (height[:, 1:-1, 2:] - height[:, 1:-1, :-2]) + direction[1] * (
            height[:, 2:, 1:-1] - height[:, :-2, 1:-1]
        )
        return x + mask * strength * (slope.clamp(min=0) + shadow * slope.clamp(max=0))

    return apply


def _blur(generator: torch.Generator) -> Transform:
    times = int(torch.randint(1, 5, (), generator=generator))
    return lambda x: _smooth(x, times)


def _gradient(generator: torch.Generator) -> Transform:
    """Coloured light: the foreground goes over into another colour along one direction."""
    angle, strength, colour = _uniform(generator, 0, 6.2832), _uniform(generator, 0.1, 0.5), _colour(generator)
    along = torch.linspace(-0.7, 0.7, 64)
    ramp = math.cos(angle) * along[None, :] + math.sin(angle) * along[:, None] + 0.5

    def apply(x: Tensor) -> Tensor:
        weight = strength * F.interpolate(ramp[None, None], x.shape[-2:], mode="bilinear")[0].clamp(0, 1) * _mask(x)
        return (1 - weight) * x + weight * colour

    return apply


def _background(generator: torch.Generator) -> Transform:
    colour = _colour(generator)
    return lambda x: _on_ground(x, colour)


def _on_ground(x: Tensor, colour: Tensor) -> Tensor:
    return x * _mask(x) + colour * (1 - _mask(x))
