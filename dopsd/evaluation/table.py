"""The before-and-after table, once for all places that show it: terminal, page and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .naming import REFERENCES, SCORES, name_of, prompts_described

COLUMNS = ("likeness", "style", "cosine", "concept_top1", "prompt", "sharpness", "copy", "kid")
"""Scores of the concept's prompts that the table shows, where they exist."""
KEPT_COLUMNS = ("kept", "prompt", "sharpness")
KNOWN_COLUMNS = ("style", "cosine", "concept_top1", "structure", "sharpness", "mse")
_OF_SPLIT = {"concept": COLUMNS, "kept": KEPT_COLUMNS, "near": KEPT_COLUMNS, "known": KNOWN_COLUMNS}
HEADLINE_COLUMNS = ("learnt", "few_step_new", "few_step_old", "kept", "gap_closed_style", "gap_closed_truth",
                    "known_lowest", "copied", "diversity")  # fmt: skip
LABELS = {
    "learnt": "learnt",
    "few_step_new": "few-step, concept",
    "few_step_old": "few-step, general",
    "kept": "kept",
    "gap_closed_style": "gap closed: style",
    "gap_closed_truth": "gap closed: truth",
    "known_lowest": "old styles kept",
    "copied": "copied",
    "diversity": "diversity",
}
_ABOVE = {"copied": "↓", "diversity": "→1"}
_AT_MOST_1 = {"learnt", "gap_closed_style", "gap_closed_truth"}
_ARROWS = {"higher": "↑", "lower": "↓", "one": "→1"}


@dataclass(frozen=True)
class Entry:
    """One number of the table. ``change``: better or worse than the untuned base, where that can be said at all (the
    interval does not reach the base's value)."""

    value: float | None
    low: float | None = None
    high: float | None = None
    digits: int = 3
    change: Literal["better", "worse", "same", ""] = ""

    @property
    def text(self) -> str:
        """The value, or a dash."""
        return "–" if self.value is None else f"{self.value:.{self.digits}f}"

    @property
    def between(self) -> str:
        """The 95 % interval, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"{self.low:.{self.digits}f} to {self.high:.{self.digits}f}"


@dataclass(frozen=True)
class Column:
    """A column's key, title with the direction that is good, and its explanation."""

    key: str
    title: str
    meaning: str


def columns_of(metrics: Mapping[str, Any], split: str) -> list[Column]:
    """The columns that this evaluation has numbers for."""
    keys, rows = _OF_SPLIT[split], metrics["scores"].get(split, {}).values()
    shown = [SCORES[key] for key in keys if any(key in scores for scores in rows)]
    return [Column(score.key, _title(metrics, score.key, f"{score.label} {_ARROWS[score.better]}"), score.meaning)
            for score in shown]  # fmt: skip


def headline_columns(metrics: Mapping[str, Any]) -> list[Column]:
    """The headline numbers that some model has."""
    found = [key for key in HEADLINE_COLUMNS if any(key in numbers for numbers in metrics["headline"].values())]
    names = LABELS if metrics["style_score"] == "style" else LABELS | {"gap_closed_style": "gap closed: likeness"}
    return [Column(key, f"{names[key]} {_ABOVE.get(key, '↑')}", MEANINGS[key]) for key in found]


def _title(metrics: Mapping[str, Any], key: str, title: str) -> str:
    """A score that rests on the probe says how often that is right."""
    accuracy = metrics.get("probe", {}).get("accuracy_clean")
    return f"{title} (probe right in {accuracy:.0%})" if key in ("style", "style_hit") and accuracy else title


MEANINGS = {
    "learnt": "how much of the way from the untuned base's likeness to that of real pictures it goes, 1 at most",
    "few_step_new": "what few steps show less of than many, on the concept, beside what the base loses; 0 is no loss",
    "few_step_old": "the same on general prompts",
    "kept": "how much of the base's own pictures is left, on general prompts; 0 is as different as another noise",
    "gap_closed_style": "how much of the way from the untuned base to its teacher the tuned model goes: 0 is "
    "the base, 1 the teacher",
    "gap_closed_truth": "the same in similarity to the true picture",
    "known_lowest": "the tuned model's score against the true pictures of old styles over the base's, for whichever "
    "score lost most",
    "copied": "the share of its pictures that are copies of a training picture",
    "diversity": "how far two noises' pictures of the concept are apart, over the base's",
}


