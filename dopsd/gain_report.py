"""Which way of showing the teacher its picture teaches most: ``dopsd gain``, on the user's own base and data.

Nothing is trained. Every way that base and data allow is encoded first, through the ordinary cache, and the encoders
are freed; then one transformer draws for all of them. Student and pictures are the same for every way, so the student
is drawn once for each noise seed, and ways differ by nothing but the teacher's context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dopsd.config import Settings
from dopsd.config.groups import ContextName
from dopsd.data.dataset import Example
from dopsd.data.manifest import HOLDOUT, ConceptTable
from dopsd.data.needs import first_unmet
from dopsd.files import write_json
from dopsd.models import ModelError, family_class, open_base, resolved, teaching_of
from dopsd.models.base import Family
from dopsd.project import cache_of, load_base, needs_of, read_concept, run_folder
from dopsd.train.encode import encode_concept
from dopsd.train.gain import choose, compare, distances, helps

if TYPE_CHECKING:
    from rich.table import Table

FILE = "gain.json"
_READS: ContextName = "enhanced-prompt"
"""The one context in which the teacher is shown no picture."""


@dataclass(frozen=True)
class Way:
    """One way of showing the teacher its picture. ``positions``: ``None`` where there is no choice of them.

    ``settings``: those that training would have for it. ``current``: whether they are as they are.
    """

    context: ContextName
    positions: Literal["vlm", "encoder"] | None
    settings: Settings
    current: bool

    @property
    def name(self) -> str:
        """In words, on one line."""
        return self.context + (f" with positions of the {self.positions}" if self.positions else "")


@dataclass(frozen=True)
class Measured:
    """One way's numbers. ``of_seed``: as ``compare`` has them; ``distances``: the teacher's ``[seeds, examples]``."""

    way: Way
    of_seed: tuple[dict[str, float], ...]
    distances: Tensor

    @property
    def gains(self) -> list[float]:
        """The share of the student's distance that the teacher saves, for each noise seed."""
        return [found["gain"] for found in self.of_seed]

    @property
    def mean(self) -> dict[str, float]:
        """The numbers of ``compare``, each the mean over the noise seeds."""
        return {key: mean(found[key] for found in self.of_seed) for key in self.of_seed[0]}

    @property
    def spread(self) -> float | None:
        """Standard deviation of the gain over the noise seeds; ``None`` for one seed."""
        return stdev(self.gains) if len(self.of_seed) > 1 else None


@dataclass(frozen=True)
class GainReport:
    """All that ``dopsd gain`` found.

    ``pictures``: of which picture each example is. ``student``: the student's distances ``[seeds, examples]``.
    ``left_out``: (way, why).
    """

    concept: str
    steps: int
    seeds: tuple[int, ...]
    pictures: tuple[int, ...]
    student: Tensor
    measured: tuple[Measured, ...]
    left_out: tuple[tuple[Way, str], ...]


def ways_of(settings: Settings) -> list[Way]:
    """Every way that the settings' family knows; what reads only comes last. Raises ``ModelError`` for unknown ones."""
    model, family, now = settings.model, family_class(settings.model), teaching_of(settings.model)
    ways = []
    for context in sorted(family.contexts, key=lambda name: name == _READS):
        # a suffix of the user's own was written for the context that is set
        suffix = model.context_suffix if context == now.context else None
        choices: tuple[Literal["vlm", "encoder"], ...] = ("vlm", "encoder")
        for positions in choices:
            values = {"context": context, "context_suffix": suffix, "vlm_positions": positions}
            changed = model.model_copy(update=values)
            chooses = family.needs_vlm(teaching_of(changed))
            if chooses or positions == model.vlm_positions:
                current = context == now.context and positions == model.vlm_positions
                changed_settings = settings.model_copy(update={"model": changed})
                ways.append(Way(context, positions if chooses else None, changed_settings, current))
    return ways


def report_gain(
    concept: str, settings: Settings, root: Path, images: int | None = None, seeds: int = 3
) -> tuple[GainReport, Path]:
    """Measure every way for a concept; what was found, and the file it was written to (``runs/<concept>/gain.json``).

    ``images``: how many samples of each, ``None``: ``train.teacher.gain_images``. The noise of the first of the
    ``seeds`` is the one that training measures with. Raises ``DataError`` and ``ModelError`` for what training would.
    """
    settings = resolved(settings.of(concept, root))
    table, holdout = read_concept(concept, settings, root)
    ways, left_out = _possible(ways_of(settings), table, holdout, root)
    count = images or settings.train.teacher.gain_images
    family, encoded, too_long = _encode(ways, table, count, root)
    seed = settings.train.seed + 2
    student, measured = _measure(family, encoded, range(seed, seed + seeds), settings)
    report = GainReport(
        concept=concept,
        steps=settings.train.rollout_steps,
        seeds=tuple(range(seed, seed + seeds)),
        pictures=tuple(example.image_index for example in encoded[0][1]),
        student=student,
        measured=tuple(measured),
        left_out=(*left_out, *too_long),
    )
    path = run_folder(concept, root) / FILE
    base = open_base(settings.model, root).source.shown
    write_json(path, as_json(report) | {"base": base, "content_hash": table.content_hash})
    return report, path


