"""Where things are in a project, and how the stages get at them: run folders, data sets, base, caches."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.config import CONCEPTS, Settings, concept_name, is_concept_name

if TYPE_CHECKING:
    from dopsd.data.cache import EncodingCache
    from dopsd.data.manifest import ConceptTable
    from dopsd.data.needs import Needs, Reader
    from dopsd.evaluation.world import World
    from dopsd.models import Use
    from dopsd.models.base import Family

BASE = Path("runs/base.json")
PLAN = "plan.json"
"""In a run folder: what each stage's result is made of (:mod:`dopsd.identity`)."""

ENCODINGS = "encodings.json"
"""In a run folder: stage to the keys of the cached encodings that it used; others' may be deleted."""


class StageError(ValueError):
    """A stage that lacks what an earlier one makes; one line saying which to run."""


def find_project() -> dict[str, str]:
    """The folder that a flow run works in, for ``prefect.yaml``: ``DOPSD_ROOT``, or the clone that this package is
    installed from. Raises :class:`StageError` where neither is a project."""
    named = os.environ.get("DOPSD_ROOT")
    folder = Path(named) if named else Path(__file__).parents[1]
    if not (folder / "params.yaml").is_file():
        what = f"DOPSD_ROOT={named}: there is no params.yaml in it" if named else "the worker does not know the project"
        raise StageError(f"{what}; start it with DOPSD_ROOT set to the project's folder")
    return {"folder": str(folder.resolve())}


def run_folder(concept: str, root: Path) -> Path:
    """Where all results of a concept are. Raises ``SettingsError`` for a name that is none."""
    return root / "runs" / concept_name(concept)


def concept_folder(concept: str, root: Path) -> Path:
    """Where a concept's data are. Raises ``SettingsError`` for a name that is none."""
    return root / CONCEPTS / concept_name(concept)


def concepts_in(root: Path) -> list[str]:
    """All that have data, a run, or something of a job."""
    folders = [path for place in (root / CONCEPTS, root / "runs") if place.is_dir() for path in place.iterdir()]
    names = {path.name for path in folders if path.is_dir()} | {job_of(path)[0] for path in jobs_in(root)}
    return sorted(filter(is_concept_name, names))


def jobs_in(root: Path) -> list[Path]:
    """What Ray's jobs keep on this machine; ``compute.storage`` elsewhere is not looked at."""
    return sorted(path for path in (root / ".cache" / "ray").glob("*-*") if path.is_dir())


def job_of(path: Path) -> tuple[str, str]:
    """Concept and training of a job, by its folder."""
    concept, _, training = path.name.rpartition("-")
    return concept, training


def read_result(path: Path, made_by: str) -> dict[str, Any]:
    """What the stage ``made_by`` left. Raises :class:`StageError` where it did not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: missing; run stage {made_by} first") from None
    except ValueError:
        raise StageError(f"{path}: damaged; run stage {made_by} again") from None


def read_concept(concept: str, settings: Settings, root: Path) -> tuple[ConceptTable, ConceptTable | None]:
    """The data set and its held-out part. Raises ``DataError`` with every fault, the settings' own texts' first."""
    from dopsd.data.folders import HOLDOUT
    from dopsd.data.schema import validate_dataset

    settings = settings.of(concept, root)
    folder, needs = concept_folder(concept, root), needs_of(settings, root)
    if needs.reader is not None:
        check_texts(settings, needs.reader, held_out=os.path.lexists(folder / HOLDOUT))
    return validate_dataset(folder, concept, settings.data, needs)


def needs_of(settings: Settings, root: Path) -> Needs:
    """What base and context ask of the data, as far as the base is here. Raises ``ModelError`` for a family or context
    that there is not."""
    from dopsd.data.needs import Needs
    from dopsd.models import references_rule, resolved
    from dopsd.models.reading import reader_of

    settings = resolved(settings)
    return Needs(references_rule(settings.model), settings.model.teacher_variant, reader_of(settings, root))


def check_texts(settings: Settings, reader: Reader, held_out: bool) -> None:
    """Raise ``DataError`` for texts of the settings that the base cannot read to their end, of those that are used.

    ``held_out``: whether the data set has held-out rows, and the evaluation asks for nothing else.
    """
    from dopsd.data.manifest import DataError, Fault

    train, model = settings.train, settings.model
    words = [("data.placeholder", settings.data.placeholder), ("model.context_suffix", model.context_suffix or "")]
    found = [(key, reader.as_prompt(text)) for key, text in words]
    prompts = {
        "train.replay.prompts": train.replay.prompts if train.replay.weight > 0 else (),
        "train.preview_prompts": train.preview_prompts,
        "evaluation.prompts": () if held_out else settings.evaluation.prompts,
        "evaluation.kept_prompts": () if isinstance(kept := settings.evaluation.kept_prompts, str) else kept,
    }
    for key, texts in prompts.items():
        for number, text in enumerate(texts, start=1):
            wrong = reader.as_prompt(text)
            if not wrong and key == "evaluation.prompts" and model.teacher_variant is None:
                wrong = reader.as_context(text, reader.picture_tokens(None))
            found.append((f"{key}, number {number}", wrong))
    if faults := [Fault("settings", None, key, wrong) for key, wrong in found if wrong]:
        raise DataError(faults)


def load_base(settings: Settings, root: Path, use: Use = "teach") -> Family:
    """The base model; its parts are loaded when they are used."""
    from dopsd.models import load_family

    return load_family(settings.model, root, use)


def cache_of(root: Path) -> EncodingCache:
    """The encodings of all concepts."""
    from dopsd.data.cache import EncodingCache

    return EncodingCache(root / ".cache" / "encodings")


def world_of(settings: Settings, root: Path) -> World | None:
    """The truth for every prompt, where the base's folder brings it along."""
    from dopsd.evaluation import world
    from dopsd.models import open_base

    return world.world_of(open_base(settings.model, root, "train").source.folder)
