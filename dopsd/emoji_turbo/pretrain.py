"""Stage 2: encoder and transformer together, flow matching, half of it with a picture in the encoder's context.

Text only: "a fox, noto style". In context: the target itself, another thing in the same style while the text says what
to draw ("a fox in [V] style"), or the same thing drawn otherwise ("a [V], noto style"). The first two go through one
random transform of a wide family, the same for reference and target, so that the context comes to carry styles that no
caption names: the in-context ability that large encoders bring along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from diffusers.models.transformers import transformer_z_image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3VLModel

from dopsd.models.z_image import context_inputs, context_states, prompt_text

from .captions import PLACEHOLDER, random_caption
from .loop import train
from .pictures import BASE_STYLES, World
from .transforms import sample_placement, sample_transform
from .vae import LATENT_CHANNELS, PATCH, linear_code

SHIFT = 3.0
_PATCH, _MERGE = 8, 2


@dataclass
class Parts:
    """The modules of the base while it is built."""

    vae: AutoencoderKL
    tokenizer: PreTrainedTokenizerFast
    vlm: Qwen3VLModel
    transformer: ZImageTransformer2DModel

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def encode_text(self, captions: list[str]) -> list[Tensor]:
        """States ``[tokens, dim]`` of captions alone, with gradient."""
        texts = [prompt_text(self.tokenizer, c) for c in captions]
        inputs = self.tokenizer(texts, padding="longest", return_tensors="pt").to(self.device)
        output = self.vlm.language_model(**inputs, output_hidden_states=True, use_cache=False)
        mask = inputs.attention_mask.bool()
        return [s[m] for s, m in zip(output.hidden_states[-2], mask, strict=True)]

    def encode_context(self, captions: list[str], pictures: Tensor) -> list[Tensor]:
        """States of one picture (``[B, 3, 64, 64]`` in [-1, 1]) and a caption each, with gradient."""
        pixels, grid = patchify(pictures)
        inputs = context_inputs(self.tokenizer, captions, [1] * len(captions), grid, _MERGE)
        inputs = {k: v.to(self.device) for k, v in inputs.items()}
        return context_states(self.vlm, inputs, pixels.to(self.device), grid.to(self.device))

    def velocity(self, x: Tensor, sigma: Tensor, states: list[Tensor]) -> Tensor:
        """``dx/dsigma`` of latents ``[B, C, h, w]`` at noise levels ``[B]``."""
        out = self.transformer(list(x.unsqueeze(2).unbind(0)), 1 - sigma, states, return_dict=False)[0]
        return -torch.stack([o.float() for o in out]).squeeze(2)


def patchify(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """What Qwen2VLImageProcessor makes of pictures ``[B, 3, H, W]`` in [-1, 1]: patches, grid ``[B, 3]``."""
    b, c, height, width = pictures.shape
    rows, columns = height // _PATCH, width // _PATCH
    x = pictures.unsqueeze(1).expand(-1, 2, -1, -1, -1)
    x = x.reshape(b, 1, 2, c, rows // _MERGE, _MERGE, _PATCH, columns // _MERGE, _MERGE, _PATCH)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(b * rows * columns, c * 2 * _PATCH * _PATCH)
    return x, torch.tensor([[1, rows, columns]] * b)


@dataclass(frozen=True)
class Batch:
    """Captions, context pictures of the last ``len(context)`` of them, targets ``[B, 3, 64, 64]`` in [-1, 1]."""

    captions: list[str]
    context: Tensor
    targets: Tensor


def draw_batch(world: World, size: int, generator: torch.Generator, drop: float = 0.15) -> Batch:
    """Half text only (``drop`` of it without a caption, for guidance), half with a picture in the context."""
    captions, targets, context = [], [], []
    for i in range(size):
        in_context = i >= size // 2
        label, style, target, reference = (_draw_in_context if in_context else _draw_text)(world, generator)
        captions.append(random_caption(label, style, generator))
        targets.append(target)
        if in_context:
            context.append(reference)
    dropped = torch.rand(size // 2, generator=generator) < drop
    captions[: size // 2] = ["" if d else c for d, c in zip(dropped, captions, strict=False)]
    return Batch(captions, torch.stack(context) * 2 - 1, torch.stack(targets) * 2 - 1)


def _draw_text(world: World, generator: torch.Generator) -> tuple[str, str, Tensor, Tensor]:
    index, style = _index(world.known, generator), _style(generator)
    target = _picture(world, style, index)
    named = PLACEHOLDER if torch.rand((), generator=generator) < 0.1 else style
    return world.labels[index], named, target, target


def _draw_in_context(world: World, generator: torch.Generator) -> tuple[str, str, Tensor, Tensor]:
    index, style = _index(world.known, generator), _style(generator)
    kind = torch.rand((), generator=generator).item()
    if kind < 0.25:  # the same thing in the same style: the target itself
        both = sample_transform(generator)
        target = both(_picture(world, style, index))
        return world.labels[index], PLACEHOLDER, target, target
    if kind < 0.8:  # another thing in the same style
        both = sample_transform(generator)
        other = _index(world.seen, generator)
        target, reference = _picture(world, style, index), _picture(world, style, other)
        return world.labels[index], PLACEHOLDER, both(target), both(reference)
    index = _index(world.seen, generator)  # the same thing, drawn or placed otherwise; the style is named
    shown = _style(generator)
    target, reference = _picture(world, style, index), _picture(world, shown, index)
    return PLACEHOLDER, style, target, sample_placement(generator)(reference)


def _index(of: tuple[int, ...] | list[int], generator: torch.Generator) -> int:
    return of[int(torch.randint(len(of), (), generator=generator))]


def _style(generator: torch.Generator) -> str:
    return BASE_STYLES[int(torch.randint(len(BASE_STYLES), (), generator=generator))]


def _picture(world: World, style: str, index: int) -> Tensor:
    return world.pictures[style][index].float() / 255


def shifted(u: Tensor) -> Tensor:
    """Noise levels from uniform ``u``: the static shift of Z-Image's schedule."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class _Quadrants(nn.Module):
    """Latents ``[B, C, 8, 8]`` from the last four tokens' states: one linear map for each quadrant of the picture."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.maps = nn.ModuleList(nn.Linear(hidden, LATENT_CHANNELS * 16) for _ in range(4))

    def forward(self, states: list[Tensor]) -> Tensor:
        last = self.norm(torch.stack([s[-4:] for s in states]))
        a, b, c, d = (m(last[:, i]).view(-1, LATENT_CHANNELS, 4, 4) for i, m in enumerate(self.maps))
        return torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)


def pretrain_encoder(
    parts: Parts, world: World, folder: Path, *, batch: int, steps: int, minutes: float, lr: float, head_steps: int = 0
) -> None:
    """Teach ``parts.vlm`` to know what is to be drawn: its last states must hold the picture. Resumable.

    The picture is read off by a linear map that is thrown away afterwards. A step costs a fifth of one with the
    transformer, and has no noise in it: names, styles and how to draw one thing in the style of another are learnt here
    many times faster (docs/decisions.md), and the transformer finds them ready. For ``head_steps`` before that the map
    learns alone: a random one would undo what an encoder knows already.
    """
    matrix, offset = (t.to(parts.device) for t in linear_code(world))
    torch.manual_seed(1)
    head = _Quadrants(parts.vlm.config.text_config.hidden_size).to(parts.device)

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        drawn = draw_batch(world, batch, generator, drop=0.0)
        half = batch - len(drawn.context)
        x0 = F.conv2d(drawn.targets.to(parts.device), matrix, offset, stride=PATCH)
        states = parts.encode_text(drawn.captions[:half]) + parts.encode_context(drawn.captions[half:], drawn.context)
        return F.mse_loss(head(states), x0)

    if head_steps:
        parts.vlm.requires_grad_(False)
        weights = train("encoder-head", folder, {"head": head}, loss_fn, steps=head_steps, lr=1e-2, max_minutes=minutes)
        head.load_state_dict(weights["head"])
        parts.vlm.requires_grad_(True)
    modules = {"vlm": parts.vlm, "head": head}
    inner = ("layers.", "blocks.", "merger")
    matrices = {
        f"vlm/{name}": p
        for name, p in parts.vlm.named_parameters()
        if p.ndim == 2 and any(part in name for part in inner)
    }
    weights = train("encoder", folder, modules, loss_fn, steps=steps, lr=lr, max_minutes=minutes, ema=0.99,
                    muon=matrices)  # fmt: skip
    parts.vlm.load_state_dict(weights["vlm"])


def pretrain(
    parts: Parts, world: World, folder: Path, *, batch: int, steps: int, minutes: float, lr: float,
    padded: bool = True, compiled: bool = False, name: str = "pretrain",
) -> None:  # fmt: skip
    """Train ``parts.transformer`` on what the finished encoder says; leaves its averaged weights in place. Resumable.

    Z-Image fills pictures and captions up to a multiple of 32 tokens: at this size half of a sequence. Not ``padded``,
    a step costs two thirds; the end of training must be. ``compiled`` fuses the transformer's blocks (a sixth faster on
    a CPU, after two minutes of compiling).
    """
    device = parts.device
    parts.vlm.requires_grad_(False).eval()
    if compiled:
        parts.transformer.compile_repeated_blocks()
    matrix, offset = (t.to(device) for t in linear_code(world))

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        drawn = draw_batch(world, batch, generator)
        half = batch - len(drawn.context)
        with torch.no_grad():
            x0 = F.conv2d(drawn.targets.to(device), matrix, offset, stride=PATCH)  # what the VAE's encoder computes
            captions = drawn.captions
            states = parts.encode_text(captions[:half]) + parts.encode_context(captions[half:], drawn.context)
        sigma = shifted(torch.rand(batch, generator=generator)).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        s = sigma.view(-1, 1, 1, 1)
        x, u = (1 - s) * x0 + s * noise, noise - x0
        if padded:
            return F.mse_loss(parts.velocity(x, sigma, states), u)
        with granule(16):  # captions are half as long as those with a picture: not padded to them either
            out = [parts.velocity(x[part], sigma[part], states[part]) for part in (slice(half), slice(half, batch))]
        return F.mse_loss(torch.cat(out), u)

    weights = train(name, folder, {"transformer": parts.transformer}, loss_fn, steps=steps, lr=lr, ema=0.998,
                    max_minutes=minutes, warmup=200)  # fmt: skip
    parts.transformer.load_state_dict(weights["transformer"])


@contextlib.contextmanager
def granule(tokens: int) -> Iterator[None]:
    """Fill sequences up to a multiple of ``tokens`` instead of Z-Image's 32, in this process and for a while."""
    before = transformer_z_image.SEQ_MULTI_OF
    transformer_z_image.SEQ_MULTI_OF = tokens
    try:
        yield
    finally:
        transformer_z_image.SEQ_MULTI_OF = before


def guided_velocity(
    parts: Parts, x: Tensor, sigma: Tensor, states: list[Tensor], empty: Tensor, guidance: float
) -> Tensor:
    """``u_0 + g (u_c - u_0)`` in one batch of twice the size; without guidance (g = 1) a single forward."""
    level = sigma.to(x.device).expand(len(x))
    if guidance == 1:
        return parts.velocity(x, level, states)
    both = parts.velocity(torch.cat([x, x]), torch.cat([level, level]), [*states, *[empty] * len(states)])
    conditional, unconditional = both.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
