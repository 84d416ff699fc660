"""The numbers a person asks for first: did it learn, did it stay few-step, what was lost.

None of them needs to know the right picture; what a base's own world adds is named ``known``. With 95 % bootstrap
intervals over prompts (paired: the same resamples for both sides of a comparison).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compare import Cells
from .draws import Key
from .naming import KNOWN_SCORES, REFERENCES
from .prompts import KEPT, KNOWN, MIN_PROMPTS, NEAR
from .scoring import NO_SCORES, Bootstrap, Cell, Scorer, Values, interval

RETAINED_SCORES = ("style", "likeness", "cosine", "sharpness")
MIN_REAL = 3
"""Of fewer real pictures nobody knows how like each other they are."""
_LEAST = 0.05
"""Below this a score is nothing that could be retained: a ratio of two such values would be noise."""


class Numbers:
    """Point values and, beside them, their intervals: two trees of one shape."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}

    def add(
        self, key: str, value: float, resampled: Values | None, prompts: int, least: float = -np.inf,
        most: float = np.inf,
    ) -> None:  # fmt: skip
        """One number of so many prompts, rounded to what its interval can bear; within ``least`` and ``most``. NaN and
        infinity are left out."""
        if not np.isfinite(value):
            return
        self.values[key] = round_(min(max(value, least), most))
        # of fewer prompts the resamples are too alike: one has no interval at all
        if resampled is not None and prompts >= MIN_PROMPTS:
            self.intervals[key] = [round_(min(max(bound, least), most)) for bound in interval(resampled)]


_SHARES = ("style", "style_hit", "concept_top1", "concept_top5")
_BOUNDS = dict.fromkeys(_SHARES, (0.0, 1.0)) | {"kept": (-np.inf, 1.0), "copy": (-1.0, 1.0), "judge": (1.0, 4.0)}
"""What no mean of these scores can leave, and so no end of its interval."""


def scores_of(cell: Cell, kid: float | None, bootstrap: Bootstrap) -> Numbers:
    """Mean and interval of every score of a cell. The distribution's distance belongs to the set: no interval."""
    numbers = Numbers()
    for key, values in cell.values.items():
        if key in NO_SCORES:
            continue
        least, most = _BOUNDS.get(key.partition("@")[0], (-np.inf, np.inf))
        numbers.add(key, float(values.mean()), bootstrap.means(values), len(values), least, most)
    if kid is not None:
        numbers.add("kid", kid, None, len(cell))
    return numbers


@dataclass(frozen=True)
class Asked:
    """Which numbers of steps are compared, and on how many prompts those that are drawn with others than few."""

    few: int
    many: int
    curve: int


def headline(
    cells: Cells, models: Sequence[str], real: Values, asked: Asked, bootstrap: Bootstrap, omitted: dict[str, str]
) -> dict[str, Numbers]:
    """The headline numbers of every model that was run; why one is missing goes into ``omitted``.

    ``real``: how like the training pictures real pictures of the concept are.
    """
    out = {}
    for model in models:
        numbers = Numbers()
        if model not in REFERENCES:
            _learnt(numbers, cells, model, real, asked, bootstrap, omitted)
            _gap(numbers, cells, model, asked.few, bootstrap, omitted)
            _kept(numbers, cells, model, asked, bootstrap)
            _few_step(numbers, cells, model, real, asked, bootstrap, omitted)
            for name, split, over in (("sharpness_vs_base", "concept", ("base", asked.few)),
                                      ("sharpness_vs_decoded", "concept", ("decoded", 0)),
                                      ("kept_sharpness", KEPT, ("base", asked.few))):  # fmt: skip
                _ratio(numbers, name, cells, Key(split, model, asked.few), Key(split, *over), "sharpness", bootstrap)
            _ratio(numbers, "diversity", cells, Key("concept", model, asked.few, 1),
                   Key("concept", "base", asked.few, 1), "diversity", bootstrap)  # fmt: skip
            _copied(numbers, cells, model, asked.few, bootstrap)
            _known(numbers, cells, model, asked.few, bootstrap)
        many = cells.get(Key("concept", model, asked.many))
        few = cells[Key("concept", model, asked.few)].first(asked.curve)
        _retention(numbers, few, many and many.first(asked.curve), bootstrap)
        out[model] = numbers
    return out


def style_score(cells: Cells, few: int) -> str:
    """The score that says "is in the new style": the probe, or likeness to the training pictures without one."""
    return "style" if "style" in cells[Key("concept", "base", few)].values else "likeness"


