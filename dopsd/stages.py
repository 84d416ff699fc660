"""The six stages: what goes in, what comes out, nothing else. Run by ``dopsd STAGE --concept NAME`` and by the flow.

All of a concept's results are below ``runs/<concept>/``. A stage may be run again at any time: it does its work anew,
apart from training, which goes on where it was or returns at once when it is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dopsd.config import Settings
from dopsd.config.groups import Method
from dopsd.files import full_disk_said, read_json, stamps, write_json
from dopsd.lock import concept_lock, end_with_dvc
from dopsd.project import (
    BASE,
    ENCODINGS,
    PLAN,
    StageError,
    cache_of,
    concept_folder,
    load_base,
    read_concept,
    read_result,
    run_folder,
    world_of,
)  # fmt: skip

if TYPE_CHECKING:
    from dopsd.data.cache import EncodingCache
    from dopsd.data.encoded import Encoded
    from dopsd.data.manifest import ConceptTable
    from dopsd.models.base import Family


# --- what the stages are made of --------------------------------------------------------------------------------------


def identify_base(settings: Settings, root: Path) -> None:
    """Find the base's files, or fetch them, and write what they are to ``runs/base.json``."""
    from dopsd.models import open_base, remember_commits, resolved

    settings = resolved(settings)
    with full_disk_said(root / BASE):
        base = open_base(settings.model, root, fresh=True)
        remember_commits(base, root)
        about = {"family": settings.model.family, "files": dict(sorted(base.identities.items()))}
        write_json(root / BASE, about)
    print(f"base: {base.source.shown} is {settings.model.family}, {base.identity[:12]}")


def _plan(concept: str, settings: Settings, root: Path) -> None:
    """Settings and base -> ``plan.json``: what each stage's result is made of. The same, the same file."""
    run = run_folder(concept, root)
    write_json(run / PLAN, _made_of(run, settings, root))


def _made_of(run: Path, settings: Settings, root: Path) -> dict[str, Any]:
    """What each stage's result would be made of today. Raises ``AdapterError``, before anything is loaded, where
    ``train.init_from`` is not what the settings train; a plan that was written has looked at it."""
    from dopsd.evaluation.backbones import seen_of
    from dopsd.identity import plan_of
    from dopsd.models import open_base
    from dopsd.train.start import start_hash

    start, seen = start_hash(settings.train, root, run), seen_of(settings.evaluation, root)
    made = plan_of(settings, open_base(settings.model, root), start, seen)
    if start and read_json(run / PLAN).get("train") != made["train"]:
        from dopsd.train.student import check_start

        check_start(settings.train, settings.model, root)
    return made


# --- the stages -------------------------------------------------------------------------------------------------------


def validate(concept: str, settings: Settings, root: Path) -> None:
    """``data/concepts/<concept>`` -> ``validated.json``. Raises ``DataError`` with every fault of the data."""
    from dopsd.models.reading import reader_of

    before = stamps(concept_folder(concept, root))
    table, holdout = read_concept(concept, settings, root)
    summary: dict[str, Any] = {
        "concept": concept, "images": len(table.rows), "captions": sum(len(row.captions) for row in table.rows),
        "holdout_images": len(holdout.rows) if holdout else 0, **_hashes(table, holdout),
    }  # fmt: skip
    if stamps(concept_folder(concept, root)) != before:
        # dvc.lock would tie what was seen to what lies there when the stage is over
        raise StageError(f"data/concepts/{concept} changed while it was validated; run it again when all is there")
    write_json(run_folder(concept, root) / "validated.json", summary)
    for warning in warnings_of(table, holdout):
        print(warning)
    if reader_of(settings, root).source is None:
        print("validate: the base's tokenizer is not here: captions were counted by words, and encode will count them")
    print(
        f"validate: {concept} has {summary['images']} images, {summary['captions']} captions and "
        f"{summary['holdout_images']} held-out images; no faults"
    )


