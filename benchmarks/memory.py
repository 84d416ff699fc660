"""What each published base needs on each card, computed: ``python benchmarks/memory.py`` (a minute or two on a CPU).

Writes ``docs/benchmarks/memory.json`` and ``docs/true-size.md``. Nothing is downloaded and nothing runs on a card: the
project's own code works on fake tensors at true widths (``dopsd/sizing``), from the recipes' settings.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from dopsd.config import Settings, load_settings
from dopsd.config.groups import Optimizer
from dopsd.models import resolved
from dopsd.sizing.cards import card_of
from dopsd.sizing.plan import RESERVE, Choice, Plan, plan_for
from dopsd.sizing.runs import CAPTION_TOKENS

ROOT = Path(__file__).resolve().parents[1]
NUMBERS, PAGE = ROOT / "docs" / "benchmarks" / "memory.json", ROOT / "docs" / "true-size.md"
RECIPES = ("z-image-turbo", "flux2-klein-4b", "flux2-klein-9b", "krea-2-turbo")
CARDS = (8, 12, 16, 24, 48, 80, 140)
Row = dict[str, Any]


def main() -> None:
    """Count, write the numbers, write the page from them."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    numbers = {
        "computed": True, "torch": torch.__version__, "python": platform.python_version(),
        "reserve_gb": RESERVE / 1e9, "caption_tokens": CAPTION_TOKENS, "bases": {name: base(name) for name in RECIPES},
    }  # fmt: skip
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(numbers), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


def base(recipe: str) -> Row:
    """One base: its parts, the recipe's own settings, what is proposed for each card, and full tuning."""
    settings, plan, before = counted(recipe)
    print(recipe, flush=True)
    return {
        "path": settings.model.path, "context": plan.work.teaching.context, "rank": plan.work.lora.rank,
        "resolution": before.resolution, "batch": before.batch, "accumulation": before.accumulation,
        "rollout_steps": settings.train.rollout_steps, "adapter_parameters": plan.work.adapter,
        "parameters": {part: size.parameters for part, size in plan.sizes.items()},
        "stages": {
            stage.name: {name: _gb(size) for name, size in stage.rows.items()} | {"peak": _gb(stage.peak)}
            for stage in plan.stages(before)
        },
        "activations": {
            kind: _gb(plan.runs(before).training(kind).peak) for kind in ("none", "every-second", "every")
        },
        "cards": [card(plan, before, gib) for gib in CARDS], "full": full(recipe),
    }  # fmt: skip


def counted(recipe: str, *overrides: str) -> tuple[Settings, Plan, Choice]:
    """The recipe's settings, their plan, and what memory depends on, with every block checkpointed."""
    settings = resolved(load_settings(ROOT / "recipes" / f"{recipe}.yaml", overrides))
    plan = plan_for(settings, ROOT)
    assert plan is not None
    return settings, plan, replace(Choice.of(settings), checkpointing="every")


def full(recipe: str) -> Row:
    """What training all weights takes, by optimizer and by where teacher and base wait."""
    _, plan, before = counted(recipe, "train.tune=full")
    waiting = replace(before, waiting="cpu")
    return {
        f"{optimizer}{', `cpu`' * (choice is waiting)}": _gb(plan.train(replace(choice, optimizer=optimizer)).peak)
        for optimizer in get_args(Optimizer) for choice in (before, waiting)
    } | {"host memory, `cpu`": _gb(plan.host(waiting)), "checkpoints": _gb(plan.disk()["two checkpoints"])}  # fmt: skip


def card(plan: Plan, before: Choice, gib: int) -> Row:
    """The first settings that fit, and what they then need."""
    meant = card_of(str(gib))
    found = plan.proposal(before, meant.bytes)
    if found is None:
        return {"card": gib, "settings": None}
    values = {
        "gradient_checkpointing": found.checkpointing, "quantization": found.quantization, "offload": found.offload,
        "optimizer": found.optimizer, "resolution": found.resolution,
    }  # fmt: skip
    return {
        "card": gib, "as_fast_as": meant.name.rpartition("an ")[2], "settings": values,
        "gb": {stage.name: _gb(stage.peak) for stage in plan.stages(found)}, "host_gb": _gb(plan.host(found)),
        "hours_per_thousand_steps": round(plan.hours(found, meant), 1),
    }  # fmt: skip


