"""The six stages: what goes in, what comes out, nothing else. Run by ``dopsd STAGE --concept NAME`` and by the flow.

All of a concept's results are below ``runs/<concept>/``. A stage may be run again at any time: it does its work anew,
apart from training, which goes on where it was or returns at once when it is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dopsd.config import Settings
from dopsd.files import read_json, write_json

if TYPE_CHECKING:
    from dopsd.data.manifest import ConceptTable
    from dopsd.data.needs import Needs
    from dopsd.evaluation.world import World
    from dopsd.models import Base, Use
    from dopsd.models.base import Family, Request

BASE = Path("runs/base.json")


class StageError(ValueError):
    """A stage that lacks what an earlier one makes; one line saying which to run."""


def run_folder(concept: str, root: Path) -> Path:
    """Where all results of a concept are."""
    return root / "runs" / concept


def validate(concept: str, settings: Settings, root: Path) -> None:
    """``data/concepts/<concept>`` -> ``validated.json``. Raises ``DataError`` with every fault of the data."""
    table, holdout = read_concept(concept, settings, root)
    about: dict[str, Any] = {
        "concept": concept, "content_hash": table.content_hash, "images": len(table.rows),
        "captions": sum(len(row.captions) for row in table.rows),
        "holdout_images": len(holdout.rows) if holdout else 0,
        "holdout_hash": holdout.content_hash if holdout else None,
    }  # fmt: skip
    write_json(run_folder(concept, root) / "validated.json", about)
    print(
        f"validate: {concept} has {about['images']} images, {about['captions']} captions and "
        f"{about['holdout_images']} held-out images; no faults"
    )


def identify_base(settings: Settings, root: Path) -> None:
    """The base's files -> ``runs/base.json``: what the stages that use it depend on. The same base, the same file."""
    from dopsd.models import description_of, open_base, remember_commits, resolved

    settings = resolved(settings)
    base = open_base(settings.model, root, fresh=True)
    remember_commits(base, root)
    write_json(root / BASE, description_of(base, settings.model))
    print(f"base: {base.source.shown} is {settings.model.family}, {base.identity[:12]}")


def encode(concept: str, settings: Settings, root: Path) -> None:
    """The data set and the base's encoders -> ``encoded/``: prompts, teacher contexts, target latents, once."""
    from dopsd.data.encoded import Encoded, write_encoded
    from dopsd.models import open_base
    from dopsd.train.encode import BATCH, EncodingRequest, encode_concept, encode_previews, encode_prompts
    from dopsd.train.workers import SpreadEncoders, workers

    run = run_folder(concept, root)
    table, holdout = read_concept(concept, settings, root)
    if _read_json(run / "validated.json", "validate")["content_hash"] != table.content_hash:
        raise StageError(f"data/concepts/{concept} changed since it was validated; run `dopsd validate` again")
    replay = settings.train.replay.prompts if settings.train.replay.weight > 0 else ()
    cache = cache_of(root)
    if note := open_base(settings.model, root).differences():
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
    prompts = len(encoded.previews) + len(replay)
    print(f"encode: {len(encoded.examples)} examples and {prompts} prompts -> {run / 'encoded'}")


def train(concept: str, settings: Settings, root: Path) -> None:
    """``encoded/`` and the base's transformer -> ``train/<method>/`` and ``adapters/``, for each method."""
    from dopsd.data.encoded import read_encoded
    from dopsd.tracking import Sender
    from dopsd.train.job import Job
    from dopsd.train.launch import run_training
    from dopsd.train.observer import Terminal

    run = run_folder(concept, root)
    encoded = read_encoded(run / "encoded")
    training = _begin_training(run, settings, encoded.content_hash, root)
    name = training["training"]
    _describe(run, settings, root, encoded.content_hash, images=encoded.images)
    print(f"train: {settings.train.work()}")
    job = Job(f"{concept}-{name}", encoded, settings.train, settings.model, root, name)
    with Sender(root, run, settings.tracking) as sender:
        watching = Terminal(sender.wake)
        results = run_training(job, settings.compute, root, run / "train", run / "adapters", watching)
    _remove_others(run / "adapters", {path.stem for found in results.values() for path in found.adapters.values()})
    for method, result in results.items():
        print(
            f"train: {method}, {result.steps} steps ({result.stopped}), {result.images} images, {result.seconds:.0f} s "
            f"-> {', '.join(str(path) for path in result.adapters.values())}"
        )
    write_json(run / "train" / "training.json", training)


