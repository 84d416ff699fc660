"""One answer to "did anything change": what every stage's result is made of.

:func:`plan_of` says it for each stage of a concept, as values that a person can read. ``dopsd plan`` writes them to
``runs/<concept>/plan.json``; DVC compares them, the trainer resumes by them, and the registry keeps them with every
version. A setting that is in no plan decides nothing. The code counts by its numbers
(:mod:`dopsd.versions`), not by its text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dopsd.config import Settings
from dopsd.config.groups import EvaluationSettings, Method, TrainSettings
from dopsd.params import FEATURES, FOLLOWING, NOTHING_SEEN, Seen
from dopsd.versions import DATA_VERSION, ENCODING_VERSION, EXPORT_VERSION, METHOD_VERSION, SCORES_VERSION

if TYPE_CHECKING:
    from dopsd.data.encoded import Encoded
    from dopsd.models import Base

Plan = dict[str, dict[str, Any]]

_SHOWN = {"max_minutes", "checkpoint_steps", "preview_steps", "preview_prompts", "preview_count"}
"""Settings that do not change what is learnt at a step, and so may differ on resume."""
_BESIDE_THE_GATE = {"steps", "batch_size", "known_prompts", "backbones", "rubric"}
"""What is asked of an evaluation that the gate's scores do not depend on; of backbones some do."""
_SHOWN_BY_BASE = {"vlm", "world"}
"""Of a base: what the teacher sees with, and a truth of its own, which no guarded score asks."""
_ADDED = {"optimizer": "adamw", "tune": "adapter"}
"""Settings that came later, with what was always so before: what was trained then is still what it is."""


def plan_of(settings: Settings, base: Base, start: str = "", seen: Seen = NOTHING_SEEN) -> Plan:
    """Stage to what decides its result, beside the results of the stages before it; of resolved settings of one
    concept. Data counts by its content, which stage validate writes down. ``start``: hash of the file in
    ``train.init_from`` (:func:`dopsd.train.start.start_hash`); ``seen``: what the evaluation sees with
    (:func:`dopsd.evaluation.backbones.seen_of`)."""
    from dopsd.models import licence_of, references_rule

    model, data = settings.model, settings.data
    train, evaluation = settings.train, settings.evaluation
    pictures = {"resolution": data.resolution}
    files = dict(sorted(base.identities.items()))
    return _plain({
        "validate": {
            "version": DATA_VERSION, "data": data.model_dump(mode="json"), "references": references_rule(model),
            "teacher_variant": model.teacher_variant,
        },
        "encode": {
            "version": ENCODING_VERSION, "encoders": base.encoders, "vlm": base.vlm_identity,
            "model": model.decides_encoding(), "data": pictures,
            "previews": {"prompts": train.preview_prompts, "count": train.preview_count},
            "replay": train.replay.prompts if train.replay.weight > 0 else (),
        },
        "train": {
            "version": METHOD_VERSION, "base": _drawing(files), "model": model.decides_velocity(),
            "methods": {method: _deciding(train, method) for method in train.methods},
            # beside the methods, so that a method more retrains none: what ends a run early decides its result too
            "max_minutes": train.max_minutes, **({"init_from": start} if start else {}),
        },
        "evaluate": {
            "version": [SCORES_VERSION, METHOD_VERSION, ENCODING_VERSION], "base": files,
            "model": model.decides_learning(), "data": {**pictures, "placeholder": data.placeholder},
            "evaluation": _asked(evaluation, seen),
            "replayed": train.replay.prompts,  # of these nothing is asked, replay on or off
        },
        "register": {
            "version": EXPORT_VERSION, "base": files, "name": model.name,
            "licence": model.licence or licence_of(base.source),
            "method": train.methods[0], "placeholder": data.placeholder, "resolution": data.resolution,
            "few_steps": evaluation.few_steps, "seed": evaluation.seed,
            "export": settings.export.model_dump(mode="json"),
            "registry": settings.registry.model_dump(mode="json"), "tracked": settings.tracking.enabled,
        },
    })  # fmt: skip


