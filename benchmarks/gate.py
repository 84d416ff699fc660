"""Two hundred nights at the registry's gate: does the champion sink, who is let in, who is refused.

    python benchmarks/gate.py --noise A/paired.json B/paired.json   # measure the noise anew, then simulate
    python benchmarks/gate.py                                       # simulate with the noise measured before

``A`` and ``B`` are one concept's evaluations with two seeds (``evaluation.seed``) of two trainings that differ by their
seed alone, called ``seed0`` and ``seed1``. From them come the spreads per prompt: between two equal models on the same
noise, and of one model from noise to noise. The gate is the product's own (:mod:`dopsd.registry.gate`), with a
project's settings as shipped; the gate of before 29 November 2026 stands below in ten lines. Writes
``docs/benchmarks/gate.json`` and prints the tables of ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from dopsd.config.groups import RegistrySettings
from dopsd.evaluation.paired import read_paired
from dopsd.registry import gate

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "gate.json"
NIGHTS, REPEATS = 200, 50
PROMPTS = (4, 12, 60)
SCORES = ("learnt", "kept", "few_step")
SHAPES = ("normal", "skewed up", "skewed down")
ABOUT = {score: {"better": "higher", "label": score} for score in SCORES}
SETTINGS = RegistrySettings(min_diversity=None)
Array = np.ndarray[Any, np.dtype[np.float64]]

NIGHTLY: dict[str, Callable[[int, Array, Array], Array]] = {
    # night, the champion's true quality and the deltas (each per score) -> the challenger's; the anchor's is 0.
    # "In 20": nights. "Each" and "by 2 delta" are beside the champion of that night
    "equal": lambda night, champion, delta: 0 * delta,
    "worse by delta in 1,000": lambda night, champion, delta: -delta * night / 1000,
    "worse by delta in 100": lambda night, champion, delta: -delta * night / 100,
    "worse by delta in 20": lambda night, champion, delta: -delta * night / 20,
    "each worse by delta / 20": lambda night, champion, delta: champion - delta / 20,
    "kept worse by delta in 20": lambda night, champion, delta: -delta * [0, night / 20, 0],
    "few steps worse by delta in 20": lambda night, champion, delta: -delta * [0, 0, night / 20],
    "likeness better by delta in 100": lambda night, champion, delta: delta * [night / 100, 0, 0],
    "likeness better by 2 delta": lambda night, champion, delta: (champion + 2 * delta) * [1, 0, 0],
}


def measure(first: Path, second: Path) -> dict[str, Any]:
    """Levels and spreads per prompt out of two evaluations."""
    a, b = (read_paired(path).models for path in (first, second))
    noise = {"prompts": len(a["seed0"]["learnt"]["first"])}
    for score in SCORES:
        one, other, again, base = (
            np.array(values[score]["first"]) for values in (a["seed0"], a["seed1"], b["seed0"], a["base"])
        )
        noise[score] = {
            "base": base.mean(), "tuned": one.mean(), "base_spread": (one - base).std(ddof=1),
            "between_models": (one - other).std(ddof=1), "from_noise_to_noise": (one - again).std(ddof=1),
        }  # fmt: skip
    return noise


# --- the gates --------------------------------------------------------------------------------------------------------


class New:
    """The product's gate, with champion and anchor."""

    def __init__(self, anchor: gate.Values, base: gate.Values, deltas: dict[str, float], anchored: bool = True) -> None:
        self._base, self._deltas = base, deltas
        self._champion, self._anchor = anchor, anchor if anchored else None

    def lets_in(self, mine: gate.Values) -> bool:
        rivals = {"champion": self._champion} | ({"anchor": self._anchor} if self._anchor else {})
        passed = gate.judge(mine, self._base, ABOUT, rivals, self._deltas, SETTINGS).passed
        self._champion = mine if passed else self._champion
        return passed


class Old:
    """That of before: means of the concept's scores not below the champions' best by 0.02, and few-step scores at least
    0.9 of the many-step ones. The best was forgotten whenever there were other pictures to train on."""

    def __init__(
        self, anchor: gate.Values, base: gate.Values, deltas: dict[str, float], new_pictures: bool = False
    ) -> None:
        self._best, self._new_pictures = float(np.mean(anchor["learnt"]["first"])), new_pictures

    def lets_in(self, mine: gate.Values) -> bool:
        few, lost = (float(np.mean(mine[score]["first"])) for score in ("learnt", "few_step"))
        if few / (few - lost) < 0.9 or few < self._best - 0.02:
            return False
        self._best = few if self._new_pictures else max(self._best, few)
        return True