def _lead(base: Values, real: Values, bootstrap: Bootstrap) -> tuple[float, Values] | None:
    """How much liker the training pictures real ones are than the base's: the mean and resamples; ``None`` where that
    may be chance."""
    if len(base) < MIN_PROMPTS or len(real) < MIN_REAL:
        return None
    resampled = bootstrap.means(real) - bootstrap.means(base)
    lead = float(real.mean() - base.mean())
    return (lead, resampled) if lead > 0 and interval(resampled)[0] > 0 else None


def _learnt(
    numbers: Numbers, cells: Cells, model: str, real: Values, asked: Asked, bootstrap: Bootstrap,
    omitted: dict[str, str],
) -> None:  # fmt: skip
    """How far from the base's likeness to that of real pictures the tuned model's goes, from the same noise."""
    base, tuned = (cells[Key("concept", name, asked.few)].values["likeness"] for name in ("base", model))
    gain = tuned - base
    numbers.add("likeness_gain", float(gain.mean()), bootstrap.means(gain), len(gain))
    lead = _lead(base, real, bootstrap)
    if lead is None:
        omitted["learnt"] = _no_lead(base, real)
        return
    way, ways = float(gain.mean()) / lead[0], _divide(bootstrap.means(gain), lead[1])
    numbers.add("learnt", way, ways, len(gain), most=1.0)
    if interval(ways)[0] > 1:
        numbers.add("beyond_real", way, ways, len(gain))


def _no_lead(base: Values, real: Values) -> str:
    if len(base) < MIN_PROMPTS:
        return f"{len(base)} prompts are too few to tell it from chance; {MIN_PROMPTS} are needed"
    if len(real) < MIN_REAL:
        return f"{len(real)} real pictures are too few to say how like each other they are; {MIN_REAL} are needed"
    return "the untuned base's pictures may be as like the training pictures as real ones are"


def _kept(numbers: Numbers, cells: Cells, model: str, asked: Asked, bootstrap: Bootstrap) -> None:
    """What is left of the base's own pictures, 1 all and 0 no more than of another noise."""
    for name, split, steps in (
        ("kept", KEPT, asked.few),
        ("kept_many", KEPT, asked.many),
        ("kept_near", NEAR, asked.few),
    ):
        values = kept_values(cells, split, model, steps)
        if values is not None:
            numbers.add(name, float(values.mean()), bootstrap.means(values), len(values), most=1.0)


def kept_values(cells: Cells, split: str, model: str, steps: int) -> Values | None:
    """Per prompt, the mean over the noises that all of them were drawn from."""
    found = [cells.get(Key(split, model, steps, noise)) for noise in (0, 1)]
    values = [cell.values["kept"] for cell in found if cell is not None and "kept" in cell.values]
    whole = [each for each in values if len(each) == len(values[0])]
    return np.asarray(np.mean(whole, 0)) if whole else None


def few_step_values(cells: Cells, model: str, asked: Asked) -> dict[str, Values]:
    """How much less of a score a model has in few steps than in many, less what the base has less of it: per prompt, 0
    where tuning cost no few-step quality, below it where it did. ``new``: likeness, ``old``: kept."""
    if asked.few == asked.many:
        return {}
    out = {}
    for name, split, score in (("new", "concept", "likeness"), ("old", KEPT, "kept")):
        found = [cells.get(Key(split, who, steps)) for who in (model, "base") for steps in (asked.few, asked.many)]
        if all(cell is not None and score in cell.values for cell in found):
            mine, more, its, its_more = (cell.first(asked.curve).values[score] for cell in found if cell is not None)
            out[name] = (mine - more) - (its - its_more)
    return out


def _few_step(
    numbers: Numbers, cells: Cells, model: str, real: Values, asked: Asked, bootstrap: Bootstrap,
    omitted: dict[str, str],
) -> None:  # fmt: skip
    found = few_step_values(cells, model, asked)
    if not found:
        omitted["few_step"] = "evaluation.many_steps is no more than few_steps"
    if "old" in found:
        numbers.add("few_step_old", float(found["old"].mean()), bootstrap.means(found["old"]), len(found["old"]))
    lead = _lead(cells[Key("concept", "base", asked.few)].values["likeness"], real, bootstrap)
    if "new" in found and lead is not None:
        new = found["new"]
        numbers.add("few_step_new", float(new.mean()) / lead[0], _divide(bootstrap.means(new), lead[1]), len(new))
    few, many = (Key("concept", model, steps) for steps in (asked.few, asked.many))
    its = [cells.get(key._replace(model="base")) for key in (few, many)]
    own = [cells.get(key) for key in (few, many)]
    if found and all(own) and all(its):
        four = [cell.first(asked.curve).values["sharpness"] for cell in (*own, *its) if cell is not None]
        means = [bootstrap.means(values) for values in four]
        a, b, c, d = (values.mean() for values in four)
        if min(b, c, d) > 0:
            numbers.add(
                "few_step_sharpness", (a / b) / (c / d), _divide(means[0] * means[3], means[1] * means[2]), len(four[0])
            )


