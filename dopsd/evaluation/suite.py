"""Stage evaluate: what is sampled, with which seeds, and scored; before and after, with few steps and with many.

Every model gets the same prompts and the same noise per prompt. Subjects are the untuned base, its *teacher* (the base
shown another training picture of the concept) and every adapter. Written to the folder: ``metrics.json`` (headline and
the few-step table, with intervals), ``scores.csv`` (everything, long), ``few_step.csv`` (curves over steps, all on the
same prompts), ``grids/*.png``, and ``samples/`` for the report.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dopsd.config import Settings
from dopsd.data.cache import EncodingCache
from dopsd.data.manifest import ConceptTable
from dopsd.distill.adapters import adapter_applied
from dopsd.distill.drawing import batch_of, draw
from dopsd.distill.weights import holds_weights
from dopsd.files import whole_folder
from dopsd.models.base import Conditioning, Family
from dopsd.train.encode import encode_contexts, encode_prompts
from dopsd.train.workers import Workers

from . import headline, prompts
from .backbones import FeatureStore, load_backbone
from .grids import Gallery
from .paired import PAIRED, Paired, write_paired
from .probe import StyleProbe, decoded, round_trip, train_probe
from .prompts import EvaluationError, Kind, Prompt
from .scoring import Bootstrap, Cell, Scorer, by_size
from .world import World

__all__ = ["EvaluationError", "Subject", "evaluate"]

BACKBONE = "efficientnet-lite0"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: ``base``, ``teacher`` (both untuned, ``adapter`` is ``None``), or a label of an adapter."""

    name: str
    adapter: Path | None


def subjects_in(adapters: Path) -> list[Subject]:
    """What is compared: the base, its teacher, and every adapter there is, D-OPSD's first."""
    trained = sorted(adapters.glob("*.safetensors"), key=lambda path: (path.stem != "d-opsd", path.stem))
    if not trained:
        raise EvaluationError(f"{adapters}: no adapter there; run stage train first")
    return [Subject("base", None), Subject("teacher", None), *(Subject(path.stem, path) for path in trained)]


@dataclass(frozen=True)
class _Plan:
    """All that is asked, encoded: contexts belong to the teacher."""

    kind: Kind
    concept: list[Prompt]
    kept: list[Prompt]
    conditioning: dict[str, list[Conditioning]]
    training: list[Image.Image]
    training_captions: list[str]


