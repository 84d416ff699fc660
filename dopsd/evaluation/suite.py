"""Stage evaluate: what is sampled, with which seeds, and scored; before and after, with few steps and with many.

Every model gets the same prompts and the same noise per prompt. Subjects are the untuned base, its *teacher* (the base
shown another training picture of the concept) and every adapter. Written to the folder: ``metrics.json`` (headline and
the few-step table, with intervals), ``scores.csv`` (everything, long), ``few_step.csv`` (curves over steps, all on the
same prompts), ``paired.json`` (prompt by prompt, what the registry's gate compares), ``prompts.json`` (prompt by
prompt, what the report shows), ``grids/*.png``, and ``samples/`` for the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dopsd.config import Settings
from dopsd.data.cache import EncodingCache
from dopsd.data.manifest import ConceptTable
from dopsd.data.pictures import Picture
from dopsd.files import whole_folder
from dopsd.models.base import Conditioning, Family
from dopsd.models.sources import ModelError
from dopsd.process import return_memory
from dopsd.train.encode import encode_contexts, encode_prompts
from dopsd.train.workers import Workers

from . import prompts
from .backbones import BackboneError, FeatureStore, load_backbones
from .compare import compared, looks_of
from .draws import Job, Key, Subject, draw_all, parts_of, wanted
from .extras import Extras, waiting_room, with_values
from .grids import Gallery
from .naming import REFERENCES
from .paired import is_name
from .probe import StyleProbe, decoded, round_trip, train_probe
from .prompts import CONCEPT, KEPT, KNOWN, NEAR, EvaluationError, Kind, Prompt
from .scoring import Cell, Scorer, Training, in_order
from .summary import Evaluated, write_results
from .world import World

__all__ = ["EvaluationError", "Subject", "evaluate"]


_LARGE = 512 * 512
"""Pixels from which on a picture is made of blocks that are not reused well."""


def subjects_in(adapters: Path, first: str = "d-opsd") -> list[Subject]:
    """What is compared: the base, its teacher, and every adapter there is, that of the method ``first`` first."""
    trained = sorted(adapters.glob("*.safetensors"), key=lambda path: (path.stem != first, path.stem))
    if not trained:
        raise EvaluationError(f"{adapters}: no adapter there; run stage train first")
    for path in trained:
        if not is_name(path.stem) or path.stem in REFERENCES:
            raise EvaluationError(f"{path}: an adapter's name is of a-z, 0-9, _ and -, and none of "
                                  f"{', '.join(REFERENCES)}; rename it or move it away")  # fmt: skip
    return [Subject("base", None), Subject("teacher", None), *(Subject(path.stem, path) for path in trained)]


@dataclass(frozen=True)
class _Plan:
    """All that is asked, by split, and encoded: ``teacher`` holds the concept's prompts with its contexts. Of every
    training picture the first caption, and ``trained``: all of them."""

    kind: Kind
    splits: dict[str, list[Prompt]]
    conditioning: dict[str, list[Conditioning]]
    training: list[Picture]
    captions: list[str]
    trained: list[str]


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
    root: Path = Path(),
) -> dict[str, Any]:
    """Sample and score all ``subjects``; write ``folder`` (whole or not at all) and return ``metrics.json``'s content.

    ``world``: the truth for every prompt, which only the embedded base has; scores that need what is not there are left
    out and named under ``omitted``. ``cache`` also keeps real pictures' features. ``workers`` draw, where there are
    some. ``root``: what folders in the settings are relative to. The family's encoders are released once everything is
    encoded, and all of it before a judge looks; ``workers`` are closed then. Raises :class:`EvaluationError`, and
    ``BackboneError``.
    """
    names = [subject.name for subject in subjects]
    if "base" not in names or len(set(names)) < len(names):
        raise EvaluationError(f"evaluate: expected the subject base once and no name twice, got {', '.join(names)}")
    plan = _plan(family, table, holdout, world, settings, cache, with_teacher="teacher" in names)
    if "teacher" not in plan.conditioning:
        subjects = [subject for subject in subjects if subject.name != "teacher"]
    family.parts.release(("text_encoder", "vision"))  # before backbones come; the autoencoder is asked once more
    backbones = load_backbones(settings.evaluation.backbones, family.device, root, settings.evaluation.rubric)
    stores = [FeatureStore(one, cache.folder / f"{_file_name(one.name)}.safetensors") for one in backbones.features]
    evaluated = sorted({p.concept for asked in plan.splits.values() for p in asked if p.concept is not None})
    probe = _probe(family, world, evaluated, stores[0], settings)
    training = Training(plan.training, stores)
    scorers = {split: Scorer(asked, stores, training, probe, world, evaluated) for split, asked in plan.splits.items()}
    for store in stores:
        store.save()
    cells = _real(family, scorers)
    family.release_encoders()
    names = [subject.name for subject in subjects]

    with whole_folder(folder) as partial, waiting_room(folder) as waiting:
        gallery = Gallery(partial, plan.splits, plan.training, plan.captions, settings, names)
        few, many = settings.evaluation.few, settings.evaluation.many
        words = (settings.data.placeholder, plan.kind.label)
        extras = Extras(backbones, plan.splits, plan.training, words, few, many, waiting)
        extras.try_judges()
        cells |= _run(family, subjects, plan, scorers, extras, gallery, settings, workers)
        backbones.release()
        omitted = {}
        if backbones.judges:
            family.parts.release(family.parts.loaded())
            if workers is not None:  # they hold the base too
                workers.close()
            try:
                for key, grades in extras.judge(cells).items():
                    cells[key] = with_values(cells[key], grades)
            except (BackboneError, ModelError, torch.OutOfMemoryError) as error:  # all else is measured
                omitted["judge"] = " ".join(str(error).split())[:300]
                print(f"evaluate: no grades: {omitted['judge']}")
            backbones.release()
        dims = {store.backbone.name: store.backbone.content_dim for store in stores}
        looks = looks_of(cells, training.features, dims, plan.kind.kind, few)
        found = Evaluated(
            table.name, plan.kind, family.teaching.context, plan.splits, plan.trained, names,
            compared(cells, looks), looks[0], scorers, probe, settings, omitted,
        )  # fmt: skip
        metrics = write_results(found, partial)
        gallery.write()
    return metrics


def _file_name(name: str) -> str:
    """Of a backbone's remembered features: its name may hold a hub's or a folder's slashes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)


