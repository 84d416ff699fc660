"""What rounding the base costs: *ink* learnt on emoji-turbo, as it is and rounded, drawn by the unrounded one.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --seeds 0 --kinds none nf4

Every training is D-OPSD as shipped, by the product's own stages below ``.cache/results``; all of one seed are evaluated
together on the unrounded base, as whoever is given the adapter draws. What is finished is not run again. Writes
``docs/benchmarks/quantization.json`` and prints its table. Needs the extra ``quantization``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import date
from typing import Any

import results

OUT = results.DOCS / "benchmarks" / "quantization.json"
CONCEPT = "style-ink"
KINDS = ("none", "int8", "fp8", "nf4")
COLUMNS = {
    "gap, style": "gap_closed_style", "gap, truth": "gap_closed_truth", "sharpness / base": "sharpness_vs_base",
    "kept, lowest": "known_lowest", "few-step share": "retention_style",
}  # fmt: skip


def main() -> None:
    """Train and evaluate what is missing; write after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, choices=results.SEEDS, default=results.SEEDS)
    given = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        runs.append({"seed": seed, "headline": headlines(seed, given.kinds)})
        said = {
            "command": f"python benchmarks/quantization.py --kinds {' '.join(given.kinds)} "
            f"--seeds {' '.join(map(str, given.seeds))}",
            "date": date.today().isoformat(), "machine": results._machine(), "concept": CONCEPT, "runs": runs,
        }  # fmt: skip
        OUT.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(runs)))


def headlines(seed: int, kinds: list[str]) -> dict[str, Any]:
    """Kind to its adapter's scores on the unrounded base."""
    adapters = {}
    for kind in kinds:
        changes = () if kind == "none" else (f"model.quantization={kind}",)
        row = results.Row(f"d-opsd-{kind}", kind, (*results.D_OPSD, *changes))
        adapters[kind] = results._train(CONCEPT, seed, row, results._settings(CONCEPT, seed, row))
    found = results._evaluate(CONCEPT, seed, adapters)["headline"]
    return {
        kind: {key: found[kind].get(f"{key}_raw", found[kind].get(key)) for key in COLUMNS.values()} for kind in kinds
    }


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Mean over the seeds; smallest and largest where there are several."""
    lines = ["| `model.quantization` | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for kind in runs[0]["headline"]:
        cells = []
        for key in COLUMNS.values():
            values = [run["headline"][kind][key] for run in runs]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
