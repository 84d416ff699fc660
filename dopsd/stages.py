"""The six stages: what goes in, what comes out, nothing else. Run by ``dopsd STAGE --concept NAME`` and by the flow.

All of a concept's results are below ``runs/<concept>/``. A stage may be run again at any time: it does its work anew,
apart from training, which goes on where it was or returns at once when it is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.config import Settings

if TYPE_CHECKING:
    from dopsd.data.manifest import ConceptTable
    from dopsd.emoji_turbo.pictures import World
    from dopsd.models.base import Family
    from dopsd.tracking import Tracker

EMBEDDED_BASE = Path("data/base/emoji-turbo")
WORLD = Path("data/world")
PREVIEWS = 6
"""How many held-out prompts are previewed during training where the settings name none."""
_TRAINING_CODE = ("models", "distill", "train", "data/dataset.py", "data/encoded.py")


class StageError(ValueError):
    """A stage that lacks what an earlier one makes; one line saying which to run."""


def run_folder(concept: str, root: Path) -> Path:
    """Where all results of a concept are."""
    return root / "runs" / concept


def validate(concept: str, settings: Settings, root: Path) -> None:
    """``data/concepts/<concept>`` -> ``validated.json``. Raises ``DataError`` with every fault of the data."""
    table, holdout = _read_concept(concept, settings, root)
    about: dict[str, Any] = {
        "concept": concept, "content_hash": table.content_hash, "images": len(table.rows),
        "captions": sum(len(row.captions) for row in table.rows),
        "holdout_images": len(holdout.rows) if holdout else 0,
        "holdout_hash": holdout.content_hash if holdout else None,
    }  # fmt: skip
    _write_json(run_folder(concept, root) / "validated.json", about)
    print(
        f"validate: {concept} has {about['images']} images, {about['captions']} captions and "
        f"{about['holdout_images']} held-out images; no faults"
    )


def encode(concept: str, settings: Settings, root: Path) -> None:
    """The data set and the base's encoders -> ``encoded/``: prompts, teacher contexts, target latents, once."""
    from dopsd.data.encoded import Encoded, write_encoded
    from dopsd.train.encode import encode_concept, encode_texts

    run = run_folder(concept, root)
    table, holdout = _read_concept(concept, settings, root)
    if _read_json(run / "validated.json", "validate")["content_hash"] != table.content_hash:
        raise StageError(f"data/concepts/{concept} changed since it was validated; run `dopsd validate` again")
    family = load_base(settings, root)
    cache = _cache(root)
    examples = encode_concept(family, table, settings, cache)
    unseen = holdout or table
    previews = settings.train.preview_prompts or tuple(row.captions[0][1] for row in unseen.rows[:PREVIEWS])
    replay = settings.train.replay.prompts
    encoded = Encoded(
        examples=tuple(examples),
        previews=tuple(zip(previews, encode_texts(family, previews, cache), strict=True)),
        replay=tuple(zip(replay, encode_texts(family, replay, cache), strict=True)),
        images=len(table.rows),
        content_hash=table.content_hash,
    )
    write_encoded(run / "encoded", encoded)
    print(f"encode: {len(examples)} examples and {len(previews) + len(replay)} prompts -> {run / 'encoded'}")


def train(concept: str, settings: Settings, root: Path) -> None:
    """``encoded/`` and the base's transformer -> ``train/<method>/`` and ``adapters/``, for each method."""
    from dopsd.data.encoded import read_encoded
    from dopsd.train.trainer import train as train_method

    run = run_folder(concept, root)
    encoded = read_encoded(run / "encoded")
    training = _begin_training(run, settings, encoded.content_hash)
    family = load_base(settings, root, encoders=False)
    with _tracker(concept, settings, root) as tracker:
        _describe(tracker, concept, settings, root, encoded.content_hash, images=encoded.images)
    side, how = settings.data.resolution, settings.train
    for method in settings.train.methods:
        with _tracker(concept, settings, root, method) as tracker:
            tracker.params({"train": how.model_dump(mode="json", exclude={"methods"})})
            result = train_method(
                family, encoded.examples, encoded.previews, [c for _, c in encoded.replay], how, method,
                run / "train" / method, run / "adapters", tracker, side, side,
            )  # fmt: skip
            for path in result.adapters.values():
                tracker.artifact(path, "adapters")
        if result.stopped == "max_minutes":
            # the clock ended it: those that are compared with it draw as many images, not as many minutes
            how = how.model_copy(update={"max_steps": result.steps, "max_minutes": None})
        print(
            f"train: {method}, {result.steps} steps ({result.stopped}), {result.images} images, {result.seconds:.0f} s "
            f"-> {', '.join(str(path) for path in result.adapters.values())}"
        )
    _write_json(run / "train" / "training.json", training)


