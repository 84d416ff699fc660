"""Between the stages and the registry: is a new version due, and making one.

Stage register calls :func:`register_version`; the nightly flow asks :func:`reasons_to_train` first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.config import Settings
from dopsd.files import write_json
from dopsd.identity import VersionIdentity, plan_of, questions_of, version_identity
from dopsd.models import ModelError, family_class, open_base, resolved
from dopsd.models.base import Request
from dopsd.models.reading import reader_of
from dopsd.project import cache_of, load_base, read_concept, read_result, run_folder, world_of
from dopsd.registry import CHAMPION, Registry, RegistryAway
from dopsd.registry.gate import scores_of

if TYPE_CHECKING:
    from dopsd.data.manifest import ConceptTable


def identity_today(concept: str, content_hash: str, settings: Settings, root: Path) -> VersionIdentity:
    """What a version of ``concept`` would be made from today. ``content_hash``: of its data."""
    from dopsd.train.start import start_hash

    own = resolved(settings.of(concept, root))
    start = start_hash(own.train, root, run_folder(concept, root))
    return version_identity(content_hash, own, open_base(own.model, root), start)


def reasons_to_train(concept: str, table: ConceptTable, settings: Settings, root: Path) -> list[str]:
    """Why ``concept`` is to be tuned again; empty where its champion, or its latest candidate that the gate judged, was
    made from just this data, base, method and settings. Raises ``RegistryAway``."""
    registry = Registry(root)
    now = identity_today(concept, table.content_hash, settings, root)
    champion = registry.champion(concept)
    if champion is None:
        judged = registry.judged(concept, now)
        return [] if judged else ["it has no champion"]
    version, identity, _ = champion
    differences = now.differences(identity)
    if not differences or registry.judged(concept, now):
        return []
    return [f"{what} changed since version {version.version}" for what in differences]


def is_registered(concept: str, settings: Settings, root: Path) -> bool:
    """Whether stage register has nothing to do: the registry is off, or has a judged version made from just this."""
    if not (settings.tracking.enabled and settings.registry.enabled):
        return True
    validated = read_result(run_folder(concept, root) / "validated.json", "validate")
    return Registry(root).judged(concept, identity_today(concept, validated["content_hash"], settings, root))


def register_version(concept: str, settings: Settings, root: Path) -> None:
    """Register the first method's adapter and judge it, on the same prompts and seeds as the champion; the outcome is
    kept in ``registered.json``. Settings: resolved, of the concept. Raises ``RegistryAway``."""
    from dopsd.evaluation.backbones.judge import rubric_of
    from dopsd.origin import git_tags
    from dopsd.tracking import run_id
    from dopsd.train.start import start_hash

    run, registry = run_folder(concept, root), Registry(root)
    training = read_result(run / "train" / "training.json", "train")["training"]
    found = run_id(root, run, training, settings.tracking)
    if found is None:
        raise RegistryAway("the tracker has not got this training yet; run stage register again when it answers")
    validated = read_result(run / "validated.json", "validate")
    metrics = read_result(run / "evaluation" / "metrics.json", "evaluate")
    base = open_base(settings.model, root)
    identity = version_identity(validated["content_hash"], settings, base, start_hash(settings.train, root, run))
    questions = questions_of(plan_of(settings, base, rubric=rubric_of(settings.evaluation, root)), validated)
    tags = git_tags(root) | {"dopsd.training": training, "dopsd.data.hash": validated["content_hash"],
                             "dopsd.base": base.source.shown}  # fmt: skip
    champion_scores, obstacle = _champion_scores(registry, concept, identity, questions, settings, root)
    outcome = registry.register(
        concept, found, identity, scores_of(metrics, settings.train.methods[0], questions), tags, champion_scores,
        _files(run, settings, base.source.folder), _serving(concept, settings, root), settings.registry, obstacle,
    )  # fmt: skip
    write_json(run / "registered.json", outcome.__dict__)
    state = "is the champion" if outcome.promoted else "is a candidate, not the champion"
    print(f"register: {outcome.name} version {outcome.version} {state}: {outcome.reason}")


def _files(run: Path, settings: Settings, base: Path) -> dict[str, Path]:
    """What is stored with a version, and nowhere else in the tracker; the base where it is small enough."""
    from dopsd.export import CARD_FILE, COMFYUI_FILE, DIFFUSERS_FILE, WEIGHTS

    export, method = run / "export", settings.train.methods[0]
    stored = sum(f.stat().st_size for f in base.rglob("*") if f.is_file()) <= settings.registry.max_base_gib * 2**30
    files = {
        "adapter": export / WEIGHTS if (export / WEIGHTS).is_dir() else export / DIFFUSERS_FILE,
        "comfyui": export / COMFYUI_FILE,
        "card": export / CARD_FILE,
        "about": run / "adapters" / f"{method}.json",
    }
    if not files["comfyui"].exists():  # of what has no names that are known to load there
        del files["comfyui"]
    return files | ({"base": base} if stored else {})


def _serving(concept: str, settings: Settings, root: Path) -> dict[str, Any]:
    """How a version is drawn with, away from this project."""
    source, side = open_base(settings.model, root, "draw").source, settings.data.resolution
    call = family_class(settings.model).call(Request(""), side, side, settings.evaluation.few)
    table, _ = read_concept(concept, settings, root)
    room = reader_of(settings, root).room
    return {
        "base": source.name or str(source.folder), "revision": source.revision,
        "call": {key: value for key, value in call.items() if key != "prompt"},
        "placeholder": settings.data.placeholder, "edits": any(row.references for row in table.rows),
    } | ({} if room is None else {"prompt_tokens": room})  # fmt: skip


def _champion_scores(
    registry: Registry, concept: str, identity: VersionIdentity, questions: str, settings: Settings, root: Path
) -> tuple[Mapping[str, Any] | None, str]:
    """The champion's answers to what is asked today (none where there is no champion), and why they cannot be had.

    One that was asked other things is evaluated again, on the base that it was made for, and as it is served: with the
    weights that were exported, rounded to bfloat16 where those are."""
    from dopsd.distill.targets import AdapterError
    from dopsd.given import read_export

    champion = registry.champion(concept)
    if champion is None:
        return None, ""
    version, before, scores = champion
    if scores.get("asked") == questions:
        return scores, ""
    print(f"register: the champion, version {version.version}, was asked other things; evaluating it anew")
    with tempfile.TemporaryDirectory(prefix="dopsd-champion-") as place:
        its_base = None if before.base == identity.base else registry.base(version, Path(place))
        if its_base is None and before.base != identity.base:
            return scores, f"version {version.version}, the champion, was made for another base, which is gone"
        try:
            adapter = read_export(registry.adapter(version, Path(place)), Path(place) / "again" / "student.safetensors")
            again = _evaluate_again(concept, settings, root, adapter, its_base)
        except (ModelError, AdapterError) as error:  # of another family, say, or whole weights and a rounded base
            return scores, f"version {version.version}, the champion, cannot be drawn with these settings ({error})"
    return scores_of(again, CHAMPION, questions), ""


def _evaluate_again(
    concept: str, settings: Settings, root: Path, adapter: Path, base_folder: Path | None
) -> dict[str, Any]:
    """What today's evaluation says of ``adapter``, on today's base or the one that was stored in ``base_folder``."""
    from dopsd.evaluation.suite import Subject, evaluate

    table, holdout = read_concept(concept, settings, root)
    its = settings
    if base_folder is not None:
        model = settings.model.model_copy(update={"path": str(base_folder), "revision": None})
        its = settings.model_copy(update={"model": model})
    return evaluate(
        load_base(its, root, use="draw"), table, holdout, world_of(settings, root),
        [Subject("base", None), Subject(CHAMPION, adapter)], settings, cache_of(root), adapter.parent / "evaluation",
    )  # fmt: skip
