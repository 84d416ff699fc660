"""``dopsd concept``: data sets, added and captioned."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dopsd.lock import concept_lock
from dopsd.project import StageError, needs_of
from dopsd.stages import warnings_of

from .options import PARAMS, Overrides, Params, settings_of

if TYPE_CHECKING:
    from dopsd.data.manifest import ConceptTable

app = typer.Typer(no_args_is_help=True, help="Concept data sets.")


@app.command("add")
def add(
    folder: Annotated[
        Path, typer.Argument(help="Pictures and captions, as this or another tool has them (docs/data.md).")
    ],
    name: Annotated[str, typer.Option("--name", help="What to call it: a-z, 0-9 and -.")],
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a concept of that name.")] = False,
    trigger: Annotated[
        str | None,
        typer.Option("--trigger", help="The word that calls it in its captions now: [V] is put there.", metavar="WORD"),
    ] = None,
    wording: Annotated[
        str | None,
        typer.Option("--wording", help='What becomes of captions without [V]: "{} in [V] style".', metavar="WORDS"),
    ] = None,
    params: Params = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Check a folder, copy it to `data/concepts/NAME`, put it under DVC and list it in the settings."""
    from dopsd.config import OWN_SETTINGS
    from dopsd.data.concept import add_concept
    from dopsd.data.unpack import rewording

    settings = settings_of(params, overrides)
    how = rewording(settings.data.placeholder, trigger, wording)
    listed_in = None if name in settings.concepts else params
    with concept_lock(name, Path(), "dopsd concept add"):
        table, held_out = add_concept(
            folder, name, Path(), settings.data, replace, needs_of(settings, Path()), listed_in, print, how
        )
    for warning in warnings_of(table, held_out):
        print(warning)
    print(f"{len(table.rows)} images to train on, {_by_folder(table)} -> {table.root}")
    if held_out:
        print(f"{len(held_out.rows)} held-out images, {_by_folder(held_out)}")
    if listed_in is not None:
        print(f"{params}: {name} is listed in `concepts` now")
    print(f"what it needs otherwise than others: {table.root / OWN_SETTINGS}")
    print(f"next: `dvc repro report@{name} register@{name}`")


def _by_folder(table: ConceptTable) -> str:
    """How many of its pictures lie where."""
    places = [f"{number} in {table.root.name if place == '.' else place}/" for place, number in table.folders().items()]
    return ", ".join(places)


@app.command("caption")
def caption(
    place: Annotated[str, typer.Argument(help="A folder of pictures, or a concept.", metavar="NAME_OR_FOLDER")],
    kind: Annotated[
        Literal["subject", "style"] | None,
        typer.Option("--kind", help="What [V] is to mean; by itself a style, or a subject where --subject says which."),
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help='What all pictures show, such as "a wolf".', metavar="WORDS")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The VLM that looks; by itself that of the settings.", metavar="NAME_OR_FOLDER"
        ),
    ] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="Make all captions anew, yours too; they stay in a hidden .NAME.before.")
    ] = False,
    params: Params = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Write captions for the pictures that have none, by a VLM; review them, then `dopsd concept add`.

    Each picture gets a short, a medium and a detailed caption, and a request, with `[V]` in each. For example:
    `dopsd concept caption ~/my-pictures` for a style, `dopsd concept caption ~/mug --subject "a mug"` for a subject.
    """
    from dopsd.captioning import caption_folder, folder_of, naming_for, next_command

    settings = settings_of(params, overrides)
    folder, concept = folder_of(place, Path())
    naming = naming_for(folder, kind, subject, settings.data.placeholder)
    with concept_lock(concept, Path(), "dopsd concept caption") if concept else nullcontext():
        report = caption_folder(folder, naming, settings, Path(), model, redo)
    print(f"{report.made} of {report.total} pictures captioned{report.untouched}")
    for line in report.examples:
        print(f"  {line}")
    for line in report.look:
        print(f"look at {line}")
    for line in report.failed:
        typer.secho(f"no caption for {line}", fg="red", err=True)
    if report.files:
        print(f"review and edit: {', '.join(map(str, sorted(report.files)[:3]))}{', ...' * (len(report.files) > 3)}")
    print(f"next: `{next_command(folder, concept)}`")
    if report.failed:
        raise typer.Exit(1)


@app.command("prompts")
def prompts(
    name: Annotated[str, typer.Argument(help="A concept of the project.", metavar="NAME")],
    vlm: Annotated[
        str | None,
        typer.Option("--vlm", help="The VLM that looks and writes; without one a template.", metavar="NAME_OR_FOLDER"),
    ] = None,
    kind: Annotated[Literal["subject", "style"] | None, typer.Option("--kind", help="What [V] means.")] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help='What all pictures show, such as "a wolf".', metavar="WORDS")
    ] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Write the file anew, over what it holds.")] = False,
    params: Params = PARAMS,
    overrides: Overrides = None,
) -> None:
    """Write the published evaluation's prompts for a concept: of each picture a rewrite and four tests.

    They go to `data/concepts/NAME/protocol.jsonl`; review and edit them. The published ones are by
    `--vlm Qwen/Qwen3-VL-8B-Instruct`.
    """
    from tqdm import tqdm

    from dopsd.captioning import naming_for
    from dopsd.data.manifest import PROTOCOL
    from dopsd.evaluation.protocol import published_prompts, write_protocol
    from dopsd.models import resolved
    from dopsd.models.captioner import find_captioner, load_captioner
    from dopsd.project import concept_folder, read_concept

    settings = resolved(settings_of(params, overrides))
    folder, root = concept_folder(name, Path()), Path()
    path = folder / PROTOCOL
    with concept_lock(name, root, "dopsd concept prompts"):
        if path.exists() and not redo:
            raise StageError(f"{path}: there already, and may be edited; --redo writes it anew")
        table, _ = read_concept(name, settings, root)
        naming = naming_for(folder, kind, subject, settings.data.placeholder)
        look = None
        if vlm is not None:
            found = find_captioner(settings.model, root, vlm, key="--vlm")
            print(f"loading {found.shown}")
            look = load_captioner(found, settings.model)
        notes = write_protocol(table, naming, settings.model.teacher_variant, settings.data.max_pixels, look,
                               lambda rows: tqdm(rows, desc="prompts", unit="picture", disable=None))  # fmt: skip
        made = published_prompts(table, path)
    for note in notes:
        print(f"look at {note}")
    print(f"{len(made)} prompts of {len(table.rows)} pictures, {'from a template' if vlm is None else f'by {vlm}'} "
          f"-> {path}; review and edit them")  # fmt: skip
