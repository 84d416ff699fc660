"""What the published bases need, counted once for all tests of a process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dopsd.config import load_settings
from dopsd.config.groups import LoraSettings
from dopsd.models import resolved
from dopsd.sizing.plan import Plan, plan_for
from dopsd.sizing.runs import Work

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
RECIPES = {"z-image-turbo": "z-image-turbo", "klein-4b": "flux2-klein-4b", "klein-9b": "flux2-klein-9b",
           "krea-2": "krea-2-turbo"}  # fmt: skip
"""Of every base in :mod:`tests.published_configs`."""


def settings(model: str, *overrides: str) -> Any:
    """Of a base's recipe."""
    return resolved(load_settings(ROOT / "recipes" / f"{RECIPES[model]}.yaml", overrides))


@cache
def plan(model: str) -> Plan:
    """Of a base's recipe."""
    made = plan_for(settings(model), ROOT)
    assert made is not None
    return made


def small() -> Work:
    """klein 4B at its widths and 256 px."""
    work = replace(plan("klein-4b").work, height=256, width=256, lora=LoraSettings(rank=8))
    work.__dict__["transformer"] = plan("klein-4b").work.transformer
    return work
