"""What a run goes on from: the checkpoint of the same run, or of one that was to be shorter or longer.

Nothing that has steps behind it is deleted here. A run of other settings, data, base or code is set aside under a
number, with a line that says what differs. Another ``max_steps`` alone goes on where the run is, unless the step where
it is to end (with ``sft``, where its first adapter is written) lies behind: with a constant rate that is the unbroken
run of that length, bit for bit; a decaying schedule is the new length's from that step on. ``lengthened`` in the
checkpoint, and beside the adapter, says where that was.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopsd.config.groups import Method, TrainSettings
from dopsd.data.dataset import Example, Preview
from dopsd.files import read_json
from dopsd.identity import changes
from dopsd.models.base import Conditioning
from dopsd.train import checkpoint as ckpt
from dopsd.train.observer import Observer
from dopsd.train.schedule import why_stopped

_NAMED = 5
"""Differences that a message names; of more it says how many."""


@dataclass(frozen=True)
class Training:
    """What a run is: all that decides what is learnt, and what is shown meanwhile."""

    method: Method
    settings: TrainSettings
    examples: Sequence[Example]
    identity: str
    """Of all that decides what is learnt (:func:`dopsd.identity.training_identity`)."""
    replay: Sequence[Conditioning] = ()
    """Encoded prompts of the base's own domain."""
    previews: Sequence[Preview] = ()
    name: str = ""
    """Of the training that the run is part of, for the tracker."""
    made_of: Mapping[str, Any] = field(default_factory=dict)
    """What ``identity`` is of, to be read (:func:`dopsd.identity.made_of`); empty where nobody said."""
    start: Path | None = None
    """The file that it begins from (``train.init_from``); ``None``: the base."""


def find_saved(folder: Path, training: Training, observer: Observer) -> ckpt.Checkpoint | None:
    """The checkpoint to go on from, or that says the run is over; ``None``: a fresh start in an empty folder."""
    checkpoints, settings = folder / "checkpoints", training.settings

    def wanted(step: int, state: Mapping[str, Any]) -> bool:
        over = why_stopped(settings, training.method, step, state["seconds"])
        return _goes_on(training, step, state) and not (over and state["fingerprint"] == training.identity)

    ckpt.remove_unfinished(checkpoints)
    saved = ckpt.load_checkpoint(checkpoints, observer.message, wanted)
    if saved is not None and _goes_on(training, saved.step, saved.state):
        if saved.state["fingerprint"] != training.identity:
            saved.state["lengthened"] = [*saved.state.get("lengthened", []), _lengthened(training, saved, observer)]
            _keep_earlier(folder / "adapters", training.identity)
        return saved
    if saved is not None:
        what = _named(_differences(training, saved.step, saved.state))
        observer.message(f"{folder.name}: {what} since the run at step {saved.step}; starting afresh, the old run is "
                         "set aside (`dopsd runs` lists it)")  # fmt: skip
    elif ckpt.complete(checkpoints):
        observer.message(f"{folder.name}: starting afresh, the old run is set aside (`dopsd runs` lists it)")
    if ckpt.complete(checkpoints):
        ckpt.set_aside(folder)
        observer.wrote(folder)
    else:  # an adapter that a run without a checkpoint left must not pass for one of this run
        shutil.rmtree(folder / "adapters", ignore_errors=True)
    return None


def _goes_on(training: Training, step: int, state: Mapping[str, Any]) -> bool:
    """Whether the run at ``step`` is this one so far."""
    if state["fingerprint"] == training.identity:
        return True
    before, now = state.get("made_of"), training.made_of
    same = bool(before and now) and _but_steps(before or {}) == _but_steps(now)
    return same and step <= training.settings.max_steps


def _but_steps(made_of: Mapping[str, Any]) -> dict[str, Any]:
    return {**made_of, "settings": {key: v for key, v in made_of["settings"].items() if key != "max_steps"}}


def _lengthened(training: Training, saved: ckpt.Checkpoint, observer: Observer) -> dict[str, int]:
    """Where a run went on to another length, and from which one; said to the person."""
    before, schedule = saved.state["made_of"]["settings"]["max_steps"], training.settings.schedule
    now = training.settings.max_steps
    note = "" if schedule == "constant" else (
        f"; from there on the rate is that of a {schedule} schedule of {now} steps, so the result is not that of an "
        "unbroken run"
    )  # fmt: skip
    observer.message(f"{training.method}: max_steps {before} -> {now}; going on from step {saved.step}{note}")
    return {"step": saved.step, "max_steps": before}


def _keep_earlier(adapters: Path, identity: str) -> None:
    """An adapter that the shorter run ended with keeps its place beside the one to come, under its number of steps."""
    for about in sorted(adapters.glob("*.json")):
        written = read_json(about)
        if written.get("fingerprint") != identity and about.stem == written.get("label"):
            for path in (about.with_suffix(".safetensors"), about):
                if path.exists():
                    path.rename(path.with_stem(f"{path.stem}-{written['steps']}"))


def _differences(training: Training, step: int, state: Mapping[str, Any]) -> list[str]:
    before = state.get("made_of")
    if not before or not training.made_of:
        return ["settings, data, base or code changed"]
    found = changes(before, training.made_of)
    if _but_steps(before) == _but_steps(training.made_of):
        found[0] += ", which it is past"
    return found


def _named(differences: Sequence[str]) -> str:
    more = len(differences) - _NAMED
    return ", ".join(differences[:_NAMED]) + (f" and {more} more" if more > 0 else "")
