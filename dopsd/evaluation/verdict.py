"""What the numbers say, in plain words: did it learn, did it stay few-step, what was lost.

The same thresholds for every run and base; nothing is said that was not measured, or that chance may have made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .naming import REFERENCES, name_of, teacher_described

Level = Literal["good", "fair", "poor", "unknown"]

LEARNT = (0.5, 0.2)
"""From here on it learnt, and from here on in part: of the way from the base's pictures to real ones."""
FEW_STEP = (-0.05, -0.15)
"""What few steps may show less of than many do, beside what the base itself loses."""
SHARP = (0.9, 0.75)
"""The sharpness of few steps beside many, over the base's."""
KEPT = (0.6, 0.3)
"""Of the base's own pictures (docs/benchmarks.md: the known truth of twenty models stands beside it)."""
CLEARLY_COPIED = 0.1
"""A share of samples that are copies which is worth a sentence."""


@dataclass(frozen=True)
class Answer:
    """One of the three. ``value`` and ``between``: the number and its 95 % interval. ``beside``: (label, text) of what
    belongs to it. ``rivals``: (model, text, whether it is ``better`` or ``worse`` than the main model, or neither)."""

    key: str
    title: str
    level: Level
    value: str
    between: str
    sentence: str
    beside: tuple[tuple[str, str], ...] = ()
    rivals: tuple[tuple[str, str, str], ...] = field(default=())


def main_model(metrics: Mapping[str, Any]) -> str | None:
    """The model that the verdict is about: the first tuned one."""
    return next((model for model in metrics["models"] if model not in REFERENCES), None)


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
    in_steps = f" in {few} steps" if few_step.level == "good" else ""
    head = {
        "good": f"{name} learnt the new {what}{in_steps}",
        "fair": f"{name} learnt the new {what} in part",
        "poor": f"{name} hardly learnt the new {what}",
        "unknown": f"Whether {name} learnt the new {what} cannot be told",
    }[learnt.level]
    losses = [
        text for answer, level, text in (
            (few_step, "fair", "needs a little more steps than the base did"), (few_step, "poor", "lost its few steps"),
            (kept, "fair", "changed much of what the base drew"), (kept, "poor", "lost what the base drew"),
        ) if answer.level == level
    ]  # fmt: skip
    gains = [text for answer, text in ((few_step, "stays few-step"), (kept, "keeps what the base drew"))
             if answer.level == "good"]  # fmt: skip
    if learnt.level == "good" and few_step.level == "good":
        gains = gains[1:]  # said with the steps
    rest = f", but {_and(losses)}" if losses else f" and {_and(gains)}" if gains else ""
    sentences = [answer.sentence for answer in found] + _more(metrics, model)
    return f"{head}{rest}.", sentences


def _and(words: list[str]) -> str:
    return " and ".join(words)


# --- the three --------------------------------------------------------------------------------------------------------


def _learnt(metrics: Mapping[str, Any], model: str) -> Answer:
    value, low, high = _number(metrics, model, "learnt")
    half = {"style": "in style", "subject": "in what is drawn"}.get(metrics.get("kind") or "", "in likeness")
    beside = [
        (f"of the way to its teacher, {what}", _percent(min(number, 1.0)))
        for what, key in (("style", "gap_closed_style"), ("truth", "gap_closed_truth"))
        if (number := _number(metrics, model, key)[0]) is not None
    ]
    if value is None:
        reason = metrics.get("omitted", {}).get("learnt", "it was not measured")
        sentence = f"What it learnt cannot be told: {reason}. Judge by the pictures."
        return Answer("learnt", "Did it learn?", "unknown", "–", "", sentence, tuple(beside))
    level: Level = "poor" if not (low or 0) > 0 else _level(value, LEARNT)
    sentence = (
        f"{half[0].upper()}{half[1:]}, its {metrics['few_steps']}-step pictures go {_percent(min(value, 1.0))} of the "
        f"way from the untuned base's to real pictures of the {metrics.get('kind') or 'concept'}."
    )
    if level == "poor" and value > 0 and not (low or 0) > 0:
        sentence += " That may be chance."
    return Answer(
        "learnt", "Did it learn?", level, _percent(min(value, 1.0)), _between(low, high, 1.0), sentence, tuple(beside),
        _rivals(metrics, model, "learnt", "learnt"),
    )  # fmt: skip


def _few_step(metrics: Mapping[str, Any], model: str) -> Answer:
    few, many = metrics["few_steps"], metrics["most_steps"]
    title = "Did it stay few-step?"
    found = {key: _number(metrics, model, key) for key in ("few_step_new", "few_step_old")}
    known = {key: number for key, number in found.items() if number[0] is not None}
    sharp, _, sharp_high = _number(metrics, model, "few_step_sharpness")
    if not known:
        reason = metrics.get("omitted", {}).get("few_step", "it was not measured")
        return Answer("few_step", title, "unknown", "–", "", f"Whether it stayed few-step cannot be told: {reason}.")
    key = min(known, key=lambda name: known[name][0] or 0.0)
    value, low, high = known[key]
    assert value is not None
    level = _level(value, FEW_STEP)
    if level != "good" and high is not None and high >= 0:
        level = "fair"  # may be chance
    if sharp is not None and (sharp_high is None or sharp_high < 1):
        level = _worse(level, _level(sharp, SHARP))
    what = "the concept" if key == "few_step_new" else "general prompts"
    shown = (
        "as much" if abs(value) < 0.005 else f"{abs(value):.0%} {'less' if value < 0 else 'more'}".replace("%", " %")
    )
    sentence = (
        f"Beside what the base itself loses, {few} steps show {shown} of what {many} do, at their worst: on {what}."
    )
    beside = [
        ("on the concept", _signed(found["few_step_new"][0])),
        ("on general prompts", _signed(found["few_step_old"][0])),
    ]
    beside += [("sharpness, few over many, over the base's", f"{sharp:.2f}")] if sharp is not None else []
    return Answer(
        "few_step", title, level, _signed(value), _between(low, high), sentence,
        tuple((label, text) for label, text in beside if text != "–"), _rivals(metrics, model, key, _GUARDED[key]),
    )  # fmt: skip