def page(numbers: Row) -> str:
    """The numbers as Markdown."""
    return "\n".join(_page(numbers)) + "\n"


def _page(numbers: Row) -> Iterator[str]:
    yield from _HEAD.format(**numbers).splitlines()
    for name, base in numbers["bases"].items():
        parameters = ", ".join(
            f"{part.replace('_', ' ')} {count / 1e9:.2f}" for part, count in base["parameters"].items()
        )
        yield from ("", f"## {base['path']}", "")
        yield f"Recipe `{name}`: {base['resolution']} px, context `{base['context']}`, LoRA rank {base['rank']} with"
        yield (
            f"{base['adapter_parameters'] / 1e6:.0f} M parameters; in a step "
            f"{base['batch'] * base['accumulation']} pictures, {base['rollout_steps']} states each."
        )
        yield f"Parameters, 10^9: {parameters}."
        kinds = ", ".join(f"{kind} {size:.1f}" for kind, size in base["activations"].items())
        yield f"Activations of a training step by `gradient_checkpointing`, GB: {kinds}."
        yield from ("", "| card, GB | settings | encode | train | evaluate | register | host | h per 1000 steps |",
                    "|---|---|---|---|---|---|---|---|")  # fmt: skip
        yield from map(_row, base["cards"])
    columns = next(iter(numbers["bases"].values()))["full"]
    yield from (*_FULL.splitlines(), "", f"| GB | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|")
    for base in numbers["bases"].values():
        yield f"| {base['path']} | {' | '.join(f'{size:.0f}' for size in base['full'].values())} |"


def _row(row: Row) -> str:
    if row["settings"] is None:
        return f"| {row['card']} | nothing known here fits | | | | | | |"
    checkpointing = row["settings"]["gradient_checkpointing"]
    words = ["no checkpointing" if checkpointing == "none" else f"checkpoint {checkpointing}"]
    words += [row["settings"][key] for key in ("quantization", "optimizer") if row["settings"][key] not in _PLAIN]
    words += ["group offload"] * (row["settings"]["offload"] == "group")
    words += [f"{row['settings']['resolution']} px"] * (row["settings"]["resolution"] < 1024)
    cells = [f"{size:.1f}" for size in row["gb"].values()]
    values = [row["card"], ", ".join(words), *cells, f"{row['host_gb']:.1f}", row["hours_per_thousand_steps"]]
    return f"| {' | '.join(map(str, values))} |"


def _gb(size: float) -> float:
    return round(size / 1e9, 2)


_PLAIN = ("none", "adamw")
_HEAD = """# True size: what the published bases need

**All of this is computed; none of it was measured on a card.** `python benchmarks/memory.py` writes it, from the
recipes' settings (torch {torch}). `dopsd doctor --card 24` says the same of your own settings, with advice.

- **Memory.** The project's own roll-out, sampling, encoding and decoding run on fake tensors at true widths, with the
  types of CUDA's autocast, and every storage is counted. A training step is run on few blocks and extended to all;
  running all of them gives the same to the last digit. Attention counts as a fused kernel. A caption has
  {caption_tokens} tokens where its family does not pad it. Weights, adapters and the optimizer are counted from
  configurations. Kernels' own workspaces are not seen: {reserve_gb:g} GB of each card are kept free for them, for
  CUDA's context and for fragments.
- **Settings.** For each card the first that fit, down a ladder: more checkpointing first, then int8, nf4, the 8-bit
  optimizer, the blocks waiting on the host, and last fewer pixels. Every stage must fit. `register`
  draws with a diffusers pipeline: its components take turns on the device, or are all there where they are quantised.
- **Time.** Matrix products at what such a card really reaches, plus all other traffic at its bandwidth, D-OPSD alone,
  without replay: within a half of the truth, one hopes. Speeds are those of an RTX 4060, 4070, 4080, 4090, an L40S,
  an H100 and an H200.

GB are 10^9 bytes; a card of 24 GB holds 25.8 of them."""
_FULL = """
## Full tuning

With `train.tune: full`, at the recipe's pixels and with every block checkpointed: the device's memory to train by
`train.optimizer`; `cpu` is `train.teacher.weights: cpu`. Checkpoints are the two that are kept on disk.
"""

if __name__ == "__main__":
    main()
