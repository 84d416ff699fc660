"""The page of ``benchmarks/true_size.py``: what was measured, beside what is aimed at."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

SMALL = "ours+nf4+checkpointing+8bit"
"""The variant that small cards are meant for."""
_ROUNDED = {"int8", "fp8", "nf4", "8bit", "512px"}
"""Variants with these do other work than the published algorithm; speed and memory are not compared with its."""
SPEED, MEMORY, FLOOR = 2.0, 0.5, 1.5
CARDS = {("z-image-turbo", SMALL): 12, ("z-image-turbo", f"{SMALL}+512px"): 8, ("klein-4b", SMALL): 10}
"""Gigabytes that a step is to fit in. A card of that size holds 7 % more than so many times 10^9 bytes, which is what
CUDA's context and fragments get."""


def is_step(row: Row) -> bool:
    """Whether a row is about a training step."""
    return row["variant"] == "plain" or row["variant"].partition("+")[0] == "ours"


def aims(rows: list[Row], models: list[str]) -> list[list[str]]:
    """Per aim: model, what is aimed at, by which variant, what was measured, and met, missed or not measured."""
    steps = {(r["model"], r["variant"]): r for r in rows if r["status"] == "measured" and is_step(r)}
    found = []
    for model in models:
        plain = steps.get((model, "plain"))
        same = [r for (m, v), r in steps.items() if m == model and v != "plain" and not _ROUNDED & set(v.split("+"))]
        fast = min(same, key=lambda r: r["seconds_per_step"], default=None)
        small = min(same, key=lambda r: r["peak_bytes"], default=None)
        speed = fast and plain and plain["seconds_per_step"] / fast["seconds_per_step"]
        memory = small and plain and small["peak_bytes"] / plain["peak_bytes"]
        found += [
            _aim(model, f"plain's speed x {SPEED:g}", fast, speed, speed and speed >= SPEED),
            _aim(model, f"plain's peak x {MEMORY:g}", small, memory, memory and memory <= MEMORY),
            _aim(model, "both by one variant", *_both(same, plain)),
            _aim(model, f"floor x {FLOOR:g}", fast, over := fast and fast.get("over_floor"), over and over <= FLOOR),
        ]
    for (model, variant), size in CARDS.items():
        if model in models:
            row = steps.get((model, variant))
            peak = row and row["peak_bytes"] / 1e9
            found.append(_aim(model, f"{size} GB", row or {"variant": variant}, peak, peak and peak <= size))
    return found


def _both(same: list[Row], plain: Row | None) -> tuple[Row | None, str | None, bool]:
    """The variant that comes nearest to speed and memory at once: its lesser share of the two aims is the largest."""
    if plain is None or not same:
        return None, None, False
    pairs = [(plain["seconds_per_step"] / r["seconds_per_step"], r["peak_bytes"] / plain["peak_bytes"]) for r in same]
    shares = [min(speed / SPEED, MEMORY / memory) for speed, memory in pairs]
    best = shares.index(max(shares))
    return same[best], "{:.2f} x speed, {:.2f} x peak".format(*pairs[best]), shares[best] >= 1


def _aim(model: str, aim: str, row: Row | None, value: Any, met: Any) -> list[str]:
    said = "not measured" if value is None else "met" if met else "missed"
    return [model, aim, row["variant"] if row else "", "-" if value is None else short(value), said]


def page(head: Row, rows: list[Row], machine: Row, profile: Row) -> str:
    """Tables of the steps, of what else was measured, of the profile, and of what is missing."""
    lines = [
        f"# One D-OPSD step at {head['scale']} size", "",
        f"{head['side']} px, batch 1, K = 4, LoRA rank {head['lora_rank']}, random weights, "
        f"median of {head['timed_steps']} steps;",
        f"{machine.get('card', head['device'])}, {head['date'][:10]}, torch {machine.get('torch', '?')}.",
    ]  # fmt: skip
    if "matmul_tflop_per_second" in machine:
        rate, copy = machine["matmul_tflop_per_second"], machine["copy_terabytes_per_second"]
        lines.append(f"Matrix products {rate:.4g} TFLOP/s, copies {copy:.3g} TB/s (read and written).")
    if head["scale"] == "true":
        models = list(dict.fromkeys(r["model"] for r in rows))
        lines += _table(["model", "aim", "by", "measured", ""], aims(rows, models))
    found = [r for r in rows if r["status"] == "measured"]
    steps = [
        [r["model"], r["variant"], f"{r['seconds_per_step']:.3f}", f"{min(r['seconds']):.3f}-{max(r['seconds']):.3f}",
         _gb(r["resident_bytes"]), _gb(r["peak_bytes"]),
         short(r.get("over_floor", "-")), short(r.get("compile_seconds", "-"))]
        for r in found if is_step(r)
    ]  # fmt: skip
    columns = ["model", "step", "s", "min-max", "resident GB", "peak GB", "x floor", "compile s"]
    lines += _table(columns, steps)
    lines += _table(["model", "floor, TFLOP", "teacher", "student", "backward", "whole step", "s"], [
        [r["model"], "", *(short(r[f"{part}_tflop"]) for part in ("teacher", "student", "backward", "step")),
         short(r.get("floor_seconds", "-"))]
        for r in found if r["variant"] == "floor"
    ])  # fmt: skip
    lines += _table(["model", "stage", "s", "peak GB", "of that its own"], [
        [r["model"], stage["what"], f"{stage['seconds']:.2f}", _gb(stage["peak_bytes"]),
         _gb(stage["peak_bytes"] - stage["resident_bytes"])]
        for r in found for stage in r.get("stages", ())
    ])  # fmt: skip
    lines += _table(["kernels of one step (ours)", "ms", "share"], [
        [group, f"{values['ms']:.1f}", f"{values['share']:.1%}"] for group, values in profile.get("groups", {}).items()
    ])  # fmt: skip
    lines += _table(["model", "ours against plain, same encodings", "value"], [
        [r["model"], key.replace("_", " "), short(r[key])]
        for r in found if r["variant"] == "agreement" for key in r if plain_value(r[key]) and isinstance(r[key], float)
    ])  # fmt: skip
    missing = [[r["model"], r["variant"], r["status"], str(r.get("error", "")).split(";")[0][:50].replace("|", "/")]
               for r in rows if r["status"] != "measured"]  # fmt: skip
    return "\n".join(lines + _table(["model", "without a value", "why", ""], missing))


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Nothing without rows; cells padded, so that it can be read as text too."""
    if not rows:
        return []
    widths = [max(len(row[n]) for row in [columns, *rows]) for n in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [columns, *rows]]
    return ["", lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def plain_value(value: Any) -> bool:
    """Whether it can stand in a line."""
    return isinstance(value, int | float | str)


def short(value: Any) -> str:
    """Four digits are enough."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"