def evaluate(concept: str, settings: Settings, root: Path) -> None:
    """Adapters, base and held-out truth -> ``evaluation/``: scores, curves and grids, before and after."""
    from dopsd.evaluation.suite import evaluate as evaluate_subjects
    from dopsd.tracking import send
    from dopsd.train.workers import workers

    run = run_folder(concept, root)
    table, holdout = read_concept(concept, settings, root)
    subjects = _subjects(run / "adapters")
    with workers(settings.model, settings.compute, root, "train") as helpers:
        evaluate_subjects(
            load_base(settings, root), table, holdout, world_of(settings, root), subjects, settings, cache_of(root),
            run / "evaluation", workers=helpers,
        )  # fmt: skip
    send(root, run, settings.tracking)
    print(f"evaluate: {', '.join(s.name for s in subjects)} -> {run / 'evaluation'}")


def report(concept: str, settings: Settings, root: Path) -> None:
    """``evaluation/`` and ``train/`` -> ``report.html``, one page that needs nothing else."""
    from dopsd.evaluation.report import write_report
    from dopsd.tracking import send

    run = run_folder(concept, root)
    about = _read_json(run / "validated.json", "validate")
    write_report(run / "evaluation", run / "train", about, run / "report.html")
    send(root, run, settings.tracking)
    print(f"report: {run / 'report.html'}")


def register(concept: str, settings: Settings, root: Path) -> None:
    """The first method's adapter -> ``export/``: files for diffusers and ComfyUI, model card; loaded and compared."""
    from dopsd.export import check_export, draw_student, export_adapter
    from dopsd.models import family_class, open_base
    from dopsd.tracking import send

    run = run_folder(concept, root)
    method = settings.train.methods[0]
    adapter = run / "adapters" / f"{method}.safetensors"
    table, _ = read_concept(concept, settings, root)
    base, family = open_base(settings.model, root, use="draw"), family_class(settings.model)
    asked = _first_requests(table, settings, 2)
    export = export_adapter(adapter, run / "export", _card(concept, settings, table, run, base, asked[0]), family)
    loaded = load_base(settings, root, use="draw")
    dtype, device = loaded.dtype, loaded.device
    drawn = draw_student(loaded, adapter, asked, settings.evaluation.few, settings.evaluation.seed)
    del loaded  # a large base fits once
    compared = check_export(base.source.folder, export, drawn, family, dtype=dtype, device=device)
    write_json(run / "exported.json", compared)
    send(root, run, settings.tracking)
    print(
        f"register: {method} -> {export}; plain diffusers draws the student's pictures "
        f"(difference {compared['difference']:.3f} of 255, the adapter changes {compared['change']:.1f})"
    )
    if settings.tracking.enabled and settings.registry.enabled:
        _register_version(concept, settings, root, table, run)


def _first_requests(table: ConceptTable, settings: Settings, count: int) -> list[tuple[Request, int, int]]:
    """The first rows as a person would ask for them: request, height, width."""
    from dopsd.data.pictures import bucket_of, references_of
    from dopsd.train.encode import EncodingRequest

    asked = []
    for row in table.rows[:count]:
        text = row.student_captions(settings.model.teacher_variant)[0]
        width, height = bucket_of(row, settings.data.resolution, settings.data.max_pixels)
        asked.append((EncodingRequest(text, references_of(row, settings.data.max_pixels)).decoded(), height, width))
    return asked


