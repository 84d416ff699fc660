"""When an adapter becomes the champion of its concept: pure functions over scores per prompt.

Two kinds of questions, each answered by the 95 % interval of a paired difference over prompts:

- *Floors*, against the untuned base, for every version: it learnt something (``learnt``), the base's own pictures are
  kept (``kept``), few steps still do (``few_step``), two seeds still give two pictures (``diversity``).
- *Rivals*: the champion, and the anchor, a champion of before that stays put. In no score may the interval reach below
  a rival's by more than ``delta``. Against the champion alone, champions could sink a little every night.

Student's t and no bootstrap: over 4 to 12 prompts the latter's intervals are too narrow. Nothing is corrected for the
number of scores: all of them must pass, so many let a worse one in no more often than one does. Both, and the width of
``delta``, are measured in ``benchmarks/gate.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dopsd.config.groups import RegistrySettings

BASE = "the untuned base"
LEAST_DELTA = 0.005
"""No smaller difference is measured, however equal two seeds came out."""
_KIN = {"few_step": "learnt", "few_step_kept": "kept"}
"""Of losses of few steps: the score that they are a difference of. They have no second noise, and of the base they are
0 throughout, so that by themselves they would spread as prompts do."""
_NO_BAR = frozenset({"diversity"})
"""Scores with a floor that no rival sets a bar in: more is not better, only next to none is a fault."""
LEAST_PROMPTS = 4
"""On fewer, a spread says nothing; the delta is then :data:`LEAST_DELTA`."""
DELTA_WIDTHS = 2
"""Half-widths to a delta. The interval itself takes one: with one alone, a model just as good hardly ever passes."""
DELTA_SHARE = 0.25
"""No delta is a larger share of what the anchor has to lose, which is what it learnt or kept: on few prompts chance may
do all of that."""

Values = Mapping[str, Mapping[str, Sequence[float]]]
"""Score to ``first`` and, where they were drawn from a second noise, ``second``: one number per prompt."""
About = Mapping[str, Mapping[str, str]]
"""Score to ``better`` (``higher`` or ``lower``) and ``label``."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, positive where the first is better, and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One score against one rival: both means, :class:`Difference`, how far below the rival it may be, and whether it
    is not."""

    rival: str
    score: str
    mine: float
    theirs: float
    difference: Difference
    delta: float
    ok: bool


@dataclass(frozen=True)
class Verdict:
    """Whether the gate let it through, why (not) in one line, and every comparison that was made."""

    passed: bool
    reason: str
    table: tuple[Row, ...] = ()

    @property
    def word(self) -> str:
        """For the tag."""
        return "passed" if self.passed else "failed"


def paired_difference(mine: Sequence[float], theirs: Sequence[float], better: str = "higher") -> Difference:
    """Of two models on the same prompts and noise. Of one prompt nothing is known: its interval is infinite. Raises
    ``ValueError`` where they are not of equally many prompts, or of none."""
    if len(mine) != len(theirs) or not len(mine):
        raise ValueError(f"paired scores of {len(mine)} and {len(theirs)} prompts")
    values = (np.asarray(mine, float) - np.asarray(theirs, float)) * (1 if better == "higher" else -1)
    mean, half = float(values.mean()), _half_width(values)
    return Difference(mean, mean - half, mean + half)


def _half_width(values: NDArray[np.float64], prompts: int = 0) -> float:
    """Of the interval of a mean over ``prompts`` that spread as ``values`` do; without it over just those."""
    from scipy.special import stdtrit

    count = prompts or len(values)
    return float(stdtrit(count - 1, 0.975) * values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf


def measure_deltas(values: Values, base: Values) -> dict[str, float]:
    """How far below this model, score by score, another may be and still count as not worse: what chance alone does to
    an equal one. It is :data:`DELTA_WIDTHS` half-widths of the interval of its own difference from noise to noise;
    without a second noise, of its difference from the base over prompts. A loss of few steps is a difference of two
    scores (:data:`_KIN`) and has at most that one's. ``base``: the untuned base's scores."""
    whole = _to_lose(values, base)
    deltas = {}
    for score, seeds in values.items():
        if score in _NO_BAR:
            continue
        kin = _KIN.get(score, score)
        spreads = [_spread(values[name], base.get(name, {}).get("first", ()), len(seeds["first"]))
                   for name in (score, kin) if name in values]  # fmt: skip
        most = DELTA_SHARE * whole[kin] if kin in whole else math.inf
        deltas[score] = max(min(*spreads, most), LEAST_DELTA)
    return deltas


def _to_lose(values: Values, base: Values) -> dict[str, float]:
    """What a score is worth: of likeness what was learnt, of kept all that is left. Others have no such zero."""
    whole = {}
    if "learnt" in values and "learnt" in base:
        whole["learnt"] = abs(paired_difference(values["learnt"]["first"], base["learnt"]["first"]).mean)
    if "kept" in values:
        whole["kept"] = abs(float(np.mean(values["kept"]["first"])))
    return whole


def _spread(seeds: Mapping[str, Sequence[float]], base: Sequence[float], prompts: int) -> float:
    """As wide as over ``prompts``; the second noise may have been drawn for fewer. Beside a base that is the same
    throughout there is one model's chance alone, and two that are compared have twice its variance."""
    other = seeds.get("second", ())
    if len(other) < LEAST_PROMPTS:
        other = base
    if len(other) < LEAST_PROMPTS:
        return LEAST_DELTA
    spread = np.asarray(seeds["first"][: len(other)], float) - np.asarray(other, float)
    alone = math.sqrt(2) if np.ptp(other) == 0 else 1.0
    return DELTA_WIDTHS * alone * _half_width(spread, prompts)


