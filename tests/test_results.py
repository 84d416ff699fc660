"""``benchmarks/results.py``: the tables say what ``results.json`` says, and rows differ in what they name alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_the_shipped_page_is_what_the_shipped_numbers_make() -> None:
    runs = json.loads((DOCS / "results.json").read_text())
    reading = (DOCS / "results-reading.md").read_text()
    assert (DOCS / "results.md").read_text() == results.document(runs, reading)
    assert max(map(len, reading.splitlines())) <= 120


def _run(seed: int, tuned: dict[str, float], **words: float) -> dict[str, Any]:
    """One seed's numbers: a base at 0.1, a teacher at 0.5, and what was tuned."""

    def scores(style: float) -> dict[str, float]:
        return {"style": style, "cosine": style, "sharpness": 2 * style}

    concept = {"base": scores(0.1), "teacher": scores(0.5)} | {name: scores(style) for name, style in tuned.items()}
    head: dict[str, dict[str, float]] = {
        name: {"gap_closed_style": (style - 0.1) / 0.4, "gap_closed_truth": 0.0, "sharpness_vs_base": 1.0,
               "known_lowest": 0.9, "retention_style": 0.8} for name, style in tuned.items()
    }  # fmt: skip
    asked = {word: {"scores": {"concept": {"base": scores(style)}}, "headline": {}} for word, style in words.items()}
    return {
        "concept": "style-ink", "seed": seed, "date": f"2026-11-{28 + seed}", "machine": "a machine", "words": asked,
        "rows": [{"name": name, "label": name.upper(), "steps": 80} for name in tuned],
        "metrics": {"headline": head, "scores": {"concept": concept}},
    }  # fmt: skip


def test_a_row_is_the_mean_over_the_seeds_that_have_it() -> None:
    page = results.document([_run(0, {"a": 0.3, "b": 0.5}, pen=0.9), _run(1, {"a": 0.4})], "how to read it")
    lines = dict(line.strip("| ").split(" | ", 1) for line in page.splitlines() if line.startswith("| "))
    assert "2026-11-28 to 2026-11-29" in page
    assert lines["A (80 steps)"].startswith("2 | 0.35 [0.30, 0.40] | 0.62 [0.50, 0.75] | 0.00 | 1.00 | 0.90 | 0.80")
    assert lines["B (80 steps)"].startswith("1 | 0.50 | 1.00 |")
    assert lines["base, untuned"] == "2 | 0.10 | 0.00 | 0.00 | 1.00 | 1.00"
    assert lines['base, untuned, asked for "pen"'] == "1 | 0.90 | 2.00 | 2.00 | 9.00 | 1.00"


@pytest.mark.parametrize(("concept", "counted"), [("style-ink", 152), ("style-3d", 168)])
def test_rows_differ_in_what_they_name_alone(concept: str, counted: int) -> None:
    rows = [row for row in results.ROWS if concept in row.concepts]
    settings = {row.name: results._settings(concept, 0, row) for row in rows}
    shipped = settings["d-opsd"].train
    for row in rows:
        train = settings[row.name].train
        assert train.lora == shipped.lora
        assert train.schedule == shipped.schedule
        assert (train.learning_rate == shipped.learning_rate) == (row.name != "sft-rate")
        assert (train.replay == shipped.replay) == (not row.name.endswith("-alone"))
        assert train.max_steps == (counted if row.equal_compute else shipped.max_steps)
        assert train.methods == (("d-opsd",) if row.name.startswith("d-opsd") else ("sft",))
        assert settings[row.name].evaluation == settings["d-opsd"].evaluation
