"""The training loop: step, log, preview, checkpoint, stop. One function, :func:`train`, for every method.

A run's folder holds ``checkpoints/``, ``adapters/``, ``previews/``, ``log.jsonl`` and ``run.json``. Calling
:func:`train` again with the same settings and data resumes it, and on a CPU ends bit for bit where the unbroken run
ends; a finished run returns at once; other settings or data start afresh and set the old folder aside
(:mod:`dopsd.train.resume`).

Under several processes (a Ray Train job, ``torchrun``) every one of them calls :func:`train` with a folder of its own.
All draw the same random numbers, each works on its share of the batch, and gradients are added up once per optimizer
step (:func:`exchange`); the first process alone logs, previews and writes.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dopsd.config.groups import CHECKPOINT_SECONDS
from dopsd.data.dataset import BucketSampler
from dopsd.files import whole_file, write_json
from dopsd.models.base import Family
from dopsd.train import checkpoint as ckpt
from dopsd.train.gain import choose, described, helps, teacher_gain, teacher_samples
from dopsd.train.machine import MachineLoad
from dopsd.train.objective import Objective
from dopsd.train.observer import Observer, Previews, Progress, RunLog
from dopsd.train.optimizer import make_optimizer
from dopsd.train.parallel import exchange, share
from dopsd.train.resume import Training, find_saved
from dopsd.train.schedule import learning_rate, milestones, why_stopped
from dopsd.train.status import adopt, running
from dopsd.train.student import begin, description, make_pair, save_student

__all__ = [
    "Observer",
    "OutOfMemory",
    "Place",
    "TrainError",
    "TrainResult",
    "Training",
    "learning_rate",
    "milestones",
    "train",
]

_DISTILLED = ("d-opsd", "off-policy")


class TrainError(ValueError):
    """A run that cannot start or go on; the message says why and what to do."""


class OutOfMemory(TrainError):
    """A run that its device has not the memory for; its checkpoints are whole."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves."""

    adapters: dict[str, Path]
    """Label (``d-opsd``, ``sft``, ``sft-compute``, ...) to adapter file."""
    steps: int
    images: int
    """Examples drawn, with repetitions."""
    seconds: float
    """Of the steps alone: neither teacher gain nor previews nor checkpoints."""
    teacher_gain: dict[str, float] | None
    stopped: str
    """``max_steps`` or ``max_minutes``."""


@dataclass(frozen=True)
class Place:
    """Where a run happens."""

    folder: Path
    """The run's own: checkpoints, log, previews, adapters."""
    adapters: Path
    """Where finished adapters are copied to, as ``<label>.safetensors`` and ``<label>.json``."""
    observer: Observer
    on_saved: Callable[[], None] = lambda: None
    """Called by every process after each checkpoint."""


def train(family: Family, training: Training, place: Place) -> TrainResult:
    """Train on encoded examples; a run of another identity in the same folder is set aside.

    Raises :class:`TrainError` before any work where settings and data do not fit each other, ``DiskFull`` where the
    disk is. The family's transformer is given back without adapters.
    """
    _check(training)
    settings, method, folder = training.settings, training.method, place.folder
    saved = find_saved(folder, training, place.observer)
    done = _Done.of(saved) if saved else None
    lengthened = saved is not None and saved.state["fingerprint"] != training.identity
    if done is None or lengthened or not why_stopped(settings, method, done.step, done.seconds):
        with running(folder, place.observer, training.name), MachineLoad(folder, place.observer):
            run = _Run(family, training, place, saved)
            del saved  # its tensors are in the run now: two copies of them would be held to the end
            try:
                drawn = settings.rollout_steps, settings.batch_size, settings.seed + 1
                done = run.until_stopped(Previews(family, training.previews, training.examples, *drawn), place.on_saved)
            finally:
                run.close()
    else:
        adopt(folder, place.observer, training.name)
    return TrainResult(
        adapters=publish(folder / "adapters", place.adapters, milestones(settings, method)),
        steps=done.step,
        images=done.step * settings.batch_size * settings.accumulation,
        seconds=done.seconds,
        teacher_gain=done.gain,
        stopped=why_stopped(settings, method, done.step, done.seconds),
    )


