"""The before-and-after table, once for all places that show it: terminal, page and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


def headline_table(metrics: Mapping[str, Any]) -> Table:
    """The table for the terminal."""
    few, counts = metrics["few_steps"], metrics["counts"]
    note = "decoded: the true pictures as the autoencoder carries them, the most that the base can draw; "
    decoded = note if "decoded" in metrics["scores"]["concept"] else ""
    table = Table(
        pad_edge=False,
        collapse_padding=True,
        title=f"{metrics['concept']}: {few} steps, {counts['concept_prompts']} {prompts_described(metrics)}",
        caption=f"{decoded}intervals, curves, old styles ({counts['kept_prompts']} prompts): see the report",
    )
    columns = columns_of(metrics, "concept")
    table.add_column("model", min_width=7)  # the longest word of the names
    for column in columns:
        table.add_column(column.title, justify="right", overflow="fold")
    for model, entries in rows_of(metrics, "concept"):
        tuned = model not in REFERENCES
        table.add_row(name_of(model), *(entry.text for entry in entries), style="bold" if tuned else "dim")
    return table


def table_as_text(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows as text, intervals in brackets: for the model card."""
    titles = ["model", *(column.title for column in columns_of(metrics, "concept"))]
    rows = []
    for model, entries in rows_of(metrics, "concept"):
        cells = [f"{e.text} ({e.between})" if e.between else e.text for e in entries]
        rows.append([name_of(model), *cells])
    return titles, rows
