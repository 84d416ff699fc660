"""Stage 3: step distillation to 4 steps, guidance folded in (piecewise rectified flow, PeRFlow's regression).

For each segment of the 4-step grid the student regresses the one velocity that carries the guided many-step model's
state from the segment's start to where that model arrives at its end; text-only and in-context conditions alike. First
on trajectories of the guided model, then on states of the student's own 4-step roll-outs, corrected by the guided
model from there: what the student meets when it samples.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dopsd.train.parallel import share

from .batches import draw_batch
from .loop import fast_math, place, train
from .pictures import World
from .pretrain import Parts, guided_velocity, shifted

FEW_STEPS = 4
SUBSTEPS = 5
"""Guided Euler steps inside one segment: 20 in all."""
GUIDANCE = 1.5


@dataclass
class Trajectories:
    """States of the guided model at the ends of the segments.

    ``states [N, FEW_STEPS + 1, C, h, w]`` from noise to picture; ``conditions``: one ``[tokens, dim]`` each.
    """

    states: Tensor
    conditions: list[Tensor]


def grid() -> Tensor:
    """The 4-step grid of Z-Image's schedule with its end 0: ``[5]``."""
    return shifted(torch.linspace(1, 0, FEW_STEPS + 1))


@torch.no_grad()
def segment_end(parts: Parts, x: Tensor, start: Tensor, end: Tensor, conditions: list[Tensor], empty: Tensor,
                guidance: float = GUIDANCE) -> Tensor:  # fmt: skip
    """Where the guided model carries ``x`` from noise level ``start`` to ``end`` in :data:`SUBSTEPS` Euler steps."""
    levels = torch.linspace(float(start), float(end), SUBSTEPS + 1)
    for a, b in pairwise(levels):
        x = x + (b - a) * guided_velocity(parts, x, a, conditions, empty, guidance)
    return x


@torch.no_grad()
def collect(parts: Parts, world: World, folder: Path, count: int, chunk: int = 100) -> Trajectories:
    """Sample ``count`` guided trajectories, in chunks that are files of their own (so a killed build goes on)."""
    empty = parts.encode_text([""])[0].float()
    levels = grid()
    files = [(start, folder / f"trajectories-{start}.safetensors") for start in range(0, count, chunk)]
    for start, file in tqdm(share(files, *place()), desc="trajectories"):
        if not file.exists():
            generator = torch.Generator().manual_seed(10_000 + start)
            with fast_math(parts.device):
                conditions = [s.float() for s in parts.encode(draw_batch(world, chunk, generator, drop=0.02))]
                x = torch.randn(chunk, *latent_shape(parts), generator=generator).to(parts.device)
                states = [x]
                for k in range(FEW_STEPS):
                    x = segment_end(parts, x, levels[k], levels[k + 1], conditions, empty)
                    states.append(x)
            lengths = torch.tensor([len(c) for c in conditions])
            tensors = {"states": torch.stack(states, 1), "conditions": torch.cat(conditions), "lengths": lengths}
            partial = file.with_suffix(".partial")
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial)
            partial.replace(file)
    PartialState().wait_for_everyone()
    chunks = [load_file(file) for _, file in files]
    all_conditions = [c for part in chunks for c in part["conditions"].split(part["lengths"].tolist())]
    return Trajectories(torch.cat([part["states"] for part in chunks]), all_conditions)


def latent_shape(parts: Parts) -> tuple[int, int, int]:
    """``(C, h, w)`` of a 64-px picture's latents."""
    return parts.transformer.config.in_channels, 8, 8


def regression(parts: Parts, x: Tensor, ends: Tensor, k: Tensor, along: Tensor, conditions: list[Tensor]) -> Tensor:
    """Squared error to the straight velocity from the states ``x`` at segment starts to ``ends``.

    ``k [B]``: segments. ``along [B]`` in [0, 1): how far along the segment the student is asked (0: at its start),
    so that it also answers between the grid's points, where it is sampled with more than 4 steps.
    """
    levels = grid().to(x.device)
    start, end = levels[k], levels[k + 1]
    target = (ends - x) / (end - start).view(-1, 1, 1, 1)
    moved = x + along.view(-1, 1, 1, 1) * (ends - x)
    return F.mse_loss(parts.velocity(moved, start + along * (end - start), conditions), target)


def distill(
    parts: Parts, world: World, folder: Path, *, trajectories: int, batch: int, steps: int, minutes: float,
    own_share: float = 0.35,
) -> None:  # fmt: skip
    """Make ``parts.transformer`` a 4-step model without guidance; encoders stay as they are. Resumable.

    ``own_share`` of the budget goes to the student's own states.
    """
    device = parts.device
    parts.vlm.requires_grad_(False).eval()
    guided = Parts(parts.vae, parts.tokenizer, parts.vlm, copy.deepcopy(parts.transformer).requires_grad_(False).eval())
    data = collect(guided, world, folder, trajectories)
    empty = guided.encode_text([""])[0].float()
    rank, ranks = place()

    def on_trajectories(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data.states), (batch,), generator=generator)
        k = torch.randint(FEW_STEPS, (batch,), generator=generator)
        along = torch.rand(batch, generator=generator) * (torch.rand(batch, generator=generator) < 0.25)
        index, k, along = (t[rank::ranks] for t in (index, k, along))
        x, ends = data.states[index, k].to(device), data.states[index, k + 1].to(device)
        conditions = [data.conditions[i].to(device) for i in index.tolist()]
        return regression(parts, x, ends, k.to(device), along.to(device), conditions)

    weights = train("distill", folder, {"transformer": parts.transformer}, on_trajectories, steps=steps, lr=3e-4,
                    ema=0.998, max_minutes=(1 - own_share) * minutes)  # fmt: skip
    parts.transformer.load_state_dict(weights["transformer"])
    levels = grid()

    def on_own_states(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data.states), (batch,), generator=generator)[rank::ranks]
        conditions = [data.conditions[i].to(device) for i in index.tolist()]
        last = int(torch.randint(FEW_STEPS, (), generator=generator))
        x = torch.randn(batch, *latent_shape(parts), generator=generator)[rank::ranks].to(device)
        with torch.no_grad():
            for k in range(last):
                u = parts.velocity(x, levels[k].expand(len(x)).to(device), conditions)
                x = x + (levels[k + 1] - levels[k]) * u
            ends = segment_end(guided, x, levels[last], levels[last + 1], conditions, empty)
        along = torch.zeros(len(x), device=device)
        return regression(parts, x, ends, torch.full((len(x),), last, device=device), along, conditions)

    weights = train("distill-own", folder, {"transformer": parts.transformer}, on_own_states, steps=steps // 2, lr=1e-4,
                    ema=0.99, max_minutes=own_share * minutes)  # fmt: skip
    parts.transformer.load_state_dict(weights["transformer"])
