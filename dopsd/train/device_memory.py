"""A training on the memory that its device has: which blocks ``auto`` checkpoints there, and what is said of one that
ran out of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import should_reduce_batch_size

from dopsd.config import Settings
from dopsd.config.groups import DataSettings
from dopsd.data.images import MULTIPLE
from dopsd.models import device_of
from dopsd.models.checkpointing import Checkpointing
from dopsd.sizing.plan import advice, checkpointing_that_fits

if TYPE_CHECKING:
    from dopsd.train.job import Job


def ran_out(error: BaseException) -> bool:
    """Whether it says that a device, or the host, has no memory left."""
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def checkpointing_for(job: Job) -> Checkpointing:
    """What ``model.gradient_checkpointing: auto`` means on this machine, before the transformer is loaded.

    Takes seconds where a large base is to be counted. Processes that divide a base all compute the same block at the
    same time, also while one of them has less memory free: they checkpoint every block.
    """
    device = device_of(job.model)
    if job.sharded or job.model.offload == "group":
        return "every"
    if device.type != "cuda":
        return "none"
    return checkpointing_that_fits(counted(job), torch.cuda.mem_get_info(device)[0], job.root)


def out_of_memory(settings: Settings, root: Path) -> str:
    """One line for a person: what to change."""
    device = device_of(settings.model)
    if device.type != "cuda":
        return ("out of memory: this machine has no more; lower train.batch_size (raise train.accumulation as much) or "
                "data.resolution")  # fmt: skip
    return advice(settings, torch.cuda.get_device_properties(device).total_memory, root)


def counted(job: Job) -> Settings:
    """The job as settings that memory can be counted by: the largest of its pictures decides."""
    pixels = max(example.height * example.width for example in job.encoded.examples)
    side = math.ceil(math.sqrt(pixels) / MULTIPLE) * MULTIPLE
    return Settings(concepts=(), model=job.model, train=job.train, data=DataSettings(resolution=side))
