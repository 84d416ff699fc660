"""The tables of docs/results.md: D-OPSD and SFT, each with and without replay, on both shipped styles over three seeds.

    python benchmarks/results.py
    python benchmarks/results.py --concepts style-ink --seeds 0

Every training is made by the product's own stages below ``.cache/results``, from ``params.yaml`` and its row's changes.
All of one style and seed are then evaluated together: the same prompts, noise and probe for every row. What is finished
with today's base and settings is not run again (after a change of the method itself, delete ``.cache/results/done``).
Writes ``docs/results.json``; out of that alone the tables of ``docs/results.md``, behind ``docs/results-reading.md``;
and the pictures of seed 0 in ``docs/images``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".cache" / "results"
DOCS = ROOT / "docs"
CONCEPTS = ("style-ink", "style-3d")
SEEDS = (0, 1, 2)

NO_REPLAY = "train.replay.weight=0"
D_OPSD = ("train.methods=[d-opsd]",)
SFT = ("train.methods=[sft]", "train.sft_compute_factor=1")
"""SFT of one length, with one whole schedule: the product's own equal-compute adapter goes on from the equal-exposure
one instead, with a schedule begun again. (The factor of 1 lets that go on for one step, which no row shows.)"""
FEW, MANY = 4, 32


@dataclass(frozen=True)
class Row:
    """One training. ``name``: of its adapter. ``equal_compute``: for as many steps as cost what D-OPSD's do."""

    name: str
    label: str
    changes: tuple[str, ...]
    concepts: tuple[str, ...] = CONCEPTS
    seeds: tuple[int, ...] = SEEDS
    equal_compute: bool = False


ROWS = (
    Row("d-opsd", "**D-OPSD + replay**, as shipped", D_OPSD),
    Row("sft", "**SFT + replay**, equal exposure", SFT),
    Row("sft-compute", "**SFT + replay**, equal compute", SFT, equal_compute=True),
    Row("d-opsd-alone", "D-OPSD without replay", (*D_OPSD, NO_REPLAY), seeds=(0,)),
    Row("sft-alone", "SFT without replay, equal exposure", (*SFT, NO_REPLAY)),
    Row("d-opsd-unguided", "D-OPSD + replay, without guidance", (*D_OPSD, "train.teacher.guidance=1"),
        ("style-ink",), (0,)),
    Row("sft-rate", "SFT + replay at 1e-3, equal compute", (*SFT, "train.learning_rate=1e-3"),
        ("style-ink",), (0,), equal_compute=True),
)  # fmt: skip
"""Same layers, prompts and steps of a roll-out everywhere, and where no other is named the same rate."""
WORDS = {"style-ink": ("pen", "stamp"), "style-3d": ("clay", "flat")}
"""What the untouched base was taught by name, and comes near the style: with seed 0 it is asked for that in place of
"[V]"."""


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=CONCEPTS)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    given = parser.parse_args()
    for seed in given.seeds:
        for concept in given.concepts:
            run(concept, seed)
            write()
    print(DOCS / "results.md")


# --- one style, one seed ----------------------------------------------------------------------------------------------


def run(concept: str, seed: int) -> None:
    """Every row of one style and seed, trained and evaluated, unless it is all there already."""
    chosen = [row for row in ROWS if concept in row.concepts and seed in row.seeds]
    words = WORDS[concept] if seed == 0 else ()
    trainings = {row.name: _settings(concept, seed, row) for row in chosen}
    described = [settings.model_dump(mode="json") for settings in trainings.values()]
    made_of = hashlib.sha256(json.dumps([described, words, _base()]).encode()).hexdigest()[:16]
    result = _finished(concept, seed)
    if result.exists() and json.loads(result.read_text(encoding="utf-8"))["made_of"] == made_of:
        return
    print(f"== {concept}, seed {seed}", flush=True)
    adapters = {row.name: _train(concept, seed, row, trainings[row.name]) for row in chosen}
    metrics = _evaluate(concept, seed, adapters)
    done = {
        "concept": concept, "seed": seed, "date": date.today().isoformat(), "machine": _machine(), "made_of": made_of,
        "rows": [_about(row, adapters[row.name]) for row in chosen], "metrics": metrics,
        "words": {word: _evaluate(concept, seed, {}, word) for word in words},
    }  # fmt: skip
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(done), encoding="utf-8")


