"""Scores per prompt of a base and one version, as an evaluation would find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dopsd.evaluation.paired import Paired, write_paired
from dopsd.registry import Entry

ABOUT = {
    "learnt": {"better": "higher", "label": "likeness"},
    "kept": {"better": "higher", "label": "own pictures kept"},
    "few_step": {"better": "higher", "label": "few steps"},
    "diversity": {"better": "higher", "label": "two seeds apart"},
}
BASE = {"learnt": 0.3, "kept": 1.0, "few_step": 0.0, "diversity": 0.4}
GOOD = {"learnt": 0.5, "kept": 0.9, "few_step": 0.0, "diversity": 0.3}


def values(prompts: int = 12, seed: int = 0, spread: float = 0.02, second: bool = True, **means: float) -> Any:
    """Scores to ``first`` (and ``second``): just ``means`` on average, with ``spread`` over the prompts."""
    draw = np.random.default_rng(seed)

    def around(mean: float) -> tuple[float, ...]:
        noise = draw.normal(0, spread, prompts)
        return tuple((mean + noise - noise.mean()).tolist())

    seeds = ("first", "second") if second else ("first",)
    return {score: {name: around(mean) for name in seeds} for score, mean in (GOOD | means).items()}


def paired(seed: int = 1, prompts: int = 12, **means: float) -> Paired:
    """The base, and a version with such means."""
    return Paired(ABOUT, {
        "base": values(prompts, 0, **BASE), "version": values(prompts, seed, **means),
    }, 4)  # fmt: skip


def entry(folder: Path, scores: Paired, asked: str = "q") -> Entry:
    """What is registered of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scores.json"
    write_paired(path, scores)
    return Entry(asked, scores.scores, scores.models["version"], path)
