"""The before-and-after table, once for all places that show it: terminal, page and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .naming import REFERENCES, lowest_known, main_model, name_of, probe_right, prompts_described, score_of

COLUMNS = ("likeness", "style", "cosine", "concept_top1", "prompt", "reward", "judge", "sharpness", "copy", "kid")
"""Scores of the concept's prompts that the table shows, where they exist."""
KEPT_COLUMNS = ("kept", "prompt", "reward")
KNOWN_COLUMNS = ("style", "cosine", "concept_top1", "structure", "sharpness", "mse")
_OF_SPLIT = {"concept": COLUMNS, "kept": KEPT_COLUMNS, "near": KEPT_COLUMNS,
             "known": KNOWN_COLUMNS}  # fmt: skip
PUBLISHED = {"dino_d": "DINO-D ↓", "lpips_d": "LPIPS-D ↓", "clip_s": "CLIP-S ↑", "judge": "judge, 1 to 4 ↑"}
LEARNT_COLUMNS = (
    "learnt", "likeness_gain", "gap_closed_style", "gap_closed_truth", "few_step_new", "copied", "diversity"
)  # fmt: skip
LOST_COLUMNS = ("kept", "kept_many", "kept_near", "kept_sharpness", "few_step_old", "known_lowest")
HEADLINE_COLUMNS = (*LEARNT_COLUMNS, *LOST_COLUMNS)
LABELS = {
    "learnt": "learnt",
    "likeness_gain": "likeness gained",
    "gap_closed_style": "gap closed: style",
    "gap_closed_truth": "gap closed: truth",
    "few_step_new": "few-step, concept",
    "copied": "copied",
    "diversity": "diversity",
    "kept": "kept",
    "kept_many": "kept, many steps",
    "kept_near": "kept, near the concept",
    "kept_sharpness": "sharpness kept",
    "few_step_old": "few-step, general",
    "known_lowest": "old styles kept",
}
_ABOVE = {"copied": "↓", "diversity": "→1", "kept_sharpness": "→1"}
_ARROWS = {"higher": "↑", "lower": "↓", "one": "→1"}
_NO_CHANGE = dict.fromkeys(LEARNT_COLUMNS, 0) | {"few_step_old": 0, "diversity": 1, "kept_sharpness": 1,
                                                 "known_lowest": 1}  # fmt: skip
"""What an untuned model would have; of what was kept none could have more, so nothing is marked there."""
_PAIRED = {"learnt": "learnt", "kept": "kept", "few_step_new": "few_step", "few_step_old": "few_step_kept"}
"""Of which the paired difference from the main model's is known, and under which name."""
MARKS = {"better": "▲", "worse": "▼", "same": "≈", "": ""}
Change = Literal["better", "worse", "same", ""]


@dataclass(frozen=True)
class Entry:
    """One number of the table. ``change``: better or worse than ``beside``, where that can be said at all (the
    interval does not reach the other's value)."""

    value: float | None
    low: float | None = None
    high: float | None = None
    digits: int = 3
    change: Change = ""
    beside: str = "the untuned base"

    @property
    def text(self) -> str:
        """The value, or a dash."""
        return "–" if self.value is None else self._written(self.value)

    @property
    def between(self) -> str:
        """The 95 % interval, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"{self._written(self.low)} to {self._written(self.high)}"

    @property
    def mark(self) -> str:
        """▲ better, ▼ worse, ≈ a difference that chance may have made or that is too small to speak of, or nothing."""
        return MARKS[self.change]

    @property
    def told(self) -> str:
        """The mark in words."""
        if self.change == "same":
            return f"no clear difference from {self.beside}"
        return f"{self.change} than {self.beside}, more than chance" if self.change else ""

    def _written(self, value: float) -> str:
        return f"{round(value, self.digits) + 0.0:.{self.digits}f}"  # no minus before a zero


@dataclass(frozen=True)
class Column:
    """A column's key, title with the direction that is good, and its explanation."""

    key: str
    title: str
    meaning: str


def columns_of(metrics: Mapping[str, Any], split: str) -> list[Column]:
    """The columns that this evaluation has numbers for."""
    keys, rows = _OF_SPLIT.get(split, ()), metrics["scores"].get(split, {}).values()
    found = dict.fromkeys(name for scores in rows for name in scores)
    shown = [score_of(name) for key in keys for name in found if _shown_as(name, key, split)]
    return [Column(score.key, titled(metrics, score.key, f"{score.label} {_ARROWS[score.better]}"), score.meaning)
            for score in shown]  # fmt: skip


