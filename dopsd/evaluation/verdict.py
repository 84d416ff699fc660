"""What the numbers say, in plain words: did it learn, did it stay few-step, what was lost.

The same thresholds for every run and base; nothing is said that was not measured, or that chance may have made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .naming import REFERENCES, SCORES, lowest_known, main_model, name_of, probe_right, teacher_described
from .table import beside_main

Level = Literal["good", "fair", "poor", "unknown"]

LEARNT = (0.5, 0.2)
"""From here on it learnt, and from here on in part: of the way from the base's pictures to real ones."""
FEW_STEP = (-0.05, -0.15)
"""What few steps may show less of than many do, beside what the base itself loses."""
SHARP = (0.9, 0.75)
"""The sharpness of few steps beside many, over the base's."""
KEPT = (0.6, 0.25)
"""Of the base's own pictures (docs/benchmarks.md: the known truth of twenty models stands beside it)."""
STATUS: dict[str, dict[Level, str]] = {
    "learnt": {"good": "✓ learnt", "fair": "○ in part", "poor": "✗ hardly"},
    "few_step": {"good": "✓ still few-step", "fair": "○ less so", "poor": "✗ lost"},
    "kept": {"good": "✓ kept", "fair": "○ much changed", "poor": "✗ lost"},
}
"""What is said of a level beside the number."""
CLEARLY_COPIED = 0.1
"""A share of samples that are copies which is worth a sentence."""
LESS_DIVERSE = 0.95
"""How far two seeds' pictures are apart, over the base's, that is worth one."""


@dataclass(frozen=True)
class Answer:
    """One of the three. ``value`` and ``between``: the number and its 95 % interval. ``beside``: (label, text) of what
    belongs to it. ``rivals``: (model, text, whether it is ``better`` or ``worse`` than the main model, the ``same`` or
    not known)."""

    key: str
    title: str
    level: Level
    value: str
    between: str
    sentence: str
    beside: tuple[tuple[str, str], ...] = ()
    rivals: tuple[tuple[str, str, str], ...] = ()

    @property
    def status(self) -> str:
        """The level in words."""
        return STATUS[self.key].get(self.level, "? cannot be told")


def answers(metrics: Mapping[str, Any]) -> list[Answer]:
    """The three answers of the main model; what was not measured says why."""
    model = main_model(metrics)
    return [] if model is None else [_learnt(metrics, model), _few_step(metrics, model), _kept(metrics, model)]