def encode(concept: str, settings: Settings, root: Path) -> None:
    """The data set and the base's encoders -> ``encoded/``: prompts, teacher contexts, target latents, once."""
    from dopsd.data.encoded import Encoded, write_encoded
    from dopsd.models import open_base
    from dopsd.train.encode import BATCH, EncodingRequest, encode_concept, encode_previews, encode_prompts
    from dopsd.train.workers import SpreadEncoders, workers

    run = run_folder(concept, root)
    base = open_base(settings.model, root)  # first of all: with its tokenizer here the texts are judged exactly
    table, holdout = _read_validated(concept, settings, root)
    _check_evaluation(table, holdout, settings, root)  # now, and not when hours of training are over
    replay = settings.train.replay.prompts if settings.train.replay.weight > 0 else ()
    cache = cache_of(root)
    if note := base.differences():
        print(f"encode: {note}")
    with workers(settings.model, settings.compute, root, "teach") as helpers:
        family = load_base(settings, root)
        if helpers is not None:
            family = cast("Family", SpreadEncoders(family, helpers, BATCH))
        encoded = Encoded(
            examples=tuple(encode_concept(family, table, settings, cache)),
            previews=tuple(encode_previews(family, holdout or table, settings, cache)),
            replay=tuple(
                zip(replay, encode_prompts(family, [EncodingRequest(text) for text in replay], cache), strict=True)
            ),
            images=len(table.rows),
            content_hash=table.content_hash,
        )
    write_encoded(run / "encoded", encoded)
    _remember_encodings(run, "encode", cache)
    prompts = len(encoded.previews) + len(replay)
    print(f"encode: {len(encoded.examples)} examples and {prompts} prompts -> {run / 'encoded'}")


def train(concept: str, settings: Settings, root: Path) -> None:
    """``encoded/`` and the base's transformer -> ``train/<method>/`` and ``adapters/``, for each method."""
    from dopsd.identity import common_identity, training_name
    from dopsd.tracking import Sender
    from dopsd.train.job import Job
    from dopsd.train.launch import bring_back, run_training
    from dopsd.train.observer import Terminal
    from dopsd.train.optimizer import check_optimizer

    check_optimizer(settings.train)
    run = run_folder(concept, root)
    encoded, parts = _learnt_from(run, settings, root)
    common = common_identity(parts)
    name, before = training_name(settings.train, common), read_json(run / "train" / "training.json").get("training")
    if before and (before != name or settings.compute.launcher == "local"):  # on Ray the same job finds its own
        # first of all: whoever fails here must find the old name again
        bring_back(f"{concept}-{before}", settings.compute, root, run / "train")
    _describe(run, name, settings, root, encoded.content_hash, images=encoded.images)
    print(f"train: {settings.train.work()}")
    job = Job(
        f"{concept}-{name}", encoded, settings.train, settings.model, root, common, name, settings.compute.sharded,
        parts,
    )  # fmt: skip
    with Sender(root, run, settings.tracking) as sender:
        watching = Terminal(sender.wake)
        results = run_training(job, settings.compute, root, run / "train", run / "adapters", watching)
    _remove_others(run / "adapters", {path.stem for found in results.values() for path in found.adapters.values()})
    for method, result in results.items():
        print(
            f"train: {method}, {result.steps} steps ({result.stopped}), {result.images} images, {result.seconds:.0f} s "
            f"-> {', '.join(str(path) for path in result.adapters.values())}"
        )


def evaluate(concept: str, settings: Settings, root: Path) -> None:
    """Adapters, base and held-out truth -> ``evaluation/``: scores, curves and grids, before and after."""
    from dopsd.evaluation.suite import evaluate as evaluate_subjects
    from dopsd.evaluation.suite import subjects_in
    from dopsd.tracking import send
    from dopsd.train.workers import workers

    run = run_folder(concept, root)
    table, holdout = _read_validated(concept, settings, root)
    _check_evaluation(table, holdout, settings, root)
    subjects, cache = subjects_in(run / "adapters", settings.train.methods[0]), cache_of(root)
    with workers(settings.model, settings.compute, root, "train") as helpers:
        evaluate_subjects(
            load_base(settings, root), table, holdout, world_of(settings, root), subjects, settings, cache,
            run / "evaluation", workers=helpers, root=root,
        )  # fmt: skip
    _remember_encodings(run, "evaluate", cache)
    send(root, run, settings.tracking)
    print(f"evaluate: {', '.join(s.name for s in subjects)} -> {run / 'evaluation'}")


