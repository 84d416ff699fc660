"""How models and scores are called and coloured wherever a person reads of them. Imports nothing heavy: pages, tables
and flows that only show numbers start in a moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

REFERENCES = ("base", "teacher", "decoded", "real", "reference")
"""Rows of the table that are not tuned models."""
KNOWN_SCORES = ("style", "cosine", "concept_top1", "concept_top5", "structure")
"""Of these the lowest ratio is ``known_lowest``; all of them are better when higher."""

COLORS = {
    "reference": "#6b7280", "real": "#6b7280", "decoded": "#6b7280", "base": "#8a8a8a", "teacher": "#e69f00",
    "d-opsd": "#0072b2",
    "sft": "#d55e00", "sft-compute": "#b5548c", "sft-teacher": "#009e73", "off-policy": "#56b4e9",
}  # fmt: skip
"""One colour per model everywhere (Okabe and Ito's set, told apart with every kind of colour vision)."""
NAMES = {
    "reference": "reference", "real": "truth", "decoded": "truth, decoded", "base": "base, untuned",
    "teacher": "teacher",
    "d-opsd": "D-OPSD", "sft": "SFT",
    "sft-compute": "SFT, equal compute", "sft-teacher": "SFT on teacher's samples", "off-policy": "off-policy",
}  # fmt: skip


def name_of(model: str) -> str:
    """How a model is called on pages and pictures."""
    return NAMES.get(model, model)


def color_of(model: str) -> str:
    """Its colour; unknown models are dark grey."""
    return COLORS.get(model, "#444444")


def main_model(metrics: Mapping[str, Any]) -> str | None:
    """The model that an evaluation is about: the first tuned one."""
    return next((model for model in metrics["models"] if model not in REFERENCES), None)


def prompts_described(metrics: Mapping[str, Any]) -> str:
    """How many prompts an evaluation asked, and which: without held-out rows they are captions that were trained on."""
    count, trained_on = metrics["counts"]["concept_prompts"], metrics.get("trained_on", 0)
    if not trained_on:
        return f"{count} prompts that were not trained on" if count > 1 else "1 prompt that was not trained on"
    if trained_on < count:
        return f"{count} prompts, of which {trained_on} are captions of training pictures"
    return f"{count} caption{'s' if count > 1 else ''} of the training pictures"


def probe_right(metrics: Mapping[str, Any]) -> str:
    """How often the probe is right, as it stands beside every score that rests on it; empty without a probe."""
    accuracy = metrics.get("probe", {}).get("accuracy_clean")
    return f"probe right in {100 * accuracy:.0f} %" if accuracy else ""


def lowest_known(metrics: Mapping[str, Any], model: str) -> str | None:
    """The score of old styles that a model lost most of, whose ratio ``known_lowest`` is."""
    numbers = metrics["headline"].get(model, {})
    found = [key for key in KNOWN_SCORES if f"known_{key}" in numbers]
    return min(found, key=lambda key: numbers[f"known_{key}"], default=None)


def teacher_described(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """What the evaluation's teacher had, and what all others had, by the teacher's context."""
    others = {
        "edit-reference": ("shown the finished edit", "text and the pictures to edit"),
        "enhanced-prompt": ("told the long caption", "short caption alone"),
    }
    return others.get(metrics.get("context", ""), ("shown another training picture", "text alone"))


@dataclass(frozen=True)
class Score:
    """How a score is shown. ``better``: which way is good; ``one`` means that 1 is like the real pictures."""

    key: str
    label: str
    better: Literal["higher", "lower", "one"]
    meaning: str
    digits: int = 3


SCORES: dict[str, Score] = {
    score.key: score
    for score in (
        Score("style", "style", "higher", "probability that a probe trained on real pictures of all styles gives the "
              "wanted style"),
        Score("style_hit", "style, first guess", "higher", "share of prompts whose most probable style is the "
              "wanted one"),
        Score("cosine", "similarity to the truth", "higher", "cosine of the features to those of the true picture, the "
              "style's mean feature subtracted"),
        Score("concept_top1", "right thing, first guess", "higher", "share of prompts whose own picture is the nearest "
              "among all candidates"),
        Score("concept_top5", "right thing, five guesses", "higher", "share of prompts whose own picture is among the "
              "five nearest candidates"),
        Score("likeness", "likeness to the training pictures", "higher", "mean cosine of the features to those of the "
              "training pictures, of a style with what the base's share taken away"),
        Score("kept", "kept", "higher", "1 is the base's own picture, 0 one as far from it as another noise makes it"),
        Score("copy", "copy", "lower", "structural similarity to the nearest training picture; 1 is the same picture"),
        Score("target", "distance to the target", "lower", "of features or pixels, to the picture that was asked for"),
        Score("judge", "judge's grade", "higher", "of a vision-language model by a written rubric, 1 to 4", 2),
        Score("reward", "reward", "higher", "of a model that was tuned on which pictures people preferred"),
        Score("prompt", "prompt following", "higher", "how well a text-image model finds the prompt in the picture"),
        Score("structure", "structure", "higher", "structural similarity to the true picture, at its best over shifts "
              "of up to 2 of 64 pixels"),
        Score("mse", "pixel error", "lower", "mean squared pixel difference to the true picture", 4),
        Score("sharpness", "sharpness", "one", "Laplacian energy relative to the real pictures'; 1 is like them, "
              "0 is a blur"),
        Score("kid", "distribution (KID)", "lower", "kernel distance of the samples' features to real pictures of the "
              "style", 4),
    )
}  # fmt: skip


def score_of(key: str) -> Score:
    """How a score is shown, also one that another backbone gave (``kept@clip``)."""
    name, _, backbone = key.partition("@")
    score = SCORES[name]
    return replace(score, key=key, label=f"{score.label} ({backbone})") if backbone else score