def _copied(numbers: Numbers, cells: Cells, model: str, few: int, bootstrap: Bootstrap) -> None:
    """Which share of the samples is a copy of a training picture, and nearer to it than the base's of that prompt."""
    base, tuned = (cells[Key("concept", name, few)].values for name in ("base", model))
    over = ((tuned["copy"] > tuned["copy_bar"]) & (tuned["copy"] > base["copy"])).astype(np.float64)
    numbers.add("copied", float(over.mean()), bootstrap.means(over), len(over), 0.0, 1.0)


def _gap(numbers: Numbers, cells: Cells, model: str, few: int, bootstrap: Bootstrap, omitted: dict[str, str]) -> None:
    """Which share of the way from the untuned base to its teacher the tuned model goes."""
    base, teacher = cells.get(Key("concept", "base", few)), cells.get(Key("concept", "teacher", few))
    tuned = cells[Key("concept", model, few)]
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
        share = (c.mean() - a.mean()) / (b.mean() - a.mean())
        shares = _divide(mine - low, high - low)
        numbers.add(name, share, shares, len(a), most=1.0)
        numbers.add(f"{name}_raw", share, shares, len(a))  # benchmarks compare what goes further, too


def _known(numbers: Numbers, cells: Cells, model: str, few: int, bootstrap: Bootstrap) -> None:
    """The scores against the true pictures of old styles, over the base's."""
    own, base = Key(KNOWN, model, few), Key(KNOWN, "base", few)
    for key in (*KNOWN_SCORES, "sharpness", "mse"):
        _ratio(numbers, f"known_{key}", cells, own, base, key, bootstrap)
    ratios = {key: numbers.values[f"known_{key}"] for key in KNOWN_SCORES if f"known_{key}" in numbers.values}
    if ratios:
        lowest = min(ratios, key=lambda key: ratios[key])
        numbers.values["known_lowest"] = ratios[lowest]
        if f"known_{lowest}" in numbers.intervals:
            numbers.intervals["known_lowest"] = numbers.intervals[f"known_{lowest}"]


def _ratio(
    numbers: Numbers, name: str, cells: Cells, own: Key, other: Key, score: str, bootstrap: Bootstrap
) -> None:  # fmt: skip
    """The mean of one cell over that of another, where both have the score."""
    tuned, base = cells.get(own), cells.get(other)
    if tuned is None or base is None or score not in tuned.values or score not in base.values:
        return
    mine, its = tuned.values[score], base.values[score]
    if its.mean() > 0:
        resampled = _divide(bootstrap.means(mine), bootstrap.means(its))
        numbers.add(name, mine.mean() / its.mean(), resampled, len(mine))


def _retention(numbers: Numbers, few: Cell, most: Cell | None, bootstrap: Bootstrap) -> None:
    """Few steps against many: 1 where nothing is gained by more steps. Both on the curve's prompts."""
    if most is None:
        return
    for key in RETAINED_SCORES:
        if key in few.values and key in most.values and most.values[key].mean() > _LEAST:
            resampled = _divide(bootstrap.means(few.values[key]), bootstrap.means(most.values[key]))
            numbers.add(f"retention_{key}", few.values[key].mean() / most.values[key].mean(), resampled, len(few))


def _divide(a: Values, b: Values) -> Values:
    """``a / b``; NaN where ``b`` is not positive."""
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def round_(value: Any) -> float:
    """To five digits: more is below what any interval can bear."""
    return float(f"{float(value):.5g}")


def split_numbers(
    cells: Cells, scorers: Mapping[str, Scorer], split: str, steps: int, bootstrap: Bootstrap
) -> dict[str, Numbers]:
    """The scores of every model on one split at ``steps`` (and of the real pictures, which have 0 steps)."""
    return {
        key.model: scores_of(cell, scorers[split].kid(cell, key.model == "real"), bootstrap)
        for key, cell in cells.items()
        if key.split == split and key.steps in (steps, 0) and key.noise == 0
    }
