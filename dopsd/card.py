"""What the model card says of a training: settings worth knowing, licence, the before-and-after table."""

from __future__ import annotations

from pathlib import Path

from dopsd.config import Settings
from dopsd.config.groups import TrainSettings
from dopsd.data.manifest import ConceptTable
from dopsd.distill.kinds import NAMES
from dopsd.evaluation.naming import prompts_described
from dopsd.evaluation.table import table_as_text
from dopsd.export import Card
from dopsd.models import Base, family_class, licence_of, teaching_of
from dopsd.models.base import Request
from dopsd.project import read_result

_LISTED_LICENCES = ("apache-2.0", "mit", "openrail", "creativeml-openrail-m", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0")
"""Identifiers that a hub takes as a licence; any other is given as the name of one."""


def card_of(
    concept: str, settings: Settings, table: ConceptTable, run: Path, base: Base, example: tuple[Request, int, int],
    start: str = "",
) -> Card:  # fmt: skip
    """The card of the first method's adapter in ``run``. ``example``: a request with height and width. ``start``: hash
    of the file in ``train.init_from``."""
    train, (request, height, width) = settings.train, example
    call = family_class(settings.model).call(request, height, width, settings.evaluation.few)
    licence = settings.model.licence or licence_of(base.source)
    trained = read_result(run / "adapters" / f"{train.methods[0]}.json", "train")
    metrics = read_result(run / "evaluation" / "metrics.json", "evaluate")
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
        prompts=prompts_described(metrics),
        images=len(table.rows),
        data_hash=table.content_hash,
        training={
            "steps": f"{trained['steps']} of batch {train.batch_size * train.accumulation}",
            "learning rate": f"{train.learning_rate:g} ({train.schedule})",
            **_trained_of(train),
            "roll-out": f"{train.rollout_steps} steps, {train.loss} loss",
            "context": _context_of(settings),
            "teacher": f"{train.teacher.kind}, decay {train.teacher.decay}, guidance {train.teacher.guidance:g}",
            "replay": f"{train.replay.weight:g}",
            "seed": str(train.seed),
            **({"begun from": f"{Path(train.init_from).name} (sha256 {start[:12]}...)"} if train.init_from else {}),
        },
        columns=columns,
        rows=rows,
    )


def _trained_of(train: TrainSettings) -> dict[str, str]:
    if train.tune == "full":
        return {"trained layers": "all" if train.lora.targets is None else "chosen ones"}
    kind = "" if train.lora.kind == "lora" else f"{NAMES[train.lora.kind]}, "
    return {"adapter": f"{kind}rank {train.lora.rank}, alpha {train.lora.alpha or train.lora.rank:g}"}


def _context_of(settings: Settings) -> str:
    teaching = teaching_of(settings.model)
    if teaching.context == "enhanced-prompt":
        return f"{teaching.context} (the teacher reads the caption {settings.model.context_variant!r})"
    return f"{teaching.context}{f', with{teaching.suffix}' if teaching.suffix else ''}"
