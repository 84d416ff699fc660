"""The command line: ``dopsd STAGE --concept NAME`` and a few verbs beside.

A person's mistake is one line and exit code 2; ``--debug`` shows where it was found.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dopsd.files import full_disk_said
from dopsd.process import prepare_process
from dopsd.project import StageError, run_folder
from dopsd.stages import STAGES, plan, run_stage

from .concept import app as concept_app
from .options import PARAMS, Concept, Overrides, Params, settings_of

if TYPE_CHECKING:
    from PIL.Image import Image

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Tunes a few-step text-to-image model to a new concept, and keeps it few-step (D-OPSD).

    The whole way, with what is already done skipped:

        dvc repro register@style-ink report@style-ink

    One stage of it, with a setting changed for once:

        dopsd train --concept style-ink --set train.max_steps=20

    Your own concept, from a folder of pictures and captions:

        dopsd concept add ~/pictures/mug --name mug

    Pictures from what was trained:

        dopsd sample --adapter runs/style-ink/adapters/d-opsd.safetensors --prompt "a fox in [V] style"
    """,
)
base_app = typer.Typer(no_args_is_help=True, help="The base model.")
track_app = typer.Typer(no_args_is_help=True, help="The tracker (MLflow).")
app.add_typer(concept_app, name="concept")
app.add_typer(base_app, name="base")
app.add_typer(track_app, name="track")


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show where an error was found.")] = False) -> None:
    # --debug is read by main(), which sees the arguments first
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in _SPEAK_OF_FAULTS_ALONE:
        logging.getLogger(name).setLevel(logging.ERROR)