def report(concept: str, settings: Settings, root: Path) -> None:
    """``evaluation/`` and ``train/`` -> ``report.html``, one page that needs nothing else."""
    from dopsd.evaluation.report import write_report
    from dopsd.tracking import send

    run = run_folder(concept, root)
    summary = read_result(run / "validated.json", "validate")
    write_report(run / "evaluation", run / "train", summary, run / "report.html")
    send(root, run, settings.tracking)
    print(f"report: {run / 'report.html'}")


def register(concept: str, settings: Settings, root: Path) -> None:
    """The first method's adapter -> ``export/``: what diffusers and ComfyUI load, model card; loaded and compared."""
    import torch

    from dopsd.card import card_of
    from dopsd.champions import register_version
    from dopsd.export import check_export, draw_student, export_trained
    from dopsd.models import family_class, open_base
    from dopsd.tracking import send
    from dopsd.train.encode import first_requests
    from dopsd.train.start import start_hash

    run, method = run_folder(concept, root), settings.train.methods[0]
    adapter = run / "adapters" / f"{method}.safetensors"
    table, _ = _read_validated(concept, settings, root)
    _check_trained(run, method, settings, root)
    base, family = open_base(settings.model, root, use="draw"), family_class(settings.model)
    requests = first_requests(table, settings, 2)
    card = card_of(concept, settings, table, run, base, requests[0], start_hash(settings.train, root, run))
    dtype = getattr(torch, settings.export.dtype)
    export = export_trained(adapter, run / "export", card, family, base.source.folder, dtype)
    loaded = load_base(settings, root, use="draw")
    dtype, device = loaded.dtype, loaded.device
    drawn = draw_student(loaded, adapter, requests, settings.evaluation.few, settings.evaluation.seed)
    del loaded  # a large base fits once
    compared = check_export(
        base.source.folder, export, drawn, family, dtype=dtype, device=device,
        quantization=settings.model.quantization, offload=settings.model.offload,
    )  # fmt: skip
    write_json(run / "exported.json", compared)
    send(root, run, settings.tracking)
    print(
        f"register: {method} -> {export}; plain diffusers draws the student's pictures "
        f"(difference {compared['difference']:.3f} of 255, the adapter changes {compared['change']:.1f})"
    )
    if settings.tracking.enabled and settings.registry.enabled:
        register_version(concept, settings, root)


Stage = Callable[[str, Settings, Path], None]


def _of_concept(stage: Stage) -> Stage:
    """The stage with the settings of its concept, and what they need where the device has not that much memory."""

    @wraps(stage)
    def run(concept: str, settings: Settings, root: Path) -> None:
        from dopsd.models import resolved

        settings = resolved(settings.of(concept, root))
        try:
            with full_disk_said(run_folder(concept, root)):
                stage(concept, settings, root)
        except RuntimeError as error:
            from dopsd.train.device_memory import out_of_memory, ran_out

            if not ran_out(error):
                raise
            raise StageError(f"{stage.__name__.lstrip('_')}: {out_of_memory(settings, root)}") from error

    return run


plan = _of_concept(_plan)
"""Not a stage: it says what the stages are made of."""
STAGES: dict[str, Stage] = {
    stage.__name__: _of_concept(stage) for stage in (validate, encode, train, evaluate, report, register)
}


def run_stage(name: str, concept: str, settings: Settings, root: Path) -> None:
    """One stage (or ``plan``) by itself, while nobody else works on the concept. Raises ``ConceptBusy``."""
    with concept_lock(concept, root, f"dopsd {name}", end_with_dvc()):
        (STAGES | {"plan": plan})[name](concept, settings, root)


# --- what goes in -----------------------------------------------------------------------------------------------------


def _hashes(table: ConceptTable, holdout: ConceptTable | None) -> dict[str, str | None]:
    """By what the later stages know a data set."""
    from dopsd.data.manifest import kind_hash

    held_out = holdout.content_hash if holdout else None
    return {"content_hash": table.content_hash, "holdout_hash": held_out, "kind_hash": kind_hash(table.root)}