def _register_version(concept: str, settings: Settings, root: Path, table: ConceptTable, run: Path) -> None:
    """A version in the registry, judged; the outcome is kept in ``registered.json``."""
    from dopsd.champions import register_version
    from dopsd.models import open_base
    from dopsd.origin import git_tags
    from dopsd.registry import CHAMPION, RegistryAway
    from dopsd.tracking import run_id

    training = _read_json(run / "train" / "training.json", "train")["training"]
    found = run_id(root, run, training, settings.tracking)
    if found is None:
        raise RegistryAway("the tracker has not got this training yet; run stage register again when it answers")
    about = _read_json(run / "validated.json", "validate")
    metrics = _read_json(run / "evaluation" / "metrics.json", "evaluate")
    tags = git_tags(root) | {"dopsd.training": training, "dopsd.data.hash": table.content_hash,
                             "dopsd.base": open_base(settings.model, root, use="draw").source.shown}  # fmt: skip

    def evaluate_again(adapter: Path, base_folder: Path | None) -> dict[str, Any]:
        from dopsd.evaluation.suite import Subject
        from dopsd.evaluation.suite import evaluate as evaluate_subjects

        _, holdout = read_concept(concept, settings, root)
        subjects = [Subject("base", None), Subject(CHAMPION, adapter)]
        its = settings
        if base_folder is not None:  # another one than today's, that was stored with the version
            model = settings.model.model_copy(update={"path": str(base_folder), "revision": None})
            its = settings.model_copy(update={"model": model})
        base = load_base(its, root, use="draw")
        world, cache = world_of(settings, root), cache_of(root)
        folder = adapter.parent / "evaluation"
        return evaluate_subjects(base, table, holdout, world, subjects, settings, cache, folder)

    outcome = register_version(
        concept, found, table, about["holdout_hash"], metrics, run, settings, root, tags, evaluate_again
    )
    write_json(run / "registered.json", outcome.__dict__)
    state = "is the champion" if outcome.promoted else "is a candidate, not the champion"
    print(f"register: {outcome.name} version {outcome.version} {state}: {outcome.reason}")


def is_registered(concept: str, settings: Settings, root: Path) -> bool:
    """Whether stage register has nothing to do: the registry is off, or has a judged version made from just this."""
    from dopsd.champions import made_of
    from dopsd.registry import Registry

    if not (settings.tracking.enabled and settings.registry.enabled):
        return True
    about = _read_json(run_folder(concept, root) / "validated.json", "validate")
    return Registry(root).judged(concept, made_of(about["content_hash"], settings.of(concept), root))


Stage = Callable[[str, Settings, Path], None]


def _of_concept(stage: Stage) -> Stage:
    """The stage with the settings of its concept."""

    @wraps(stage)
    def run(concept: str, settings: Settings, root: Path) -> None:
        from dopsd.models import resolved

        stage(concept, resolved(settings.of(concept)), root)

    return run


STAGES: dict[str, Stage] = {
    stage.__name__: _of_concept(stage) for stage in (validate, encode, train, evaluate, report, register)
}


def load_base(settings: Settings, root: Path, use: Use = "teach") -> Family:
    """The base model; its parts are loaded when they are used."""
    from dopsd.models import load_family

    return load_family(settings.model, root, use)


# --- what goes in -----------------------------------------------------------------------------------------------------


def read_concept(concept: str, settings: Settings, root: Path) -> tuple[ConceptTable, ConceptTable | None]:
    from dopsd.data.schema import validate_dataset

    return validate_dataset(root / "data" / "concepts" / concept, concept, settings.data, needs_of(settings))


def needs_of(settings: Settings) -> Needs:
    """What the base's context asks of the data. Raises ``ModelError`` for a family or context that there is not."""
    from dopsd.data.needs import Needs
    from dopsd.models import references_rule, resolved

    settings = resolved(settings)

    return Needs(references_rule(settings.model), settings.model.teacher_variant)


def cache_of(root: Path) -> Any:
    from dopsd.data.cache import EncodingCache

    return EncodingCache(root / ".cache" / "encodings")


def world_of(settings: Settings, root: Path) -> World | None:
    """The truth for every prompt, where the base's folder brings it along."""
    from dopsd.evaluation import world
    from dopsd.models import open_base

    return world.world_of(open_base(settings.model, root, "train").source.folder)


def _subjects(adapters: Path) -> list[Any]:
    """What is compared: the base, its teacher, and every adapter there is."""
    from dopsd.evaluation.suite import Subject

    trained = sorted(adapters.glob("*.safetensors"))
    if not trained:
        raise StageError(f"{adapters}: no adapter there; run stage train first")
    trained.sort(key=lambda path: (path.stem != "d-opsd", path.stem))
    return [Subject("base", None), Subject("teacher", None), *(Subject(path.stem, path) for path in trained)]