def _asked(evaluation: EvaluationSettings, seen: Seen) -> dict[str, Any]:
    """The settings that decide scores. Backbones count by their weights, a rubric by its text, where there are any but
    the first."""
    values = evaluation.model_dump(mode="json", exclude={"rubric", "backbones"})
    if seen.backbones:
        values["backbones"] = seen.backbones
    return {**values, **({"rubric": hash_of(seen.rubric)} if seen.rubric else {})}


def common_parts(plan: Plan, encoded: Encoded, replayed: bool) -> dict[str, Any]:
    """What all methods of a training have in common, to be read: code, base, encoded data (replay where it counts)."""
    common = {key: value for key, value in plan["train"].items() if key not in ("methods", "max_minutes")}
    return {**common, "data": encoded.identity(replayed)}


def common_identity(parts: Mapping[str, Any]) -> str:
    """Hash of :func:`common_parts`."""
    return hash_of([{key: value for key, value in parts.items() if key != "data"}, parts["data"]])


def training_name(train: TrainSettings, common: str) -> str:
    """What a training is called in the tracker; a method more is the same training."""
    return hash_of(["training", _deciding(train, "sft"), common])[:12]


def training_identity(train: TrainSettings, method: Method, common: str) -> str:
    """Hash of everything that decides what ``method`` learns; two equal ones may be resumed. ``common``: from
    :func:`common_identity`."""
    return hash_of([method, _deciding(train, method), common])


def made_of(train: TrainSettings, method: Method, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`training_identity` is of, to be read; ``parts``: from :func:`common_parts`."""
    return _plain({"settings": _deciding(train, method), **parts})


_WHAT_CHANGED = {
    "init_from": "what train.init_from names", "data": "the encoded data", "base": "the base",
    "version": "the version of the training code",
}  # fmt: skip


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two :func:`made_of`, in words: settings by their keys, the rest by what it is. Data, base
    and code come last."""
    words = []
    for group in ("settings", *sorted({*before, *now} - {"settings", *_WHAT_CHANGED}), *_WHAT_CHANGED):
        was, is_now = before.get(group), now.get(group)
        if was == is_now:
            continue
        if group in _WHAT_CHANGED:
            begun = group == "init_from"  # which not every training has
            how = "is new" if begun and was is None else "is gone" if begun and is_now is None else "changed"
            words.append(f"{_WHAT_CHANGED[group]} {how}")
            continue
        old, new = _flat(was, group), _flat(is_now, group)
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):  # what is as it always was is left out of an identity
                values = (_short(values[key]) if key in values else "as by default" for values in (old, new))
                words.append(f"{key.removeprefix('settings.')} {' -> '.join(values)}")
    return words


def _flat(value: Any, place: str) -> dict[str, Any]:
    """By dotted keys."""
    if not isinstance(value, dict):
        return {place: value}
    return {key: leaf for name, below in value.items() for key, leaf in _flat(below, f"{place}.{name}").items()}


def _short(value: Any) -> str:
    text = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class VersionIdentity:
    """What a version was made from. Two equal ones need no second training."""

    data: str
    """Content hash of the concept's data."""
    settings: str
    """Hash of the settings that decide what the exported method learns."""
    base: str
    """Identity of the base model's files."""
    method: str
    """The version of the method."""

    def differences(self, other: VersionIdentity) -> list[str]:
        """Which parts differ, in words."""
        words = {"data": "data", "settings": "settings", "base": "base model", "method": "method version"}
        return [word for key, word in words.items() if getattr(self, key) != getattr(other, key)]


def version_identity(content_hash: str, settings: Settings, base: Base, start: str = "") -> VersionIdentity:
    """What a version would be made from. ``content_hash``: of the concept's data; resolved settings of the concept;
    ``start``: as in :func:`plan_of`."""
    train = settings.train
    replayed = train.replay.prompts if train.replay.weight > 0 else ()  # in a training's identity by their encodings
    decides = [_deciding(train, train.methods[0]), replayed, train.max_minutes, settings.model.decides_learning(),
               settings.data.resolution, *([start] if start else [])]  # fmt: skip
    return VersionIdentity(content_hash[:32], hash_of(decides), base.identity, f"{METHOD_VERSION}.{ENCODING_VERSION}")


