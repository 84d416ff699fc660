"""Typed settings, read from ``params.yaml``, and for one concept from the ``train.yaml`` beside its data.

An unknown, missing or ill-typed key is a :class:`SettingsError` that names it; nothing is read from anywhere else. What
each key means is said in :mod:`dopsd.config.groups`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dopsd.config.groups import (
    ComputeSettings,
    DataSettings,
    EvaluationSettings,
    ExportSettings,
    Group,
    ModelSettings,
    RegistrySettings,
    TrackingSettings,
    TrainSettings,
)
from dopsd.params import EachOnce, override, read_params, read_prompts
from dopsd.params import SettingsError as SettingsError

CONCEPTS = Path("data") / "concepts"
OWN_SETTINGS = "train.yaml"
"""In a concept's folder: what differs from ``train`` there."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_REPLACED = {"registry.min_retention": "registry.max_few_step_loss, registry.min_learnt and registry.min_kept"}
"""Settings of before, with what there is instead."""


def concept_name(name: str) -> str:
    """``name``, where it may name a concept: it becomes folders, stages and models. Raises :class:`SettingsError`."""
    if not is_concept_name(name):
        raise SettingsError(f"concept name {name!r}: use 1 to 64 of a-z, 0-9 and -, not beginning with -")
    return name


def is_concept_name(name: str) -> bool:
    """Whether ``name`` may name a concept."""
    return _NAME.fullmatch(name) is not None


class Settings(Group):
    """All of ``params.yaml``. ``concepts`` lists the folders under ``data/concepts`` that the pipeline runs over."""

    concepts: Annotated[tuple[Annotated[str, AfterValidator(concept_name)], ...], EachOnce]
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    compute: ComputeSettings = ComputeSettings()
    export: ExportSettings = ExportSettings()
    registry: RegistrySettings = RegistrySettings()
    tracking: TrackingSettings = TrackingSettings()
    overrides: Annotated[dict[str, Any], Field(exclude=True)] = {}  # noqa: RUF012 (pydantic copies it)
    """What ``--set`` says of ``train``: it holds for every concept, over the concept's own."""

    @model_validator(mode="after")
    def _gate_has_more_steps(self) -> Settings:
        if missing := self.evaluation.missing_for(
            self.registry,
            self.evaluation.few_steps or min(self.evaluation.steps),
            self.evaluation.many_steps or max(self.evaluation.steps),
        ):
            raise ValueError(missing)
        return self

    @model_validator(mode="after")
    def _weights_are_plain(self) -> Settings:
        full, dora = self.train.tune == "full", self.train.lora.kind == "dora" and self.train.tune != "full"
        rounded, sharded, group = self.model.quantization != "none", self.compute.sharded, self.model.offload == "group"
        waiting, taken = self.train.teacher.weights == "cpu", rounded or group or sharded
        plain = "leave model.quantization none, and model.offload none or model"
        faults = {
            f"train.tune: full trains the base's own weights; {plain}, compute.sharded false": full and taken,
            f"train.lora.kind: dora measures the base's own weights; {plain}, compute.sharded false": dora and taken,
            "train.teacher.weights: cpu is for train.tune: full; leave it out": waiting and not full,
            "train.teacher.weights: cpu changes blocks; leave model.compile false": waiting and self.model.compile,
            f"compute.sharded divides plain weights; {plain}": sharded and (rounded or group),
        }
        for fault in (said for said, wrong in faults.items() if wrong):
            raise ValueError(fault)
        return self

    def of(self, concept: str, root: Path) -> Settings:
        """These settings for one concept: its ``train.yaml`` over ``train``, and the general prompts read from their
        file. Done twice it is the same. Raises :class:`SettingsError` for a name that is none and faults of a file."""
        path = root / CONCEPTS / concept_name(concept) / OWN_SETTINGS
        own = read_params(path) if path.is_file() else {}
        merged = _merged(_merged(self.train.model_dump(), own), self.overrides)
        try:  # whole: what a concept asks for may not go with the model's settings
            train = TrainSettings.model_validate(merged)
            return Settings.model_validate({**self.__dict__, "train": train, "evaluation": self._evaluation(root)})
        except ValidationError as error:
            raise SettingsError("\n".join(f"{path}: {_fault(fault)}" for fault in error.errors())) from None

    def _evaluation(self, root: Path) -> EvaluationSettings:
        """With the general prompts themselves in place of their file's name: results are made of them."""
        if not isinstance(self.evaluation.kept_prompts, str) or not os.path.lexists(
            root / self.evaluation.kept_prompts
        ):
            return self.evaluation  # whoever asks for what is not there says so
        prompts = read_prompts(root, self.evaluation.kept_prompts, "evaluation.kept_prompts")
        return self.evaluation.model_copy(update={"kept_prompts": prompts})


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes`` over them, group by group."""
    merged = dict(values)
    for key, change in changes.items():
        before = merged.get(key)
        merged[key] = _merged(before, change) if isinstance(before, dict) and isinstance(change, dict) else change
    return merged


def load_settings(path: Path, overrides: tuple[str, ...] = ()) -> Settings:
    """Read and check ``path``; ``overrides`` are ``a.b=value`` with YAML values. Raises :class:`SettingsError` with one
    line per fault."""
    raw = read_params(path)
    if not raw:
        raise SettingsError(f"{path}: expected keys and values, found nothing")
    given: dict[str, Any] = {}
    for said in overrides:
        override(given, said)
        override(raw, said)
    if "overrides" in raw:  # neither a file's nor a command line's to set
        raise SettingsError(f"{path}: overrides: unknown setting; remove it or check the spelling")
    forced = given.get("train")
    try:
        return Settings.model_validate(raw | {"overrides": forced if isinstance(forced, dict) else {}})
    except ValidationError as error:
        raise SettingsError("\n".join(f"{path}: {_fault(fault)}" for fault in error.errors())) from None


def _fault(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "settings"
    if fault["type"] == "extra_forbidden":
        instead = f"; {_REPLACED[key]} took its place" if key in _REPLACED else " or check the spelling"
        return f"{key}: unknown setting; remove it{instead}"
    if fault["type"] == "missing":
        return f"{key}: missing; add it"
    if fault["type"] == "value_error":  # ours, of several settings together: it says what was found
        place = f"{key}: " if fault["loc"] else ""
        return place + fault["msg"].removeprefix("Value error, ")
    return f"{key}: {fault['msg']} (got {fault['input']!r})"[:400]