def evaluate(concept: str, settings: Settings, root: Path) -> None:
    """Adapters, base and held-out truth -> ``evaluation/``: scores, curves and grids, before and after."""
    from dopsd.evaluation.suite import evaluate as evaluate_subjects
    from dopsd.tracking import flatten

    run = run_folder(concept, root)
    table, holdout = _read_concept(concept, settings, root)
    subjects = _subjects(run / "adapters")
    metrics = evaluate_subjects(
        load_base(settings, root), table, holdout, _world(settings, root), subjects, settings, _cache(root),
        run / "evaluation", None,
    )  # fmt: skip
    with _tracker(concept, settings, root) as tracker:
        numbers = {k: v for k, v in flatten(metrics).items() if isinstance(v, int | float) and not isinstance(v, bool)}
        tracker.metrics(0, {f"evaluation/{key}".replace(".", "/"): value for key, value in numbers.items()})
        tracker.artifact(run / "evaluation", "evaluation")
    print(f"evaluate: {', '.join(s.name for s in subjects)} -> {run / 'evaluation'}")


def report(concept: str, settings: Settings, root: Path) -> None:
    """``evaluation/`` and ``train/`` -> ``report.html``, one page that needs nothing else."""
    from dopsd.evaluation.report import write_report

    run = run_folder(concept, root)
    about = _read_json(run / "validated.json", "validate")
    write_report(run / "evaluation", run / "train", about, run / "report.html")
    with _tracker(concept, settings, root) as tracker:
        tracker.artifact(run / "report.html")
    print(f"report: {run / 'report.html'}")


def register(concept: str, settings: Settings, root: Path) -> None:
    """The first method's adapter -> ``export/``: files for diffusers and ComfyUI, model card; loaded and compared."""
    from dopsd.export import check_export, draw_student, export_adapter

    run = run_folder(concept, root)
    method = settings.train.methods[0]
    adapter = run / "adapters" / f"{method}.safetensors"
    table, _ = _read_concept(concept, settings, root)
    export = export_adapter(adapter, run / "export", _card(concept, settings, table, run))
    family = load_base(settings, root)
    dtype, device, side = family.dtype, family.device, settings.data.resolution
    prompts = [row.captions[0][1] for row in table.rows[:2]]
    drawn = draw_student(family, adapter, prompts, settings.evaluation.few_steps, side, side, settings.evaluation.seed)
    del family  # a large base fits once
    compared = check_export(root / settings.model.path, export, drawn, dtype=dtype, device=device)
    with _tracker(concept, settings, root) as tracker:
        tracker.metrics(0, {f"export/{key}": value for key, value in compared.items()})
        tracker.artifact(export, "export")
    print(
        f"register: {method} -> {export}; plain diffusers draws the student's pictures "
        f"(difference {compared['difference']:.3f} of 255, the adapter changes {compared['change']:.1f})"
    )


Stage = Callable[[str, Settings, Path], None]
STAGES: dict[str, Stage] = {stage.__name__: stage for stage in (validate, encode, train, evaluate, report, register)}


def load_base(settings: Settings, root: Path, encoders: bool = True) -> Family:
    """The base model, without the libraries' own progress bars."""
    from diffusers.utils import logging

    from dopsd.models import load_family

    logging.disable_progress_bar()
    return load_family(settings.model, root, encoders)


# --- what goes in -----------------------------------------------------------------------------------------------------


def _read_concept(concept: str, settings: Settings, root: Path) -> tuple[ConceptTable, ConceptTable | None]:
    from dopsd.data.schema import validate_dataset

    return validate_dataset(root / "data" / "concepts" / concept, concept, settings.data)


