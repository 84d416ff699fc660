"""Who is trained and who teaches, as the settings say: adapters, or the transformer's own weights."""

from __future__ import annotations

from pathlib import Path

from dopsd.config import TrainSettings
from dopsd.distill.adapters import add_adapters, save_adapter
from dopsd.distill.kinds import NAMES
from dopsd.distill.pair import STUDENT, Pair, TeacherKind
from dopsd.distill.weights import WeightPair, train_weights
from dopsd.models.base import Family


def make_pair(settings: TrainSettings, family: Family, kind: TeacherKind) -> Pair:
    """Student and teacher on the family's transformer. Raises ``AdapterError`` for targets that match nothing."""
    if settings.tune == "full":
        return train_weights(family.transformer, settings.lora.targets, kind, settings.teacher.weights)
    return add_adapters(family.transformer, settings.lora, family.lora_targets, settings.seed, kind)


def description(settings: TrainSettings, pair: Pair) -> str:
    """What is trained, in words."""
    counts = ", ".join(f"{pattern} x {len(names)}" for pattern, names in pair.matched.items())
    if isinstance(pair, WeightPair):
        count = sum(parameter.numel() for parameter in pair.student_parameters())
        return f"the transformer's own weights, {count:,} of them: {counts}"
    return f"{NAMES[settings.lora.kind]} rank {settings.lora.rank} on {counts}"


def save_student(path: Path, settings: TrainSettings, pair: Pair) -> Path:
    """Write the student to ``path``, whole or not at all."""
    if isinstance(pair, WeightPair):
        return pair.save(path)
    return save_adapter(path, pair.transformer, STUDENT, settings.lora)
