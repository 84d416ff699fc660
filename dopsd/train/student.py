"""Who is trained and who teaches, as the settings say: adapters, or the transformer's own weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dopsd.config.groups import ModelSettings, TrainSettings
from dopsd.distill.adapters import add_adapters, save_adapter
from dopsd.distill.initial import begin_as
from dopsd.distill.kinds import NAMES
from dopsd.distill.pair import STUDENT, Pair, TeacherKind
from dopsd.distill.targets import AdapterError
from dopsd.distill.weights import WeightPair, train_weights
from dopsd.given import as_trained, check_transformer, find_given
from dopsd.models import family_class
from dopsd.models.base import Configs, Family
from dopsd.models.hashes import content_hash
from dopsd.models.sizes import configurations, skeleton
from dopsd.train.start import start_path


def make_pair(settings: TrainSettings, transformer: nn.Module, targets: Sequence[str], kind: TeacherKind) -> Pair:
    """Student and teacher on a transformer; ``targets``: the family's, for an adapter where the settings name none.
    Raises ``AdapterError`` for targets that match nothing."""
    if settings.tune == "full":
        return train_weights(transformer, settings.lora.targets, kind, settings.teacher.weights)
    return add_adapters(transformer, settings.lora, targets, settings.seed, kind)


def check_start(settings: TrainSettings, model: ModelSettings, root: Path) -> None:
    """Raise :class:`~dopsd.distill.targets.AdapterError`, one line, where ``train.init_from`` is not what these
    settings train. Nothing of the base is loaded; where its configuration is not known yet, its training will say
    it."""
    start = start_path(settings, root)
    if start is None or (configs := configurations(model, root)) is None:
        return
    family = family_class(model)
    transformer = skeleton("transformer", configs, family)
    with torch.device("meta"):
        pair = make_pair(settings, transformer, family.lora_targets, "frozen")
    begin(settings, pair, start, None, configs, family)


def begin(
    settings: TrainSettings, pair: Pair, start: Path, expected: str | None, configs: Configs, family: type[Family]
) -> None:
    """Let student and teacher begin as the file ``start``, of the content ``expected``. Raises ``AdapterError``, one
    line, where it does not fit, or is another one than was looked at when the training was asked for."""
    with tempfile.TemporaryDirectory(prefix="dopsd-start-") as place:
        out, known = Path(place) / "start.safetensors", Path(place) / "hashes.json"
        try:
            given = find_given(start)
            if expected and content_hash(given, known) != expected:
                raise AdapterError(f"{start}: it changed since this training was started; start it again")
            transformer = skeleton("transformer", configs, family)
            if given.is_dir():  # tens of gigabytes: read where they lie
                check_transformer(given, transformer)
            file = given if given.is_dir() else as_trained(given, out, transformer, family)
        except AdapterError as error:
            raise AdapterError(f"train.init_from: {error}") from None
        try:
            begin_as(file, pair, settings.lora)
        except AdapterError as error:
            raise AdapterError(f"train.init_from: {start}: {error}") from None


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
