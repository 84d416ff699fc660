"""Scores per prompt of every model, paired by position: what the registry's gate compares (``paired.json``).

A program reads it, and so does a registry that others may write to: nothing in it is taken on trust.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopsd.files import write_json

PAIRED = "paired.json"
VERSION = 1
LARGEST, MOST_NAMES, MOST_PROMPTS = 16 * 2**20, 100, 100_000
"""Of a file in bytes; of scores and of models; of one list."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def is_name(text: str) -> bool:
    """Whether a model or score may be called so."""
    return _NAME.fullmatch(text) is not None


Values = Mapping[str, Mapping[str, tuple[float, ...]]]
"""Score to ``first`` and, where they were drawn from a second noise, ``second``: one number per prompt."""


class PairedError(ValueError):
    """A file that is no paired scores; one line saying which and why."""


@dataclass(frozen=True)
class Paired:
    """``scores``: name to ``better`` (``higher`` or ``lower``) and ``label``. ``models``: name to :data:`Values`, the
    untuned ``base`` among them. ``first`` is as long for all models; ``second`` may be absent, or shorter."""

    scores: Mapping[str, Mapping[str, str]]
    models: Mapping[str, Values]
    few_steps: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def of(self, model: str, name: str) -> Paired:
        """The base and one model alone, called ``name``; of the scores, those that the model has."""
        values = self.models[model]
        scores = {score: about for score, about in self.scores.items() if score in values}
        base = {score: self.models["base"][score] for score in scores}
        return Paired(scores, {"base": base, name: {score: values[score] for score in scores}}, self.few_steps)


def write_paired(path: Path, paired: Paired) -> None:
    """``paired`` as JSON, whole or not at all."""
    write_json(path, {"version": VERSION, **paired.__dict__})


def read_paired(path: Path) -> Paired:
    """What :func:`write_paired` wrote. Raises :class:`PairedError` for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise PairedError(f"more than {LARGEST} bytes")
        value = json.loads(content, parse_constant=_refuse)
        if not isinstance(value, dict) or value.get("version") != VERSION:
            raise PairedError(f"expected an object of version {VERSION}")
        few = value.get("few_steps")
        if type(few) is not int:
            raise PairedError("few_steps must be a whole number")
        about = {
            name: {key: _text(text) for key, text in _object(its, name).items() if key in ("better", "label")}
            for name, its in _object(value.get("scores"), "scores").items()
        }
        models = {
            model: {
                score: {seed: _list(values, score) for seed, values in _object(its, score).items()}
                for score, its in _object(scores, model).items()
            }
            for model, scores in _object(value.get("models"), "models").items()
        }
        return Paired(about, models, few)
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise PairedError(f"{path}: no paired scores ({str(error)[:200] or type(error).__name__})") from None


def _check(paired: Paired) -> None:
    for names in (paired.scores, paired.models):
        if len(names) > MOST_NAMES or not all(_NAME.fullmatch(name) for name in names):
            raise PairedError(f"expected at most {MOST_NAMES} names of a-z, 0-9, _ and -")
    for score, about in paired.scores.items():
        if about.get("better") not in ("higher", "lower") or not about.get("label"):
            raise PairedError(f"{score}: better must be higher or lower, and label a text")
    base = paired.models.get("base")
    if base is None:
        raise PairedError("there is no model base")
    for model, values in paired.models.items():
        if not set(values) <= set(base):
            raise PairedError(f"{model} has scores that the base has not")
        for score, seeds in values.items():
            _check_score(paired, model, score, seeds)


def _check_score(paired: Paired, model: str, score: str, seeds: Mapping[str, tuple[float, ...]]) -> None:
    where, first = f"{score} of {model}", seeds.get("first", ())
    if score not in paired.scores or not set(seeds) <= {"first", "second"}:
        raise PairedError(f"{where}: not listed under scores, or seeds other than first and second")
    if not 0 < len(first) == len(paired.models["base"][score].get("first", ())) or len(first) > MOST_PROMPTS:
        raise PairedError(f"{where}: expected a number for each of the base's prompts, got {len(first)}")
    if len(seeds.get("second", ())) > len(first):
        raise PairedError(f"{where}: more prompts with the second noise than with the first")
    if not all(math.isfinite(value) for values in seeds.values() for value in values):
        raise PairedError(f"{where}: not all numbers are finite")


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PairedError(f"{name} must be an object")
    return value


def _list(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        raise PairedError(f"{name} must have lists of numbers")
    return tuple(float(number) for number in value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 100 or not value.isprintable():
        raise PairedError("better and label must be texts of at most 100 characters")
    return value


def _refuse(constant: str) -> float:
    raise PairedError(f"{constant} is no finite number")
