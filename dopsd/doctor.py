"""``dopsd doctor``: what the machine and the project offer, each line with what to do where something is missing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from rich.markup import escape
from rich.table import Table

from dopsd.config import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from dopsd.sizing.cards import Card

State = Literal["fine", "note", "fault"]
_COLOURS: dict[State, str] = {"fine": "green", "note": "yellow", "fault": "red"}
_TRAINING_PICTURES = 20
"""Of a concept that nobody has looked at."""
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "mlflow", "dvc")


@dataclass(frozen=True)
class Finding:
    """One line of the table; ``advice`` is empty where all is well."""

    what: str
    found: str
    state: State = "fine"
    advice: str = ""


def examine(params: Path, root: Path, overrides: Sequence[str] = ()) -> list[Finding]:
    """Look at everything; a check that fails is a finding, not an exception. ``overrides``: KEY=VALUE."""
    findings = [*_python(), *_machine()]
    try:
        settings = load_settings(params, tuple(overrides))
    except SettingsError as error:
        return [*findings, Finding("settings", str(error), "fault", "correct them; nothing runs without")]
    findings.append(Finding("settings", f"{params}, {len(settings.concepts)} concepts"))
    checks: tuple[Callable[[Settings, Path], Iterator[Finding]], ...] = (_concepts, _base, _dvc, _tracker)
    return [*findings, *(finding for check in checks for finding in check(settings, root))]


def card_meant(text: str | None) -> Card | None:
    """The card that is named; ``None``: this machine's. Raises :class:`dopsd.sizing.cards.CardError`."""
    from dopsd.sizing.cards import card_of

    return card_of(text) if text is not None else None


def what_is_needed(
    params: Path, root: Path, card: Card | None, overrides: Sequence[str] = (), concept: str | None = None
) -> Iterator[str]:
    """Lines on memory, disk and time of a base of true size, on that card or (``None``) this machine's; nothing where
    the settings or the base are at fault, which is a finding already. ``concept``: with the settings of its own.
    Raises ``SettingsError`` where those are at fault."""
    from dopsd.evaluation.backbones.sources import device_bytes
    from dopsd.evaluation.draws import drawn_at_most
    from dopsd.models import ModelError, resolved
    from dopsd.sizing.plan import plan_for
    from dopsd.sizing.show import Evaluation, report
    from dopsd.train.schedule import milestones

    try:
        settings = load_settings(params, tuple(overrides))
    except SettingsError:
        return
    if concept is not None:
        settings = settings.of(concept, root)
    try:
        settings = resolved(settings)
        yield ""
        plan = plan_for(settings, root)
        tuned = sum(len(milestones(settings.train, method)) for method in settings.train.methods)
        drawn = drawn_at_most(settings.evaluation, tuned, _TRAINING_PICTURES)
        evaluation = Evaluation(*drawn, *device_bytes(settings.evaluation.backbones))
        yield from report(settings, plan, card or (card_here() if plan else None), evaluation)
    except (SettingsError, ModelError):
        return


def card_here() -> Card | None:
    """This machine's first card, its rates measured in half a second, or what such a card has where others leave no
    room for that; ``None`` without CUDA."""
    import torch

    from dopsd.sizing.cards import GIB, Card, CardError, card_of

    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    size = seen.total_memory / GIB
    try:
        teraflops, terabytes = _rates()
    except RuntimeError:  # torch's own, and what its libraries raise where they cannot begin
        try:
            like = card_of(seen.name)
        except CardError:
            like = card_of(f"{size:.1f}")
        teraflops, terabytes = like.teraflops, like.terabytes
    return Card(seen.name, size, teraflops, terabytes)