def without_anchor(anchor: gate.Values, base: gate.Values, deltas: dict[str, float]) -> New:
    return New(anchor, base, deltas, anchored=False)


def old_with_new_pictures(anchor: gate.Values, base: gate.Values, deltas: dict[str, float]) -> Old:
    return Old(anchor, base, deltas, new_pictures=True)


@contextmanager
def unfloored() -> Iterator[None]:
    """Without the floor for few steps, which stops whatever sinks in all scores at once, anchor or none."""
    with patch.dict(globals(), SETTINGS=RegistrySettings(max_few_step_loss=None, min_diversity=None)):
        yield


@contextmanager
def narrow() -> Iterator[None]:
    """With a delta of one half-width."""
    with patch.object(gate, "DELTA_WIDTHS", 1):
        yield


@contextmanager
def bonferroni() -> Iterator[None]:
    """With intervals for three scores and two rivals at once."""
    half = gate._half_width

    def wider(values: Array, prompts: int = 0) -> float:
        from scipy.special import stdtrit

        count = prompts or len(values)
        return half(values, prompts) * stdtrit(count - 1, 1 - 0.025 / 6) / stdtrit(count - 1, 0.975)

    with patch.object(gate, "_half_width", wider):
        yield


# --- the nights -------------------------------------------------------------------------------------------------------


def drawn(quality: Array, noise: dict[str, Any], own: Array, draw: np.random.Generator) -> dict[str, dict[str, Any]]:
    """A model's scores; two models on the same noise differ by as much as two trainings did. ``own``: what a prompt
    loses of few steps by any model; of other scores it cancels."""
    scores = {
        score: noise[score]["tuned"] + quality[i] + draw.normal(0, _spread(noise[score]), len(own))
        for i, score in enumerate(SCORES)
    }
    return {score: {"first": values + (own if score == "few_step" else 0)} for score, values in scores.items()}


def _spread(its: dict[str, float]) -> float:
    """Of one model alone."""
    return its["between_models"] / math.sqrt(2)


def nights(
    make: Callable[..., Any], nightly: Callable[..., Array], noise: dict[str, Any], prompts: int, seed: int
) -> dict[str, float]:
    """One project's nights under one gate."""
    draw = np.random.default_rng(seed)
    few = noise["few_step"]
    own = draw.normal(0, math.sqrt(max(few["base_spread"] ** 2 - _spread(few) ** 2, 0)), prompts)
    anchor = drawn(np.zeros(3), noise, own, draw)
    base = {}
    for score in SCORES:
        its = noise[score]
        if score != "few_step":  # which is drawn from one noise
            anchor[score]["second"] = anchor[score]["first"] + draw.normal(0, its["from_noise_to_noise"], prompts)
        # of what is measured against the base, the base has none itself
        spread = its["base_spread"] if score == "learnt" else 0
        base[score] = {"first": its["base"] + draw.normal(0, spread, prompts)}
    deltas = gate.measure_deltas(anchor, base)
    delta = np.array([deltas[score] for score in SCORES])
    judge, champion = make(anchor, base, deltas), np.zeros(3)
    counts = dict.fromkeys(("promoted", "false", "missed", "better"), 0)
    lowest = 0.0
    for night in range(1, NIGHTS + 1):
        quality = nightly(night, champion, delta)
        better = bool((quality - champion >= 1.999 * delta).any() and (quality >= champion).all())
        passed = judge.lets_in(drawn(quality, noise, own, draw))
        counts["better"] += better
        counts["missed"] += better and not passed
        counts["promoted"] += passed
        counts["false"] += passed and bool((quality < -1.001 * delta).any())
        champion = quality if passed else champion
        lowest = min(lowest, float((champion / delta).min()))
    return counts | {"drift": float((champion / delta).min()), "lowest": lowest, "delta": float(delta[0])}