def judge(
    mine: Values, base: Values, about: About, rivals: Mapping[str, Values], deltas: Mapping[str, float],
    settings: RegistrySettings,
) -> Verdict:  # fmt: skip
    """The gate. ``base``: the untuned base's scores, beside ``mine``; ``rivals``: what they are called to their scores,
    on the same prompts and noise; ``deltas``: the anchor's (:func:`measure_deltas`). Raises ``ValueError`` where lists
    that are to be paired differ in length."""
    table = list(_floors(mine, base, about, settings))
    for rival, theirs in rivals.items():
        for score in theirs:
            if score in mine and score not in _NO_BAR:
                delta = deltas.get(score, LEAST_DELTA) if settings.tolerance is None else settings.tolerance
                table.append(_compare(rival, score, mine, theirs, about, delta))
    faults = [*_lacking(mine, about, rivals, settings), *_faults(table, about)]
    words = [*faults, *_versus(table, about, next(iter(rivals), BASE))]
    words += [f"not below {rival}" for rival in list(rivals)[1:] if not faults]
    words += [] if rivals else ["there was no champion"]
    return Verdict(not faults, "; ".join(words), tuple(table))


def _floors(mine: Values, base: Values, about: About, settings: RegistrySettings) -> Iterator[Row]:
    """Against the base. Of what was lost the mean counts: over a dozen prompts an interval is wider than the floor."""
    if settings.min_learnt is not None and "learnt" in mine:
        row = _compare(BASE, "learnt", mine, base, about, -settings.min_learnt)
        yield replace(row, ok=row.difference.low > settings.min_learnt)  # the base itself learnt nothing
    if settings.min_kept is not None and "kept" in mine:
        row = _compare(BASE, "kept", mine, base, about, 1 - settings.min_kept)
        yield replace(row, ok=row.mine >= settings.min_kept)
    if settings.max_few_step_loss is not None:
        for score in (score for score in _KIN if score in mine):
            row = _compare(BASE, score, mine, base, about, settings.max_few_step_loss * _whole(score, mine, base))
            yield replace(row, ok=row.difference.mean >= -row.delta)
    if settings.min_diversity is not None and "diversity" in mine:
        row = _compare(BASE, "diversity", mine, base, about, 0.0)
        least = settings.min_diversity * row.theirs
        yield replace(row, delta=row.theirs - least, ok=row.mine >= least)


def _whole(score: str, mine: Values, base: Values) -> float:
    """What a loss of few steps is a share of: of the concept what was learnt of it, else all that there was to keep."""
    if score == "few_step" and "learnt" in mine and "learnt" in base:
        return max(paired_difference(mine["learnt"]["first"], base["learnt"]["first"]).mean, 0.0)
    return 1.0


def _compare(rival: str, score: str, mine: Values, theirs: Values, about: About, delta: float) -> Row:
    a, b = mine[score]["first"], theirs[score]["first"]
    difference = paired_difference(a, b, about[score]["better"])
    return Row(rival, score, float(np.mean(a)), float(np.mean(b)), difference, delta, difference.low >= -delta)


# --- in words ---------------------------------------------------------------------------------------------------------


def _lacking(mine: Values, about: About, rivals: Mapping[str, Values], settings: RegistrySettings) -> Iterator[str]:
    """What was not measured was not passed."""
    floors = {
        "learnt": settings.min_learnt, "kept": settings.min_kept, "few_step": settings.max_few_step_loss,
        "diversity": settings.min_diversity,
    }  # fmt: skip
    for score, floor in floors.items():
        if floor is not None and score not in mine:
            yield f"{_label(score, about)} was not measured"
    for rival, theirs in rivals.items():
        if missing := [_label(score, about) for score in theirs if score not in mine]:
            yield f"{', '.join(missing)} was measured of {rival} and not of this version"


