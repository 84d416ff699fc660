"""The optimizer that the settings name; its state is saved and put back by :mod:`dopsd.train.checkpoint`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import nn

from dopsd.config import SettingsError
from dopsd.config.groups import TrainSettings


def check_optimizer(settings: TrainSettings) -> None:
    """Raise :class:`SettingsError` where the library that it needs is not installed."""
    if settings.optimizer == "adamw-8bit" and find_spec("bitsandbytes") is None:
        raise SettingsError("train.optimizer: adamw-8bit needs bitsandbytes; `pip install -e '.[quantization]'` "
                            "brings it")  # fmt: skip


def make_optimizer(
    settings: TrainSettings, parameters: Sequence[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW on these parameters, in float32 or with both moments in 8 bits."""
    if settings.optimizer == "adamw-8bit":
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(
            parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip
