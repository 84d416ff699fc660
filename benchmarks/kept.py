"""Does *kept*, measured without a truth, say what the truth says: twenty tunings of emoji-turbo of all kinds.

    python benchmarks/kept.py

The embedded base's world knows the right picture for every old style. Twenty adapters, from harmless to ruinous, are
evaluated twice: against that truth, and as any other base is, against the base's own pictures alone
(``evaluation.kept_prompts``). Writes ``docs/benchmarks/kept.json`` and prints its table: the rank correlation over all
models and over the seeds of the evaluation. Every training is made by the product's own stages below
``.cache/results``; what is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import results

OUT = results.DOCS / "benchmarks" / "kept.json"
ALL = "train.lora.targets=null"
SHORT = "train.max_steps=40"
SFT, D_OPSD, ALONE = results.SFT, results.D_OPSD, results.NO_REPLAY
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ink, D-OPSD as shipped": ("style-ink", D_OPSD),
    "ink, D-OPSD alone": ("style-ink", (*D_OPSD, ALONE, SHORT)),
    "ink, D-OPSD alone, 3e-4": ("style-ink", (*D_OPSD, ALONE, SHORT, "train.learning_rate=3e-4")),
    "ink, D-OPSD, teacher a copy": ("style-ink", (*D_OPSD, ALONE, SHORT, "train.teacher.kind=copy")),
    "ink, off-policy alone": ("style-ink", ("train.methods=[off-policy]", ALONE, SHORT)),
    "ink, SFT on teacher's samples": ("style-ink", ("train.methods=[sft-teacher]", ALONE, SHORT)),
    "ink, SFT with replay": ("style-ink", (*SFT, SHORT)),
    "ink, SFT at 3e-3": ("style-ink", (*SFT, ALONE)),
    "ink, SFT at 3e-3, 10 steps": ("style-ink", (*SFT, ALONE, "train.max_steps=10")),
    "ink, SFT at 1e-3": ("style-ink", (*SFT, ALONE, SHORT, "train.learning_rate=1e-3")),
    "ink, SFT at 3e-4": ("style-ink", (*SFT, ALONE, SHORT, "train.learning_rate=3e-4")),
    "ink, SFT at 3e-5": ("style-ink", (*SFT, ALONE, SHORT, "train.learning_rate=3e-5")),
    "ink, SFT of all layers at 3e-4": ("style-ink", (*SFT, ALONE, SHORT, ALL, "train.learning_rate=3e-4")),
    "3d, D-OPSD as shipped": ("style-3d", D_OPSD),
    "3d, D-OPSD alone, 2e-3": ("style-3d", (*D_OPSD, ALONE, SHORT, "train.learning_rate=2e-3")),
    "3d, SFT at 3e-3": ("style-3d", (*SFT, ALONE, SHORT, "train.learning_rate=3e-3")),
    "3d, SFT at 5e-4": ("style-3d", (*SFT, ALONE, SHORT, "train.learning_rate=5e-4")),
    "3d, SFT of all layers at 1e-3": ("style-3d", (*SFT, ALONE, SHORT, ALL, "train.learning_rate=1e-3")),
    "wolf, D-OPSD at 5e-4": ("subject-wolf", (*D_OPSD, SHORT, "train.learning_rate=5e-4")),
    "wolf, SFT at 3e-3": ("subject-wolf", (*SFT, SHORT, "train.learning_rate=3e-3")),
    "wolf, SFT at 3e-4": ("subject-wolf", (*SFT, SHORT, "train.learning_rate=3e-4")),
}
"""Name to concept and changes of the shipped settings."""


KNOWN = ("known_lowest", "known_cosine", "known_style", "known_structure")
"""What the truth says: the score that lost most, and some of them by name."""


def main() -> None:
    """Train what is missing, evaluate all, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the evaluation")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured before")
    given = parser.parse_args()
    if given.table:
        print("\n".join(table(json.loads(OUT.read_text(encoding="utf-8")))))
        return
    adapters = {name: train(name) for name in MODELS}
    runs = [{"seed": seed, "models": evaluated(adapters, seed)} for seed in given.seeds]
    about = {
        "command": f"python benchmarks/kept.py --seeds {' '.join(map(str, given.seeds))}",
        "date": date.today().isoformat(), "machine": results._machine(),
        "rank_correlation": correlations(runs), "runs": runs,
    }  # fmt: skip
    OUT.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(table(about)))


def train(name: str) -> Path:
    """The adapter of one model."""
    concept, changes = MODELS[name]
    row = results.Row("kept-" + name.replace(", ", "-").replace(" ", "-"), name, changes)
    return results._train(concept, 0, row, results._settings(concept, 0, row))


def evaluated(adapters: dict[str, Path], seed: int) -> dict[str, dict[str, float]]:
    """Every model's headline, the base's among them: all of one concept together, with few steps alone."""
    found: dict[str, dict[str, float]] = {}
    for concept in dict.fromkeys(concept for concept, _ in MODELS.values()):
        names = [name for name, (its, _) in MODELS.items() if its == concept]
        row = results.Row("kept", "kept", ("evaluation.steps=[4]", "evaluation.many_steps=4", "registry.enabled=false"))
        labels = {f"model-{number}": adapters[name] for number, name in enumerate(names)}
        head = results.evaluate_all(concept, seed, labels, results._settings(concept, seed, row))["headline"]
        found |= {name: head[f"model-{number}"] for number, name in enumerate(names)}
    return found


def correlations(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Spearman's, over the models, seed by seed: of what is measured without a truth, and what the truth says."""
    from scipy.stats import spearmanr

    def of(models: dict[str, dict[str, float]], measured: str, known: str) -> float:
        pairs = [(head[measured], head[known]) for head in models.values()]
        return round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 4)

    return {
        measured: {known: [of(run["models"], measured, known) for run in runs] for known in KNOWN}
        for measured in ("kept", "kept_sharpness")
    }


def table(about: dict[str, Any]) -> list[str]:
    """All models by what they kept, mean over the seeds of the evaluation with the least and the most."""
    keys = {"kept": "kept", "known_lowest": "known truth, lowest score", "kept_near": "kept near the concept",
            "kept_sharpness": "sharpness kept", "learnt": "learnt"}  # fmt: skip
    rows = []
    for name in MODELS:
        values = [[run["models"][name].get(key) for run in about["runs"]] for key in keys]
        rows.append((name, values))
    lines = ["| model | " + " | ".join(keys.values()) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, values in sorted(rows, key=lambda row: -statistics.mean(row[1][0])):
        lines.append(f"| {name} | " + " | ".join(results._cell(each) for each in values) + " |")
    lines += ["", "| rank correlation with | " + " | ".join(key.removeprefix("known_") for key in KNOWN) + " |",
              "|---" * (len(KNOWN) + 1) + "|"]  # fmt: skip
    for measured, found in about["rank_correlation"].items():
        name = "kept" if measured == "kept" else "sharpness kept"
        lines.append(f"| {name} | " + " | ".join(results._cell(found[key]) for key in KNOWN) + " |")
    return lines


if __name__ == "__main__":
    main()
