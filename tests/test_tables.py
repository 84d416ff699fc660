"""Everything that is printed as a table, at 80 columns: no word is broken."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dopsd.clean import Leftover, leftovers_table
from dopsd.config import load_settings
from dopsd.doctor import Finding, findings_table
from dopsd.evaluation.naming import NAMES, SCORES
from dopsd.evaluation.table import Entry, headline_columns, headline_rows, headline_tables
from dopsd.gain_report import GainReport, Measured, Way, gain_table
from dopsd.runs import Run, runs_table
from emoji_turbo.check import Line
from emoji_turbo.cli import check_table
from infra.local import services
from infra.local.processes import Supervisor
from infra.local.stack import PORTS, Stack

EVERY = ("base", "teacher", "d-opsd", "sft", "sft-compute", "sft-teacher", "off-policy")
DEMO = ("base", "teacher", "d-opsd", "sft", "sft-compute")


def printed(tables: list[Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(*tables)
    return console.export_text()


def words(text: str) -> set[str]:
    return {word for line in text.splitlines() for word in line.translate(_FRAME).split()}


_FRAME = str.maketrans(dict.fromkeys("│┃─━┏┓┗┛┡┩┳┻╇┴┬├┤┼╈╋└┘┌┐╰╯╭╮┠┨╶╴╵╷╸╺┝┥┿┾┽╀╁╂", " "))


def metrics(models: tuple[str, ...], scores: tuple[str, ...], style: str = "style") -> dict[str, Any]:
    """An evaluation with a number for everything."""
    shown = [*models, "decoded", "real"]
    values = dict.fromkeys(scores, 0.1234)
    tuned = [model for model in models if model not in ("base", "teacher")]
    headline = {
        "gap_closed_style": -1.02, "gap_closed_truth": 0.87, "known_lowest": 0.96, "learnt": 0.81, "kept": 0.72,
        "few_step_new": -0.02, "few_step_old": -0.01, "copied": 0.0, "diversity": 1.31, "kept_many": 0.71,
        "kept_near": -1.63, "kept_sharpness": 0.97,
    }  # fmt: skip
    return {
        "concept": "a-concept-with-a-long-name-of-its-own", "few_steps": 4, "models": list(models),
        "style_score": style, "counts": {"concept_prompts": 10, "kept_prompts": 30},
        "scores": {"concept": {model: dict(values) for model in shown}},
        "headline": {model: dict(headline) for model in tuned},
        "intervals": {
            "headline": {model: dict.fromkeys(headline, (-9, 9)) for model in tuned},
            "scores": {"concept": {model: {} for model in shown}},
        },
        "differences": {"concept": {model: dict.fromkeys({*scores} - {"kid"}, (1, 1, 1)) for model in models[1:]}},
    }  # fmt: skip


def gain() -> GainReport:
    distances = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    settings = load_settings(Path(__file__).parents[1] / "params.yaml")
    ways = (Way("vlm", "vlm", settings, True), Way("enhanced-prompt", None, settings, False))
    numbers = {"gain": -10.505, "improved": 1.0, "images": 24.0}
    measured = tuple(Measured(way, ({**numbers, "gain": 0.1}, numbers, numbers), distances) for way in ways)
    return GainReport("a-concept-of-mine", 4, (0, 1, 2), tuple(range(6)), distances, measured, ())


FINDINGS = [
    Finding("python", "3.11.9"),
    Finding("transformers", "not installed", "fault", "run `make setup`"),
    Finding("device", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition, 96 GiB"),
    Finding("teacher's VLM", "Qwen/Qwen3-VL-4B-Instruct", "note", "fetched by the first stage that needs it"),
    Finding("base model", "/a/very/long/path/to/where/somebody/keeps/all/of/his/models/Z-Image-Turbo: no such folder",
            "fault", "`emoji-turbo build` makes it anew"),
]  # fmt: skip
ROOT = Path("/project")
LEFTOVERS = [
    Leftover((ROOT / "runs/wolf/train/sft.previous-1",), "set aside before its first checkpoint", 10**9),
    Leftover((ROOT / "runs/x/train/d-opsd.partial",), "half-written by a process that was killed", 999_900_000),
    Leftover((ROOT / ".cache/encodings/a", ROOT / ".cache/encodings/b"), "encodings that no concept uses", 5),
]  # fmt: skip
MADE_OF = {"settings": {"max_steps": 2000, "batch_size": 1, "learning_rate": 1e-4, "lora": {"rank": 64}}}
RUNS = [
    Run(ROOT / "runs/a-concept-of-mine/train" / name, ".previous" in name, 2000, "interrupted", 10**12, 5 * 10**9, made)
    for name, made in (("d-opsd", MADE_OF), ("d-opsd.previous-12", {}), ("off-policy", MADE_OF))
]

TABLES = {
    "show, the demo": lambda: headline_tables(metrics(DEMO, tuple(SCORES))),
    "show, every method": lambda: headline_tables(metrics(EVERY, tuple(SCORES))),
    "show, no probe": lambda: headline_tables(metrics(EVERY, tuple(SCORES), style="likeness")),
    "doctor": lambda: [findings_table(FINDINGS)],
    "clean": lambda: [leftovers_table(LEFTOVERS, ROOT, deleted=False)],
    "runs": lambda: [runs_table(RUNS, ROOT)],
    "gain": lambda: [gain_table(gain())],
    "emoji-turbo check": lambda: [
        check_table([Line("D-OPSD teacher, style blobs: 4 steps minus 32 steps", -0.9912, 0.0123, "within 0.1", True)])
    ],
}


@pytest.mark.parametrize("name", TABLES)
def test_no_word_is_broken_at_80_columns(name: str) -> None:
    narrow = printed(TABLES[name](), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    whole = words(printed(TABLES[name](), 1000))
    paths = {word for word in whole if "/" in word}
    broken = [word for word in words(narrow) - whole if not any(word in path for path in paths)]
    assert not broken
    missing = whole - words(narrow) - paths
    assert not missing, "cut off"


def test_every_model_and_score_is_shown() -> None:
    """More models than fit abreast are a second table with the same rows; the headline's is of tuned ones alone."""
    head, first, second = TABLES["show, every method"]()
    assert [column.header for column in head.columns] == ["score", *(NAMES[model] for model in EVERY[2:])]
    assert [column.header for table in (first, second) for column in table.columns] == [
        "score", *(NAMES[model] for model in EVERY), "score", NAMES["decoded"], NAMES["real"],
    ]  # fmt: skip
    assert list(first.columns[0].cells) == list(second.columns[0].cells)


