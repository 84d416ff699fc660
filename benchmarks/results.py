"""The table of docs/results.md: tuning and evaluation over seeds and variants of the method, on the shipped concepts.

    python benchmarks/results.py --concepts style-ink style-3d --seeds 0 1 2
    python benchmarks/results.py --concepts style-3d --seeds 0 --variants paper guidance replay both frozen copy

Every run is made by the product's own stages below ``.cache/results``, from ``params.yaml`` and the variant's changes;
what is finished with today's base is not run again. Writes ``docs/results.json`` and ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".cache" / "results"

ALONE = ("train.methods=[d-opsd]",)
PAPER = ("tuning={}", "train.lora.targets=null", "train.learning_rate=1e-4")
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "plain": ("tuning={}",),
    "sft-3e-4": ("train.methods=[sft]", "train.learning_rate=3e-4"),
    "sft-5e-5": ("train.methods=[sft]", "train.learning_rate=5e-5"),
    "paper": PAPER,
    "x0": (*PAPER, *ALONE, "train.loss=x0"),
    "guidance": (*PAPER, *ALONE, "train.teacher.guidance=2"),
    "replay": (*PAPER, *ALONE, "train.replay.weight=5"),
    "both": (*PAPER, *ALONE, "train.teacher.guidance=2", "train.replay.weight=5"),
    "frozen": (*PAPER, *ALONE, "train.teacher.kind=frozen"),
    "copy": (*PAPER, *ALONE, "train.teacher.kind=copy"),
    "ema-0.9": (*PAPER, *ALONE, "train.teacher.decay=0.9"),
}
"""``default`` is ``params.yaml`` as it is, ``plain`` without the concepts' own settings, ``sft-`` SFT alone at rates of
its own; all others adapt every layer, at the authors' rate."""
HEADLINE = (
    ("gap_closed_style", "gap closed, style"),
    ("gap_closed_truth", "gap closed, similarity to the truth"),
    ("sharpness_vs_base", "sharpness / base"),
    ("sharpness_vs_decoded", "sharpness / truth through the autoencoder"),
    ("kept_lowest", "kept of old styles (lowest score)"),
    ("kept_cosine", "kept, similarity to the truth"),
    ("kept_style", "kept, style"),
)
SCORES = ("style", "cosine", "concept_top1", "structure", "mse", "sharpness", "kid")


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["style-ink", "style-3d"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"])
    given = parser.parse_args()
    for variant in given.variants:
        for concept in given.concepts:
            for seed in given.seeds:
                run(concept, variant, seed)
    write_tables()


def run(concept: str, variant: str, seed: int) -> None:
    """One tuning with its evaluation, unless it is there already."""
    from dopsd.config import load_settings
    from dopsd.stages import STAGES

    root = WORK / f"{variant}-{seed}"
    result = _done() / f"{concept}-{variant}-{seed}.json"
    overrides = (*VARIANTS[variant], f"train.seed={seed}", f"evaluation.seed={1234 + seed}", "tracking.enabled=false")
    overrides = (*overrides, "evaluation.steps=[4]", "evaluation.few_steps=4")  # curves are in each report
    overrides = (*overrides, "compute.launcher=local")
    settings = load_settings(ROOT / "params.yaml", overrides).of(concept)
    name = hashlib.sha256(settings.model_dump_json(exclude={"tuning", "concepts"}).encode()).hexdigest()[:16]
    if result.exists() and json.loads(result.read_text())["settings"] == name:
        return
    root.mkdir(parents=True, exist_ok=True)
    for shared in ("data", ".cache"):
        link = root / shared
        if not link.is_symlink():
            link.symlink_to(ROOT / shared)
    print(f"== {concept}, {variant}, seed {seed}", flush=True)
    for stage in ("validate", "encode", "train", "evaluate"):
        STAGES[stage](concept, settings, root)
    metrics = json.loads((root / "runs" / concept / "evaluation" / "metrics.json").read_text())
    seconds = {
        path.stem: json.loads(path.read_text())["seconds"]
        for path in (root / "runs" / concept / "adapters").glob("*.json")
    }
    done = {"concept": concept, "variant": variant, "seed": seed, "settings": name, "metrics": metrics,
            "seconds": seconds, "date": date.today().isoformat()}  # fmt: skip
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(done))


@cache
def _done() -> Path:
    """Where finished runs of today's base are."""
    from dopsd.pipeline import hash_path

    from dopsd.config import load_settings

    base = ROOT / load_settings(ROOT / "params.yaml").model.path
    return WORK / "done" / hash_path(base, ROOT)[:16]


def write_tables() -> None:
    """Means and spreads over the seeds of everything that is finished."""
    runs = [json.loads(path.read_text()) for path in sorted(_done().glob("*.json"))]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["concept"], one["variant"]), []).append(one)
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
    lines = [
        "# Results",
        "",
        f"Written by `python benchmarks/results.py` on {machine}; dates in `results.json`. Four steps unless said "
        "otherwise, unseen prompts; mean over the seeds, in brackets the smallest and the largest.",
    ]
    summary = []
    for (concept, variant), members in sorted(groups.items(), key=lambda g: (list(VARIANTS).index(g[0][1]), g[0])):
        lines += ["", f"## {concept}, {variant} (seeds {', '.join(str(m['seed']) for m in members)})", ""]
        lines += [*_headline(members), "", *_scores(members, "concept"), "", *_scores(members, "kept")]
        summary.append({"concept": concept, "variant": variant, "runs": members})
    (ROOT / "docs" / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    head = ROOT / "docs" / "results-reading.md"
    reading = ["", head.read_text().strip()] if head.exists() else []
    (ROOT / "docs" / "results.md").write_text("\n".join([*lines[:3], *reading, *lines[3:]]) + "\n")
    print("docs/results.md")


def _headline(members: list[dict[str, Any]]) -> list[str]:
    models = [m for m in members[0]["metrics"]["models"] if m not in ("base", "teacher")]
    lines = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for key, label in HEADLINE:
        cells = [_cell([m["metrics"]["headline"].get(model, {}).get(key) for m in members]) for model in models]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _scores(members: list[dict[str, Any]], split: str) -> list[str]:
    models = list(members[0]["metrics"]["scores"][split])
    title = {"concept": "new concept", "kept": "old styles"}[split]
    lines = [f"| {title} | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for key in SCORES:
        cells = [_cell([m["metrics"]["scores"][split].get(model, {}).get(key) for m in members]) for model in models]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    if len(known) == 1:
        return f"{known[0]:.3f}"
    return f"{statistics.mean(known):.3f} [{min(known):.3f}, {max(known):.3f}]"


if __name__ == "__main__":
    main()