def verdict(metrics: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A headline, and the sentences below it."""
    model = main_model(metrics)
    if model is None:
        return "Nothing was tuned: this page shows the base alone.", []
    learnt, few_step, kept = found = answers(metrics)
    name, few = name_of(model), metrics["few_steps"]
    what = {"subject": "subject", "style": "style"}.get(metrics.get("kind") or "", "concept")
    steps = f"{few} step{'s' if few > 1 else ''}"
    head = {
        "good": f"{name} learnt the new {what}",
        "fair": f"{name} learnt the new {what} in part",
        "poor": f"{name} hardly learnt the new {what}",
        "unknown": f"Whether {name} learnt the new {what} cannot be told",
    }[learnt.level]
    on_steps = {"good": f"stays good in {steps}", "fair": "needs a few more steps than the base did",
                "poor": f"lost its {steps}"}  # fmt: skip
    on_kept = {"good": "keeps what the base drew", "fair": "changed much of what the base drew",
               "poor": "lost most of what the base drew"}  # fmt: skip
    told = [(answer, words[answer.level]) for answer, words in ((few_step, on_steps), (kept, on_kept))
            if answer.level in words]  # fmt: skip
    alike = len({answer.level == "good" for answer, _ in told}) < 2
    rest = (" and " if alike else ", but ").join(words for _, words in told)
    sentences = [answer.sentence for answer in found] + _more(metrics, model)
    return f"{head}.{f' It {rest}.' if rest else ''}", sentences


# --- the three --------------------------------------------------------------------------------------------------------


def _learnt(metrics: Mapping[str, Any], model: str) -> Answer:
    value, low, high = _number(metrics, model, "learnt")
    half = {"style": "in style", "subject": "in what is drawn"}.get(metrics.get("kind") or "", "in likeness")
    beside = [
        (f"of the way to its teacher, {what}", _percent(number))
        for what, key in ((_style(metrics), "gap_closed_style"), ("truth", "gap_closed_truth"))
        if (number := _number(metrics, model, key)[0]) is not None
    ]
    if value is None:
        reason = metrics.get("omitted", {}).get("learnt", "it was not measured")
        sentence = f"What it learnt cannot be told: {reason}. Judge by the pictures."
        return Answer("learnt", "Did it learn?", "unknown", "–", "", sentence, tuple(beside))
    chance = not (low or 0) > 0
    level: Level = _level(value, LEARNT)
    if chance:  # nothing was shown; whether there is anything, only where the interval ends soon
        level = "poor" if high is not None and high < LEARNT[1] else "unknown"
    sentence = (
        f"{half[0].upper()}{half[1:]}, its {metrics['few_steps']}-step pictures go {_percent(value)} of the "
        f"way from the untuned base's to real pictures of the {metrics.get('kind') or 'concept'}."
    )
    if chance and value > 0:
        sentence += " That may be chance."
    if _number(metrics, model, "beyond_real")[0] is not None:
        sentence += " And further: they are liker to the training pictures than real ones are. Is it a caricature?"
    return Answer(
        "learnt", "Did it learn?", level, _percent(value), _between(low, high), sentence, tuple(beside),
        _rivals(metrics, model, "learnt"),
    )  # fmt: skip


def _few_step(metrics: Mapping[str, Any], model: str) -> Answer:
    few, many = metrics["few_steps"], metrics["most_steps"]
    title = "Did it stay few-step?"
    key = _worst(metrics, model)
    if key is None:
        reason = metrics.get("omitted", {}).get("few_step", "it was not measured")
        return Answer("few_step", title, "unknown", "–", "", f"Whether it stayed few-step cannot be told: {reason}.")
    value, low, high = _number(metrics, model, key)
    sharp, _, sharp_high = _number(metrics, model, "few_step_sharpness")
    assert value is not None
    level = _not_told(_level(value, FEW_STEP), low, high, FEW_STEP)
    if level in ("fair", "poor") and high is not None and high >= 0:
        level = "fair"  # may be chance
    blurred = False
    if sharp is not None and sharp_high is not None and sharp_high < 1 and sharp < SHARP[0]:
        worse = _worse(level, _level(sharp, SHARP))
        blurred, level = worse != level, worse
    beside = [(label, _signed(_number(metrics, model, name)[0])) for name, label in _ON.items()]
    beside += [("sharpness, beside the base's", f"{sharp:.2f}")] if sharp is not None else []
    rivals = [
        (other, _signed(_number(metrics, other, name)[0]), beside_main(metrics, other, name))
        for other in _others(metrics, model)
        if (name := _worst(metrics, other)) is not None
    ]
    less, than = "as much", "as"
    if round(100 * value):
        less, than = f"{_percent(abs(value))} {'less' if value < 0 else 'more'}", "than"
    what = {"few_step_new": "goes {} of the way to real pictures", "few_step_old": "keeps {} of the base's pictures"}[
        key
    ]
    where = f"Where it loses most, {_ON[key]}" if value < 0 else f"{_ON[key][0].upper()}{_ON[key][1:]}"
    sentence = (
        f"{where}, it {what.format(less)} in {few} step{'s' if few > 1 else ''} {than} in "
        f"{many}, what the base itself loses taken off."
    )
    if level == "unknown":
        sentence += " The prompts do not tell whether it lost much or nothing."
    elif value < 0 and high is not None and high >= 0 and than == "than":
        sentence += " That may be chance."
    if blurred and sharp is not None:
        sentence += f" But few steps blur: they have {sharp:.2f} times the sharpness of many, beside the base's."
    return Answer(
        "few_step", title, level, _signed(value), _between(low, high), sentence,
        tuple((label, text) for label, text in beside if text != "–"), tuple(rivals),
    )  # fmt: skip


_ON = {"few_step_new": "on the concept", "few_step_old": "on general prompts"}


def _worst(metrics: Mapping[str, Any], model: str) -> str | None:
    """Where few steps lose most."""
    found = {key: value for key in _ON if (value := _number(metrics, model, key)[0]) is not None}
    return min(found, key=lambda key: found[key]) if found else None


def _kept(metrics: Mapping[str, Any], model: str) -> Answer:
    title = "Did it keep the rest?"
    value, low, high = _number(metrics, model, "kept")
    if value is None:
        reason = metrics.get("omitted", {}).get("kept", "it was not measured")
        return Answer("kept", title, "unknown", "–", "", f"Whether it kept the rest cannot be told: {reason}.")
    count = metrics["counts"]["kept_prompts"]
    left = left_of(value) if value > 0 else "nothing"
    sentence = (
        f"On {count} general prompt{'s' if count > 1 else ''} it keeps {left} of the base's own pictures: 100 % is the "
        "same picture, 0 % one as different as another seed makes it."
    )
    level = _not_told(_level(value, KEPT), low, high, KEPT)
    if level == "unknown":
        sentence += " The prompts do not tell whether that is enough."
    beside = [(label, written(number)) for label, key, written in (
        (f"in {metrics['most_steps']} steps", "kept_many", left_of), ("near the concept", "kept_near", left_of),
        (_known_label(metrics, model), "known_lowest", _percent),
    ) if (number := _number(metrics, model, key)[0]) is not None]  # fmt: skip
    rivals = _rivals(metrics, model, "kept")
    return Answer("kept", title, level, left_of(value), _between(low, high), sentence, tuple(beside), rivals)


def _known_label(metrics: Mapping[str, Any], model: str) -> str:
    """Which score of the old styles it lost most of, and what that rests on."""
    lowest = lowest_known(metrics, model)
    right = f" ({probe_right(metrics)})" if lowest == "style" and probe_right(metrics) else ""
    return f"known truth, lowest: {SCORES[lowest].label}{right}" if lowest else "known truth, lowest score"


def _rivals(metrics: Mapping[str, Any], model: str, key: str) -> tuple[tuple[str, str, str], ...]:
    """Other tuned models' numbers, and how they stand to the main model's."""
    written = left_of if key == "kept" else _percent
    return tuple(
        (other, written(value), beside_main(metrics, other, key))
        for other in _others(metrics, model)
        if (value := _number(metrics, other, key)[0]) is not None
    )


def _others(metrics: Mapping[str, Any], model: str) -> list[str]:
    return [other for other in metrics["models"] if other != model and other not in REFERENCES]


# --- what else is worth a sentence ------------------------------------------------------------------------------------


def _more(metrics: Mapping[str, Any], model: str) -> list[str]:
    return [*_on_teacher(metrics, model), *_on_copies(metrics, model), *_on_near(metrics, model)]


def _on_teacher(metrics: Mapping[str, Any], model: str) -> list[str]:
    value, low, _ = _number(metrics, model, "gap_closed_style")
    if value is None:
        return []
    shown, text = teacher_described(metrics)
    return [
        f"In {_style(metrics)} it goes {_percent(value)} of the way from the untuned base to its teacher, "
        f"which is {shown} every time; it draws from {text}.{'' if (low or 0) > 0 else ' That may be chance.'}"
    ]


def _on_copies(metrics: Mapping[str, Any], model: str) -> list[str]:
    copied, diversity = _number(metrics, model, "copied")[0], _number(metrics, model, "diversity")
    out = []
    if copied is not None and copied >= CLEARLY_COPIED:
        count = metrics["counts"]["concept_prompts"]
        out.append(f"{round(copied * count)} of its {count} pictures copy a training picture: it learnt some by heart.")
    if diversity[0] is not None and diversity[0] <= LESS_DIVERSE and diversity[2] is not None and diversity[2] < 1:
        out.append(
            f"Two seeds give pictures that are {diversity[0]:.2f} times as far apart as the base's: less diverse."
        )
    return out


def _on_near(metrics: Mapping[str, Any], model: str) -> list[str]:
    (_, _, high), (_, general, _) = _number(metrics, model, "kept_near"), _number(metrics, model, "kept")
    if high is None or high >= KEPT[1] or (general is not None and high >= general):
        return []  # what lost everything has leaked nothing
    return ["Asked for what the captions say without the placeholder, it draws something else than the base did: the "
            "concept has leaked into plain words."]  # fmt: skip


def _style(metrics: Mapping[str, Any]) -> str:
    """What ``gap_closed_style`` is measured by."""
    return (
        f"style ({probe_right(metrics)})" if metrics["style_score"] == "style" else "likeness to the training pictures"
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(metrics: Mapping[str, Any], model: str, key: str) -> tuple[float | None, float | None, float | None]:
    """A headline number and its interval."""
    value = metrics["headline"].get(model, {}).get(key)
    low, high = metrics["intervals"]["headline"].get(model, {}).get(key, (None, None))
    return value, low, high


def _level(value: float, thresholds: tuple[float, float]) -> Level:
    return "good" if value >= thresholds[0] else "fair" if value >= thresholds[1] else "poor"


def _not_told(level: Level, low: float | None, high: float | None, thresholds: tuple[float, float]) -> Level:
    """Nothing is said of what may as well be good as poor; of fewer than six prompts, which have no interval, nothing
    is known."""
    if low is None or high is None:
        return "unknown"
    return "unknown" if low < thresholds[1] and high >= thresholds[0] else level


def _worse(one: Level, other: Level) -> Level:
    order: tuple[Level, ...] = ("poor", "fair", "good", "unknown")
    return min(one, other, key=order.index)


def _percent(value: float) -> str:
    return f"{round(100 * value) + 0:.0f} %".replace("-", "−")


def left_of(value: float) -> str:
    """What was kept, in percent; nothing where it is further away than another seed's picture."""
    return _percent(value) if value > 0 else "none"


def _signed(value: float | None) -> str:
    """A difference in percent; zero has no sign."""
    if value is None:
        return "–"
    rounded = round(100 * value)
    return f"{rounded:+d} %".replace("-", "−") if rounded else "0 %"


def _between(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{_percent(low)[:-2]} to {_percent(high)}"
