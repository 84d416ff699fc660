"""One training job: all methods of a concept, one after the other, wherever it is that they run.

What a job is made of can be sent to another machine: settings, encoded examples, and the path of the base there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopsd.config.groups import Method, ModelSettings, TrainSettings
from dopsd.data.encoded import Encoded
from dopsd.identity import made_of, training_identity
from dopsd.models import load_family
from dopsd.models.checkpointing import Checkpointing
from dopsd.train.device_memory import checkpointing_for, counted, out_of_memory, ran_out
from dopsd.train.start import start_path
from dopsd.train.trainer import Observer, OutOfMemory, Place, Training, TrainResult, train


@dataclass(frozen=True)
class Job:
    """A concept's training, whole."""

    name: str
    """Of concept and training: the same name goes on with the same job."""
    encoded: Encoded
    train: TrainSettings
    model: ModelSettings
    root: Path
    """What relative paths are relative to, on the machine that trains."""
    common: str
    """What its methods have in common (:func:`dopsd.identity.common_identity`)."""
    training: str = ""
    """The training's name alone; every run says in its folder which one it belongs to."""
    sharded: bool = False
    """Whether its workers divide the transformer among them."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What ``common`` is of, to be read (:func:`dopsd.identity.common_parts`)."""


def run_job(
    job: Job, folder: Path, adapters: Path, observer: Observer, on_saved: Callable[[], None] = lambda: None
) -> dict[Method, TrainResult]:
    """Train every method of ``job`` in ``folder/<method>``; what is finished there is not done again.

    Raises ``TrainError``, of which :class:`OutOfMemory` says which settings need less.
    """

    def fitting() -> Checkpointing:
        which = checkpointing_for(job)
        observer.message(f"model.gradient_checkpointing: auto is {which} here")
        return which

    family = load_family(job.model, job.root, "train", job.sharded, fitting)
    encoded, how, results = job.encoded, job.train, {}
    replay = [conditioning for _, conditioning in encoded.replay]
    for method in job.train.methods:
        identity = training_identity(how, method, job.common)
        start = start_path(how, job.root)
        training = Training(method, how, encoded.examples, identity, replay, encoded.previews, job.training,
                            made_of(how, method, job.parts), start)  # fmt: skip
        try:
            result = train(family, training, Place(folder / method, adapters, observer, on_saved))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise OutOfMemory(f"{method}: {out_of_memory(counted(job), job.root)}; its checkpoints are kept") from error
        results[method] = result
        if result.stopped == "max_minutes":
            # the clock ended it: those that are compared with it draw as many images, not as many minutes
            how = how.model_copy(update={"max_steps": result.steps, "max_minutes": None})
    return results