def warnings_of(*tables: ConceptTable | None) -> list[str]:
    """What is no fault of the data, and a person should know: a line each."""
    return [f"warning: {warning}" for table in tables if table for warning in table.warnings]


def _read_validated(concept: str, settings: Settings, root: Path) -> tuple[ConceptTable, ConceptTable | None]:
    """The data set that stage validate has seen. Raises :class:`StageError` where it is another one now."""
    table, holdout = read_concept(concept, settings, root)
    validated = read_result(run_folder(concept, root) / "validated.json", "validate")
    if any(validated.get(key) != value for key, value in _hashes(table, holdout).items()):
        raise StageError(f"data/concepts/{concept} changed since it was validated; run `dopsd validate` again")
    return table, holdout


def _check_evaluation(table: ConceptTable, holdout: ConceptTable | None, settings: Settings, root: Path) -> None:
    """Find, or fetch, what the evaluation will see with and ask. Raises ``BackboneError``, ``ModelError``,
    ``EvaluationError``, ``SettingsError`` and ``DataError``: a line each."""
    from dopsd.data.manifest import PROTOCOL, DataError, Fault
    from dopsd.evaluation.backbones import check_backbones
    from dopsd.evaluation.prompts import check_questions, published
    from dopsd.models.reading import reader_of

    check_backbones(settings.evaluation.backbones, root, settings.evaluation.rubric)
    check_questions(table, holdout, world_of(settings, root), settings)
    if settings.evaluation.protocol == "published":
        reader, asked = reader_of(settings, root), published(table, settings)
        texts = [prompt.text for prompts in asked.values() for prompt in prompts]
        found = [Fault(PROTOCOL, None, text[:60], wrong) for text in texts if (wrong := reader.as_prompt(text))]
        if found:
            raise DataError(found)


def _learnt_from(run: Path, settings: Settings, root: Path) -> tuple[Encoded, dict[str, Any]]:
    """What stage encode left, and what all methods trained on it have in common."""
    from dopsd.data.encoded import read_encoded
    from dopsd.identity import common_parts

    encoded = read_encoded(run / "encoded")
    return encoded, common_parts(_made_of(run, settings, root), encoded, settings.train.replay.weight > 0)


def _check_trained(run: Path, method: Method, settings: Settings, root: Path) -> None:
    """Raise :class:`StageError` where the adapter was trained from other settings, data or base than today's: a version
    of it would be said to be made from those."""
    from dopsd.identity import common_identity, training_identity

    trained = read_result(run / "adapters" / f"{method}.json", "train")
    _, parts = _learnt_from(run, settings, root)
    if trained.get("fingerprint") != training_identity(settings.train, method, common_identity(parts)):
        raise StageError(
            f"{run / 'adapters' / method}.safetensors was trained from other settings, data or base than today's; "
            "run stage train first"
        )


# --- what comes out ---------------------------------------------------------------------------------------------------


def _remember_encodings(run: Path, stage: str, cache: EncodingCache) -> None:
    """Which cached encodings a stage used, so that `dopsd clean` leaves them."""
    write_json(run / ENCODINGS, {**read_json(run / ENCODINGS), stage: sorted(cache.used)})


def _remove_others(adapters: Path, wanted: set[str]) -> None:
    """Delete adapters of methods that are no longer asked for: they would stay in every table."""
    for file in sorted(adapters.iterdir()):
        if file.stem not in wanted:
            file.unlink()


def _describe(run: Path, name: str, settings: Settings, root: Path, content_hash: str, **profile: int) -> None:
    """What a training is called and made of, for the tracker: settings, data, code."""
    from dopsd.origin import flow_tags, git_tags

    values = settings.model_dump(mode="json", include={"model", "data", "train"})
    values["train"].pop("methods")  # a method more is the same training
    write_json(run / "train" / "training.json", {"training": name})
    write_json(run / "train" / "settings.json", values)
    data = {"name": run.name, "hash": content_hash, "source": f"data/concepts/{run.name}", "profile": profile}
    write_json(run / "about.json", {"data": data, "tags": git_tags(root) | flow_tags()})
