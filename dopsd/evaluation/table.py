"""The before-and-after table, once for all places that show it: terminal, page and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .naming import REFERENCES, SCORES, name_of, prompts_described

COLUMNS = ("style", "train_similarity", "cosine", "concept_top1", "sharpness", "kid")
"""Scores of the concept's prompts that the table shows, where they exist."""
KEPT_COLUMNS = ("style", "cosine", "concept_top1", "structure", "sharpness", "mse")
HEADLINE_COLUMNS = ("gap_closed_style", "gap_closed_truth", "kept_lowest")
LABELS = {
    "gap_closed_style": "gap closed: style",
    "gap_closed_truth": "gap closed: truth",
    "kept_lowest": "old styles kept",
}
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
    keys = list(COLUMNS if split == "concept" else KEPT_COLUMNS)
    if split == "concept" and metrics["style_score"] == "style":
        keys.remove("train_similarity")
    present = [key for key in keys if any(key in scores for scores in metrics["scores"].get(split, {}).values())]
    shown = [SCORES[key] for key in present]
    columns = [Column(score.key, f"{score.label} {_ARROWS[score.better]}", score.meaning) for score in shown]
    if split == "concept":
        for key in HEADLINE_COLUMNS:
            if any(key in numbers for numbers in metrics["headline"].values()):
                label = LABELS[key]
                if key == "gap_closed_style" and metrics["style_score"] != "style":
                    label = "gap closed: training pictures"
                columns.append(Column(key, f"{label} ↑", MEANINGS[key]))
    return columns


MEANINGS = {
    "gap_closed_style": "how much of the way from the untuned base to its teacher the tuned model goes: 0 is "
    "the base, 1 the teacher",
    "gap_closed_truth": "the same in similarity to the true picture",
    "kept_lowest": "the tuned model's score on the base's own styles over the base's, for whichever score lost most",
}


def rows_of(metrics: Mapping[str, Any], split: str) -> list[tuple[str, list[Entry]]]:
    """(model, entries) in the order: models as they were evaluated, the true pictures last (first as the autoencoder
    carries them)."""
    columns = columns_of(metrics, split)
    scores = metrics["scores"].get(split, {})
    models = [model for model in [*metrics["models"], "decoded", "real"] if model in scores]
    return [(model, [_entry(metrics, split, model, column.key) for column in columns]) for model in models]


def _entry(metrics: Mapping[str, Any], split: str, model: str, key: str) -> Entry:
    if key in HEADLINE_COLUMNS:
        value = metrics["headline"].get(model, {}).get(key)
        low, high = metrics["intervals"]["headline"].get(model, {}).get(key, (None, None))
        return Entry(value, low, high, 2)
    value = metrics["scores"][split][model].get(key)
    low, high = metrics["intervals"]["scores"][split][model].get(key, (None, None))
    base = metrics["scores"][split].get("base", {}).get(key)
    return Entry(value, low, high, SCORES[key].digits, _change(key, model, value, low, high, base))


def _change(
    key: str, model: str, value: float | None, low: float | None, high: float | None, base: float | None
) -> Literal["better", "worse", "same", ""]:
    if model in ("base", "decoded", "real") or value is None or base is None or low is None or high is None:
        return ""
    # what the table's digits hardly show is no difference to speak of, however certain
    if low <= base <= high or abs(value - base) < 5 * 10.0 ** -SCORES[key].digits:
        return "same"
    better = SCORES[key].better
    closer = abs(value - 1) < abs(base - 1)
    up = {"higher": value > base, "lower": value < base, "one": closer}[better]
    return "better" if up else "worse"


MODELS_ABREAST = 7
"""So many columns fit into 80 characters with every word whole, whatever scores there are."""


def headline_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """The table for the terminal, a row per score: one, or several below each other where the models are many."""
    few, counts = metrics["few_steps"], metrics["counts"]
    note = "decoded: the true pictures as the autoencoder carries them, the most that the base can draw; "
    decoded = note if "decoded" in metrics["scores"]["concept"] else ""
    columns, rows = columns_of(metrics, "concept"), rows_of(metrics, "concept")
    tables = [_by_score(columns, rows[first : first + MODELS_ABREAST]) for first in range(0, len(rows), MODELS_ABREAST)]
    tables[0].title = f"{metrics['concept']}: {few} steps, {counts['concept_prompts']} {prompts_described(metrics)}"
    tables[-1].caption = f"{decoded}intervals, curves, old styles ({counts['kept_prompts']} prompts): see the report"
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
    """Column titles and rows as text, intervals in brackets: for the model card."""
    titles = ["model", *(column.title for column in columns_of(metrics, "concept"))]
    rows = []
    for model, entries in rows_of(metrics, "concept"):
        cells = [f"{e.text} ({e.between})" if e.between else e.text for e in entries]
        rows.append([name_of(model), *cells])
    return titles, rows