def test_a_mark_says_what_is_more_than_chance() -> None:
    """The main model's beside no change at all, the others' beside the main model's, where that is known."""
    numbers = metrics(("base", "d-opsd", "sft"), ("style",))
    values = {"learnt": 0.8, "few_step_new": -0.02, "few_step_old": -0.3, "copied": 0.2, "diversity": 0.7, "kept": 0.7,
              "known_lowest": 1.01, "kept_sharpness": 1.4, "gap_closed_style": 0.3}  # fmt: skip
    bounds = {"learnt": (0.7, 0.9), "few_step_new": (-0.03, -0.01), "few_step_old": (-0.4, -0.2), "copied": (0.1, 0.3),
              "diversity": (0.6, 0.8), "kept": (0.6, 0.8), "known_lowest": (0.9, 1.1), "kept_sharpness": (1.3, 1.5),
              "gap_closed_style": (-0.1, 0.7)}  # fmt: skip
    for model in ("d-opsd", "sft"):
        numbers["headline"][model] = values
        numbers["intervals"]["headline"][model] = bounds
    numbers["against"] = {"sft": {"learnt": (-0.1, -0.2, -0.01), "kept": (0.1, 0.01, 0.2), "few_step": (0, -0.1, 0.1)}}
    keys = [column.key for column in headline_columns(numbers)]
    marks = {model: dict(zip(keys, [e.mark for e in row], strict=True)) for model, row in headline_rows(numbers)}
    assert marks["d-opsd"] == {
        "learnt": "▲", "few_step_new": "≈", "few_step_old": "▼", "copied": "▼", "diversity": "▼", "kept": "",
        "known_lowest": "≈", "kept_sharpness": "", "gap_closed_style": "≈",
    }  # fmt: skip
    assert marks["sft"] == dict.fromkeys(keys, "") | {"learnt": "▼", "kept": "▲", "few_step_new": "≈"}
    assert "0.80▲" in printed(headline_tables(numbers), 80)
    told = [entry.told for _, row in headline_rows(numbers) for entry in row[:1]]
    assert told == ["better than no change, more than chance", "worse than D-OPSD, more than chance"]


def test_a_zero_has_no_sign() -> None:
    entry = Entry(-0.001, -0.004, 0.004, 2)
    assert (entry.text, entry.between) == ("0.00", "0.00 to 0.00")


def test_the_services_table_fits(tmp_path: Path) -> None:
    stack = Stack(tmp_path, tmp_path, dict.fromkeys(PORTS, 54321))
    text = printed([services._table(stack, Supervisor(stack))], 80)
    assert words(text) == words(printed([services._table(stack, Supervisor(stack))], 1000))


def test_a_broken_word_would_be_noticed() -> None:
    assert words("│ sharpne │\n│ ss │") - words("sharpness") == {"sharpne", "ss"}