def simulate(make: Callable[..., Any], scenario: str, noise: dict[str, Any], prompts: int) -> dict[str, Any]:
    """All repeats of a scenario: means, and the worst that a champion came to in one repeat of twenty."""
    runs = [nights(make, NIGHTLY[scenario], noise, prompts, seed) for seed in range(REPEATS)]
    total = {key: sum(run[key] for run in runs) for key in runs[0]}
    return {
        "prompts": prompts, "nights": scenario,
        "promoted": round(total["promoted"] / REPEATS / NIGHTS, 4),
        "drift": round(total["drift"] / REPEATS, 3),
        "lowest_of_20": round(float(np.quantile([run["lowest"] for run in runs], 0.05)), 3),
        "false_promotions": round(total["false"] / REPEATS, 3),
        "missed": round(total["missed"] / total["better"], 3) if total["better"] else None,
        "delta_likeness": round(total["delta"] / REPEATS, 4),
    }  # fmt: skip


def coverage(prompts: int, shape: str, trials: int = 4000) -> dict[str, Any]:
    """How often a true difference of 0 is above the lower bound: it should be 0.975."""
    draw, zeros = np.random.default_rng(prompts), [0.0] * prompts
    values = draw.exponential(1, (trials, prompts)) - 1 if "skewed" in shape else draw.normal(0, 1, (trials, prompts))
    values = -values if shape == "skewed down" else values
    t = np.mean([gate.paired_difference(row, zeros).low < 0 for row in values])
    picked = draw.integers(0, prompts, (1000, prompts))
    bootstrap = np.mean([np.percentile(row[picked].mean(1), 2.5) < 0 for row in values])
    return {"prompts": prompts, "shape": shape, "t": round(float(t), 3), "bootstrap": round(float(bootstrap), 3)}


def main() -> None:
    """Simulate, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs=2, type=Path)
    given = parser.parse_args()
    noise = measure(*given.noise) if given.noise else json.loads(OUT.read_text(encoding="utf-8"))["noise"]
    found: dict[str, Any] = {
        "command": "python benchmarks/gate.py", "date": date.today().isoformat(), "nights": NIGHTS, "repeats": REPEATS,
        "noise": noise, "settings": SETTINGS.model_dump(mode="json"), "delta_widths": gate.DELTA_WIDTHS,
        "coverage": [coverage(prompts, shape) for prompts in (4, 6, 12, 60) for shape in SHAPES],
    }  # fmt: skip
    for name, make in (("old", Old), ("new", New)):
        found[name] = [simulate(make, scenario, noise, prompts) for scenario in NIGHTLY for prompts in PROMPTS]
    found["variants"] = {
        "old, new pictures nightly": [simulate(old_with_new_pictures, it, noise, 12) for it in NIGHTLY],
        "without the anchor": [simulate(without_anchor, it, noise, 12) for it in NIGHTLY],
    }
    for name, changed, make in (
        ("without the floor for few steps", unfloored, New),
        ("without that floor and the anchor", unfloored, without_anchor),
        ("one half-width", narrow, New),
        ("Bonferroni", bonferroni, New),
    ):
        with changed():
            found["variants"][name] = [simulate(make, it, noise, 12) for it in NIGHTLY]
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(tables(found)))


def tables(found: dict[str, Any]) -> list[str]:
    """For ``docs/benchmarks.md``."""
    lines = ["| challengers | prompts | promoted | drift | lowest | false | missed |", "|---|---|---|---|---|---|---|"]
    for old, new in zip(found["old"], found["new"], strict=True):
        cells = [f"{_cell(old, key)}, {_cell(new, key)}".strip(", ") for key in _COLUMNS]
        lines.append(f"| {new['nights']} | {new['prompts']} | {' | '.join(cells)} |")
    rows = {"as shipped": [row for row in found["new"] if row["prompts"] == 12], **found["variants"]}
    lines += ["", "| 12 prompts | equal | each worse | | better | |",
              "| | promoted | lowest | false | promoted | missed |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name, its in rows.items():
        by = {row["nights"]: row for row in its}
        equal, sinking, better = by["equal"], by["each worse by delta / 20"], by["likeness better by 2 delta"]
        cells = [_cell(equal, "promoted"), _cell(sinking, "lowest_of_20"), _cell(sinking, "false_promotions"),
                 _cell(better, "promoted"), _cell(better, "missed")]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| prompts | differences | t | bootstrap |", "|---|---|---|---|"]
    lines += [f"| {r['prompts']} | {r['shape']} | {r['t']:.3f} | {r['bootstrap']:.3f} |" for r in found["coverage"]]
    return lines


_COLUMNS = ("promoted", "drift", "lowest_of_20", "false_promotions", "missed")


def _cell(row: dict[str, Any], key: str) -> str:
    value = row[key]
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
