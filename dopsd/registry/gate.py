"""When an adapter becomes the champion: it is still few-step, and on the same prompts and seeds not worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dopsd.config import RegistrySettings

CONCEPT_SCORES = ("style", "train_similarity", "cosine", "concept_top1")
"""Higher is better for all of them; those that a concept has are compared."""


@dataclass(frozen=True)
class Verdict:
    """Whether the gate let it through, and why (not)."""

    passed: bool
    reason: str

    @property
    def word(self) -> str:
        """For the tag."""
        return "passed" if self.passed else "failed"


def scores_of(metrics: Mapping[str, Any], model: str, asked: str) -> dict[str, Any]:
    """What the gate looks at, out of the evaluation's ``metrics.json``: concept scores and few-step retention.

    ``asked``: a hash of prompts, seeds and base; only scores of one such hash may be compared.
    """
    concept = metrics["scores"]["concept"][model]
    head = metrics["headline"].get(model, {})
    retention = {key.removeprefix("retention_"): value for key, value in head.items() if key.startswith("retention_")}
    return {
        "asked": asked,
        "concept": {key: concept[key] for key in CONCEPT_SCORES if key in concept},
        "retention": retention,
    }


def bar_of(scores: Mapping[str, Any], champion: Mapping[str, Any] | None) -> dict[str, float]:
    """What the next one is compared with when these scores become the champion's: the best that any champion before it
    had on the same questions. Compared with the last one alone, champions could sink by the tolerance each time."""
    before = {} if champion is None else champion.get("bar", champion["concept"])
    return {name: max(value, before.get(name, value)) for name, value in scores["concept"].items()}


def judge(scores: Mapping[str, Any], champion: Mapping[str, Any] | None, settings: RegistrySettings) -> Verdict:
    """The gate. Raises ``ValueError`` where the champion's scores are of other prompts or seeds."""
    retention = scores["retention"]
    if not retention:
        return Verdict(False, "few-step retention was not measured: evaluation.steps has no larger number of steps")
    key = min(retention, key=lambda name: retention[name])
    if retention[key] < settings.min_retention:
        return Verdict(False, f"few-step retention of {key} is {retention[key]:.3f}, below {settings.min_retention:g}")
    kept = f"few-step retention {retention[key]:.3f} ({key})"
    if champion is None:
        return Verdict(True, f"{kept}; there was no champion")
    if champion["asked"] != scores["asked"]:
        raise ValueError("the champion was asked other things; evaluate it on the same prompts and seeds first")
    pairs = {
        name: (scores["concept"][name], value)
        for name, value in champion.get("bar", champion["concept"]).items()
        if name in scores["concept"]
    }
    worse = [
        f"{name} {mine:.3f} against {theirs:.3f}"
        for name, (mine, theirs) in pairs.items()
        if mine < theirs - settings.tolerance
    ]
    if worse:
        return Verdict(False, f"worse than the champions so far: {', '.join(worse)}")
    return Verdict(True, f"{kept}; not worse than the champions so far in {', '.join(pairs)}")