def _possible(
    ways: Sequence[Way], table: ConceptTable, holdout: ConceptTable | None, root: Path
) -> tuple[list[Way], list[tuple[Way, str]]]:
    """The ways that base and data are fit for, and the others with the reason why not."""
    possible, left_out = [], []
    for way in sorted(ways, key=lambda way: not way.current):  # what is wrong with the base itself is an error
        needs = needs_of(way.settings, root)
        fault: object = first_unmet(table.rows, needs)
        if fault is None and holdout is not None and (missing := first_unmet(holdout.rows, needs)) is not None:
            fault = f"{HOLDOUT}/{missing}"
        try:
            open_base(way.settings.model, root)
        except ModelError as error:
            if way.current:
                raise
            fault = fault or error
        if fault is None:
            possible.append(way)
        else:
            left_out.append((way, str(fault)))
    return [way for way in ways if way in possible], left_out


def _encode(
    ways: Sequence[Way], table: ConceptTable, count: int, root: Path
) -> tuple[Family, list[tuple[Way, list[Example]]], list[tuple[Way, str]]]:
    """Examples of every way, the same pictures and captions in the same order; and a base without its encoders.

    Ways whose contexts are longer than the model reads are returned with the reason.
    """
    alone = next((way.settings.model.teacher_variant for way in ways if way.context == _READS), None)
    family: Family | None = None
    encoded, too_long = [], []
    for way in ways:
        if family is None or way.context != _READS:  # what only reads needs no eyes of its own
            if family is not None:
                family.release_encoders()  # a large text encoder fits once
            family = load_base(way.settings, root)
        chosen = _rows_of(table, count, alone, with_alone=way.context == _READS)
        try:
            examples = encode_concept(family, chosen, way.settings, cache_of(root))
        except ModelError as error:
            if way.current:
                raise
            too_long.append((way, str(error)))
        else:
            encoded.append((way, choose(examples, count)))
    assert family is not None  # the present way is always possible
    family.release_encoders()
    return family, encoded, too_long


def _rows_of(table: ConceptTable, count: int, alone: str | None, with_alone: bool) -> ConceptTable:
    """The rows and captions of the ``count`` examples that training would choose, and of no others.

    ``alone``: the variant that some teacher reads alone. No student reads it here, so that all ways have one student;
    ``with_alone``: this teacher does.
    """
    captions = [[pair for pair in row.captions if pair[0] != alone] for row in table.rows]
    ranked = sorted((nth, number) for number, several in enumerate(captions) for nth in range(len(several)))
    taken = [number for _, number in ranked[:count]]
    rows = []
    for number, (row, several) in enumerate(zip(table.rows, captions, strict=True)):
        if number in taken:
            long = [pair for pair in row.captions if pair[0] == alone and with_alone]
            rows.append(replace(row, captions=(*several[: taken.count(number)], *long)))
    return replace(table, rows=tuple(rows))


def _measure(
    family: Family, encoded: Sequence[tuple[Way, list[Example]]], seeds: Sequence[int], settings: Settings
) -> tuple[Tensor, list[Measured]]:
    """The student's distances to the pictures ``[seeds, examples]`` and what was found of each way."""
    _, examples = encoded[0]
    # two thetas may be one: then the contexts are equal, and drawn once
    first = [next(n for n, (_, other) in enumerate(encoded) if _same(other, mine)) for _, mine in encoded]
    shown = {number: [example.context for example in encoded[number][1]] for number in sorted(set(first))}
    steps, batch = settings.train.rollout_steps, settings.train.batch_size
    found: dict[int, list[Tensor]] = {number: [] for number in shown}
    students = []
    total = len(seeds) * (1 + len(shown)) * len(examples)
    with tqdm(total=total, desc="gain", unit="sample", dynamic_ncols=True, disable=None) as bar:
        for seed in seeds:
            prompts = [example.prompt for example in examples]
            students.append(distances(family, examples, prompts, steps, batch, seed, bar.update))
            for number, contexts in shown.items():
                found[number].append(distances(family, examples, contexts, steps, batch, seed, bar.update))
    measured = []
    for (way, _), number in zip(encoded, first, strict=True):
        of_seed = tuple(compare(far, near) for far, near in zip(students, found[number], strict=True))
        measured.append(Measured(way, of_seed, torch.stack(found[number])))
    return torch.stack(students), measured


def _same(one: Sequence[Example], other: Sequence[Example]) -> bool:
    """Whether the teacher sees exactly the same of all examples."""
    return all(
        a.context.keys() == b.context.keys() and all(torch.equal(a.context[key], b.context[key]) for key in a.context)
        for a, b in zip(one, other, strict=True)
    )


# --- what it means ----------------------------------------------------------------------------------------------------


