"""What the numbers say, in plain words. The same thresholds for every run; nothing is said that was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .naming import REFERENCES, name_of, teacher_described

AIMS = {"gap_closed_style": 0.75, "gap_closed_truth": 0.75, "sharpness_vs_base": 0.95, "kept_lowest": 0.95}
"""From here on a headline number counts as reached. "As sharp as the base" allows for 5 %, the width of chance."""

Level = Literal["good", "fair", "poor", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One headline number. ``rivals``: (model, text) of the others. ``aim``: what counts as reached."""

    key: str
    title: str
    value: str
    between: str
    level: Level
    sentence: str
    aim: str
    rivals: tuple[tuple[str, str], ...] = ()


def main_model(metrics: Mapping[str, Any]) -> str | None:
    """The model that the verdict is about: the first tuned one."""
    return next((model for model in metrics["models"] if model not in REFERENCES), None)


def findings(metrics: Mapping[str, Any]) -> list[Finding]:
    """The four headline numbers of the main model, those that exist."""
    model = main_model(metrics)
    if model is None:
        return []
    numbers = metrics["headline"].get(model, {})
    return [_finding(metrics, model, key, numbers[key]) for key in AIMS if key in numbers]


def verdict(metrics: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A headline, and the sentences below it."""
    model = main_model(metrics)
    if model is None:
        return "Nothing was tuned: this page shows the base alone.", []
    found = {finding.key: finding for finding in findings(metrics)}
    name, few = name_of(model), metrics["few_steps"]
    sentences = [finding.sentence for finding in found.values()]
    sentences += _on_rivals(metrics, model) + _on_steps(metrics, model)
    gaps = [found[key].level for key in ("gap_closed_style", "gap_closed_truth") if key in found]
    what = "subject" if metrics.get("kind") == "subject" else "style"
    if not gaps:
        reason = metrics.get("omitted", {}).get("gap_closed_style") or "there is no teacher to compare with"
        return (
            f"Nothing can be said of whether {name} learnt the new {what}: {reason}. Judge by the pictures.",
            sentences,
        )
    sharp = found["sharpness_vs_base"].level if "sharpness_vs_base" in found else "unknown"
    kept = found["kept_lowest"].level if "kept_lowest" in found else "unknown"
    if all(level == "good" for level in gaps):
        head = f"{name} learnt the new {what}, in {few} steps"
    elif all(level == "poor" for level in gaps):
        head = f"{name} hardly learnt the new {what}"
    else:
        head = f"{name} learnt the new {what} in part"
    words = {
        ("sharp", "fair"): "lost a little sharpness", ("sharp", "poor"): "lost sharpness",
        ("kept", "fair"): "gave up a little of the old styles", ("kept", "poor"): "lost much of the old styles",
    }  # fmt: skip
    losses = [words[key] for key in (("sharp", sharp), ("kept", kept)) if key in words]
    gains = [text for level, text in ((sharp, "stays sharp"), (kept, "keeps what the base knew")) if level == "good"]
    if losses:
        return f"{head}, but {' and '.join(losses)}.", sentences
    return f"{head}, {' and '.join(gains)}." if gains else f"{head}.", sentences


def _finding(metrics: Mapping[str, Any], model: str, key: str, value: float) -> Finding:
    low, high = metrics["intervals"]["headline"].get(model, {}).get(key, (None, None))
    between = "" if low is None else f"{low:.2f} to {high:.2f}"
    aim = AIMS[key]
    level: Level = "good" if value >= aim else "fair" if value >= aim - 0.25 else "poor"
    if key.startswith("gap_closed") and not (low or 0) > 0:
        level = "poor"  # its interval holds 0: what it shows may be chance
    rivals = tuple(
        (other, f"{metrics['headline'][other][key]:.2f}")
        for other in metrics["models"]
        if other != model and key in metrics["headline"].get(other, {})
    )
    title, sentence = _words(metrics, model, key, value)
    return Finding(key, title, f"{value:.2f}", between, level, sentence, f"at least {aim:.2f}", rivals)


def _words(metrics: Mapping[str, Any], model: str, key: str, value: float) -> tuple[str, str]:
    name, few = name_of(model), metrics["few_steps"]
    if key == "gap_closed_style":
        what = "style" if metrics["style_score"] == "style" else "similarity to the training pictures"
        shown, text = teacher_described(metrics)
        return f"gap closed: {what}", (
            f"In {what}, {name} goes {value:.0%} of the way from the untuned base to its teacher, which is {shown} "
            f"every time; {name} draws from {text}."
        )
    if key == "gap_closed_truth":
        return "gap closed: truth", f"In similarity to the true picture it goes {value:.0%} of that way."
    if key == "sharpness_vs_base":
        bound = metrics["headline"][model].get("sharpness_vs_decoded")
        beside = f", {bound:.2f} times that of the true pictures as its autoencoder carries them" if bound else ""
        return "sharpness / base", (
            f"On the same prompts its {few}-step pictures have {value:.2f} times the sharpness of the base's{beside}."
        )
    lost = min(
        (other for other in metrics["headline"][model] if other.startswith("kept_") and other[5:] in _KEPT_NAMES),
        key=lambda other: metrics["headline"][model][other],
    )
    return "old styles kept", (
        f"Asked for the base's own styles it keeps at least {value:.0%} of the base's scores; "
        f"the lowest is {_KEPT_NAMES[lost[5:]]}."
    )


_KEPT_NAMES = {
    "style": "style", "cosine": "similarity to the truth", "concept_top1": "the right thing at the first guess",
    "concept_top5": "the right thing in five guesses", "structure": "structure",
}  # fmt: skip


def _on_rivals(metrics: Mapping[str, Any], model: str) -> list[str]:
    """How ordinary fine-tuning does on the same pictures."""
    out = []
    for other in metrics["models"]:
        numbers = metrics["headline"].get(other, {})
        if other == model or other in REFERENCES or not numbers:
            continue
        parts = [
            text.format(numbers[key])
            for key, text in (
                ("gap_closed_style", "{:.0%} of the gap in style"),
                ("gap_closed_truth", "{:.0%} in similarity to the truth"),
                ("sharpness_vs_base", "{:.2f} times the base's sharpness"),
                ("kept_lowest", "{:.0%} of the old styles kept"),
            )
            if key in numbers
        ]
        out.append(f"{name_of(other)}: {', '.join(parts)}.")
    return out


def _on_steps(metrics: Mapping[str, Any], model: str) -> list[str]:
    """Whether few steps still do what many do."""
    key = "retention_style" if metrics["style_score"] == "style" else "retention_train_similarity"
    value, few, most = metrics["headline"].get(model, {}).get(key), metrics["few_steps"], metrics["most_steps"]
    if value is None or few == most:
        return []
    what = "style" if metrics["style_score"] == "style" else "similarity to the training pictures"
    return [f"With {few} steps {name_of(model)} reaches {value:.0%} of the {what} that it reaches with {most}."]
