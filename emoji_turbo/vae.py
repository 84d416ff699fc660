"""Stage 1: an ``AutoencoderKL`` of factor 8 for 64-px drawings: an analytic encoder, a trained decoder.

The encoder is written down, not trained: the best linear code of 8 x 8 patches (principal components over real and
transformed pictures), expressed exactly in the weights of diffusers' ``AutoencoderKL``. Trained jointly from scratch
within a CPU's budget, encoder and decoder did not even reach that code and mixed up colours (docs/decisions.md); and
because the latents are known at once, pre-training need not wait for the decoder. The decoder is trained by
reconstruction from noised latents, on pictures through the transforms of stage 2 as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from torch import Tensor, nn

from .loop import train
from .pictures import BASE_STYLES, World
from .transforms import sample_placement, sample_transform

LATENT_CHANNELS = 32
CHANNELS = (16, 48, 64, 128)
PATCH = 8
_GROUPS = 4
_ANCHOR = 100.0
NOISE = 0.3
"""Largest deviation of the noise on latents that the decoder learns from; latents have 1."""
# Latents are divided by the square root of their deviation, not by the deviation itself: coarse components stay larger
# than fine ones, so that the first of few large steps decides the layout and the last the detail.
_WHITENING = 0.5


def make_vae() -> AutoencoderKL:
    """A fresh VAE of factor 8; its encoder is useless until :func:`write_linear_encoder`."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        norm_num_groups=_GROUPS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=64,
    )


def linear_code(world: World, samples: int = 4096) -> tuple[Tensor, Tensor]:
    """The code ``z = matrix * patch + offset``: ``matrix [LATENT_CHANNELS, 3, 8, 8]``, ``offset [LATENT_CHANNELS]``.

    Principal components of the patches of pictures in [-1, 1], half of them transformed, scaled to mean 0 and to unit
    variance over all channels together.
    """
    x = draw_pictures(_pictures(world), samples, torch.Generator().manual_seed(1))
    patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH).double()
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    components = vectors.flip(1)[:, :LATENT_CHANNELS].T
    # The sign of an eigenvector is arbitrary: fix it, so that every machine writes the same encoder.
    components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    deviation = values.flip(0)[:LATENT_CHANNELS].sqrt()
    scale = deviation.pow(-_WHITENING)
    scale = scale / (deviation * scale).square().mean().sqrt()
    matrix = components * scale[:, None]
    return matrix.view(-1, 3, PATCH, PATCH).float(), -(matrix @ mean).float()


@torch.no_grad()
def write_linear_encoder(vae: AutoencoderKL, matrix: Tensor, offset: Tensor) -> None:
    """Make the encoder compute exactly ``z = matrix * patch + offset`` (its posterior's mean; the variance is e^-12).

    Residual branches are switched off; strided convolutions gather 2 x 2 blocks into channels. The output's GroupNorm
    is made linear by two constant channels of +-100 in each group, which alone determine the group's mean and variance
    (to 1 part in 10^3), and its SiLU by pairs of channels of opposite sign: silu(x) - silu(-x) = x.
    """
    encoder = vae.encoder
    for module in encoder.modules():
        if hasattr(module, "conv2") and hasattr(module, "conv1"):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        if getattr(module, "conv_shortcut", None) is not None:
            _identity(module.conv_shortcut)
    _identity(encoder.conv_in)
    blocks = encoder.down_blocks
    _gather(blocks[0].downsamplers[0].conv, 3)
    _gather(blocks[1].downsamplers[0].conv, 12)
    last = blocks[2].downsamplers[0].conv
    bias = _cleared(last)
    for c in range(48):
        plane, y, x = c // 16, *_cell(c % 16)
        for dy in range(2):
            for dx in range(2):
                last.weight[:LATENT_CHANNELS, c, dy, dx] = matrix[:, plane, 4 * dy + y, 4 * dx + x]
    bias[:LATENT_CHANNELS] = offset
    _write_output(encoder, blocks[3].resnets[0].conv_shortcut)