def _shown_as(name: str, key: str, split: str) -> bool:
    """Whether a score is ``key``, or another backbone's. What the first one says of what was kept is in the headline;
    the targets are the published protocol's."""
    if key == "kept" and name == key:
        return False
    return name.partition("@")[0] == key


def headline_columns(metrics: Mapping[str, Any], keys: Sequence[str] = HEADLINE_COLUMNS) -> list[Column]:
    """Those of ``keys``, headline numbers, that some model has."""
    found = [key for key in keys if any(key in numbers for numbers in metrics["headline"].values())]
    if "learnt" in found and "likeness_gain" in found:
        found.remove("likeness_gain")  # the same, before it is measured by real pictures
    names = labels_of(metrics)
    return [Column(key, titled(metrics, key, f"{names[key]} {_ABOVE.get(key, '↑')}"), MEANINGS[key]) for key in found]


def labels_of(metrics: Mapping[str, Any]) -> Mapping[str, str]:
    """What the headline numbers are called, by what style is measured by."""
    return LABELS if metrics["style_score"] == "style" else LABELS | {"gap_closed_style": "gap closed: likeness"}


def titled(metrics: Mapping[str, Any], key: str, title: str) -> str:
    """A score's title; what rests on the probe says how often that is right."""
    rests = (
        key in ("style", "style_hit")
        or (key == "gap_closed_style" and metrics["style_score"] == "style")
        or (key == "known_lowest" and any(lowest_known(metrics, model) == "style" for model in metrics["models"]))
    )
    return f"{title} ({probe_right(metrics)})" if rests and probe_right(metrics) else title


MEANINGS = {
    "learnt": "how much of the way from the untuned base's likeness to that of real pictures it goes, 1 at most",
    "likeness_gain": "how much more like the training pictures its pictures are than the untuned base's",
    "few_step_new": "how much less of that way it goes in few steps than in many, what the base loses taken off; 0 is "
    "no loss",
    "few_step_old": "how much less it keeps in few steps than in many, what the base loses taken off; 0 is no loss",
    "kept": "how much of the base's own pictures is left, on general prompts; 0 is as different as another seed, and "
    "below it further away than that",
    "kept_many": "the same in many steps",
    "kept_near": "the same for the captions without the placeholder",
    "kept_sharpness": "sharpness on general prompts, over the base's",
    "gap_closed_style": "how much of the way from the untuned base to its teacher the tuned model goes: 0 is "
    "the base, 1 the teacher",
    "gap_closed_truth": "the same in similarity to the true picture",
    "known_lowest": "the tuned model's score against the true pictures of old styles over the base's, for whichever "
    "score lost most",
    "copied": "the share of its pictures that are copies of a training picture",
    "diversity": "how far two seeds' pictures of the concept are apart, over the base's",
}


def rows_of(metrics: Mapping[str, Any], split: str) -> list[tuple[str, list[Entry]]]:
    """(model, entries) in the order: models as they were evaluated, the true pictures last (first as the autoencoder
    carries them)."""
    columns = columns_of(metrics, split)
    scores = metrics["scores"].get(split, {})
    models = [model for model in [*metrics["models"], "decoded", "real"] if model in scores]
    return [(model, [_entry(metrics, split, model, column.key) for column in columns]) for model in models]


def headline_rows(metrics: Mapping[str, Any], keys: Sequence[str] = HEADLINE_COLUMNS) -> list[tuple[str, list[Entry]]]:
    """(model, entries) of the tuned models, one entry for each of :func:`headline_columns`. The main model's are marked
    beside no change, the others' beside the main model's."""
    columns = headline_columns(metrics, keys)
    models = [model for model in metrics["models"] if model not in REFERENCES] if columns else []
    return [(model, [_headline_entry(metrics, model, column.key) for column in columns]) for model in models]