def questions_of(plan: Plan, validated: Mapping[str, Any]) -> str:
    """Hash of what the evaluation asks: two sets of scores may be compared only where it is the same. The pictures that
    were trained on are part of it: likeness to them is a score, and without a holdout their captions are the prompts.
    """
    return hash_of([plan["evaluate"], [validated[key] for key in ("content_hash", "holdout_hash", "kind_hash")]])


def ground_of(plan: Plan, validated: Mapping[str, Any]) -> str:
    """Hash of what the registry's anchor stands on: while it stays, so does the anchor. Held-out pictures, seeds, base
    and scores, as far as a score that is guarded (:mod:`dopsd.evaluation.guarded`) depends on them; not the pictures
    that were trained on, nor what shows or teaches alone. Where code that draws changes, the anchor is drawn anew."""
    asked, rehearsed = plan["evaluate"], set(plan["evaluate"]["replayed"])
    evaluation = {key: value for key, value in asked["evaluation"].items() if key not in _BESIDE_THE_GATE}
    left_out = sorted(rehearsed.intersection(evaluation["kept_prompts"]))
    if validated["holdout_hash"] or evaluation["protocol"] == "published":
        del evaluation["prompts"]  # asked of nobody
    model = {key: value for key, value in asked["model"].items() if key in ("family", "dtype", "quantization")}
    if asked["model"]["context"] == "enhanced-prompt":
        model["context_variant"] = asked["model"]["context_variant"]  # the captions that are none of the prompts
    seen = _guarding(asked["evaluation"])
    parts = [asked["version"][0], _drawn_with(plan), model, asked["data"], evaluation, seen, left_out]
    return hash_of([parts, [validated[key] for key in ("holdout_hash", "kind_hash")]])


def drawing_of(plan: Plan) -> str:
    """Hash of what of the base is drawn with: on two bases with the same one an adapter draws the same."""
    return hash_of(_drawn_with(plan))


def _drawn_with(plan: Plan) -> dict[str, str]:
    return {name: files for name, files in plan["evaluate"]["base"].items() if name not in _SHOWN_BY_BASE}


def _guarding(evaluation: Mapping[str, Any]) -> list[str]:
    """The backbones that guarded scores are seen with: the first of features, and the first that follows a prompt."""
    seen = evaluation.get("backbones", FEATURES[:1])
    firsts = [[name for name in seen if name.partition(":")[0] in kinds][:1] for kinds in (FEATURES, FOLLOWING)]
    return [*firsts[0], *firsts[1]]


def hash_of(value: Any) -> str:
    """Of JSON values, 32 hex digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:32]


def _deciding(train: TrainSettings, method: Method) -> dict[str, Any]:
    """The settings that decide what ``method`` learns. Replay's prompts are in its encodings, and count there, and what
    it begins as by its content."""
    values = train.model_dump(mode="json", exclude=_SHOWN | {"methods", "init_from"})
    values["replay"] = values["replay"]["weight"]
    for key in ("gain_images", "on_no_gain"):  # measured beforehand, from seeds of its own
        values["teacher"].pop(key)
    values["teacher"].pop("weights")  # where they wait
    if values["teacher"]["every"] == 1:
        values["teacher"].pop("every")
    if train.tune == "full":
        values["lora"] = {"targets": values["lora"]["targets"]}
    elif values["lora"]["kind"] == "lora":
        values["lora"].pop("kind")  # came later: what was trained before is still what it is
    if method != "sft":
        values.pop("sft_compute_factor")
    return {key: value for key, value in values.items() if _ADDED.get(key) != value}


def _drawing(files: Mapping[str, str]) -> dict[str, str]:
    """The files that a velocity depends on: no encoder, whose work is in the encodings."""
    return {name: files[name] for name in ("transformer", "scheduler") if name in files}


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(value))
