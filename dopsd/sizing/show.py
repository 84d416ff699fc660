"""What the settings need, as text for the terminal: 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from tqdm import tqdm

from dopsd.config import Settings
from dopsd.sizing.cards import Card
from dopsd.sizing.plan import RESERVE, Choice, Plan, Stage

_SMALL_ROW = 5e7
"""Rows of fewer bytes are left out."""


@dataclass(frozen=True)
class Evaluation:
    """What one draws at the most, in so many steps together, and bytes that its backbones hold: those that look while
    it draws, and a judge that comes when all else is gone."""

    pictures: int
    steps: int
    backbones: float = 0.0
    judge: float = 0.0


def report(settings: Settings, plan: Plan | None, card: Card | None, evaluation: Evaluation) -> Iterator[str]:
    """Lines, of resolved settings and their plan; what takes seconds is counted between them."""
    if plan is None:
        yield "What these settings need: little, or this base's configuration is not here to count."
        return
    with tqdm(total=4, desc="computing", leave=False, disable=None, bar_format="{desc} {bar} {postfix}") as bar:
        for what in plan.count(Choice.of(settings)):
            bar.set_postfix_str(what)
            bar.update()
    choice = plan.chosen(settings, card.bytes) if card is not None else Choice.of(settings)
    yield "What these settings need, computed and not measured"
    yield _settings_line(plan, choice)
    if settings.compute.sharded:
        yield "The base is counted whole; each of the workers holds its share of the blocks."
    yield from needs(plan, choice, card, evaluation)
    if card is not None:
        yield from proposals(plan, choice, card)


def needs(plan: Plan, choice: Choice, card: Card | None, evaluation: Evaluation) -> Iterator[str]:
    """Memory stage by stage, host, disk, time."""
    for stage in plan.stages(choice):
        yield ""
        yield _headline(stage, card)
        yield from (f"  {name:<44}{_gb(size)}" for name, size in stage.rows.items() if size >= _SMALL_ROW)
    yield from _looking(evaluation, card)
    yield ""
    yield f"{'host memory, at the most':<46}{_gb(plan.host(choice))}"
    yield f"{'disk':<46}{_gb(sum(plan.disk().values()))}"
    yield from (f"  {name:<44}{_gb(size)}" for name, size in plan.disk().items())
    if card is not None:
        hours = plan.hours(choice, card)
        yield f"{'a thousand steps (within a half)':<46}{hours:6.1f} h on this card"
        hours = plan.drawing_hours(evaluation.pictures, evaluation.steps, choice, card)
        yield f"{f'an evaluation, {evaluation.pictures:,} pictures at most':<46}{hours:6.1f} h"
    else:
        yield f"an evaluation draws {evaluation.pictures:,} pictures at most, in {evaluation.steps:,} steps"


def _looking(evaluation: Evaluation, card: Card | None) -> Iterator[str]:
    """What an evaluation's backbones hold, about: their activations are not counted."""
    if evaluation.backbones >= _SMALL_ROW:
        yield ""
        yield f"{'the backbones beside evaluate':<46}{_gb(evaluation.backbones)}"
    if evaluation.judge:
        yield ""
        yield _headline(Stage("evaluate's judge, when all else is gone", {"its weights": evaluation.judge}), card)


def proposals(plan: Plan, choice: Choice, card: Card) -> Iterator[str]:
    """Whether the settings fit, and what to write where they do not, or more than is needed is saved."""
    found = plan.proposal(choice, card.bytes)
    fits = plan.fits(choice, card.bytes)
    yield ""
    if found is None:
        yield f"Nothing known here fits {card.name}, with {RESERVE / 1e9:g} GB kept free."
        return
    if fits and not found.lines(choice):
        yield f"They fit ({card.name})."
        return
    hours = plan.hours(found, card)
    if fits and hours >= plan.hours(choice, card):
        yield f"They fit ({card.name})."
        return
    yield f"They fit ({card.name}). Faster:" if fits else f"They do not fit ({card.name}). These do:"
    text = yaml.safe_dump(found.lines(choice), sort_keys=False)
    yield from (f"    {line}" for line in text.splitlines())
    peaks = ", ".join(f"{stage.name.partition(',')[0]} {stage.peak / 1e9:.1f}" for stage in plan.stages(found))
    yield f"  then in GB: {peaks}"
    yield f"  and {hours:.1f} h a thousand steps"
    yield f"  ({RESERVE / 1e9:g} GB of the card are kept free)"


def _settings_line(plan: Plan, choice: Choice) -> str:
    tuned = f",\n full tuning, teacher on the {choice.waiting}" if plan.work.tune == "full" else ""
    return (
        f"({choice.resolution} px, batch {choice.batch}, checkpointing {choice.checkpointing}, "
        f"quantization {choice.quantization},\n offload {choice.offload}, {choice.optimizer}{tuned})"
    )


def _headline(stage: Stage, card: Card | None) -> str:
    verdict = ""
    if card is not None:
        verdict = f"   of {card.bytes / 1e9:.1f}" + ("" if stage.fits(card.bytes) else ": too much")
    note = f" ({stage.note})" if stage.note else ""
    return f"{stage.name:<46}{_gb(stage.peak)}{verdict}" + (f"\n {note}" if note else "")


def _gb(size: float) -> str:
    return f"{size / 1e9:6.1f} GB"
