"""``benchmarks/step.py``: docs/benchmarks.md shows what the command wrote, and what it wrote adds up."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import step

ROOT = Path(__file__).parent.parent


def test_the_page_shows_the_tables_of_the_file_and_the_file_adds_up() -> None:
    report = json.loads(step.OUT.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for line in step.tables(report):
        assert line in page
    assert f"`{report['command']}`" in page
    parts = report["parts"]
    for kind in ("by kind", "by phase"):
        assert sum(parts[kind].values()) == pytest.approx(parts["whole_ms"])
    assert parts["by kind"]["floor"] == pytest.approx(1e3 * parts["gflop"] / parts["product_gflop_per_second"])
    norms = {round(run["gradient_norm"], 5) for runs in report["runs"].values() for run in runs}
    assert len(norms) == 1, "all variants learn the same"
    medians = {k: statistics.median(run["seconds_per_step"] for run in runs) for k, runs in report["runs"].items()}
    assert report["speed_ratio"] == pytest.approx(medians["plain"] / medians["ours"])
