"""Everything a training run is, in safetensors and JSON, so that a killed run ends where the unbroken one ends.

A checkpoint is a folder ``step-00000050/`` with ``tensors.safetensors`` (student, optimizer, the state of the run's
random generator, and where the teacher is an EMA its float32 weights: four times the adapter, 2.5 GB at true size; with
full tuning four times the model in float32, and little host memory, for they are written one by one) and
``state.json`` (step, sampler position, seconds, what the run is made of, why it is over if it is). It is written beside
its place, synced to disk and renamed, so a kill at any moment leaves the previous one; the last two are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dopsd.files import write_tensors

KEEP = 2
TENSORS, STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run, between two optimizer steps."""

    step: int
    """Optimizer steps done."""
    tensors: dict[str, Tensor]
    """Empty where nothing goes on from there."""
    state: dict[str, Any]
    """JSON values: fingerprint and what it is of (``made_of``), sampler position, seconds so far, teacher gain,
    ``stopped`` (why it is over, or ""), ``lengthened`` (:mod:`dopsd.train.resume`)."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``checkpoint`` below ``folder``, atomically and synced, and drop all but the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.step:08d}"
    partial = final.with_name(final.name + ".partial")
    for stale in (partial, final):  # a run that was moved back to an older checkpoint may write the same step again
        if stale.exists():
            shutil.rmtree(stale)
    partial.mkdir()
    try:
        write_tensors(partial / TENSORS, checkpoint.tensors)
        (partial / STATE).write_text(
            json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1) + "\n", encoding="utf-8"
        )
        for path in (partial / TENSORS, partial / STATE, partial):
            _sync(path)
    except BaseException:  # on a full disk half of it would take the room that the next try needs
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(final)
    _sync(folder)
    for old in complete(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path, log: Callable[[str], object] = print, wanted: Callable[[int, Mapping[str, Any]], bool] | None = None
) -> Checkpoint | None:
    """The newest readable checkpoint below ``folder``, or ``None``; one that cannot be read is a line to ``log``.

    ``wanted`` says of a step and its state whether the tensors are read too; by itself where the run is not over.
    """
    for path in reversed(complete(folder)):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            step = state.pop("step")
            read = wanted(step, state) if wanted else not is_over(state)
            if read and is_over(state) and not (path / TENSORS).exists():
                raise ValueError("its tensors are gone: `dopsd clean` deletes those of a finished training")
            return Checkpoint(step, load_file(path / TENSORS) if read else {}, state)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log(f"{path}: unreadable checkpoint ({error}); going back to the one before it, or to the start")
    return None


def is_over(state: Mapping[str, Any]) -> bool:
    """Whether a run did all its steps, by its newest checkpoint's ``state``. One that ended by the clock may go on."""
    return state.get("stopped") == "max_steps"


def remove_unfinished(folder: Path) -> None:
    """Delete what a kill left half-written."""
    for partial in folder.glob("step-*.partial"):
        shutil.rmtree(partial)


def complete(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ".partial")


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_ASIDE = ".previous"


def set_aside(folder: Path) -> Path:
    """Move a run's folder to ``<folder>.previous-1``, or the next number that was not given yet; returns the new place.
    What was set aside before stays."""
    taken = [found.name.rpartition("-")[2] for found in folder.parent.glob(f"{folder.name}{_ASIDE}-*")]
    number = 1 + max((int(text) for text in taken if text.isdecimal()), default=0)
    return folder.rename(folder.with_name(f"{folder.name}{_ASIDE}-{number}"))


def was_set_aside(folder: Path) -> bool:
    """Whether a run's folder is one that :func:`set_aside` moved."""
    return _ASIDE in folder.name


# --- optimizer --------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, ``optimizer/<parameter's number>/<what>``: where it is, to be written before the next
    step."""
    return {
        f"optimizer/{number}/{what}": torch.as_tensor(value).detach()
        for number, parameter in enumerate(_parameters(optimizer))
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave; the parameters must come in the same order."""
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, number, what = key.split("/")
            parameter = parameters[int(number)]
            whole = value.dtype == torch.int64 and value.ndim == 0  # bitsandbytes counts in plain numbers
            optimizer.state[parameter][what] = int(value) if whole else value.to(parameter.device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
