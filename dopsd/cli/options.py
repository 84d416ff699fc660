"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dopsd.config import Settings, load_settings

Concept = Annotated[str, typer.Option("--concept", "-c", help="A folder in data/concepts.", metavar="NAME")]
Params = Annotated[Path, typer.Option("--params", help="The settings.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting for this run alone, for example train.max_steps=20.", metavar="KEY=VALUE"),
]
PARAMS = Path("params.yaml")


def settings_of(params: Path, overrides: list[str] | None) -> Settings:
    """The settings of the file, with a run's own. Raises ``SettingsError``."""
    return load_settings(params, tuple(overrides or ()))