def evaluate(
    family: Family,
    table: ConceptTable,
    holdout: ConceptTable | None,
    world: World | None,
    subjects: Sequence[Subject],
    settings: Settings,
    cache: EncodingCache,
    folder: Path,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Sample and score all ``subjects``; write ``folder`` (whole or not at all) and return ``metrics.json``'s content.

    ``world``: the truth for every prompt, which only the embedded base has; scores that need what is not there are left
    out and named under ``omitted``. ``cache`` also keeps real pictures' features. ``workers`` draw, where there are
    some. The family's encoders are released once everything is encoded. Raises :class:`EvaluationError`.
    """
    store = FeatureStore(load_backbone(BACKBONE, family.device), cache.folder / f"{BACKBONE}.safetensors")
    names = [subject.name for subject in subjects]
    if "base" not in names or len(set(names)) < len(names):
        raise EvaluationError(f"evaluate: expected the subject base once and no name twice, got {', '.join(names)}")
    plan = _plan(family, table, holdout, world, settings, cache, with_teacher="teacher" in names)
    if "teacher" not in plan.conditioning:
        subjects = [subject for subject in subjects if subject.name != "teacher"]
        names = [subject.name for subject in subjects]
    evaluated = sorted({p.concept for p in [*plan.concept, *plan.kept] if p.concept is not None})
    probe = _probe(family, world, evaluated, store, settings)
    scorers = {"concept": Scorer(plan.concept, store, plan.training, probe, world, evaluated)}
    if plan.kept:
        scorers["kept"] = Scorer(plan.kept, store, plan.training, probe, world, evaluated)
    store.save()
    cells = _real(family, scorers, settings)
    family.release_encoders()

    with whole_folder(folder) as partial:
        gallery = Gallery(partial, plan.concept, plan.kept, plan.training, plan.training_captions, settings, names)
        cells |= _run(family, subjects, plan, scorers, gallery, settings, workers)
        metrics = _summary(table, plan, probe, scorers, cells, names, settings, family.teaching.context)
        _write_csv(partial, cells, scorers, min(settings.evaluation.curve_prompts, len(plan.concept)), settings)
        gallery.write()
        (partial / METRICS).write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        write_paired(partial / PAIRED, _paired(cells, names, settings))
    return metrics


# --- what is asked ----------------------------------------------------------------------------------------------------


def _plan(
    family: Family, table: ConceptTable, holdout: ConceptTable | None, world: World | None, settings: Settings,
    cache: EncodingCache, with_teacher: bool,
) -> _Plan:  # fmt: skip
    kind = prompts.read_kind(table, world)
    concept = prompts.concept_prompts(table, holdout, world, kind, settings)
    kept = prompts.kept_prompts(world, concept, settings)
    conditioning = {
        "concept": encode_prompts(family, [p.request for p in concept], cache),
        "kept": encode_prompts(family, [p.request for p in kept], cache),
    }
    if with_teacher:
        requests = prompts.teacher_requests(table, concept, settings, family.teaching.context)
        if requests is not None:
            conditioning["teacher"] = encode_contexts(family, requests, cache)
    captions = [row.student_captions(settings.model.teacher_variant)[0] for row in table.rows]
    return _Plan(kind, concept, kept, conditioning, prompts.training_pictures(table, settings), captions)


def _probe(
    family: Family, world: World | None, evaluated: Sequence[int], store: FeatureStore, settings: Settings
) -> StyleProbe | None:
    if world is None:
        return None
    again = round_trip(family, settings.data.resolution, settings.evaluation.batch_size)
    return train_probe(world, evaluated, store, again, settings.evaluation.seed)


# --- sampling ---------------------------------------------------------------------------------------------------------


def _run(
    family: Family, subjects: Sequence[Subject], plan: _Plan, scorers: dict[str, Scorer], gallery: Gallery,
    settings: Settings, workers: Workers | None,
) -> dict[tuple[str, str, int], Cell]:  # fmt: skip
    """Every subject at every number of steps; pictures are scored and dropped, apart from the gallery's."""
    few = settings.evaluation.few
    curve = settings.evaluation.curve_prompts
    jobs = [
        (subject, split, steps, len(requested) if steps == few else min(curve, len(requested)))
        for subject in subjects
        for split, requested in (("concept", plan.concept), ("kept", plan.kept))
        for steps in (settings.evaluation.steps if split == "concept" else (few,))
        if requested and not (split == "kept" and subject.name == "teacher")
    ]
    cells: dict[tuple[str, str, int], Cell] = {}
    parts = [part for job in jobs for part in _parts(*job, plan, settings)]
    drawn = zip(parts, _draw_all(family, parts, workers), strict=True)
    with tqdm(total=sum(s * n for _, _, s, n in jobs), desc="evaluate", unit="step", disable=None) as bar:
        for subject, split, steps, count in jobs:
            bar.set_postfix_str(f"{subject.name}, {steps} steps")
            images: dict[int, Image.Image] = {}
            while len(images) < count:
                part, pictures = next(drawn)
                images |= dict(zip(part.rows, pictures, strict=True))
                bar.update(steps * len(part.rows))
            ordered = [images[row] for row in range(count)]
            cells[split, subject.name, steps] = scorers[split].score(ordered)
            gallery.add(split, subject.name, steps, ordered)
    return cells


def _real(family: Family, scorers: dict[str, Scorer], settings: Settings) -> dict[tuple[str, str, int], Cell]:
    """The true pictures' own scores, where there are any, and those through the autoencoder."""
    cells: dict[tuple[str, str, int], Cell] = {}
    for split, scorer in scorers.items():
        real = scorer.real()
        if real is not None:
            cells[split, "real", 0] = real
            cells[split, "decoded", 0] = scorer.score(_decoded(family, scorer.prompts, settings))
    return cells


def _decoded(family: Family, requested: Sequence[Prompt], settings: Settings) -> list[Image.Image]:
    """The true pictures through the base's own autoencoder: all that a model in its latents can come to."""
    images: dict[int, Image.Image] = {}
    for rows in by_size(requested).values():
        truths = [truth for i in rows if (truth := requested[i].truth) is not None]
        images |= dict(zip(rows, decoded(family, truths, settings.evaluation.batch_size), strict=True))
    return [images[i] for i in range(len(requested))]


@dataclass(frozen=True)
class _Part:
    """One batch of pictures of one size: ``rows`` of the prompts asked, each with its own noise."""

    subject: str
    adapter: Path | None
    steps: int
    height: int
    width: int
    rows: list[int]
    seeds: list[int]
    conditioning: list[Conditioning]


def _parts(
    subject: Subject, split: str, steps: int, count: int, plan: _Plan, settings: Settings
) -> Iterator[_Part]:  # fmt: skip
    """What one subject is to draw with one number of steps: batches of one size and of similar caption length."""
    requested = (plan.concept if split == "concept" else plan.kept)[:count]
    conditioning = plan.conditioning["teacher" if subject.name == "teacher" else split]
    for (height, width), rows in by_size(requested).items():
        rows = sorted(rows, key=lambda i: max(len(tensor) for tensor in conditioning[i].values()))
        size = batch_of(height, width, settings.evaluation.batch_size)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            # a prompt's own noise, whatever batch it is drawn in; torch takes 64 bits
            seeds = [(settings.evaluation.seed * 1_000_003 + requested[i].number) % 2**64 for i in chosen]
            yield _Part(
                subject.name, subject.adapter, steps, height, width, chosen, seeds, [conditioning[i] for i in chosen]
            )


def _draw_all(family: Family, parts: Sequence[_Part], workers: Workers | None) -> Iterator[list[Image.Image]]:
    """The pictures of every part, in order."""
    paths = {part.adapter for part in parts if part.adapter is not None}
    # trained weights are gigabytes: they are not sent about with every part, one process draws with them
    if workers is not None and not any(map(holds_weights, paths)):
        files = {path: path.read_bytes() for path in paths}
        yield from workers.map(_draw_with, [(part, files[part.adapter] if part.adapter else None) for part in parts])
        return
    for adapter, group in groupby(parts, key=lambda part: part.adapter):
        with adapter_applied(family.transformer, adapter):
            for part in group:
                yield _draw(family, part)


def _draw_with(family: Family, conditioning: tuple[_Part, bytes | None]) -> list[Image.Image]:
    """As :func:`_draw`, on a machine that may not see this one's disk: the adapter's file comes along."""
    part, content = conditioning
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        if content is not None:
            path.write_bytes(content)
        with adapter_applied(family.transformer, None if content is None else path):
            return _draw(family, part)


def _draw(family: Family, part: _Part) -> list[Image.Image]:
    noise = torch.cat([
        family.initial_latents(1, part.height, part.width, torch.Generator().manual_seed(seed)) for seed in part.seeds
    ])  # fmt: skip
    try:
        return draw(family, part.conditioning, part.steps, noise, part.height, part.width, len(part.rows))
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"evaluate: {family.device} has no memory for one picture of {part.width} x {part.height} pixels; free "
            f"some of it (other programs?) or lower data.resolution ({str(error).splitlines()[0]})"
        ) from None