def _faults(table: Sequence[Row], about: About) -> Iterator[str]:
    """Floors that it is below, and rivals that it may be below."""
    for row in table:
        label = _label(row.score, about)
        if row.ok or row.rival != BASE:
            continue
        if row.score == "learnt":
            yield (f"nothing learnt that could be measured: {label} {row.mine:.3f}, the untuned base's "
                   f"{row.theirs:.3f}, {between(row.difference)}")  # fmt: skip
        elif row.score == "kept":
            yield f"the base's own pictures are lost: {label} {row.mine:.3f}, registry.min_kept is {1 - row.delta:g}"
        elif row.score == "diversity":
            yield (f"two seeds give nearly the same picture: {label} {row.mine:.3f}, the untuned base's "
                   f"{row.theirs:.3f}, {row.theirs - row.delta:.3f} is asked for (registry.min_diversity)")  # fmt: skip
        else:
            yield (f"few steps may cost too much: {label} {between(row.difference)} beside the base, where "
                   f"{row.delta:.3f} may be lost (registry.max_few_step_loss)")  # fmt: skip
    for rival in dict.fromkeys(row.rival for row in table if not row.ok and row.rival != BASE):
        worse = [
            f"{_label(row.score, about)} {row.mine:.3f} against {row.theirs:.3f}, {between(row.difference)}, "
            f"where {row.delta:.3f} below is allowed"
            for row in table
            if row.rival == rival and not row.ok
        ]
        yield f"worse than {rival}, as far as can be told: {' and '.join(worse)}"


def between(difference: Difference) -> str:
    """Mean and interval."""
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def _versus(table: Sequence[Row], about: About, rival: str) -> Iterator[str]:
    """Better or worse than ``rival``: only what its interval tells from chance."""
    rows = [row for row in table if row.rival == rival and row.score not in _NO_BAR]
    better = [_label(row.score, about) for row in rows if row.difference.low > 0]
    worse = [_label(row.score, about) for row in rows if row.difference.high < 0]
    same = [_label(row.score, about) for row in rows if row.difference.low <= 0 <= row.difference.high]
    ways = (("better in", better), ("worse in", worse), ("no measurable difference in", same))
    if rows:
        yield f"beside {rival}: " + ", ".join(f"{way} {' and '.join(names)}" for way, names in ways if names)


def in_short(verdict: Verdict) -> str:
    """The verdict by the scores' own names: what failed, was better or was worse beside the champion, with intervals.
    Where no comparison decided it, the reason."""
    state = "promoted" if verdict.passed else "not promoted"
    failed = [row for row in verdict.table if not row.ok]
    if not verdict.table or not (verdict.passed or failed):
        return f"{state}: {verdict.reason}"
    rival = next((row.rival for row in verdict.table if row.rival != BASE), BASE)
    rest = [row for row in verdict.table if row.rival == rival and row.ok and row.score not in _NO_BAR]
    ways = (
        ("failed", [f"{_measured(row)}{f' beside {row.rival}' * (row.rival != rival)}" for row in failed]),
        ("better", [_measured(row) for row in rest if row.difference.low > 0]),
        ("worse", [_measured(row) for row in rest if row.difference.high < 0]),
        ("no measurable difference in", [row.score for row in rest if row.difference.low <= 0 <= row.difference.high]),
    )
    return f"{state} beside {rival}: " + "; ".join(f"{way} {', '.join(its)}" for way, its in ways if its)


def _measured(row: Row) -> str:
    return f"{row.score} {between(row.difference)}"


def described(verdict: Verdict, about: About) -> str:
    """The verdict for a page: the reason, and the table in Markdown. It begins with plain words: MLflow's list of
    versions shows them as they are."""
    state = "Promoted to champion" if verdict.passed else "Not promoted"
    lines = [f"{state}: {verdict.reason}.", ""]
    if verdict.table:
        lines += ["| beside | score | this | theirs | difference (95 %) | may be | |", "|---|---|---|---|---|---|---|"]
    for row in verdict.table:
        lines.append(f"| {row.rival} | {_label(row.score, about)} | {row.mine:.3f} | {row.theirs:.3f} | "
                     f"{between(row.difference)} | {-row.delta:+.3f} | {'ok' if row.ok else '**no**'} |")  # fmt: skip
    return "\n".join(lines)


def _label(score: str, about: About) -> str:
    return about.get(score, {}).get("label", score)