def _settings(concept: str, seed: int, row: Row) -> Any:
    from dopsd.config import load_settings
    from dopsd.models import resolved

    everywhere = (
        f"train.seed={seed}", "train.preview_steps=1000", "tracking.enabled=false", "compute.launcher=local",
        f"evaluation.seed={1234 + seed}", f"evaluation.steps=[{FEW}, {MANY}]", f"evaluation.few_steps={FEW}",
    )  # fmt: skip
    if row.equal_compute:
        shipped = load_settings(ROOT / "params.yaml").of(concept, ROOT).train
        everywhere = (*everywhere, f"train.max_steps={shipped.sft_steps_at_equal_compute()}")
    return resolved(load_settings(ROOT / "params.yaml", (*everywhere, *row.changes)).of(concept, ROOT))


def _train(concept: str, seed: int, row: Row, settings: Any) -> Path:
    """The adapter of one row; a training that is finished is not done again."""
    from dopsd.stages import STAGES

    print(f"-- {row.name}", flush=True)
    root = WORK / "runs" / f"{row.name}-{seed}"
    root.mkdir(parents=True, exist_ok=True)
    for shared in ("data", ".cache"):
        if not (root / shared).is_symlink():
            (root / shared).symlink_to(ROOT / shared)
    for stage in ("validate", "encode", "train"):
        STAGES[stage](concept, settings, root)
    return root / "runs" / concept / "adapters" / f"{settings.train.methods[0]}.safetensors"


def _evaluate(concept: str, seed: int, adapters: dict[str, Path], word: str | None = None) -> dict[str, Any]:
    """Base, teacher and adapters by the product's own evaluation; or with ``word`` the base alone, asked for that."""
    metrics = evaluate_all(concept, seed, adapters, _settings(concept, seed, ROWS[0]), word)
    return {key: metrics[key] for key in ("counts", "headline", "scores")}


def evaluate_all(
    concept: str, seed: int, adapters: dict[str, Path], settings: Any, word: str | None = None
) -> dict[str, Any]:
    """``metrics.json`` of base, teacher and adapters."""
    from dopsd.data.cache import EncodingCache
    from dopsd.data.schema import validate_dataset
    from dopsd.evaluation.suite import Subject, evaluate
    from dopsd.evaluation.world import world_of
    from dopsd.models import load_family, open_base

    table, holdout = validate_dataset(ROOT / "data" / "concepts" / concept, concept, settings.data)
    subjects = [Subject("base", None)]
    if word is None:
        subjects += [Subject("teacher", None), *(Subject(name, path) for name, path in adapters.items())]
    else:
        assert holdout is not None
        renamed = [tuple((name, text.replace(settings.data.placeholder, word)) for name, text in row.captions)
                   for row in holdout.rows]  # fmt: skip
        rows = (replace(row, captions=captions) for row, captions in zip(holdout.rows, renamed, strict=True))
        holdout = replace(holdout, rows=tuple(rows))
    world = world_of(open_base(settings.model, ROOT, "train").source.folder)
    return evaluate(
        load_family(settings.model, ROOT), table, holdout, world, subjects, settings,
        EncodingCache(ROOT / ".cache" / "encodings"), _evaluation(concept, seed, word),
    )  # fmt: skip


def _evaluation(concept: str, seed: int, word: str | None = None) -> Path:
    return WORK / "evaluations" / f"{concept}-{seed}{f'-{word}' if word else ''}"


def _about(row: Row, adapter: Path) -> dict[str, Any]:
    trained = json.loads(adapter.with_suffix(".json").read_text(encoding="utf-8"))
    rate = trained["settings"]["learning_rate"]
    return {"name": row.name, "label": row.label, "steps": trained["steps"], "learning_rate": rate}


def _base() -> str:
    """Today's base, by its content."""
    from dopsd.config import load_settings
    from dopsd.models import open_base

    return open_base(load_settings(ROOT / "params.yaml").model, ROOT).identity


def _machine() -> str:
    import torch

    threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU, {threads}"


def _finished(concept: str, seed: int) -> Path:
    return WORK / "done" / f"{concept}-{seed}.json"


# --- what is written --------------------------------------------------------------------------------------------------


def write() -> None:
    """``results.json`` of all that is finished, the tables out of it, and the pictures."""
    found = [_finished(concept, seed) for concept in CONCEPTS for seed in SEEDS]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    (DOCS / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    (DOCS / "results.md").write_text(
        document(runs, (DOCS / "results-reading.md").read_text(encoding="utf-8")), encoding="utf-8"
    )
    for concept in CONCEPTS:
        if _finished(concept, 0).exists():
            _draw(concept)


def document(runs: Sequence[dict[str, Any]], reading: str) -> str:
    """``results.md``: how to read it, then one table per style; every number of the tables is in ``runs``."""
    dates = sorted({run["date"] for run in runs})
    machines = ", ".join(sorted({run["machine"] for run in runs}))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        "# Results",
        "",
        f"Written by `python benchmarks/results.py` from `results.json`: {machines},\n{when}.",
        "",
        reading.strip(),
    ]
    for concept in CONCEPTS:
        members = [run for run in runs if run["concept"] == concept]
        if members:
            lines += ["", f"## {concept}", "", *_table(members)]
    return "\n".join(lines) + "\n"


