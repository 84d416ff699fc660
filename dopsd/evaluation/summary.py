"""What an evaluation writes: its numbers, once for people and once prompt by prompt."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopsd.config import Settings

from . import headline
from .compare import Look
from .draws import Key
from .guarded import against, differences, paired_of
from .headline import Asked
from .likeness import as_independent
from .naming import main_model
from .paired import PAIRED, Paired, write_paired
from .probe import StyleProbe
from .prompts import CONCEPT, KEPT, KNOWN, NEAR, Kind, Prompt, rehearsed_of
from .published import published
from .scoring import Bootstrap, Cell, Scorer, Values

METRICS, PROMPTS = "metrics.json", "prompts.json"


@dataclass(frozen=True)
class Evaluated:
    """All that was found. ``context``: what the teacher was shown; ``captions``: all that were trained on;
    ``look``: the first backbone's."""

    concept: str
    kind: Kind
    context: str
    splits: Mapping[str, Sequence[Prompt]]
    captions: Sequence[str]
    models: Sequence[str]
    cells: Mapping[Key, Cell]
    look: Look
    scorers: Mapping[str, Scorer]
    probe: StyleProbe | None
    settings: Settings
    omitted: Mapping[str, str]

    @property
    def asked(self) -> Asked:
        """The numbers of steps that are compared."""
        evaluation = self.settings.evaluation
        return Asked(evaluation.few, evaluation.many, evaluation.curve_prompts)

    @property
    def real(self) -> Values:
        """How like the training pictures real ones are: held-out ones, or each training picture to the others."""
        truths = self.cells.get(Key("concept", "real", 0))
        if truths is not None:
            return truths.values["likeness"]
        among = self.look.scale.likeness_among(self.look.training, self.look.half)
        return as_independent(among).double().numpy()


def write_results(found: Evaluated, folder: Path) -> dict[str, Any]:
    """Write ``metrics.json``, the tables and what was found of each prompt; returns the content of the first."""
    paired = paired_of(found.cells, found.models, found.real, found.asked)
    metrics = _metrics(found, paired)
    _write_csv(found, folder)
    (folder / METRICS).write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_paired(folder / PAIRED, paired)
    by_prompt = json.dumps(_by_prompt(found), ensure_ascii=False)
    (folder / PROMPTS).write_text(by_prompt + "\n", encoding="utf-8")
    return metrics


def _metrics(found: Evaluated, paired: Paired) -> dict[str, Any]:
    evaluation, asked, scorers, cells = found.settings.evaluation, found.asked, found.scorers, found.cells
    bootstrap = Bootstrap(evaluation.seed)
    omitted = {**scorers["concept"].omitted, **found.omitted}
    if evaluation.protocol == "published":
        asks = "the published protocol asks for no held-out pictures"
        omitted |= dict.fromkeys({"cosine", "structure", "mse", "kid"} & omitted.keys(), asks)
    if KEPT not in found.splits:
        rehearsed = rehearsed_of(found.settings)
        reason = f"all {rehearsed} general prompts are rehearsed by replay"
        omitted["kept"] = reason if rehearsed else "evaluation.kept_prompts is empty"
    if KNOWN not in found.splits:
        omitted["known_lowest"] = "no world of known styles belongs to this base"
    if found.context == "edit" and "teacher" in found.models:
        # its suffix requests for the shown picture's background and composition: no measure of what can be learnt
        omitted["gap_closed_style"] = omitted["gap_closed_truth"] = (
            "the teacher is asked to follow the picture that it is shown, its background and composition too"
        )
    captions, real = set(found.captions), found.real
    main = main_model({"models": found.models})
    head = headline.headline(cells, found.models, real, asked, bootstrap, omitted)
    tables = {split: headline.split_numbers(cells, scorers, split, asked.few, bootstrap) for split in scorers}
    counts = {f"{split}_prompts": len(found.splits.get(split, ())) for split in (CONCEPT, KEPT, NEAR, KNOWN)}
    return {
        "concept": found.concept,
        "kind": found.kind.kind,
        "style": found.kind.style,
        "context": found.context,
        "trained_on": sum(prompt.text in captions for prompt in found.splits[CONCEPT]),
        "truth": all(prompt.truth is not None for prompt in found.splits[CONCEPT]),
        "few_steps": asked.few,
        "most_steps": asked.many,
        "seed": evaluation.seed,
        "backbone": found.look.name,
        "backbones": list(evaluation.backbones),
        "models": list(found.models),
        "style_score": headline.style_score(cells, asked.few),
        "real_likeness": round(float(real.mean()), 5) if len(real) else None,
        "counts": {
            "training_pictures": len(found.look.training),
            **counts,
            "curve_prompts": min(asked.curve, counts["concept_prompts"]),
            "rehearsed_prompts": rehearsed_of(found.settings),
            "candidates": scorers["concept"].candidates,
        },
        "published": _published(found, bootstrap),
        "headline": {model: numbers.values for model, numbers in head.items() if numbers.values},
        "scores": {split: {m: n.values for m, n in models.items()} for split, models in tables.items()},
        "probe": _probe_summary(found),
        "intervals": {
            "headline": {model: numbers.intervals for model, numbers in head.items() if numbers.intervals},
            "scores": {split: {m: n.intervals for m, n in models.items()} for split, models in tables.items()},
        },
        "differences": differences(cells, found.models, asked.few, bootstrap),
        "against": against(paired, main, bootstrap) if main else {},
        "omitted": omitted,
    }


