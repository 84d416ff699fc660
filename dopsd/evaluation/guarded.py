"""The scores that decide: prompt by prompt for the registry's gate, and what of a difference is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .compare import Cells
from .draws import Key
from .headline import MIN_REAL, Asked, few_step_values, round_
from .naming import REFERENCES
from .paired import Paired
from .prompts import KEPT, MIN_PROMPTS
from .scoring import NO_SCORES, Bootstrap, Values, interval

LABELS = {
    "learnt": "likeness to the training pictures",
    "kept": "the base's own pictures kept",
    "few_step": "few steps beside many, the concept",
    "few_step_kept": "few steps beside many, general prompts",
    "prompt": "prompt following",
    "diversity": "distance between two seeds' pictures",
}
_DRAWN = {"learnt": ("concept", "likeness"), "kept": (KEPT, "kept"), "prompt": ("concept", "prompt")}
"""Split and score of those that are drawn from two noises."""
_FEW_STEP = {"new": "few_step", "old": "few_step_kept"}


def paired_of(cells: Cells, models: Sequence[str], real: Values, asked: Asked) -> Paired:
    """What a version is judged by, of the base and all tuned models; all of it is better when higher.

    ``real``: how like the training pictures real ones are. What a model is liker than they may be (the upper end of
    their mean's interval) is taken off all its prompts: being like pictures beyond what pictures of the concept are is
    no merit, but caricature or a copy, and would be a bar that no honest challenger reaches.
    """
    found = {model: _guarded(cells, model, asked) for model in models if model == "base" or model not in REFERENCES}
    most = _most_like(real)
    if most > found["base"]["learnt"]["first"].mean():
        for its in found.values():
            beyond = max(float(its["learnt"]["first"].mean() - most), 0.0)
            its["learnt"] = {noise: values - beyond for noise, values in its["learnt"].items()}
    scores = {name: {"better": "higher", "label": LABELS[name]} for name in found["base"]}
    values = {
        model: {
            score: {noise: tuple(map(round_, values)) for noise, values in noises.items()}
            for score, noises in its.items()
        }
        for model, its in found.items()
    }
    return Paired(scores, values, asked.few)


def _most_like(real: Values) -> float:
    """What the mean of real pictures may be; of too few of them, anything."""
    from scipy.special import stdtrit

    count = len(real)
    if count < MIN_REAL:
        return float("inf")
    return float(real.mean() + stdtrit(count - 1, 0.975) * real.std(ddof=1) / np.sqrt(count))


def _guarded(cells: Cells, model: str, asked: Asked) -> dict[str, dict[str, Values]]:
    """Score to its values from the first noise and, where it was drawn, the second."""
    out: dict[str, dict[str, Values]] = {}
    for name, (split, score) in _DRAWN.items():
        drawn = {noise: cells.get(Key(split, model, asked.few, at)) for at, noise in enumerate(("first", "second"))}
        values = {noise: cell.values[score] for noise, cell in drawn.items() if cell and score in cell.values}
        if "first" in values:
            out[name] = values
    twice = cells.get(Key("concept", model, asked.few, 1))
    if twice is not None and "diversity" in twice.values:
        out["diversity"] = {"first": twice.values["diversity"]}
    lost = few_step_values(cells, model, asked)
    return out | {name: {"first": lost[key]} for key, name in _FEW_STEP.items() if key in lost}


def differences(
    cells: Cells, models: Sequence[str], few: int, bootstrap: Bootstrap
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Split, model and score to the mean paired difference from the base's, and its interval; of fewer than
    :data:`MIN_PROMPTS` prompts nothing is said."""
    out: dict[str, dict[str, dict[str, list[float]]]] = {}
    for key, cell in cells.items():
        other = cells.get(key._replace(model="base"))
        if other is None or key.noise or key.steps != few or key.model not in models or key.model == "base":
            continue
        for score in sorted(set(cell.values) & set(other.values) - NO_SCORES):
            apart = cell.values[score] - other.values[score]
            if len(apart) >= MIN_PROMPTS:
                out.setdefault(key.split, {}).setdefault(key.model, {})[score] = _with_interval(apart, bootstrap)
    return out


def against(paired: Paired, main: str, bootstrap: Bootstrap) -> dict[str, dict[str, list[float]]]:
    """The same of the guarded scores, from the main model's."""
    out: dict[str, dict[str, list[float]]] = {}
    mine: Mapping[str, Mapping[str, tuple[float, ...]]] = paired.models.get(main, {})
    for model, scores in paired.models.items():
        if model == main:
            continue
        for score in sorted(set(scores) & set(mine)):
            apart = _shown(score, scores[score]) - _shown(score, mine[score])
            if len(apart) >= MIN_PROMPTS:
                out.setdefault(model, {})[score] = _with_interval(apart, bootstrap)
    return out


def _shown(score: str, noises: Mapping[str, tuple[float, ...]]) -> Values:
    """What the headline's number is the mean of: of kept both noises, as it is drawn whole from each."""
    first, second = noises["first"], noises.get("second", ())
    return np.asarray(np.mean([first, second], 0) if score == "kept" and len(first) == len(second) else first)


def _with_interval(values: Values, bootstrap: Bootstrap) -> list[float]:
    """Mean, and both ends of its interval."""
    return [round_(value) for value in (values.mean(), *interval(bootstrap.means(values)))]
