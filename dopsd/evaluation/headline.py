"""The numbers a person asks for first: how far to the teacher, how sharp, what was kept, does few-step still work.

All are ratios of means over prompts, with 95 % bootstrap intervals over prompts (paired: the same resamples for both).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .naming import REFERENCES
from .scoring import Bootstrap, Cell, Scorer, Values, interval

KEPT_SCORES = ("style", "cosine", "concept_top1", "concept_top5", "structure")
"""Of these the lowest ratio is ``kept_lowest``; all of them are better when higher."""
RETAINED_SCORES = ("style", "train_similarity", "cosine", "sharpness")
MIN_PROMPTS = 6
"""On fewer prompts chance alone too often puts a model between the base and its teacher."""
_LEAST = 0.05
"""Below this a score is nothing that could be retained: a ratio of two such values would be noise."""

Cells = Mapping[tuple[str, str, int], Cell]
"""(split, model, steps) to scores; the real pictures, and those through the autoencoder, have 0 steps."""


class Numbers:
    """Point values and, beside them, their intervals: two trees of one shape."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}

    def add(self, key: str, value: float, resampled: Values | None) -> None:
        """One number, rounded to what its interval can bear. NaN and infinity are left out."""
        if not np.isfinite(value):
            return
        self.values[key] = _round(value)
        if resampled is not None:
            self.intervals[key] = [_round(bound) for bound in interval(resampled)]


def scores_of(cell: Cell, kid: float | None, bootstrap: Bootstrap) -> Numbers:
    """Mean and interval of every score of a cell. The distribution's distance belongs to the set: no interval."""
    numbers = Numbers()
    for key, values in cell.values.items():
        numbers.add(key, float(values.mean()), bootstrap.means(values))
    if kid is not None:
        numbers.add("kid", kid, None)
    return numbers


def headline(
    cells: Cells, models: Sequence[str], few: int, most: int, curve: int, bootstrap: Bootstrap, omitted: dict[str, str]
) -> dict[str, Numbers]:
    """The headline numbers of every model that was run; why one is missing goes into ``omitted``.

    ``few`` and ``most``: the numbers of steps compared; ``curve``: on how many prompts retention is measured.
    """
    out = {}
    for model in models:
        numbers = Numbers()
        if model not in REFERENCES:
            _gap(numbers, cells, model, few, bootstrap, omitted)
            _ratio(numbers, "sharpness_vs_base", cells, model, "concept", "sharpness", few, bootstrap)
            _ratio(
                numbers, "sharpness_vs_decoded", cells, model, "concept", "sharpness", few, bootstrap, ("decoded", 0)
            )
            _kept(numbers, cells, model, few, bootstrap)
        many = cells.get(("concept", model, most))
        _retention(numbers, cells[("concept", model, few)].first(curve), many and many.first(curve), bootstrap)
        out[model] = numbers
    return out


def style_score(cells: Cells, few: int) -> str:
    """The score that says "is in the new style": the probe, or similarity to the training pictures without one."""
    return "style" if "style" in cells[("concept", "base", few)].values else "train_similarity"


def _gap(numbers: Numbers, cells: Cells, model: str, few: int, bootstrap: Bootstrap, omitted: dict[str, str]) -> None:
    """Which share of the way from the untuned base to its teacher the tuned model goes."""
    base, teacher = cells.get(("concept", "base", few)), cells.get(("concept", "teacher", few))
    tuned = cells[("concept", model, few)]
    if base is None or teacher is None:
        omitted["gap_closed"] = "base and teacher were not both evaluated"
        return
    for name, key in (("gap_closed_style", style_score(cells, few)), ("gap_closed_truth", "cosine")):
        if name in omitted:
            continue
        if key not in tuned.values:
            omitted[name] = "there is no true picture to compare with"
            continue
        a, b, c = (cell.values[key] for cell in (base, teacher, tuned))
        if len(a) < MIN_PROMPTS:
            omitted[name] = f"{len(a)} prompts are too few to tell a gap from chance; {MIN_PROMPTS} are needed"
            continue
        low, high, mine = (bootstrap.means(values) for values in (a, b, c))
        least, _ = interval(high - low)
        if b.mean() - a.mean() <= 1e-6 or not least > 0:
            omitted[name] = f"the teacher is not measurably better than the base in {key}: there is no gap to close"
            continue
        numbers.add(name, (c.mean() - a.mean()) / (b.mean() - a.mean()), _divide(mine - low, high - low))


def _kept(numbers: Numbers, cells: Cells, model: str, few: int, bootstrap: Bootstrap) -> None:
    if ("kept", model, few) not in cells or ("kept", "base", few) not in cells:
        return
    for key in (*KEPT_SCORES, "sharpness", "mse"):
        _ratio(numbers, f"kept_{key}", cells, model, "kept", key, few, bootstrap)
    ratios = {key: numbers.values[f"kept_{key}"] for key in KEPT_SCORES if f"kept_{key}" in numbers.values}
    if ratios:
        lowest = min(ratios, key=lambda key: ratios[key])
        numbers.values["kept_lowest"] = ratios[lowest]
        numbers.intervals["kept_lowest"] = numbers.intervals[f"kept_{lowest}"]


def _ratio(
    numbers: Numbers, name: str, cells: Cells, model: str, split: str, key: str, few: int, bootstrap: Bootstrap,
    over: tuple[str, int] | None = None,
) -> None:  # fmt: skip
    """The model's mean over the base's, or over that of another (model, steps)."""
    base, tuned = cells.get((split, *(over or ("base", few)))), cells[(split, model, few)]
    if base is None or key not in base.values or key not in tuned.values or base.values[key].mean() == 0:
        return
    resampled = _divide(bootstrap.means(tuned.values[key]), bootstrap.means(base.values[key]))
    numbers.add(name, tuned.values[key].mean() / base.values[key].mean(), resampled)


def _retention(numbers: Numbers, few: Cell, most: Cell | None, bootstrap: Bootstrap) -> None:
    """Few steps against many: 1 where nothing is gained by more steps. Both on the curve's prompts."""
    if most is None:
        return
    for key in RETAINED_SCORES:
        if key in few.values and key in most.values and most.values[key].mean() > _LEAST:
            resampled = _divide(bootstrap.means(few.values[key]), bootstrap.means(most.values[key]))
            numbers.add(f"retention_{key}", few.values[key].mean() / most.values[key].mean(), resampled)


def _divide(a: Values, b: Values) -> Values:
    """``a / b``; NaN where ``b`` is not positive."""
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def _round(value: Any) -> float:
    return float(f"{float(value):.5g}")


def split_numbers(
    cells: Cells, scorers: Mapping[str, Scorer], split: str, steps: int, bootstrap: Bootstrap
) -> dict[str, Numbers]:
    """The scores of every model on one split at ``steps`` (and of the real pictures, which have 0 steps)."""
    out = {}
    for (its_split, model, its_steps), cell in cells.items():
        if its_split == split and its_steps in (steps, 0):
            out[model] = scores_of(cell, scorers[split].kid(cell, model == "real"), bootstrap)
    return out