def _cache(root: Path) -> Any:
    from dopsd.data.cache import EncodingCache

    return EncodingCache(root / ".cache" / "encodings")


def _world(settings: Settings, root: Path) -> World | None:
    """The truth for every prompt, which only the embedded base has."""
    if (root / settings.model.path).resolve() != (root / EMBEDDED_BASE).resolve():
        return None
    from dopsd.emoji_turbo.pictures import World

    return World.load(root / WORLD)


def _subjects(adapters: Path) -> list[Any]:
    """What is compared: the base, its teacher, and every adapter there is."""
    from dopsd.evaluation.suite import Subject

    trained = sorted(adapters.glob("*.safetensors"))
    if not trained:
        raise StageError(f"{adapters}: no adapter there; run stage train first")
    trained.sort(key=lambda path: (path.stem != "d-opsd", path.stem))
    return [Subject("base", None), Subject("teacher", None), *(Subject(path.stem, path) for path in trained)]


def _begin_training(run: Path, settings: Settings, content_hash: str) -> dict[str, str]:
    """Name this training after all that decides it. A run of other code is set aside: it must not be resumed."""
    from dopsd.train.checkpoint import set_aside

    code = _code_hash()
    path = run / "train" / "training.json"
    before = json.loads(path.read_text()) if path.exists() else None
    if before and before["code"] != code:
        for folder in sorted(p for p in (run / "train").iterdir() if p.is_dir() and p.suffix != ".previous"):
            print(f"train: the code of training changed; the old run is now {set_aside(folder)}")
    decides = [
        settings.train.model_dump(mode="json", exclude={"methods"}), settings.model.model_dump(mode="json"),
        settings.data.model_dump(mode="json"), content_hash, code,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    training = {"training": name, "code": code}
    _write_json(path, training)
    return training


def _code_hash() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for part in _TRAINING_CODE:
        place = package / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


# --- what comes out ---------------------------------------------------------------------------------------------------


def _tracker(concept: str, settings: Settings, root: Path, method: str | None = None) -> Tracker:
    from dopsd.tracking import Tracker

    run = run_folder(concept, root)
    training = _read_json(run / "train" / "training.json", "train")["training"]
    return Tracker(root, run / "tracking", concept, training, method, settings.tracking)


def _describe(
    tracker: Tracker, concept: str, settings: Settings, root: Path, content_hash: str, **profile: int
) -> None:
    """What a training is made of: settings, data, code."""
    from dopsd.tracking import git_tags

    values = settings.model_dump(mode="json", include={"model", "data", "train"})
    values["train"].pop("methods")  # a method more is the same training
    tracker.params(values)
    tracker.dataset(concept, content_hash, f"data/concepts/{concept}", **profile)
    tracker.tags(git_tags(root))


def _card(concept: str, settings: Settings, table: ConceptTable, run: Path) -> Any:
    from dopsd.evaluation.table import table_as_text
    from dopsd.export import Card

    train = settings.train
    trained = _read_json(run / "adapters" / f"{train.methods[0]}.json", "train")
    columns, rows = table_as_text(_read_json(run / "evaluation" / "metrics.json", "evaluate"))
    return Card(
        concept=concept,
        base=settings.model.path.as_posix(),
        method=train.methods[0],
        steps=settings.evaluation.few_steps,
        resolution=settings.data.resolution,
        placeholder=settings.data.placeholder,
        prompt=table.rows[0].captions[0][1],
        images=len(table.rows),
        data_hash=table.content_hash,
        training={
            "steps": f"{trained['steps']} of batch {train.batch_size * train.accumulation}",
            "learning rate": f"{train.learning_rate:g} ({train.schedule})",
            "roll-out": f"{train.rollout_steps} steps, {train.loss} loss",
            "teacher": f"{train.teacher.kind}, decay {train.teacher.decay}, guidance {train.teacher.guidance:g}",
            "replay": f"{train.replay.weight:g}",
            "seed": str(train.seed),
        },
        columns=columns,
        rows=rows,
    )


def _read_json(path: Path, made_by: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StageError(f"{path}: missing; run stage {made_by} first") from None


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