def beyond_chance(near: Tensor, far: Tensor, pictures: Sequence[int]) -> bool:
    """Whether distances ``[seeds, examples]`` are smaller than others beyond chance: in the mean under every noise
    seed, and over the pictures by more than the 95 % interval of the mean (Student's t; captions of one picture are no
    pictures of their own)."""
    from scipy.stats import t

    if not bool((near.mean(1) < far.mean(1)).all()):
        return False
    saved, place = (far - near).mean(0).double(), torch.tensor(pictures)
    each = torch.stack([saved[place == picture].mean() for picture in sorted(set(pictures))])
    if len(each) < 2:
        return False
    error = float(each.std()) / math.sqrt(len(each))
    return float(each.mean()) > float(t.ppf(0.975, len(each) - 1)) * error


def verdict(report: GainReport) -> str:
    """Which way to take, in a sentence or two."""

    def clearly(one: Measured, other: Measured) -> bool:
        return beyond_chance(one.distances, other.distances, report.pictures)

    def sure(one: Measured) -> str:
        may_be = f" That it gains may be chance, on {pictures}: more of them, or more --seeds, would tell."
        return "" if beyond_chance(one.distances, report.student, report.pictures) else may_be

    count = len(set(report.pictures))
    pictures = f"{count} picture{'s' if count > 1 else ''}"
    current = next(found for found in report.measured if found.way.current)
    others = [found for found in report.measured if found is not current]
    helping = [found for found in report.measured if helps(found.mean)]
    if not helping:
        return ("No way gains: shown the picture, the teacher is no nearer to it than the student, so there is nothing "
                "to learn from it. Check the captions, the context and the base (docs/method.md).")  # fmt: skip
    best = max(helping, key=lambda found: found.mean["gain"])
    if current not in helping:
        return (
            f"Take {best.way.name}: it gains, and what is set does not. {_describe_change(current, best)}{sure(best)}"
        )
    if clearly(best, current):
        return f"Take {best.way.name}: it gains clearly more. {_describe_change(current, best)}{sure(best)}"
    if not others:
        return f"{current.way.name} gains: there is something to learn from this teacher.{sure(current)}"
    if all(clearly(current, other) for other in others):
        return f"Keep {current.way.name}: it gains clearly more than the others.{sure(current)}"
    return f"Keep {current.way.name}: nothing gains clearly more on {pictures}.{sure(current)}"


def _describe_change(before: Measured, after: Measured) -> str:
    """The settings that make one way the other."""
    keys = ("context", "context_suffix", "vlm_positions")
    old, new = before.way.settings.model, after.way.settings.model
    changed = {key: getattr(new, key) for key in keys if getattr(new, key) != getattr(old, key)}
    lines = ", ".join(f"model.{key}: {'null' if value is None else value}" for key, value in changed.items())
    return f"In params.yaml: {lines}."


def as_json(report: GainReport) -> dict[str, Any]:
    """The report for programs. ``distance``: mean squared, in latent space."""
    ways = []
    for found in report.measured:
        numbers = found.mean
        ways.append({
            "context": found.way.context, "positions": found.way.positions, "current": found.way.current,
            "gain": numbers["gain"], "gain_spread": found.spread, "gain_of_seed": found.gains,
            "improved": numbers["improved"], "distance": numbers["teacher"], "student_distance": numbers["student"],
            "images": int(numbers["images"]),
            "beyond_chance": beyond_chance(found.distances, report.student, report.pictures),
        })  # fmt: skip
    left_out = [{"context": way.context, "positions": way.positions, "why": why} for way, why in report.left_out]
    return {
        "concept": report.concept, "steps": report.steps, "seeds": list(report.seeds),
        "pictures": len(set(report.pictures)), "ways": ways, "left_out": left_out, "verdict": verdict(report),
    }  # fmt: skip


def gain_table(report: GainReport) -> Table:
    """The table for the terminal: narrow enough for 80 columns."""
    from rich.table import Table

    seeds = len(report.seeds)
    noise = f"mean and standard deviation over {seeds} noise seeds" if seeds > 1 else "one noise seed"
    table = Table(
        title=f"{report.concept}: what each teacher saves of the student's distance",
        caption=f"gain: share of the student's distance to the pictures that the teacher saves, {report.steps} steps, "
        f"{noise}; nearer: share of images that it comes nearer to; →: as it is set",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("context", no_wrap=True)
    table.add_column("positions")
    for title in ("gain", "nearer", "images"):
        table.add_column(title, justify="right", no_wrap=True)
    for found in report.measured:
        numbers, way = found.mean, found.way
        spread = "" if found.spread is None else f" ± {100 * found.spread:.1f}"
        table.add_row(
            "→" if way.current else "", way.context, way.positions or "–", f"{100 * numbers['gain']:.1f}{spread} %",
            f"{numbers['improved']:.0%}", f"{numbers['images']:.0f}", style="bold" if way.current else "",
        )  # fmt: skip
    return table