_QUIET = {
    # the libraries' own bars and notes would drown ours
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
_SPEAK_OF_FAULTS_ALONE = ("bitsandbytes", "torch.utils._pytree", "torchao")
"""The extras' loggers: they warn of every kernel that is not for this machine."""


def main() -> None:
    """The entry point: run the command, and turn a person's mistake into one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without arrows gets a mark in their place
    prepare_process()
    try:
        _check_locale()
        with full_disk_said(Path.cwd()):
            app()
    except (ValueError, RuntimeError, OSError) as error:
        # our own errors are a person's mistakes, or a machine that is away; those out of a library need their traceback
        ours = type(error).__module__.partition(".")[0] == "dopsd" or isinstance(error, FileNotFoundError)
        if not ours or "--debug" in sys.argv[1:]:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


def _check_locale() -> None:
    """The libraries open no file below a folder whose name is not text here."""
    try:
        os.getcwd().encode()
    except UnicodeEncodeError:
        named = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG")
        raise StageError(
            f"{Path.cwd()}: its name has letters that the locale ({named}) has not; set LC_ALL=C.UTF-8"
        ) from None


def _stage_command(name: str) -> Callable[..., None]:
    def command(concept: Concept, params: Params = PARAMS, overrides: Overrides = None) -> None:
        run_stage(name, concept, settings_of(params, overrides), Path())

    return command


def _help(stage: Callable[..., None]) -> str:
    """The first sentence of a stage's docstring."""
    return (stage.__doc__ or "").partition(". ")[0].replace("``", "`")


for _name, _stage in STAGES.items():
    app.command(_name, help=_help(_stage), rich_help_panel="Stages, in this order")(_stage_command(_name))
app.command("plan", help=_help(plan))(_stage_command("plan"))


@app.command()
def show(concept: Concept, params: Params = PARAMS) -> None:
    """Print the before-and-after table of a concept, and where its page, adapter and records are."""
    import json

    from rich.console import Console

    from dopsd.evaluation.table import headline_tables
    from dopsd.evaluation.verdict import verdict
    from dopsd.tracking import public_uri, tracking_uri

    run = run_folder(concept, Path())
    metrics = run / "evaluation" / "metrics.json"
    if not metrics.exists():
        raise StageError(f"{metrics}: missing; run `make demo CONCEPT={concept}` or `dvc repro evaluate@{concept}`")
    console = Console()
    numbers = json.loads(metrics.read_text(encoding="utf-8"))
    console.print(*headline_tables(numbers))
    console.print(verdict(numbers)[0], highlight=False)
    for what, path in (("page", run / "report.html"), ("export", run / "export"), ("metrics", metrics)):
        if path.exists():
            console.print(f"{what:>8}: {path.resolve()}", soft_wrap=True, highlight=False)
    if settings_of(params, None).tracking.enabled:
        console.print(f" tracker: {public_uri(tracking_uri(Path()))}", soft_wrap=True, highlight=False)
        console.print("          `make ui` opens it on 127.0.0.1", soft_wrap=True, highlight=False)


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", "-a", help="One in runs/*/adapters, or runs/*/export, or a file or folder in that."),
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option("--reference", "-r", help="A picture to edit, for models that edit; may be given several times."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="Pixels; by itself the reference's shape, or a square.", metavar="WIDTHxHEIGHT"),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", "-n", min=1, help="By itself evaluation.few_steps.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Of the first picture, the next counts on; or one for each.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs.", file_okay=False)] = Path("samples"),
    params: Params = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Draw with the base, or base + adapter: one PNG for each prompt, and `grid.png`.

    For example: `dopsd sample -a runs/style-ink/adapters/d-opsd.safetensors -p "a fox in [V] style"`
    """
    from dopsd.models import resolved
    from dopsd.sampling import draw, read_references, seeds_of, size_of
    from dopsd.train.observer import picture_row

    settings = resolved(settings_of(params, overrides))
    seeds = seeds_of(seed or [], len(prompt))
    steps = steps or settings.evaluation.few
    references = read_references(reference or [], settings)
    width, height = size_of(size, references, settings)
    images: list[Image] = []
    for image in draw(prompt, references, settings, Path(), adapter, width, height, steps, seeds):
        _save(image, out / f"{len(images):02d}.png")
        images.append(image)
    _save(picture_row(images, at_least=128), out / "grid.png")
    print(f"{len(images)} pictures, {steps} steps, seeds {', '.join(map(str, seeds))} -> {out}")


@app.command()
def gain(
    concept: Concept,
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, help="Samples of each way and seed; by itself train.teacher.gain_images."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many noises each is drawn from.")] = 3,
    params: Params = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Measure, without training, which way of showing the teacher its picture would teach most on this base and data.

    Compared are the contexts that the base can be taught by and the data is fit for, and for Z-Image both
    `model.vlm_positions`. The gain is the share of the student's distance to the pictures that the teacher saves; at 0
    and below there is nothing to learn. All numbers go to `runs/NAME/gain.json`.
    """
    from rich.console import Console

    from dopsd.gain_report import gain_table, report_gain, verdict

    report, path = report_gain(concept, settings_of(params, overrides), Path(), images, seeds)
    console = Console()
    console.print(gain_table(report))
    for way, why in report.left_out:
        console.print(f"left out, {way.name}: {why}", highlight=False, markup=False)
    console.print(verdict(report), highlight=False, markup=False)
    print(f"gain: {path}")


def _save(image: Image, path: Path) -> None:
    from dopsd.files import whole_file

    with whole_file(path) as partial:
        image.save(partial, format="PNG")


@app.command()
def doctor(
    params: Params = PARAMS,
    card: Annotated[
        str | None, typer.Option("--card", help="A card elsewhere: its memory in GB, or its name (RTX 4090).")
    ] = None,
    concept: Annotated[
        str | None, typer.Option("--concept", "-c", help="With the settings of its own.", metavar="NAME")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Look at the machine and the project, say what to do about what is missing, and what the settings need.

    Would it fit? `dopsd doctor --card 12 --set model.quantization=nf4`
    """
    from rich.console import Console

    from dopsd.doctor import card_meant, examine, findings_table, what_is_needed

    meant = card_meant(card)
    findings = examine(params, Path(), overrides or ())
    Console().print(findings_table(findings))
    for line in what_is_needed(params, Path(), meant, overrides or (), concept):
        print(line, flush=True)
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(1)


@app.command()
def clean(
    concept: Annotated[
        str | None, typer.Option("--concept", "-c", help="Of this one alone; by itself of all.", metavar="NAME")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List what nobody needs any more, with its size; with `--yes`, delete it.

    - checkpoints of finished trainings: they are known as finished without them, but more `max_steps` then start
      afresh. Of one that the clock ended (`max_minutes`) the newest stays, and with more minutes it goes on from there
    - what a killed process left half-written (`*.partial`)
    - what Ray's jobs kept in `.cache/ray`, where they are over or their settings are no longer the concept's
    - cached encodings that the last `encode` and `evaluate` of no concept used

    Adapters, results, logs, previews and exports stay, and so do trainings that were set aside because settings or data
    changed: `dopsd runs` lists them. A concept that somebody works on is named and skipped. DVC's
    cache is DVC's: `dvc gc --workspace` empties it of what no file here refers to.
    """
    from rich.console import Console

    from dopsd.clean import leftovers_table, tidy

    found, skipped = tidy(Path(), concept, delete=yes)
    Console().print(leftovers_table(found, Path(), deleted=yes))
    for line in skipped:
        print(f"skipped: {line}")
    if found and not yes:
        print("nothing was deleted; `dopsd clean --yes` deletes what is listed")


@app.command()
def runs(
    concept: Annotated[
        str | None, typer.Option("--concept", "-c", help="Of this one alone; by itself of all.", metavar="NAME")
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", help="Delete this run of the concept; may be given several times.", metavar="RUN"),
    ] = None,
    params: Params = PARAMS,
) -> None:
    """List the trainings, and those that were set aside, with steps, date, size and settings; remove those named.

    A training is set aside, under a number, when its settings, data, base or code changed; another `max_steps` alone
    goes on where it was. Nothing deletes it but this: `dopsd runs -c style-ink --remove d-opsd.previous-1`. Its
    adapters are in `runs/NAME/train/RUN/adapters`. To go on with it, give it the settings that it had, remove the run
    that took its place (or move that aside), then `mv runs/NAME/train/d-opsd.previous-1 runs/NAME/train/d-opsd`.
    """
    from rich.console import Console

    from dopsd.config import SettingsError
    from dopsd.runs import remove_runs, runs_in, runs_table

    if remove:
        if concept is None:
            raise SettingsError("--remove: say of which concept, with --concept NAME")
        for run in remove_runs(Path(), concept, remove, settings_of(params, None).compute):
            print(f"removed: {run.folder}, {run.steps} steps")
    Console().print(runs_table(runs_in(Path(), concept), Path()))


@track_app.command("sync")
def track_sync(concept: Concept, params: Params = PARAMS) -> None:
    """Send what the tracker has not got of a concept's runs: after an outage, or to another tracker."""
    from dopsd.tracking import public_uri, send, tracking_uri

    run = run_folder(concept, Path())
    if not send(Path(), run, settings_of(params, None).tracking):
        raise typer.Exit(1)
    print(f"{public_uri(tracking_uri(Path()))} has all of {run} that it takes")


@base_app.command("identify")
def base_identify(params: Params = PARAMS, overrides: Overrides = None) -> None:
    """Check the base's files (or fetch them), and write what it is to `runs/base.json`; large ones are read once."""
    from dopsd.stages import identify_base

    identify_base(settings_of(params, overrides), Path())