def _remove_others(adapters: Path, wanted: set[str]) -> None:
    """Delete adapters of methods that are no longer asked for: they would stay in every table."""
    for file in sorted(adapters.iterdir()):
        if file.stem not in wanted:
            file.unlink()


def _begin_training(run: Path, settings: Settings, content_hash: str, root: Path) -> dict[str, str]:
    """Name this training after all that decides it. A run of other code is set aside: it must not be resumed."""
    from dopsd.champions import method_version
    from dopsd.models import open_base
    from dopsd.train.checkpoint import set_aside

    code = method_version()
    path = run / "train" / "training.json"
    if read_json(path, print).get("code", code) != code:
        for folder in sorted(p for p in (run / "train").iterdir() if p.is_dir() and p.suffix != ".previous"):
            print(f"train: the code of training changed; the old run is now {set_aside(folder)}")
    decides = [
        settings.train.model_dump(mode="json", exclude={"methods"}), settings.model.decides_learning(),
        open_base(settings.model, root).identity, settings.data.model_dump(mode="json"), content_hash, code,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    training = {"training": name, "code": code}
    write_json(path, training)
    return training


# --- what comes out ---------------------------------------------------------------------------------------------------


def _describe(run: Path, settings: Settings, root: Path, content_hash: str, **profile: int) -> None:
    """What a training is made of, for the tracker: settings, data, code."""
    from dopsd.origin import flow_tags, git_tags

    values = settings.model_dump(mode="json", include={"model", "data", "train"})
    values["train"].pop("methods")  # a method more is the same training
    write_json(run / "train" / "settings.json", values)
    data = {"name": run.name, "hash": content_hash, "source": f"data/concepts/{run.name}", "profile": profile}
    write_json(run / "about.json", {"data": data, "tags": git_tags(root) | flow_tags()})


def _card(
    concept: str, settings: Settings, table: ConceptTable, run: Path, base: Base, asked: tuple[Request, int, int]
) -> Any:
    from dopsd.evaluation.table import table_as_text
    from dopsd.export import Card
    from dopsd.models import family_class, licence_of

    train, (request, height, width) = settings.train, asked
    call = family_class(settings.model).call(request, height, width, settings.evaluation.few)
    licence = settings.model.licence or licence_of(base.source)
    trained = _read_json(run / "adapters" / f"{train.methods[0]}.json", "train")
    metrics = _read_json(run / "evaluation" / "metrics.json", "evaluate")
    columns, rows = table_as_text(metrics)
    return Card(
        concept=concept,
        base=settings.model.name or base.source.shown,
        licence=licence,
        licence_listed=licence in _LISTED_LICENCES,
        method=train.methods[0],
        steps=settings.evaluation.few,
        placeholder=settings.data.placeholder,
        prompt=request.caption,
        call={key: value for key, value in call.items() if key not in ("prompt", "image")},
        edits=bool(request.references),
        unseen=metrics["unseen"],
        images=len(table.rows),
        data_hash=table.content_hash,
        training={
            "steps": f"{trained['steps']} of batch {train.batch_size * train.accumulation}",
            "learning rate": f"{train.learning_rate:g} ({train.schedule})",
            "adapter": f"rank {train.lora.rank}, alpha {train.lora.alpha or train.lora.rank:g}",
            "roll-out": f"{train.rollout_steps} steps, {train.loss} loss",
            "context": _context_of(settings),
            "teacher": f"{train.teacher.kind}, decay {train.teacher.decay}, guidance {train.teacher.guidance:g}",
            "replay": f"{train.replay.weight:g}",
            "seed": str(train.seed),
        },
        columns=columns,
        rows=rows,
    )


def _context_of(settings: Settings) -> str:
    from dopsd.models import teaching_of

    teaching = teaching_of(settings.model)
    if teaching.context == "enhanced-prompt":
        return f"{teaching.context} (the teacher reads the caption {settings.model.context_variant!r})"
    return f"{teaching.context}{f', with{teaching.suffix}' if teaching.suffix else ''}"


_LISTED_LICENCES = ("apache-2.0", "mit", "openrail", "creativeml-openrail-m", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0")
"""Identifiers that a hub takes as a licence; any other is given as the name of one."""


def _read_json(path: Path, made_by: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StageError(f"{path}: missing; run stage {made_by} first") from None
    except ValueError:
        raise StageError(f"{path}: broken; run stage {made_by} again") from None
