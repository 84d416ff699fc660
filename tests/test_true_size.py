"""``benchmarks/true_size.py`` at tiny size: its files, what it measures, and what it does when something goes wrong."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "true_size.py"
TINY = ("--scale", "tiny", "--device", "cpu", "--models", "z-image-turbo", "--steps", "1")


def run(out: Path, *arguments: str) -> dict[str, Any]:
    """The command in a process of its own; what it wrote, rows by variant."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *TINY, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((out / "true_size.json").read_text(encoding="utf-8"))
    assert (out / "true_size.md").read_text(encoding="utf-8").rstrip() in done.stdout  # the table comes last
    return written | {"rows": {row["variant"]: row for row in written["rows"]}}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The command's own functions."""
    spec = importlib.util.spec_from_file_location("true_size", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measures_ours_and_plain(tmp_path: Path) -> None:
    result = run(tmp_path, "--variants", "machine,floor,profile,ours+nocast,decoding,plain,agreement")
    rows = result["rows"]
    assert {row["status"] for row in rows.values()} == {"measured"}, rows
    assert result["side"] == 64
    assert rows["machine"]["matmul_tflop_per_second"] > 0
    assert rows["floor"]["step_tflop"] == pytest.approx(
        4 * sum(rows["floor"][f"{part}_tflop"] for part in ("teacher", "student", "backward"))
    )
    for variant in ("ours+nocast", "plain"):
        row = rows[variant]
        assert len(row["seconds"]) == 1
        assert row["peak_bytes"] >= row["resident_bytes"] > 0
        assert row["loss"] > 0
        assert row["gradient_norm"] > 0
        assert row["over_floor"] == pytest.approx(row["seconds_per_step"] / rows["floor"]["floor_seconds"])
    assert [stage["what"] for stage in rows["decoding"]["stages"]] == ["decode 1 picture", "decode 4 pictures"]
    assert sum(group["share"] for group in rows["profile"]["groups"].values()) == pytest.approx(1)
    assert "the 25 longest" in (tmp_path / "profile.txt").read_text(encoding="utf-8")

    same = rows["agreement"]
    # in float32 the two differ only in the order of sums
    assert same["loss_ours"] == pytest.approx(same["loss_plain"], rel=1e-5)
    assert same["gradient_norm_ours"] == pytest.approx(same["gradient_norm_plain"], rel=1e-5)
    assert same["gradient_difference"] < 1e-5

    page = (tmp_path / "true_size.md").read_text(encoding="utf-8")
    assert result["date"][:10] in page
    assert rows["machine"]["card"] in page
    assert max(map(len, page.splitlines())) <= 120


def test_a_variant_that_fails_costs_its_own_row(tmp_path: Path) -> None:
    rows = run(tmp_path, "--variants", "machine,ours", "--side", "8")["rows"]  # no whole patch
    assert rows["machine"]["status"] == "measured"
    assert rows["ours"]["status"] == "failed"
    assert rows["ours"]["error"]
    assert "Traceback" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_without_time_everything_is_skipped(tmp_path: Path) -> None:
    result = run(tmp_path, "--minutes", "0")
    assert {row["status"] for row in result["rows"].values()} == {"skipped"}
    assert len(result["rows"]) > 10


CHILD = """
import json, os, sys, time
say = lambda event: print(json.dumps(event), flush=True)
say({"ready": True})
for variant in json.loads(sys.stdin.readline())["variants"]:
    if variant == "sampling":
        print("gone", file=sys.stderr, flush=True)
        os._exit(9)
    if variant == "decoding":
        time.sleep(60)
    say({"status": "failed", "error": "no"} if variant == "floor" else {"status": "measured"})
    if variant == "floor":
        break
"""


def test_what_crashes_hangs_or_fails_is_put_down_and_the_rest_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "CHILD", [sys.executable, "-c", CHILD])
    given = argparse.Namespace(
        out=tmp_path, scale="tiny", device="cpu", side=64, steps=1, minutes=5.0, limit=1.0, models="m", variants=None
    )
    variants = ["machine", "floor", "sampling", "decoding", "encoding", script.COMPILED]
    report = script.Report(given, [("m", variants)])
    script.run_all(report, given)
    rows = {row["variant"]: row for row in json.loads((tmp_path / "true_size.json").read_text())["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "machine": "measured", "floor": "failed", "sampling": "failed", "decoding": "timeout", "encoding": "measured",
        script.COMPILED: "skipped",
    }  # fmt: skip
    assert "code 9: gone" in rows["sampling"]["error"]


def test_where_no_process_starts_nothing_is_tried_twice(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "CHILD", [sys.executable, "-c", "import no_such_library"])
    given = argparse.Namespace(
        out=tmp_path, scale="tiny", device="cpu", side=64, steps=1, minutes=5.0, limit=None, models="m", variants=None
    )
    report = script.Report(given, [("m", ["machine", "ours"]), ("n", ["ours"])])
    script.run_all(report, given)
    assert [row["status"] for row in report.rows] == ["failed", "skipped", "skipped"]
    assert "no_such_library" in report.rows[0]["error"]
