"""Between the stages and the registry: what a version is made from, is a new one due, and making one.

Stage register calls :func:`register_version`; the nightly flow asks :func:`reasons_to_train` first.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.config import Settings
from dopsd.models import ModelError, family_class, open_base, resolved
from dopsd.models.base import Request
from dopsd.registry import CHAMPION, Made, Outcome, Registry
from dopsd.registry.gate import scores_of

if TYPE_CHECKING:
    from dopsd.data.manifest import ConceptTable

_MODELS = (
    "models/__init__.py", "models/base.py", "models/flux2_klein.py", "models/krea2.py", "models/loading.py",
    "models/qwen_vl.py", "models/z_image.py",
)  # fmt: skip
"""What decides what a model answers; finding, fetching and checking its files does not."""
_TRAINING_CODE = (
    *_MODELS, "distill", "data/dataset.py", "data/encoded.py", "data/images.py", "data/pictures.py",
    "train/checkpoint.py", "train/encode.py", "train/gain.py", "train/objective.py", "train/observer.py",
    "train/parallel.py", "train/trainer.py",
)  # fmt: skip
_SCORING_CODE = (
    *_MODELS, "distill", "data/pictures.py", "train/encode.py", "evaluation/backbones.py", "evaluation/headline.py",
    "evaluation/metrics.py", "evaluation/probe.py", "evaluation/prompts.py", "evaluation/scoring.py",
    "evaluation/suite.py", "evaluation/world.py",
)  # fmt: skip


def method_version() -> str:
    """Hash of the code that decides what is learnt."""
    return _code(_TRAINING_CODE)


def _code(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for part in parts:
        place = package / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def settings_hash(settings: Settings) -> str:
    """Hash of the settings that decide what the exported method learns."""
    shown = {"methods", "checkpoint_steps", "preview_steps", "preview_prompts", "preview_count"}
    train = settings.train.model_dump(mode="json", exclude=shown)
    values = {"train": train, "method": settings.train.methods[0], "resolution": settings.data.resolution}
    return _hash({**values, "model": settings.model.decides_learning()})


def made_of(content_hash: str, settings: Settings, root: Path) -> Made:
    """What a version would be made from today. ``content_hash``: of the concept's data."""
    settings = resolved(settings)
    base = open_base(settings.model, root).identity
    return Made(content_hash[:32], settings_hash(settings), base, method_version())


def reasons_to_train(concept: str, table: ConceptTable, settings: Settings, root: Path) -> list[str]:
    """Why ``concept`` is to be tuned again; empty where its champion, or its latest candidate that the gate judged, was
    made from just this data, base, method and settings. Raises ``RegistryAway``."""
    registry = Registry(root)
    now = made_of(table.content_hash, settings.of(concept), root)
    champion = registry.champion(concept)
    if champion is None:
        judged = registry.judged(concept, now)
        return [] if judged else ["it has no champion"]
    version, made, _ = champion
    differences = now.differences(made)
    if not differences or registry.judged(concept, now):
        return []
    return [f"{what} changed since version {version.version}" for what in differences]


def register_version(
    concept: str, run_id: str, table: ConceptTable, holdout_hash: str | None, metrics: dict[str, Any], run: Path,
    settings: Settings, root: Path, tags: dict[str, str], evaluate_again: Callable[[Path, Path | None], dict[str, Any]],
) -> Outcome:  # fmt: skip
    """Register the first method's adapter of ``run`` and judge it, on the same prompts and seeds as the champion.

    ``evaluate_again``: what today's evaluation says of an adapter on a base, for a champion that was asked other
    things. One that was made for another base is drawn with on that one.
    """
    from dopsd.export import CARD_FILE, DIFFUSERS_FILE

    method = settings.train.methods[0]
    registry, made = Registry(root), made_of(table.content_hash, settings, root)
    asked = _asked(holdout_hash, made, settings)
    opened = open_base(settings.model, root, "draw")
    base = opened.source.folder
    champion_scores, obstacle = _champion_scores(registry, concept, made, asked, evaluate_again)
    stored = sum(f.stat().st_size for f in base.rglob("*") if f.is_file()) <= settings.registry.max_base_gib * 2**30
    files = {
        "adapter": run / "export" / DIFFUSERS_FILE,
        "card": run / "export" / CARD_FILE,
        "student": run / "adapters" / f"{method}.safetensors",
        "about": run / "adapters" / f"{method}.json",
    } | ({"base": base} if stored else {})
    side = settings.data.resolution
    call = family_class(settings.model).call(Request(""), side, side, settings.evaluation.few)
    serving = {
        "base": opened.source.name or str(base), "revision": opened.source.revision,
        "call": {key: value for key, value in call.items() if key != "prompt"},
        "placeholder": settings.data.placeholder, "edits": any(row.references for row in table.rows),
    }  # fmt: skip
    return registry.register(
        concept, run_id, made, scores_of(metrics, method, asked), tags, champion_scores, files, serving,
        settings.registry, obstacle,
    )  # fmt: skip


def _champion_scores(
    registry: Registry, concept: str, made: Made, asked: str,
    evaluate_again: Callable[[Path, Path | None], dict[str, Any]],
) -> tuple[dict[str, Any] | None, str]:  # fmt: skip
    """The champion's answers to what is asked today (none where there is no champion), and why they cannot be had."""
    champion = registry.champion(concept)
    if champion is None:
        return None, ""
    version, before, scores = champion
    if scores.get("asked") == asked:
        return scores, ""
    print(f"register: the champion, version {version.version}, was asked other things; evaluating it anew")
    with tempfile.TemporaryDirectory(prefix="dopsd-champion-") as place:
        its_base = None if before.base == made.base else registry.base(version, Path(place))
        if its_base is None and before.base != made.base:
            return scores, f"version {version.version}, the champion, was made for another base, which is gone"
        try:
            again = evaluate_again(registry.adapter(version, Path(place)), its_base)
        except ModelError as error:  # of another family, say: it cannot be asked what today's models are asked
            return scores, f"version {version.version}, the champion, cannot be drawn with these settings ({error})"
    return scores_of(again, CHAMPION, asked), ""


def _asked(holdout_hash: str | None, made: Made, settings: Settings) -> str:
    """Hash of the questions: two sets of scores may be compared only where it is the same. The pictures that were
    trained on are part of it: likeness to them is a score, and without a holdout their captions are the prompts."""
    questions = settings.evaluation.model_dump(mode="json")
    return _hash([made.data, holdout_hash, made.base, questions, settings.data.resolution, _code(_SCORING_CODE)])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