# --- before the first step --------------------------------------------------------------------------------------------


def _check(training: Training) -> None:
    method, examples = training.method, training.examples
    if not examples:
        raise TrainError("no training examples: encode the concept first")
    if method in ("sft", "off-policy") and any(example.latents is None for example in examples):
        raise TrainError(f"method {method} needs the clean latents of every target image, and some examples have none")
    if training.settings.replay.weight > 0 and not training.replay:
        raise TrainError("replay.weight is above 0 but no replay prompts were encoded; set replay.prompts")


def publish(source: Path, target: Path, labels: Mapping[int, str]) -> dict[str, Path]:
    """Copy the run's adapters to where other stages look for them (that folder may be emptied between runs)."""
    target.mkdir(parents=True, exist_ok=True)
    published = {}
    for label in labels.values():
        for suffix in (".safetensors", ".json"):
            if (source / f"{label}{suffix}").exists():
                with whole_file(target / f"{label}{suffix}") as partial:
                    shutil.copyfile(source / f"{label}{suffix}", partial)
                published[label] = target / f"{label}.safetensors"
    return published


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """How far a run is: what of its checkpoint is not tensors."""

    step: int
    seconds: float
    gain: dict[str, float] | None

    @classmethod
    def of(cls, saved: ckpt.Checkpoint) -> _Done:
        return cls(saved.step, saved.state["seconds"], saved.state["teacher_gain"])