# --- what is written --------------------------------------------------------------------------------------------------


def _summary(
    table: ConceptTable, plan: _Plan, probe: StyleProbe | None, scorers: dict[str, Scorer],
    cells: dict[tuple[str, str, int], Cell], names: Sequence[str], settings: Settings, context: str,
) -> dict[str, Any]:  # fmt: skip
    few, most = settings.evaluation.few, max(settings.evaluation.steps)
    curve = min(settings.evaluation.curve_prompts, len(plan.concept))
    bootstrap = Bootstrap(settings.evaluation.seed)
    omitted = dict(scorers["concept"].omitted)
    if not plan.kept:
        omitted["kept"] = "no world of known styles belongs to this base; compare prompts of your own by eye"
    if context == "edit" and "teacher" in names:
        # its suffix requests for the shown picture's background and composition: no measure of what can be learnt
        omitted["gap_closed_style"] = omitted["gap_closed_truth"] = (
            "the teacher is asked to follow the picture that it is shown, its background and composition too"
        )
    head = headline.headline(cells, names, few, most, curve, bootstrap, omitted)
    tables = {split: headline.split_numbers(cells, scorers, split, few, bootstrap) for split in scorers}
    return {
        "concept": table.name,
        "kind": plan.kind.kind,
        "style": plan.kind.style,
        "context": context,
        "unseen": all(prompt.row is None or prompt.truth is not None for prompt in plan.concept),
        "few_steps": few,
        "most_steps": most,
        "seed": settings.evaluation.seed,
        "backbone": BACKBONE,
        "models": list(names),
        "style_score": headline.style_score(cells, few),
        "counts": {
            "training_pictures": len(plan.training),
            "concept_prompts": len(plan.concept),
            "curve_prompts": curve,
            "kept_prompts": len(plan.kept),
            "candidates": scorers["concept"].candidates,
        },
        "headline": {model: numbers.values for model, numbers in head.items() if numbers.values},
        "scores": {split: {m: n.values for m, n in models.items()} for split, models in tables.items()},
        "probe": _probe_summary(probe, cells, few),
        "intervals": {
            "headline": {model: numbers.intervals for model, numbers in head.items() if numbers.intervals},
            "scores": {split: {m: n.intervals for m, n in models.items()} for split, models in tables.items()},
        },
        "omitted": omitted,
    }


