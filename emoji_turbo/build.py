"""``emoji-turbo build``: emoji-turbo from the published emoji sets to a diffusers folder, every stage resumable.

    emoji-turbo build --preset cpu     # some hours on two cores; what is shipped (docs/emoji-turbo.md)
    emoji-turbo build --preset gpu     # minutes on a data-centre GPU: more concepts, more steps
    emoji-turbo build --warm           # another budget on top of the shipped weights
    torchrun --nproc-per-node 2 --no-python emoji-turbo build     # 2 processes: 1.4 times the speed of 2 threads

Work in progress lies in ``.cache/base/PRESET``; a killed build continues where it was. A finished one writes
``data/base/emoji-turbo``, with its world beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import PartialState

from dopsd.config.groups import ModelSettings
from dopsd.models import load_family

from . import architecture as arch
from .captions import PLACEHOLDER, caption, caption_variants, subject_captions
from .concepts import write_concepts
from .distill import distill
from .pictures import BASE_STYLES, World, build_world
from .pretrain import Parts, learn_to_copy, pretrain, pretrain_encoder
from .vae import linear_code, make_vae, train_decoder, write_linear_encoder


@dataclass(frozen=True)
class Preset:
    """The budget of a build. Minutes bound each stage; the learning rate follows whichever ends first."""

    max_concepts: int | None
    max_known: int | None
    dim: int
    layers: int
    heads: int
    text_hidden: int
    text_layers: int
    vision_hidden: int
    vision_layers: int
    decoder_batch: int
    decoder_steps: int
    decoder_minutes: float
    encoder_batch: int
    encoder_steps: int
    encoder_minutes: float
    copying_steps: int
    copying_minutes: float
    pretrain_batch: int
    pretrain_steps: int
    pretrain_minutes: float
    trajectories: int
    distill_batch: int
    distill_steps: int
    distill_minutes: float


_SIZE = {
    "dim": 256, "layers": 5, "heads": 4, "text_hidden": 192, "text_layers": 5, "vision_hidden": 128, "vision_layers": 4,
}  # fmt: skip

PRESETS = {
    "cpu": Preset(
        **_SIZE, max_concepts=320, max_known=120,
        decoder_batch=16, decoder_steps=8000, decoder_minutes=45,
        encoder_batch=96, encoder_steps=4000, encoder_minutes=13,
        copying_steps=1000, copying_minutes=5,
        pretrain_batch=64, pretrain_steps=12000, pretrain_minutes=46,
        trajectories=1600, distill_batch=64, distill_steps=2500, distill_minutes=8,
    ),
    "gpu": Preset(
        **_SIZE, max_concepts=None, max_known=None,
        decoder_batch=64, decoder_steps=20000, decoder_minutes=4,
        encoder_batch=512, encoder_steps=10000, encoder_minutes=5,
        copying_steps=1000, copying_minutes=1,
        pretrain_batch=256, pretrain_steps=40000, pretrain_minutes=12,
        trajectories=20000, distill_batch=256, distill_steps=8000, distill_minutes=5,
    ),
}  # fmt: skip


def build(
    preset: str,
    root: Path,
    device: str | None = None,
    presets: Mapping[str, Preset] = MappingProxyType(PRESETS),
    warm: bool = False,
) -> Path:
    """Run all stages of a preset that are not done yet; returns the folder of the finished base.

    ``warm`` starts from all that is shipped instead of from nothing, so that the budgets of several builds add up.
    """
    budget = presets[preset]
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    state = PartialState(cpu=target.type == "cpu")
    work = root / ".cache" / "base" / (f"{preset}-warm" if warm else preset)
    folder = root / "data" / "base" / "emoji-turbo"
    with state.main_process_first():
        world = World.load(folder / "world") if warm else make_world(budget, root, work)
    parts = make_parts(budget, world, target)
    if warm:
        warm_start(parts, folder)
    train_decoder(parts.vae, world, work, batch=budget.decoder_batch, steps=budget.decoder_steps,
                  minutes=budget.decoder_minutes)  # fmt: skip
    readouts = pretrain_encoder(parts, world, work, batch=budget.encoder_batch, steps=budget.encoder_steps,
                     minutes=budget.encoder_minutes, lr=1.5e-3 if warm else 3e-3,
                     head_steps=min(100, budget.encoder_steps) if warm else 0)  # fmt: skip
    learn_to_copy(parts, world, work, batch=budget.pretrain_batch, steps=budget.copying_steps,
                  minutes=budget.copying_minutes, lr=1e-3)  # fmt: skip
    pretrain(parts, readouts, world, work, batch=budget.pretrain_batch, steps=budget.pretrain_steps,
             minutes=0.85 * budget.pretrain_minutes, lr=2e-3, padded=False)  # fmt: skip
    pretrain(parts, readouts, world, work, batch=budget.pretrain_batch, steps=budget.pretrain_steps // 5,
             minutes=0.1 * budget.pretrain_minutes, lr=6e-4, name="pretrain-padded")  # fmt: skip
    distill(parts, world, work, trajectories=budget.trajectories, batch=budget.distill_batch,
            steps=budget.distill_steps, minutes=budget.distill_minutes)  # fmt: skip
    if state.is_main_process:
        arch.save_folder(folder, vae=parts.vae, tokenizer=parts.tokenizer, vlm=parts.vlm, transformer=parts.transformer)
        world.save(folder / "world")
    return folder


def make_world(budget: Preset, root: Path, work: Path) -> World:
    """The world of this build, rendered once; it is also what the base's folder brings along."""
    folder = work / "world"
    if not (folder / "concepts.json").exists():
        world = build_world(root / ".cache" / "npm", budget.max_concepts, budget.max_known, seed=0)
        world.save(folder)
        write_concepts(world, root / "data" / "concepts")
    return World.load(folder)


def make_parts(budget: Preset, world: World, device: torch.device) -> Parts:
    """Fresh modules of the preset's size, from a fixed seed; the VAE with its analytic encoder."""
    torch.manual_seed(0)
    vae = make_vae()
    write_linear_encoder(vae, *linear_code(world))
    tokenizer = arch.make_tokenizer(corpus(world))
    vlm = arch.make_vlm(
        tokenizer,
        hidden=budget.text_hidden,
        layers=budget.text_layers,
        vision_hidden=budget.vision_hidden,
        vision_layers=budget.vision_layers,
    )
    transformer = arch.make_transformer(budget.text_hidden, dim=budget.dim, layers=budget.layers, heads=budget.heads)
    vae.eval().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return Parts(vae.to(device), tokenizer, vlm.to(device), transformer.to(device))


def warm_start(parts: Parts, folder: Path) -> None:
    """Put everything of a finished base of the same sizes into ``parts``."""
    loaded = load_family(ModelSettings(path=str(folder), device="cpu", dtype="float32"), folder).parts
    parts.vae.encoder.load_state_dict(loaded["vae_encoder"].encoder.state_dict())
    parts.vae.decoder.load_state_dict(loaded["vae_decoder"].decoder.state_dict())
    parts.vlm.load_state_dict(loaded["vision"].state_dict())
    parts.transformer.load_state_dict(loaded["transformer"].state_dict())
    parts.tokenizer = loaded["tokenizer"]


def corpus(world: World) -> list[str]:
    """What the tokenizer is trained on: every label in every form of caption."""
    texts = []
    for label in world.labels:
        texts += [caption(label, style) for style in (*BASE_STYLES, PLACEHOLDER)]
        texts += caption_variants(label).values()
    return texts + [text for style in BASE_STYLES for text in subject_captions(style).values()]