class _Run:
    """One training in progress: everything in it that changes is in its checkpoints."""

    def __init__(self, family: Family, training: Training, place: Place, saved: ckpt.Checkpoint | None) -> None:
        settings, method, examples = training.settings, training.method, training.examples
        self.family, self.examples, self.settings, self.method = family, examples, settings, method
        self.folder, self.observer, self.identity = place.folder, place.observer, training.identity
        self.step = saved.step if saved else 0
        self.seconds: float = saved.state["seconds"] if saved else 0.0
        self.saved_at = self.seconds
        self.labels, self.made_of = milestones(settings, method), dict(training.made_of)
        self.lengthened: list[dict[str, int]] = saved.state.get("lengthened", []) if saved else []
        self.was_another = saved is not None and saved.state["fingerprint"] != self.identity
        self.log = RunLog(self.folder / "log.jsonl", self.step if saved else -1, self.observer)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.sampler = BucketSampler(
            [(e.height, e.width) for e in examples], settings.batch_size * settings.accumulation, settings.seed,
            [e.repeats for e in examples],
        )  # fmt: skip
        # precision is set per forward (Family.velocity): accelerate would fix it for the whole process
        self.accelerator = Accelerator(cpu=family.device.type == "cpu", mixed_precision="no")
        self.main = self.accelerator.is_main_process
        if self.accelerator.num_processes > settings.batch_size * settings.accumulation:
            raise TrainError(
                f"{self.accelerator.num_processes} workers cannot share a batch of "
                f"{settings.batch_size * settings.accumulation}; lower compute.workers or raise train.batch_size"
            )
        # a forward puts each block together from all processes: every one must take part in it
        self.sharded = bool(getattr(family.transformer, "sharded", False))
        if self.sharded and settings.batch_size * settings.accumulation % self.accelerator.num_processes:
            raise TrainError(
                f"compute.sharded: a batch of {settings.batch_size * settings.accumulation} is not shared evenly by "
                f"{self.accelerator.num_processes} workers; make train.batch_size x accumulation a multiple of them"
            )
        kind = (settings.teacher.kind or "ema") if method in _DISTILLED else "frozen"
        self.pair = make_pair(settings, family.transformer, family.lora_targets, kind)
        self.parameters = self.pair.student_parameters()
        self.optimizer = make_optimizer(settings, self.parameters, family.device)
        self.gain: dict[str, float] | None = saved.state["teacher_gain"] if saved else None
        try:
            if saved is None:
                if training.start is not None:
                    begin(settings, self.pair, training.start, training.made_of.get("init_from"),
                          family.parts.configs, type(family))  # fmt: skip
                    self.observer.message(f"{method}: begins as {training.start}")
                self._begin()
            else:
                self._restore(saved)
            self.objective = Objective(
                method,
                settings,
                family,
                family.velocity,
                self.pair,
                examples,
                self._targets(),
                training.replay,
            )
        except BaseException:
            self.close()
            raise
        self._batches = iter(self.sampler)

    def close(self) -> None:
        """Give the transformer back as it was."""
        self.pair.remove()
        self.log.close()

    def _begin(self) -> None:
        self.observer.message(f"{self.method}: {description(self.settings, self.pair)}")
        if self.method not in _DISTILLED:
            return
        with self.pair.select(None):
            self.gain = teacher_gain(
                self.family, choose(self.examples, self.settings.teacher.gain_images), self.settings.rollout_steps,
                self.settings.batch_size, self.settings.seed + 2,
            )  # fmt: skip
        if self.gain is None:
            self.observer.message("teacher gain: not measured, the examples have no target latents")
            return
        gain, improved = self.gain["gain"], self.gain["improved"]
        self.log.append(0, {"train/teacher_gain": gain, "train/teacher_improved": improved})
        self.observer.message(described(self.gain, self.settings.rollout_steps))
        if not helps(self.gain):
            text = (f"the teacher is no better than the student (gain {gain:.3f}, nearer on {improved:.0%}): there is "
                    "nothing to learn from it; check the captions, the context and the base")  # fmt: skip
            if self.settings.teacher.on_no_gain == "refuse":
                raise TrainError(f"{text}, or set train.teacher.on_no_gain to warn")
            self.observer.message(f"warning: {text}")

    def _restore(self, saved: ckpt.Checkpoint) -> None:
        self.pair.load_state_dict(saved.tensors)
        ckpt.load_optimizer_tensors(self.optimizer, saved.tensors)
        self.generator.set_state(saved.tensors["random/generator"])
        self.sampler.load_state_dict(saved.state["sampler"])
        self.observer.message(f"{self.method}: resuming at step {self.step} of {max(self.labels)}")

    def _targets(self) -> list[Tensor | None]:
        """The clean latents to learn from: the images', or for ``sft-teacher`` samples of the teacher, drawn once."""
        if self.method != "sft-teacher":
            return [example.latents for example in self.examples]
        with self.pair.select(None):
            return teacher_samples(
                self.folder / "teacher_samples.safetensors", self.identity, self.family, self.examples,
                self.settings.rollout_steps, self.settings.seed + 3,
            )  # fmt: skip

    def until_stopped(self, previews: Previews, on_saved: Callable[[], None]) -> _Done:
        """Step until the run is over and its last checkpoint is written."""
        bar = Progress(self.method, max(self.labels), self.step)
        if self.step == 0:
            self._show(previews)
        stopped = why_stopped(self.settings, self.method, self.step, self.seconds)
        if self.was_another and (stopped or self.step in self.labels):  # what ends just here was not written
            self._write_adapter(stopped)
            self._save(stopped)
            on_saved()
            if stopped:
                bar.close()
                return _Done(self.step, self.seconds, self.gain)
        started = time.monotonic() - self.seconds  # as if all steps so far had run without a pause
        try:
            while True:
                before = time.monotonic()
                values = self._train_step(started)
                after = time.monotonic()
                self.step += 1
                rate = self.settings.batch_size * self.settings.accumulation / (after - before)
                values |= {"train/images_per_second": rate, "train/seconds": self.seconds}
                self.log.append(self.step, values)
                bar.update(values["train/loss"], rate)
                stopped = why_stopped(self.settings, self.method, self.step, self.seconds)
                if stopped or self.step % self.settings.preview_steps == 0:
                    self._show(previews)
                if stopped or self.step in self.labels:
                    self._write_adapter(stopped)
                if stopped or self.step in self.labels or self._save_is_due():
                    self._save(stopped)
                    on_saved()
                if stopped:
                    return _Done(self.step, self.seconds, self.gain)
                started += time.monotonic() - after  # pictures and files are no training
        finally:
            bar.close()

    def _train_step(self, started: float) -> dict[str, float]:
        """One optimizer step over ``batch_size * accumulation`` examples of one size, shared among the processes."""
        indices = next(self._batches)
        draws = [self.objective.draw(index, self.generator) for index in indices]  # the same in every process
        mine = share(draws, self.accelerator.process_index, self.accelerator.num_processes)
        size = self.settings.batch_size
        sums: dict[str, Tensor] = {}
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            weight = len(part) / len(draws)
            for key, loss in self.objective.backward(part, weight, self.accelerator.backward).items():
                sums[key] = sums.get(key, torch.zeros_like(loss)) + weight * loss
        values, self.seconds = exchange(self.accelerator, self.parameters, sums, time.monotonic() - started)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip_norm))
        if not math.isfinite(norm) or not all(map(math.isfinite, values.values())):
            raise TrainError(
                f"{self.method}: loss or gradient is not finite at step {self.step + 1}; lower train.learning_rate "
                f"(the last checkpoint below {self.folder} is sound)"
            )
        rate = learning_rate(self.settings, self.step, sorted(self.labels))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        teacher = self.settings.teacher
        if (self.step + 1) % teacher.every == 0:
            self.pair.update(teacher.decay**teacher.every)
        return {**values, "train/grad_norm": norm, "train/learning_rate": rate}

    def _show(self, previews: Previews) -> None:
        if not self.main and not self.sharded:
            return
        previews.show(self.step, self.pair, self.method in _DISTILLED, self.folder / "previews", self.observer)

    def _write_adapter(self, stopped: str) -> None:
        if not self.main:
            return
        label = next(label for step, label in sorted(self.labels.items()) if self.step <= step)
        path = self.folder / "adapters" / f"{label}.safetensors"
        save_student(path, self.settings, self.pair)
        metadata: dict[str, Any] = {
            "label": label, "method": self.method, "steps": self.step, "stopped": stopped or "continued",
            "images": self.step * self.settings.batch_size * self.settings.accumulation, "teacher_gain": self.gain,
            "fingerprint": self.identity, "settings": self.settings.model_dump(mode="json"),
            "lengthened": self.lengthened,
        }  # fmt: skip
        write_json(path.with_suffix(".json"), metadata)

    def _save_is_due(self) -> bool:
        """By steps, or by the clock that all processes share."""
        every = self.settings.checkpoint_steps
        return self.step % every == 0 if every else self.seconds - self.saved_at >= CHECKPOINT_SECONDS

    def _save(self, stopped: str) -> None:
        """Write a checkpoint. Its tensors are let go once they are written."""
        self.saved_at = self.seconds
        self.log.sync()
        if not self.main:
            return
        tensors = self.pair.state_dict() | ckpt.optimizer_tensors(self.optimizer)
        tensors["random/generator"] = self.generator.get_state()
        state = {
            "fingerprint": self.identity, "seconds": self.seconds, "teacher_gain": self.gain,
            "sampler": self.sampler.state_dict(), "stopped": stopped, "made_of": self.made_of,
            "lengthened": self.lengthened,
        }  # fmt: skip
        ckpt.save_checkpoint(self.folder / "checkpoints", ckpt.Checkpoint(self.step, tensors, state))