def rows_of(metrics: Mapping[str, Any], split: str) -> list[tuple[str, list[Entry]]]:
    """(model, entries) in the order: models as they were evaluated, the true pictures last (first as the autoencoder
    carries them)."""
    columns = columns_of(metrics, split)
    scores = metrics["scores"].get(split, {})
    models = [model for model in [*metrics["models"], "decoded", "real"] if model in scores]
    return [(model, [_entry(metrics, split, model, column.key) for column in columns]) for model in models]


def headline_rows(metrics: Mapping[str, Any]) -> list[tuple[str, list[Entry]]]:
    """(model, entries) of the tuned models, one entry for each of :func:`headline_columns`."""
    columns = headline_columns(metrics)
    models = [model for model in metrics["models"] if model not in REFERENCES]
    return [(model, [_headline_entry(metrics, model, column.key) for column in columns]) for model in models]


def _headline_entry(metrics: Mapping[str, Any], model: str, key: str) -> Entry:
    numbers = [metrics["headline"].get(model, {}).get(key)]
    numbers += metrics["intervals"]["headline"].get(model, {}).get(key, (None, None))
    most = 1.0 if key in _AT_MOST_1 else float("inf")
    value, low, high = (None if number is None else min(number, most) for number in numbers)
    return Entry(value, low, high, 2)


def _entry(metrics: Mapping[str, Any], split: str, model: str, key: str) -> Entry:
    value = metrics["scores"][split][model].get(key)
    low, high = metrics["intervals"]["scores"][split][model].get(key, (None, None))
    return Entry(value, low, high, SCORES[key].digits, _change(metrics, split, model, key))


def _change(metrics: Mapping[str, Any], split: str, model: str, key: str) -> Literal["better", "worse", "same", ""]:
    """By the paired difference from the base."""
    found = metrics.get("differences", {}).get(split, {}).get(model, {}).get(key)
    if found is None or (split in ("kept", "near") and key == "kept"):  # what is left of it cannot be more than all
        return ""
    mean, low, high = found
    # what the table's digits hardly show is no difference to speak of, however certain
    if low <= 0 <= high or abs(mean) < 5 * 10.0 ** -SCORES[key].digits:
        return "same"
    value, base = (metrics["scores"][split][name][key] for name in (model, "base"))
    closer = abs(value - 1) < abs(base - 1)
    up = {"higher": mean > 0, "lower": mean < 0, "one": closer}[SCORES[key].better]
    return "better" if up else "worse"


MODELS_ABREAST = 7
"""So many columns fit into 80 characters with every word whole, whatever scores there are."""


def headline_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """The tables for the terminal, a row per score: the headline of the tuned models, then the concept's scores of all,
    several below each other where the models are many."""
    few, counts = metrics["few_steps"], metrics["counts"]
    note = "decoded: the true pictures as the autoencoder carries them, the most that the base can draw; "
    decoded = note if "decoded" in metrics["scores"]["concept"] else ""
    parts = [(columns_of(metrics, "concept"), rows_of(metrics, "concept"))]
    if headline_rows(metrics):
        parts.insert(0, (headline_columns(metrics), headline_rows(metrics)))
    tables = [
        _by_score(columns, rows[first : first + MODELS_ABREAST])
        for columns, rows in parts
        for first in range(0, len(rows), MODELS_ABREAST)
    ]
    tables[0].title = f"{metrics['concept']}: {few} steps, {counts['concept_prompts']} {prompts_described(metrics)}"
    tables[-1].caption = f"{decoded}intervals, curves, {counts['kept_prompts']} general prompts: see the report"
    return tables


def _by_score(columns: list[Column], rows: list[tuple[str, list[Entry]]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("score")
    for model, entries in rows:
        # a column of no width of its own is narrowed into the words
        width = max(len(word) for text in (name_of(model), *(e.text for e in entries)) for word in text.split())
        style = "dim" if model in REFERENCES else "bold"
        table.add_column(name_of(model), width=width, justify="right", style=style)
    for column, *entries in zip(columns, *(entries for _, entries in rows), strict=True):
        table.add_row(column.title, *(entry.text for entry in entries))
    return table


def table_as_text(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows as text, intervals in brackets, the headline's numbers behind the scores: for the card."""
    extra = dict(headline_rows(metrics))
    titles = ["model", *(column.title for column in [*columns_of(metrics, "concept"), *headline_columns(metrics)])]
    rows = []
    for model, entries in rows_of(metrics, "concept"):
        all_of_it = [*entries, *extra.get(model, [Entry(None)] * len(headline_columns(metrics)))]
        cells = [f"{e.text} ({e.between})" if e.between else e.text for e in all_of_it]
        rows.append([name_of(model), *cells])
    return titles, rows