def published_table(metrics: Mapping[str, Any]) -> tuple[list[Column], list[tuple[str, list[Entry]]]]:
    """The published protocol's numbers, as far as they were measured; no columns with another protocol."""
    found = metrics.get("published", {})
    keys = [key for key in PUBLISHED if any(key in numbers for numbers in found.values())]
    columns = [Column(key, PUBLISHED[key], "docs/evaluation.md") for key in keys]
    return columns, [(model, [Entry(*numbers.get(key, (None,))) for key in keys]) for model, numbers in found.items()]


def _headline_entry(metrics: Mapping[str, Any], model: str, key: str) -> Entry:
    numbers = [metrics["headline"].get(model, {}).get(key)]
    numbers += metrics["intervals"]["headline"].get(model, {}).get(key, (None, None))
    value, low, high = numbers
    main = main_model(metrics)
    if model == main:
        return Entry(value, low, high, 2, _beside_no_change(key, value, low, high), "no change")
    return Entry(value, low, high, 2, beside_main(metrics, model, key), name_of(main or ""))


def _beside_no_change(key: str, value: float | None, low: float | None, high: float | None) -> Change:
    none = _NO_CHANGE.get(key)
    if none is None or value is None or low is None or high is None:
        return ""
    if low <= none <= high or abs(value - none) < _HARDLY:
        return "same"
    if _ABOVE.get(key) == "→1":
        return "worse" if high < none else ""  # of more nobody can say whether it is good
    return "better" if (low > none) == (key != "copied") else "worse"


_HARDLY = 0.05
"""Of a headline number: no difference to speak of, however certain."""


def beside_main(metrics: Mapping[str, Any], model: str, key: str) -> Change:
    """Whether a headline number's paired difference from the main model's is more than chance, and which way."""
    found = metrics.get("against", {}).get(model, {}).get(_PAIRED.get(key, ""))
    if found is None:
        return ""
    _, low, high = found
    return "better" if low > 0 else "worse" if high < 0 else "same"


def _entry(metrics: Mapping[str, Any], split: str, model: str, key: str) -> Entry:
    value = metrics["scores"][split][model].get(key)
    low, high = metrics["intervals"]["scores"][split][model].get(key, (None, None))
    return Entry(value, low, high, score_of(key).digits, _change(metrics, split, model, key))


def _change(metrics: Mapping[str, Any], split: str, model: str, key: str) -> Change:
    """By the paired difference from the base."""
    found = metrics.get("differences", {}).get(split, {}).get(model, {}).get(key)
    if found is None:
        return ""
    mean, low, high = found
    # what the table's digits hardly show is no difference to speak of, however certain
    if low <= 0 <= high or abs(mean) < 5 * 10.0 ** -score_of(key).digits:
        return "same"
    value, base = (metrics["scores"][split][name][key] for name in (model, "base"))
    closer = abs(value - 1) < abs(base - 1)
    up = {"higher": mean > 0, "lower": mean < 0, "one": closer}[score_of(key).better]
    return "better" if up else "worse"


MODELS_ABREAST = 7
"""So many columns fit into 80 characters with every word whole, whatever scores there are."""


def headline_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """The tables for the terminal, a row per score: the headline of the tuned models, then the concept's scores of all,
    several below each other where the models are many."""
    few, counts, main = metrics["few_steps"], metrics["counts"], main_model(metrics)
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
    tables[0].title = f"{metrics['concept']}: {few} step{'s' if few > 1 else ''}, {prompts_described(metrics)}"
    marks = "▲ better and ▼ worse than the untuned base, ≈ no clear difference; "
    if len(headline_rows(metrics)) > 1:
        marks += f"above, of the others: than {name_of(main or '')}; "
    general = f", {counts['kept_prompts']} general prompts" if counts["kept_prompts"] else ""
    tables[-1].caption = f"{marks}{decoded}intervals, curves{general}: see the report"
    return tables


def _by_score(columns: list[Column], rows: list[tuple[str, list[Entry]]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("score")
    for model, entries in rows:
        # a column of no width of its own is narrowed into the words
        width = max(
            len(word) for text in (name_of(model), *(e.text + e.mark for e in entries)) for word in text.split()
        )
        style = "dim" if model in REFERENCES else "bold"
        table.add_column(name_of(model), width=width, justify="right", style=style)
    for column, *entries in zip(columns, *(entries for _, entries in rows), strict=True):
        table.add_row(column.title, *(entry.text + entry.mark for entry in entries))
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