_GUARDED = {"few_step_new": "few_step", "few_step_old": "few_step_kept"}


def _kept(metrics: Mapping[str, Any], model: str) -> Answer:
    title = "What was lost?"
    value, low, high = _number(metrics, model, "kept")
    if value is None:
        reason = metrics.get("omitted", {}).get("kept", "it was not measured")
        return Answer("kept", title, "unknown", "–", "", f"What was lost cannot be told: {reason}.")
    count = metrics["counts"]["kept_prompts"]
    left = max(value, 0.0)
    sentence = (
        f"Of {count} general prompts it keeps {_percent(left)} of the base's own pictures: 100 % is the same picture, "
        "0 % one as different as another noise makes it."
    )
    beside = [(label, _percent(number)) for label, key in (
        (f"in {metrics['most_steps']} steps", "kept_many"), ("near the concept", "kept_near"),
        ("against the known truth, lowest score", "known_lowest"),
    ) if (number := _number(metrics, model, key)[0]) is not None]  # fmt: skip
    return Answer(
        "kept", title, _level(value, KEPT), _percent(value), _between(low, high), sentence, tuple(beside),
        _rivals(metrics, model, "kept", "kept"),
    )  # fmt: skip


def _rivals(metrics: Mapping[str, Any], model: str, key: str, guarded: str) -> tuple[tuple[str, str, str], ...]:
    """Other tuned models' numbers, and whether the paired difference from the main model's is more than chance."""
    out = []
    for other in metrics["models"]:
        value = _number(metrics, other, key)[0]
        if other == model or other in REFERENCES or value is None:
            continue
        _, low, high = metrics.get("against", {}).get(other, {}).get(guarded, (0.0, 0.0, 0.0))
        mark = "better" if low > 0 else "worse" if high < 0 else ""
        out.append((other, _signed(value) if key.startswith("few_step") else _percent(min(value, 1.0)), mark))
    return tuple(out)


# --- what else is worth a sentence ------------------------------------------------------------------------------------


def _more(metrics: Mapping[str, Any], model: str) -> list[str]:
    return [*_on_teacher(metrics, model), *_on_copies(metrics, model), *_on_near(metrics, model)]


def _on_teacher(metrics: Mapping[str, Any], model: str) -> list[str]:
    value, low, _ = _number(metrics, model, "gap_closed_style")
    if value is None:
        return []
    shown, text = teacher_described(metrics)
    what = "style" if metrics["style_score"] == "style" else "likeness to the training pictures"
    return [
        f"In {what} it goes {_percent(min(value, 1.0))} of the way from the untuned base to its teacher, which is "
        f"{shown} every time; it draws from {text}.{'' if (low or 0) > 0 else ' That may be chance.'}"
    ]


def _on_copies(metrics: Mapping[str, Any], model: str) -> list[str]:
    copied, diversity = _number(metrics, model, "copied")[0], _number(metrics, model, "diversity")
    out = []
    if copied is not None and copied >= CLEARLY_COPIED:
        out.append(f"{_percent(copied)} of its pictures are copies of a training picture: it learnt some by heart.")
    if diversity[0] is not None and diversity[2] is not None and diversity[2] < 1:
        out.append(
            f"Two noises give pictures that are {diversity[0]:.2f} times as far apart as the base's: less diverse."
        )
    return out


def _on_near(metrics: Mapping[str, Any], model: str) -> list[str]:
    value = _number(metrics, model, "kept_near")[0]
    if value is None or value >= KEPT[1]:
        return []
    return ["Asked for what the captions say without the placeholder, it draws something else than the base did: the "
            "concept has leaked into plain words."]  # fmt: skip


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(metrics: Mapping[str, Any], model: str, key: str) -> tuple[float | None, float | None, float | None]:
    """A headline number and its interval."""
    value = metrics["headline"].get(model, {}).get(key)
    low, high = metrics["intervals"]["headline"].get(model, {}).get(key, (None, None))
    return value, low, high


def _level(value: float, thresholds: tuple[float, float]) -> Level:
    return "good" if value >= thresholds[0] else "fair" if value >= thresholds[1] else "poor"


def _worse(one: Level, other: Level) -> Level:
    order: tuple[Level, ...] = ("poor", "fair", "good", "unknown")
    return min(one, other, key=order.index)


def _percent(value: float) -> str:
    return f"{round(100 * value) + 0:.0f} %".replace("-", "−")


def _signed(value: float | None) -> str:
    """A difference in percent; zero has no sign."""
    if value is None:
        return "–"
    rounded = round(100 * value)
    return f"{rounded:+d} %".replace("-", "−") if rounded else "0 %"


def _between(low: float | None, high: float | None, most: float | None = None) -> str:
    if low is None or high is None:
        return ""
    ends = [min(bound, most) if most is not None else bound for bound in (low, high)]
    return f"{_percent(ends[0])[:-2]} to {_percent(ends[1])}"
