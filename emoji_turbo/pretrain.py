"""Stage 2: the encoder learns what is to be drawn, then the transformer to draw it, by flow matching.

What they are trained on is in ``batches.py``.
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

from .batches import DEFAULT_STYLE, UNNAMED, WORDS, Batch, draw_batch, draw_shown
from .captions import restyled
from .loop import place, train
from .pictures import BASE_STYLES, World
from .transforms import TECHNIQUES
from .vae import LATENT_CHANNELS, PATCH, encoder_map

SHIFT = 3.0
TOLD = 0.2
"""Weight of the readouts beside the flow matching loss of 1."""
AFTER = 6
"""Tokens of a prompt from the word "style" on, the same for all captions."""
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

    @property
    def image_start(self) -> int:
        """Where the tokens of a context picture begin, which is the same for every caption."""
        _, grid = patchify(torch.zeros(1, 3, 64, 64))
        inputs = context_inputs(self.tokenizer, [""], [1], grid, _MERGE)
        return int(inputs["mm_token_type_ids"][0].argmax())

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

    def encode(self, drawn: Batch) -> list[Tensor]:
        """States of a drawn batch: the first ones text only, the rest with their context pictures."""
        texts, told = drawn.captions[: drawn.alone], drawn.captions[drawn.alone :]
        return self.encode_text(texts) + self.encode_context(told, drawn.context)

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


def shifted(u: Tensor) -> Tensor:
    """Noise levels from uniform ``u``: the static shift of Z-Image's schedule."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class Readouts(nn.Module):
    """What an encoder's states must tell, read off by linear maps that are thrown away when the base is finished.

    From the last four tokens, one for each quadrant: where a picture is shown, the picture to draw, and the named thing
    in each of the base's styles and techniques, whichever is asked for; which style word the caption has; what the
    picture shows, whose outlines it has, and whether that is the named thing. From a shown picture's own tokens: that
    picture. How far each style word moves the last :data:`AFTER` states, whatever the thing. Latents are
    ``[B, C, 8, 8]``; ``things``: how many there are in the world.
    """

    def __init__(self, hidden: int, things: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        quadrant = LATENT_CHANNELS * 16
        self.target = nn.ModuleList(nn.Linear(hidden, quadrant) for _ in range(4))
        ways = len(BASE_STYLES) + len(TECHNIQUES)
        self.drawings = nn.ModuleList(nn.Linear(hidden, ways * quadrant) for _ in range(4))
        self.shown = nn.Linear(hidden, LATENT_CHANNELS * 4)
        self.word = nn.Linear(4 * hidden, len(WORDS))
        self.same = nn.Linear(4 * hidden, 2)
        self.pictured = nn.Linear(4 * hidden, things)
        self.outlines = nn.Linear(4 * hidden, len(BASE_STYLES))
        self.moves = nn.Parameter(torch.zeros(len(WORDS), AFTER, hidden))

    def apart(self, states: list[Tensor], others: list[Tensor], words: Tensor, other_words: Tensor) -> Tensor:
        """How far a style word is from moving the states of every thing alike: the share of the movement from
        ``states`` to ``others`` (the same captions with other words, ``[B]`` in :data:`WORDS`) that is the thing's own.

        Only what is alike for all things can be learnt from a few of them.
        """
        before, after = (torch.stack([s[-AFTER:] for s in group]) for group in (states, others))
        moved = F.rms_norm(after, after.shape[-1:]) - F.rms_norm(before, before.shape[-1:])
        alike = self.moves[other_words] - self.moves[words]
        return (moved - alike).square().sum() / moved.square().sum()

    def loss(
        self, states: list[Tensor], drawn: Batch, x0: Tensor, shown: Tensor, drawings: Tensor, first: int
    ) -> Tensor:
        """``x0``, ``shown``: latents of targets and of context pictures; ``drawings [things, ways, C, 8, 8]``: of all
        things; ``first``: where the picture's tokens begin."""
        things, words, same = (t.to(x0.device) for t in (drawn.things, drawn.words, drawn.same))
        last = self.norm(torch.stack([s[-4:] for s in states]))
        shown_rows = slice(drawn.alone, None)
        loss = F.mse_loss(_quadrants(self.target, last[shown_rows])[:, 0], x0[shown_rows])
        named = things != UNNAMED
        loss = loss + 0.5 * F.mse_loss(_quadrants(self.drawings, last[named]), drawings[things[named]])
        loss = loss + 0.02 * F.cross_entropy(self.word(last.flatten(1)), words, ignore_index=UNNAMED)
        loss = loss + F.cross_entropy(self.same(last.flatten(1)), same, ignore_index=UNNAMED)
        told = last[drawn.alone :].flatten(1)
        loss = loss + 0.2 * F.cross_entropy(self.pictured(told), drawn.pictured.to(x0.device))
        loss = loss + 0.5 * F.cross_entropy(self.outlines(told), drawn.outlines.to(x0.device))
        seen = self.norm(torch.stack([s[first : first + 16] for s in states[drawn.alone :]]))
        cells = self.shown(seen).view(-1, 4, 4, LATENT_CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return loss + 0.5 * F.mse_loss(cells.reshape(shown.shape), shown)


def _quadrants(maps: nn.ModuleList, last: Tensor) -> Tensor:
    """``[B, pictures, C, 8, 8]`` from the last four states ``[B, 4, dim]``: one linear map for each quadrant."""
    a, b, c, d = (m(last[:, i]).view(len(last), -1, LATENT_CHANNELS, 4, 4) for i, m in enumerate(maps))
    return torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)


class Lessons:
    """Batches of the pre-training with their latents, the same for all processes, of which each takes its share."""

    def __init__(self, parts: Parts, world: World) -> None:
        self.parts, self.world = parts, world
        self.matrix, self.offset = encoder_map(parts.vae)
        plain = [world.pictures[s].float() / 255 for s in BASE_STYLES]
        default = plain[BASE_STYLES.index(DEFAULT_STYLE)]
        worked = [torch.stack([technique(p) for p in default]) for technique in TECHNIQUES.values()]
        self.drawings = torch.stack([self.latents(p * 2 - 1) for p in (*plain, *worked)], 1)
        self.first = parts.image_start

    def latents(self, pictures: Tensor) -> Tensor:
        """What the VAE's encoder makes of pictures in [-1, 1]: ``[B, C, 8, 8]``."""
        return F.conv2d(pictures.to(self.matrix.device), self.matrix, self.offset, stride=PATCH)

    def draw(self, size: int, generator: torch.Generator, drop: float) -> tuple[Batch, list[int]]:
        """This process's share of a batch of ``size``, and its rows in it."""
        drawn, (rank, ranks) = draw_batch(self.world, size, generator, drop), place()
        return drawn.share(rank, ranks), drawn.rows(rank, ranks)

    def told(self, readouts: Readouts, drawn: Batch, states: list[Tensor], x0: Tensor) -> Tensor:
        """How badly the states tell what they must."""
        with torch.no_grad():
            shown = self.latents(drawn.context)
        loss = readouts.loss(states, drawn, x0, shown, self.drawings, self.first)
        named = (drawn.words[: drawn.alone] != UNNAMED).nonzero().flatten()
        words = drawn.words[named]
        others = (words + 1 + torch.arange(len(words)) % (len(WORDS) - 1)) % len(WORDS)
        pairs = zip(named.tolist(), words.tolist(), others.tolist(), strict=True)
        captions = [restyled(drawn.captions[i], WORDS[a], WORDS[b]) for i, a, b in pairs]
        return loss + readouts.apart([states[i] for i in named], self.parts.encode_text(captions), words, others)


def pretrain_encoder(
    parts: Parts, world: World, folder: Path, *, batch: int, steps: int, minutes: float, lr: float, head_steps: int = 0
) -> Readouts:
    """Teach ``parts.vlm`` to know what is to be drawn: its last states must hold the picture. Resumable.

    A step costs a fifth of one with the transformer, and has no noise in it: names, styles and how to draw one thing in
    the style of another are learnt here many times faster (docs/decisions.md), and the transformer finds them ready.
    For ``head_steps`` before that the maps learn alone: random ones would undo what an encoder knows already.
    """
    lessons = Lessons(parts, world)
    torch.manual_seed(1)
    readouts = Readouts(parts.vlm.config.text_config.hidden_size, len(world.labels)).to(parts.device)

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        drawn, _ = lessons.draw(batch, generator, drop=0.0)
        return lessons.told(readouts, drawn, parts.encode(drawn), lessons.latents(drawn.targets))

    if head_steps:
        parts.vlm.requires_grad_(False)
        weights = train("encoder-head", folder, {"readouts": readouts}, loss_fn, steps=head_steps, lr=1e-2,
                        max_minutes=minutes)  # fmt: skip
        readouts.load_state_dict(weights["readouts"])
        parts.vlm.requires_grad_(True)
    modules = {"vlm": parts.vlm, "readouts": readouts}
    inner = ("layers.", "blocks.", "merger")
    matrices = {
        f"vlm/{name}": p
        for name, p in parts.vlm.named_parameters()
        if p.ndim == 2 and any(part in name for part in inner)
    }
    weights = train("encoder", folder, modules, loss_fn, steps=steps, lr=lr, max_minutes=minutes, ema=0.99,
                    muon=matrices)  # fmt: skip
    for name, module in modules.items():
        module.load_state_dict(weights[name])
    return readouts


def learn_to_copy(
    parts: Parts, world: World, folder: Path, *, batch: int, steps: int, minutes: float, lr: float
) -> None:
    """Show ``parts.transformer`` the tokens of the target itself and nothing else, until it finds its way from each of
    them to its place in the picture. Resumable.

    Among other lessons it does not find it: there, most of a picture can be told from the last tokens alone.
    """
    lessons, (rank, ranks) = Lessons(parts, world), place()
    first = lessons.first
    parts.vlm.requires_grad_(False)

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        pictures = draw_shown(world, batch, generator)[rank::ranks]
        sigma = shifted(torch.rand(batch, generator=generator))[rank::ranks].to(parts.device)
        with torch.no_grad():
            states = [s[first : first + 16] for s in parts.encode_context([""] * len(pictures), pictures)]
            x0 = lessons.latents(pictures)
        noise = torch.randn(batch, *x0.shape[1:], generator=generator)[rank::ranks].to(parts.device)
        s = sigma.view(-1, 1, 1, 1)
        with granule(16):
            return F.mse_loss(parts.velocity((1 - s) * x0 + s * noise, sigma, states), noise - x0)

    weights = train("copying", folder, {"transformer": parts.transformer}, loss_fn, steps=steps, lr=lr,
                    max_minutes=minutes, warmup=100, ema=0.99)  # fmt: skip
    parts.transformer.load_state_dict(weights["transformer"])
    parts.vlm.requires_grad_(True)


def pretrain(
    parts: Parts, readouts: Readouts, world: World, folder: Path, *, batch: int, steps: int, minutes: float, lr: float,
    padded: bool = True, name: str = "pretrain",
) -> None:  # fmt: skip
    """Train ``parts.transformer`` on what the encoder says, and the encoder to say it better; leaves their averaged
    weights in place. Resumable.

    Z-Image fills pictures and captions up to a multiple of 32 tokens: at this size half of a sequence. Not ``padded``,
    a step costs two thirds; the end of training must be.
    """
    device = parts.device
    lessons = Lessons(parts, world)

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        drawn, rows = lessons.draw(batch, generator, drop=0.15)
        sigma = shifted(torch.rand(batch, generator=generator))[rows].to(device)
        noise = torch.randn(batch, *lessons.drawings.shape[2:], generator=generator)[rows].to(device)
        x0 = lessons.latents(drawn.targets)
        states = parts.encode(drawn)
        s = sigma.view(-1, 1, 1, 1)
        x, u = (1 - s) * x0 + s * noise, noise - x0
        told = lessons.told(readouts, drawn, states, x0)
        if padded:
            return F.mse_loss(parts.velocity(x, sigma, states), u) + TOLD * told
        with granule(16):  # captions are half as long as those with a picture: not padded to them either
            groups = (slice(drawn.alone), slice(drawn.alone, None))
            out = [parts.velocity(x[part], sigma[part], states[part]) for part in groups]
        return F.mse_loss(torch.cat(out), u) + TOLD * told

    modules = {"transformer": parts.transformer, "vlm": parts.vlm, "readouts": readouts}
    weights = train(name, folder, modules, loss_fn, steps=steps, lr=lr, ema=0.998, max_minutes=minutes, warmup=200,
                    rates={"vlm": 0.25})  # fmt: skip
    for key, module in modules.items():
        module.load_state_dict(weights[key])


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