def _paired(cells: dict[tuple[str, str, int], Cell], names: Sequence[str], settings: Settings) -> Paired:
    """Scores per prompt, for the registry's gate."""
    few, most, key = settings.evaluation.few, max(settings.evaluation.steps), "train_similarity"
    about = {"learnt": {"better": "higher", "label": "likeness"}}
    if most > few:
        about["few_step"] = {"better": "higher", "label": "few steps beside many"}
    if ("kept", "base", few) in cells:
        about["kept"] = {"better": "higher", "label": "the base's own pictures"}

    def lost(model: str) -> Any:
        many = cells["concept", model, most].values[key]
        return cells["concept", model, few].values[key][: len(many)] - many

    models = {}
    for model in (name for name in names if name != "teacher"):
        values = {"learnt": cells["concept", model, few].values[key]}
        if "few_step" in about:
            values["few_step"] = lost(model) - lost("base")
        if "kept" in about:
            mine, base = (cells["kept", name, few].content for name in (model, "base"))
            values["kept"] = torch.cosine_similarity(mine, base).double().numpy()
        models[model] = {score: {"first": tuple(map(float, numbers))} for score, numbers in values.items()}
    return Paired(about, models, few)


def _probe_summary(probe: StyleProbe | None, cells: dict[tuple[str, str, int], Cell], few: int) -> dict[str, Any]:
    if probe is None:
        return {}
    summary: dict[str, Any] = {f"accuracy_{name}": round(value, 4) for name, value in probe.accuracy.items()}
    own = cells.get(("kept", "base", few))
    if own is not None and "style_hit" in own.values:
        summary["accuracy_base_samples"] = round(float(own.values["style_hit"].mean()), 4)
    return summary | probe.counts


def _write_csv(
    folder: Path, cells: dict[tuple[str, str, int], Cell], scorers: dict[str, Scorer], curve: int, settings: Settings
) -> None:
    bootstrap = Bootstrap(settings.evaluation.seed)
    header = ["model", "steps", "split", "metric", "value", "low", "high", "prompts"]
    everything, curves = [], []
    for (split, model, steps), cell in cells.items():
        everything += _rows(split, model, steps, cell, scorers, bootstrap)
        if split == "concept" and steps > 0:
            curves += _rows(split, model, steps, cell.first(curve), scorers, bootstrap)
    for name, rows in (("scores.csv", everything), ("few_step.csv", curves)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])


def _rows(
    split: str, model: str, steps: int, cell: Cell, scorers: dict[str, Scorer], bootstrap: Bootstrap
) -> list[list[Any]]:
    numbers = headline.scores_of(cell, scorers[split].kid(cell, model == "real"), bootstrap)
    return [
        [model, steps, split, key, value, *numbers.intervals.get(key, ["", ""]), len(cell.content)]
        for key, value in numbers.values.items()
    ]