def _published(found: Evaluated, bootstrap: Bootstrap) -> dict[str, Any]:
    """Model to the published protocol's numbers, with an interval where there is one; empty with another protocol."""
    if found.settings.evaluation.protocol != "published":
        return {}
    numbers = published(found.cells, found.models, found.asked.few, bootstrap)
    return {
        model: {key: [value, *its.intervals.get(key, ())] for key, value in its.values.items()}
        for model, its in numbers.items()
    }


def _probe_summary(found: Evaluated) -> dict[str, Any]:
    probe = found.probe
    if probe is None:
        return {}
    summary: dict[str, Any] = {f"accuracy_{name}": round(value, 4) for name, value in probe.accuracy.items()}
    own = found.cells.get(Key(KNOWN, "base", found.asked.few))
    if own is not None and "style_hit" in own.values:
        summary["accuracy_base_samples"] = round(float(own.values["style_hit"].mean()), 4)
    return summary | probe.counts | {"styles": len(probe.styles)}


def _by_prompt(found: Evaluated) -> dict[str, Any]:
    """Prompt by prompt, with few steps: what the report sorts by and shows beside the pictures."""
    wanted = ("likeness", "kept", "copy", "cosine", "style")
    out: dict[str, Any] = {}
    for key, cell in found.cells.items():
        if key.steps in (0, found.asked.few):
            values: dict[str, list[float]] = {
                name: [float(f"{v:.4g}") for v in cell.values[name]] for name in wanted if name in cell.values
            }
            values["nearest"] = [int(place) for place in cell.values["nearest"]]
            out.setdefault(key.split, {}).setdefault(key.model, {})[str(key.noise)] = values
    return out


def _write_csv(found: Evaluated, folder: Path) -> None:
    bootstrap = Bootstrap(found.settings.evaluation.seed)
    header = ["model", "steps", "split", "metric", "value", "low", "high", "prompts"]
    everything, curves = [], []
    for key, cell in found.cells.items():
        if key.noise:  # for differences alone, which have numbers of their own
            continue
        everything += _rows(key, cell, found.scorers, bootstrap)
        if key.split == "concept" and key.steps > 0:
            curves += _rows(key, cell.first(found.asked.curve), found.scorers, bootstrap)
    for name, rows in (("scores.csv", everything), ("few_step.csv", curves)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])


def _rows(key: Key, cell: Cell, scorers: Mapping[str, Scorer], bootstrap: Bootstrap) -> list[list[Any]]:
    numbers = headline.scores_of(cell, scorers[key.split].kid(cell, key.model == "real"), bootstrap)
    return [
        [key.model, key.steps, key.split, name, value, *numbers.intervals.get(name, ["", ""]), len(cell)]
        for name, value in numbers.values.items()
    ]