# --- what is asked ----------------------------------------------------------------------------------------------------


def _plan(
    family: Family, table: ConceptTable, holdout: ConceptTable | None, world: World | None, settings: Settings,
    cache: EncodingCache, with_teacher: bool,
) -> _Plan:  # fmt: skip
    kind = prompts.read_kind(table, world)
    if settings.evaluation.protocol == "published":
        asked = prompts.published(table, settings)
    else:
        asked = {CONCEPT: prompts.concept_prompts(table, holdout, world, kind, settings)}
    concept = asked[CONCEPT]
    splits = {
        **asked,
        KEPT: prompts.kept_prompts(settings),
        NEAR: prompts.near_prompts(table, kind, settings),
        KNOWN: prompts.known_prompts(world, concept, settings),
    }
    splits = {split: asked for split, asked in splits.items() if asked}
    conditioning = {split: encode_prompts(family, [p.request for p in asked], cache) for split, asked in splits.items()}
    if with_teacher:
        requests = prompts.teacher_requests(table, concept, settings, family.teaching.context)
        if requests is not None:
            conditioning["teacher"] = encode_contexts(family, requests, cache)
    captions = [row.student_captions(settings.model.teacher_variant)[0] for row in table.rows]
    trained = [text for row in table.rows for _, text in row.captions]
    return _Plan(kind, splits, conditioning, prompts.training_pictures(table, settings), captions, trained)


def _probe(
    family: Family, world: World | None, evaluated: Sequence[int], store: FeatureStore, settings: Settings
) -> StyleProbe | None:
    if world is None:
        return None
    again = round_trip(family, settings.data.resolution, settings.evaluation.batch_size)
    return train_probe(world, evaluated, store, again, settings.evaluation.seed)


# --- sampling ---------------------------------------------------------------------------------------------------------


def _jobs(subjects: Sequence[Subject], plan: _Plan, settings: Settings) -> Iterator[Job]:
    """Every model's pictures, the base's first."""
    for subject in sorted(subjects, key=lambda subject: subject.name != "base"):
        for split, asked in plan.splits.items():
            conditioning = plan.conditioning["teacher" if subject.name == "teacher" else split]
            for steps, noise, count in wanted(split, subject.name, len(asked), settings.evaluation):
                key = Key(split, subject.name, steps, noise)
                yield Job(key, subject.adapter, asked[:count], conditioning[:count])


def _run(
    family: Family, subjects: Sequence[Subject], plan: _Plan, scorers: dict[str, Scorer], extras: Extras,
    gallery: Gallery, settings: Settings, workers: Workers | None,
) -> dict[Key, Cell]:  # fmt: skip
    """Every subject's pictures, scored batch by batch and dropped, apart from the gallery's small copies."""
    jobs = list(_jobs(subjects, plan, settings))
    parts = [part for job in jobs for part in parts_of(job, settings.evaluation.seed, settings.evaluation.batch_size)]
    drawn: dict[Key, list[tuple[list[int], Cell]]] = {job.key: [] for job in jobs}
    total = sum(job.key.steps * len(job.prompts) for job in jobs)
    with tqdm(total=total, desc="evaluate", unit="step", dynamic_ncols=True, disable=None) as bar:
        for part, images in draw_all(family, parts, workers):
            bar.set_postfix_str(f"{part.key.model}, {part.key.split}, {part.key.steps} steps")
            measured = scorers[part.key.split].measure(part.rows, images)
            measured = with_values(measured, extras.measure(part.key, part.rows, images))
            drawn[part.key].append((part.rows, measured))
            gallery.add(part.key, part.rows, images)
            if part.height * part.width >= _LARGE:
                return_memory()
            bar.update(part.key.steps * len(part.rows))
    return {key: scorers[key.split].scored(in_order(measured)) for key, measured in drawn.items()}


def _real(family: Family, scorers: dict[str, Scorer]) -> dict[Key, Cell]:
    """The true pictures' own scores, where there are any, and those of what the autoencoder makes of them: all that a
    model in its latents can come to."""

    def through(images: list[Image.Image]) -> list[Image.Image]:
        return decoded(family, images, len(images))

    cells: dict[Key, Cell] = {}
    for split, scorer in scorers.items():
        for name, way in (("real", None), ("decoded", through)):
            found = scorer.real(way)
            if found is not None:
                cells[Key(split, name, 0)] = found
    return cells
