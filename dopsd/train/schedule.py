"""When a run does what: at which step which adapter is written, the rate of every step, and why it is over."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dopsd.config.groups import Method, TrainSettings


def milestones(settings: TrainSettings, method: Method) -> dict[int, str]:
    """At which step which adapter is written; the last one ends the run.

    ``sft`` is shown at an equal number of images drawn and, continued, at equal compute.
    """
    if method != "sft":
        return {settings.max_steps: method}
    return {
        settings.max_steps: "sft",
        max(settings.max_steps + 1, settings.sft_steps_at_equal_compute()): "sft-compute",
    }


def learning_rate(settings: TrainSettings, step: int, ends: Sequence[int]) -> float:
    """The rate of optimizer step ``step`` (0-based): warm-up, then the schedule down to each of ``ends`` in turn.

    A decaying schedule starts again after a milestone, so that each adapter written comes from a whole schedule.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    end = next(e for e in ends if step < e)
    start = max([settings.warmup_steps, *[e for e in ends if e <= step]])
    progress = (step - start) / (end - start)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return settings.learning_rate * factor[settings.schedule]


def why_stopped(settings: TrainSettings, method: Method, step: int, seconds: float) -> str:
    """Why a run that is at ``step`` after ``seconds`` is over; empty while it is not."""
    if step >= max(milestones(settings, method)):
        return "max_steps"
    if settings.max_minutes is not None and seconds >= 60 * settings.max_minutes:
        return "max_minutes"
    return ""
