"""``emoji-turbo build`` and ``emoji-turbo check``: the embedded base is made and measured here, run from the root."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from emoji_turbo.check import Line

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="The embedded base model, emoji-turbo.")


class Preset(StrEnum):
    """How large a build of the base is."""

    cpu = "cpu"
    gpu = "gpu"


@app.command()
def build(
    preset: Annotated[Preset, typer.Option("--preset", help="How large the runs are.")] = Preset.cpu,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; by itself the one there is.")] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Start from the shipped weights, not from nothing.")] = False,
) -> None:
    """Make the embedded base from the emoji sets: pictures, VAE, pre-training, distillation. Resumable; takes hours."""
    import torch

    from emoji_turbo.build import build as make

    torch.set_flush_denormal(True)  # of the whole process: denormal numbers slow a CPU down several times
    make(preset.value, Path(), device, warm=warm)


@app.command()
def check() -> None:
    """Measure whether the embedded base is good enough (docs/emoji-turbo.md)."""
    from rich.console import Console

    from emoji_turbo.check import check as measure

    Console().print(check_table(measure(Path())))


def check_table(lines: Sequence[Line]) -> Table:
    """The check as a table for the terminal."""
    from rich.table import Table

    table = Table()
    for name in lines[0].as_dict():
        table.add_column(name, no_wrap=name in ("value", "spread", "met"))
    for line in lines:
        row = line.as_dict().values()
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    return table


def main() -> None:
    """The entry point: a person's mistake is one line, as ``dopsd`` has it."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        ours = type(error).__module__.partition(".")[0] in ("dopsd", "emoji_turbo")
        if not ours and not isinstance(error, FileNotFoundError):
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