@torch.no_grad()
def encoder_map(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """``matrix``, ``offset`` of an encoder that :func:`write_linear_encoder` wrote, asked of it patch by patch.

    A build that goes on from shipped weights must use their code; the transforms may have changed since.
    """
    patches = torch.eye(3 * PATCH * PATCH, device=vae.device).view(-1, 3, PATCH, PATCH)
    offset = vae.encode(torch.zeros_like(patches[:1])).latent_dist.mean.float().flatten()
    columns = vae.encode(patches).latent_dist.mean.float().flatten(1) - offset
    return columns.T.reshape(LATENT_CHANNELS, 3, PATCH, PATCH).contiguous(), offset


def _write_output(encoder: Any, spread: nn.Conv2d) -> None:
    """Spread the code over sign pairs and anchors, and collect it behind the normalisation and the SiLU."""
    width = CHANNELS[-1] // _GROUPS
    bias = _cleared(spread)
    out, norm = encoder.conv_out, encoder.conv_norm_out
    _cleared(out)[LATENT_CHANNELS:] = -12.0
    norm.weight.fill_(_ANCHOR * (2 / width) ** 0.5)
    norm.bias.zero_()
    per_group = -(-LATENT_CHANNELS // _GROUPS)
    for k in range(LATENT_CHANNELS):
        group, slot = divmod(k, per_group)
        plus = group * width + 2 + 2 * slot
        spread.weight[plus, k], spread.weight[plus + 1, k] = 1.0, -1.0
        out.weight[k, plus, 1, 1], out.weight[k, plus + 1, 1, 1] = 1.0, -1.0
    for group in range(_GROUPS):
        bias[group * width], bias[group * width + 1] = _ANCHOR, -_ANCHOR


def _cleared(conv: nn.Conv2d) -> Tensor:
    """Set a convolution to zero and return its bias."""
    assert conv.bias is not None
    nn.init.zeros_(conv.weight)
    return nn.init.zeros_(conv.bias)


def _identity(conv: nn.Conv2d) -> None:
    _cleared(conv)
    centre = conv.kernel_size[0] // 2
    for c in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[c, c, centre, centre] = 1.0


def _gather(conv: nn.Conv2d, channels: int) -> None:
    """Each of ``channels`` becomes four: the 2 x 2 block that the stride steps over, row by row."""
    _cleared(conv)
    for c in range(channels):
        for i in range(4):
            conv.weight[4 * c + i, c, i // 2, i % 2] = 1.0


def _cell(i: int) -> tuple[int, int]:
    """Row and column inside a 4 x 4 block of the ``i``-th channel after two gathers."""
    first, second = divmod(i, 4)
    return 2 * (second // 2) + first // 2, 2 * (second % 2) + first % 2


def train_decoder(vae: AutoencoderKL, world: World, folder: Path, *, batch: int, steps: int, minutes: float) -> None:
    """Train the decoder on the frozen encoder's latents. Resumable.

    Noise of up to :data:`NOISE` is added to them: what the transformer draws is off by as much, and a decoder that has
    only met exact latents turns that into a weave over all that should be flat.
    """
    vae.encoder.requires_grad_(False)
    pictures = _pictures(world)
    device = vae.device

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        x = draw_pictures(pictures, batch, generator).to(device)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean.float()
        deviation = NOISE * torch.rand(len(z), 1, 1, 1, generator=generator)
        z = z + (deviation * torch.randn(z.shape, generator=generator)).to(device)
        return reconstruction_loss(vae.decode(z).sample, x)

    weights = train("decoder", folder, {"vae": vae}, loss_fn, steps=steps, lr=1.5e-3, max_minutes=minutes, ema=0.998)
    vae.load_state_dict(weights["vae"])


def reconstruction_loss(reconstruction: Tensor, x: Tensor) -> Tensor:
    """A tenth of the mean absolute error, of the picture and of its gradients; ``[B, 3, H, W]`` in [-1, 1].

    Absolute, because the median of what might be there is flat and has edges, as drawings do; the mean that a squared
    error asks for is blurred.
    """
    a = reconstruction.float()
    edges = F.l1_loss(a.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(a.diff(dim=-2), x.diff(dim=-2))
    return 0.1 * (F.l1_loss(a, x) + edges)


def draw_pictures(pictures: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """A batch of placed pictures, half of them through a random transform; ``float [B, 3, 64, 64]`` in [-1, 1]."""
    index = torch.randint(len(pictures), (batch,), generator=generator)
    out = []
    for i in index.tolist():
        x = sample_placement(generator)(pictures[i].float() / 255)
        out.append(sample_transform(generator, identity=0.4)(x))
    return torch.stack(out) * 2 - 1


def _pictures(world: World) -> Tensor:
    return torch.cat([world.pictures[style][world.seen] for style in BASE_STYLES])


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean over pictures (``uint8 [N, 3, H, W]``) of the reconstruction's PSNR in dB, peak 1."""
    x = pictures.float().to(vae.device) / 255
    values = []
    for chunk in x.split(64):
        y = (vae.decode(vae.encode(chunk * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        values.append(-10 * (y - chunk).square().mean((1, 2, 3)).log10())
    return float(torch.cat(values).mean())