def _rates() -> tuple[float, float]:
    """Teraflops of bfloat16 products, and terabytes that copies read and write, a second."""
    import torch

    side, size = 4096, 2**28
    with torch.no_grad():
        a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
        source = torch.empty(size, device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        product, copied = _seconds(lambda: a @ a), _seconds(lambda: target.copy_(source))
    return 2 * side**3 / product / 1e12, 2 * size / copied / 1e12


def _seconds(work: Callable[[], object]) -> float:
    """Of one call on the device, over a quarter of a second of them."""
    import torch

    work()
    torch.cuda.synchronize()
    started, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < 0.25:
        work()
        torch.cuda.synchronize()
        calls += 1
    return passed / calls


def findings_table(findings: list[Finding]) -> Table:
    """The findings as a table for the terminal."""
    table = Table(show_edge=False)
    table.add_column("", min_width=12)
    table.add_column("found", min_width=12, overflow="fold")  # paths and addresses are what may break
    table.add_column("advice", min_width=20)
    for f in findings:
        table.add_row(escape(f.what), f"[{_COLOURS[f.state]}]{escape(f.found)}[/]", escape(f.advice))
    return table


def _python() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding(
        "python", sys.version.split()[0], "fault" if old else "fine", "3.11 or newer is needed" if old else ""
    )
    for package in _PACKAGES:
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, "not installed", "fault", "run `make setup`")


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        yield Finding("device", f"{card.name}, {card.total_memory / 2**30:.0f} GiB")
    else:
        yield Finding("device", "CPU", "note", "enough for emoji-turbo; Z-Image-Turbo needs a GPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    crowded = threads > cores
    yield Finding(
        "cores", f"{cores}, torch uses {threads}", "note" if crowded else "fine",
        f"set OMP_NUM_THREADS={cores}: more threads than cores slow torch several-fold" if crowded else "",
    )  # fmt: skip
    memory = psutil.virtual_memory()
    short = memory.available < 4 * 2**30
    yield Finding(
        "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free", "note" if short else "fine",
        "the demo takes about 4 GiB" if short else "",
    )  # fmt: skip


def _concepts(settings: Settings, root: Path) -> Iterator[Finding]:
    for concept in settings.concepts:
        folder = root / "data" / "concepts" / concept
        if folder.is_dir():
            yield Finding(f"concept {concept}", f"{folder}")
        else:
            yield Finding(
                f"concept {concept}", "missing", "fault",
                "`dvc pull` where a remote has it, `dopsd concept add`, or take it off `concepts`",
            )  # fmt: skip


def _base(settings: Settings, root: Path) -> Iterator[Finding]:
    """The base is looked at where it lies, as every stage would before it loads anything; nothing is fetched."""
    from dopsd.models import ModelError, open_base, resolved
    from dopsd.models.sizes import configurations

    def away(path: str | None) -> bool:
        return path is not None and path.count("/") == 1 and not (root / Path(path).expanduser()).is_dir()

    fetched = "no folder here; a name on the hub is fetched when it is first needed"
    try:
        settings = resolved(settings)
        if away(settings.model.path):
            configurations(settings.model, root)  # what is known of it need not be fetched to be wrong
            yield Finding("base model", settings.model.path, "note", fetched)
            return
        if away(settings.model.vlm):
            yield Finding("teacher's VLM", f"{settings.model.vlm}", "note", fetched)
        base = open_base(settings.model, root, "draw" if away(settings.model.vlm) else "teach")
    except ModelError as error:
        embedded = settings.model.path == "data/base/emoji-turbo"
        yield Finding("base model", str(error), "fault", "`emoji-turbo build` makes it anew" if embedded else "")
        return
    size = sum(file.stat().st_size for file in base.source.folder.rglob("*") if file.is_file())
    summary = f"{settings.model.family} in {base.source.folder}, {size / 2**20:.0f} MiB, {settings.model.context}"
    yield Finding("base model", summary)
    if note := base.differences():
        yield Finding("teacher's VLM", note, "note")


def _dvc(_: Settings, root: Path) -> Iterator[Finding]:
    if (root / ".dvc").is_dir() and (root / ".git").exists():
        yield Finding("DVC", "initialised")
    else:
        yield Finding(
            "DVC", "not initialised here", "fault", "run in a git clone of the project, or `git init && dvc init`"
        )


def _tracker(settings: Settings, root: Path) -> Iterator[Finding]:
    from dopsd.tracking import connect, public_uri, tracking_uri, without_secrets

    if not settings.tracking.enabled:
        yield Finding("tracker", "switched off", "note", "tracking.enabled in the settings")
        return
    uri = tracking_uri(root)
    if uri.startswith("sqlite:") and not Path(urlsplit(uri).path[1:]).exists():
        yield Finding("tracker", f"{uri} (made by the first training)")
        return
    try:
        connect(uri).search_experiments(max_results=1)
        yield Finding("tracker", public_uri(uri))
    except Exception as error:
        message = " ".join(without_secrets(str(error), uri).split())[:120]
        yield Finding(
            "tracker", f"{public_uri(uri)} cannot be reached: {message}", "note",
            "training runs all the same; `dopsd track sync` sends the rest later",
        )  # fmt: skip