COLUMNS = ("seeds", "style", "gap, style", "gap, truth", "sharpness / base", "kept, lowest", "few-step share")


def _table(members: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Mean over the seeds and, in brackets, the smallest and the largest of them."""
    yield "| | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    yield _line("base, untuned", [_reference(run, run["metrics"], "base") for run in members])
    for word in dict.fromkeys(word for run in members for word in run["words"]):
        asked = [_reference(run, run["words"][word], "base") for run in members if word in run["words"]]
        yield _line(f'base, untuned, asked for "{word}"', asked)
    yield _line("teacher, shown another picture of it", [_reference(run, run["metrics"], "teacher") for run in members])
    for name in dict.fromkeys(row["name"] for run in members for row in run["rows"]):
        abouts = [next((row for row in run["rows"] if row["name"] == name), None) for run in members]
        about = next(found for found in abouts if found is not None)
        label = f"{about['label']} ({about['steps']} steps)"
        yield _line(label, [_tuned(run, name) for run, found in zip(members, abouts, strict=True) if found])


def _line(label: str, seeds: Sequence[dict[str, float | None]]) -> str:
    cells = [_cell([values[column] for values in seeds]) for column in COLUMNS[1:]]
    return f"| {label} | {len(seeds)} | " + " | ".join(cells) + " |"


def _tuned(run: dict[str, Any], name: str) -> dict[str, float | None]:
    head = run["metrics"]["headline"][name]
    keys = ("gap_closed_style", "gap_closed_truth", "sharpness_vs_base", "known_lowest", "retention_style")
    # of before 30 November 2026 the gaps themselves were raw
    found = (head.get(f"{key}_raw", head.get(key)) for key in keys)
    values = [run["metrics"]["scores"]["concept"][name]["style"], *found]
    return dict(zip(COLUMNS[1:], values, strict=True))


def _reference(run: dict[str, Any], metrics: dict[str, Any], name: str) -> dict[str, float | None]:
    """An untuned model's: of what it draws, however it was asked, beside the base's "[V]" and the teacher's."""
    scores, mine = run["metrics"]["scores"]["concept"], metrics["scores"]["concept"][name]
    base, teacher = scores["base"], scores["teacher"]
    gaps = [(mine[key] - base[key]) / (teacher[key] - base[key]) for key in ("style", "cosine")]
    share = metrics["headline"].get(name, {}).get("retention_style")
    kept = 1.0 if name == "base" else None  # nothing was trained
    values = [mine["style"], *gaps, mine["sharpness"] / base["sharpness"], kept, share]
    return dict(zip(COLUMNS[1:], values, strict=True))


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean, least, most = (f"{value:.2f}" for value in (statistics.mean(known), min(known), max(known)))
    return mean if least == most else f"{mean} [{least}, {most}]"


SHOWN = {
    "real": "truth", "base": "base, untuned", "teacher": "its teacher", "d-opsd": "D-OPSD + replay",
    "d-opsd-alone": "D-OPSD without replay", "sft-compute": "SFT + replay, equal compute",
    "sft-alone": "SFT without replay",
}  # fmt: skip
PICTURES = {"style-ink": {"concept": "", "known": "-kept"}, "style-3d": {"concept": ""}}
"""Which split is drawn, and the ending of its file's name."""


def _draw(concept: str) -> None:
    """The grids of the README: the first prompts of seed 0, nothing picked by hand."""
    from dopsd.evaluation.draws import Key
    from dopsd.evaluation.grids import draw_grid, opened_tile, read_tiles

    samples = _evaluation(concept, 0) / "samples"
    index = json.loads((samples / "index.json").read_text(encoding="utf-8"))
    tiles = read_tiles(samples, index)
    for split, ending in PICTURES[concept].items():
        keys = {label: Key(split, model, 0 if model == "real" else FEW) for model, label in SHOWN.items()}
        rows = [
            (label, [opened_tile(tiles[key][row]) for row in range(10)]) for label, key in keys.items() if key in tiles
        ]
        grid = draw_grid(index["prompts"][split][:10], rows, f"{FEW} steps, same noise for every model")
        grid.save(samples / "grid.png", optimize=True)
        shutil.move(samples / "grid.png", DOCS / "images" / f"{concept}{ending}.png")


if __name__ == "__main__":
    main()
