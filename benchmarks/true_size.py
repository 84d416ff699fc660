"""One D-OPSD training step at true size on one GPU, with random weights and no download: seconds, memory, floor.

    python benchmarks/true_size.py --out FOLDER                                # a card with 78 GiB or more, 7 minutes
    python benchmarks/true_size.py --out FOLDER --scale tiny --device cpu      # the same code in a minute anywhere

Needs torch, transformers, peft, accelerate, diffusers and pydantic alone. Writes ``true_size.json`` (after every
variant, so that nothing is lost when the time is up), ``true_size.md`` made from it, ``profile.txt`` and ``log.txt``.

The variants of a step at batch 1 and K = 4: ``ours`` is the training loop's step on encodings made once, without
gradient checkpointing. ``+checkpointing`` and ``+every-second`` are ``model.gradient_checkpointing``; ``+fp8``,
``+int8`` and ``+nf4`` ``model.quantization``; ``+offload`` ``model.offload: group`` with checkpointing; ``+compile``
``model.compile``; ``+8bit`` ``train.optimizer: adamw-8bit``. ``+512px`` has half the side, and ``+cast`` peft's casts
before each adapter. ``plain`` is the published algorithm: all encoders in every step, checkpointing, one backward, and
peft's adapters as they come. Quantized ones need torchao (int8, fp8) or bitsandbytes (nf4, 8bit) and are skipped
without. Each group of variants is a process of its own; what crashes, hangs or runs out of memory costs its own row.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from true_size_page import SMALL, is_step, page, plain_value, short

CHILD = [sys.executable, __file__, "--child"]
MODELS = ("z-image-turbo", "klein-4b")
COMPILED = "ours+compile"
LIMIT, LIMITS = 75.0, {COMPILED: 150.0}
"""Seconds for a variant."""
STARTING, BUILDING = 120.0, 60.0
"""Seconds for a process to import the libraries, and more for its first variant, which builds the model."""
Row = dict[str, Any]
Event = dict[str, Any]


def main() -> None:
    """Run all groups in turn; the page and a short table come last."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="folder for the results")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--scale", choices=("true", "tiny"), default="true")
    arguments.add_argument("--minutes", type=float, default=7.0, help="all in all (default 7)")
    arguments.add_argument("--models", default=",".join(MODELS), help="the most important first")
    arguments.add_argument("--side", type=int, help="pixels (default 1024; tiny 64)")
    arguments.add_argument(
        "--steps", type=int, default=3, help="timed optimizer steps, after an untimed one (default 3)"
    )
    arguments.add_argument("--variants", help="only these, with commas between (default all)")
    arguments.add_argument("--limit", type=float, help="seconds for each variant (default 75, more where compiled)")
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        serve()
        return
    if given.out is None:
        arguments.error("--out: say where the results shall be")
    whole = argparse.Namespace(models=",".join(MODELS), variants=None)
    known = {"models": MODELS, "variants": tuple(dict.fromkeys(v for _, group in jobs(whole) for v in group))}
    for option, names in known.items():
        for name in (getattr(given, option) or names[0]).split(","):
            if name not in names:
                arguments.error(f"--{option}: {name!r} is unknown; there are {', '.join(names)}")
    given.side = given.side or (1024 if given.scale == "true" else 64)
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no process outlives this one
    report = Report(given, jobs(given))
    run_all(report, given)
    print(report.page(), flush=True)


def jobs(given: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(model, variants) of each process, the most valuable first."""
    models = given.models.split(",")
    first, groups = models[0], []
    for model in models:
        groups += [
            (model, [*["machine"] * (model == first), "ours", "floor", "ours+checkpointing"]),
            (model, ["plain", "agreement"]),
            (model, [SMALL, *[f"{SMALL}+512px"] * (model == first)]),
        ]
    groups += [
        (first, ["ours+nf4+offload"]), (first, [COMPILED]),
        (first, ["profile", "sampling", "decoding", "ours+every-second", "ours+cast", "encoding"]),
        (first, ["ours+fp8"]), (first, ["ours+int8"]),
        *[(model, [COMPILED]) for model in models[1:]],
        *[(model, ["sampling", "decoding", "ours+every-second", "encoding"]) for model in models[1:]],
    ]  # fmt: skip
    wanted = given.variants.split(",") if given.variants else None
    kept = [(model, [v for v in variants if wanted is None or v in wanted]) for model, variants in groups]
    return [(model, variants) for model, variants in kept if variants]


# --- results ----------------------------------------------------------------------------------------------------------


class Report:
    """The rows, written to the folder whenever one changes."""

    def __init__(self, given: argparse.Namespace, planned: list[tuple[str, list[str]]]) -> None:
        self.given, self.planned, self.started = given, planned, time.monotonic()
        self.head = {
            "command": " ".join(["python benchmarks/true_size.py", *sys.argv[1:]]),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "scale": given.scale, "device": given.device, "side": given.side, "rollout_steps": 4, "batch": 1,
            "lora_rank": 64 if given.scale == "true" else 4, "timed_steps": given.steps,
        }  # fmt: skip
        self.rows: list[Row] = [
            {"model": model, "variant": variant, "status": "skipped", "error": "not reached"}
            for model, variants in planned
            for variant in variants
        ]
        self.write()

    def left(self) -> float:
        """Seconds left; a few are kept for ending."""
        return 60 * self.given.minutes - 5 - (time.monotonic() - self.started)

    def add(self, model: str, variant: str, status: str, **values: Any) -> None:
        """Put down how a variant ended."""
        row = next(r for r in self.rows if (r["model"], r["variant"]) == (model, variant))
        row.pop("error", None)
        row.update(status=status, **values)
        self.write()
        said = values.get("error") or ", ".join(f"{k} {short(v)}" for k, v in values.items() if plain_value(v))
        print(f"[{time.monotonic() - self.started:5.0f} s] {model} {variant}: {status}: {said}", flush=True)

    def write(self) -> None:
        """The whole file anew, and the page."""
        self._relate()
        whole = self.head | {"seconds": round(time.monotonic() - self.started, 1), "rows": self.rows}
        for name, text in (("true_size.json", json.dumps(whole, indent=1)), ("true_size.md", self.page())):
            partial = self.given.out / f"{name}.partial"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.given.out / name)

    def _of(self, variant: str, model: str | None = None) -> Row:
        found = (r for r in self.rows if r["variant"] == variant and model in (None, r["model"]))
        return next((r for r in found if r["status"] == "measured"), {})

    def _relate(self) -> None:
        """Each step over its floor: the counted operations at the measured rate of matrix products."""
        rate = self._of("machine").get("matmul_tflop_per_second")
        for row in self.rows:
            work = self._of("floor", row["model"]).get("step_tflop")
            if rate and work and row["status"] == "measured" and (is_step(row) or row["variant"] == "floor"):
                row["floor_seconds"] = work / rate
                if row.get("side") == self.given.side:
                    row["over_floor"] = row["seconds_per_step"] * rate / work

    def page(self) -> str:
        """What is to be read, as Markdown."""
        return page(self.head, self.rows, self._of("machine"), self._of("profile"))


# --- processes --------------------------------------------------------------------------------------------------------


class Child:
    """A process that imports the libraries, is given one job, and tells what it found line by line."""

    def __init__(self, folder: Path) -> None:
        with (folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8",
                process_group=0,
            )  # fmt: skip
        self._events: queue.Queue[Event | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def give(self, job: dict[str, Any]) -> None:
        """Tell it what to do."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def next(self, seconds: float) -> Event | None:
        """What it says next, ``None`` when it has ended; ``queue.Empty`` when it says nothing in that time."""
        return self._events.get(timeout=max(0.0, seconds))

    def ended(self) -> int | None:
        """Its exit code, once it says nothing more."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        return self.process.returncode

    def stop(self) -> None:
        """End it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.ended()


class Children:
    """Makes them; on a GPU the next one imports its libraries while the present one measures."""

    def __init__(self, folder: Path, ahead: bool) -> None:
        self.folder, self.ahead, self.spare = folder, ahead, None

    def take(self) -> Child:
        """One that is, or soon will be, ready."""
        child = self.spare or Child(self.folder)
        self.spare = Child(self.folder) if self.ahead else None
        return child

    def close(self) -> None:
        """End the one that nobody asked for."""
        if self.spare is not None:
            self.spare.stop()


def run_all(report: Report, given: argparse.Namespace) -> None:
    """Every job, as long as there is time."""
    children = Children(given.out, ahead=given.device == "cuda")
    try:
        for model, variants in report.planned:
            if not run_job(report, given, children, model, variants):
                break
            if not any(row["status"] == "measured" for row in report.rows):
                break  # whatever is wrong is wrong with all of them
    finally:
        children.close()


def run_job(report: Report, given: argparse.Namespace, children: Children, model: str, variants: list[str]) -> bool:
    """The variants of one model, in a new process after each that fails. False: no process starts at all."""
    pending = [variant for variant in variants if given.device != "cpu" or variant != COMPILED]
    for variant in set(variants) - set(pending):
        report.add(model, variant, "skipped", error="nothing is compiled on a CPU")
    vain = 0
    while pending and report.left() > 0:
        child = children.take()
        try:
            try:
                ready = child.next(min(STARTING, report.left()))
            except queue.Empty:
                ready = {}
            if not ready:
                text = f"no process starts (see log.txt): {_last_line(given.out)}"
                report.add(model, pending[0], "failed" if ready is None else "timeout", error=text)
                return False
            asked = {key: str(getattr(given, key)) for key in ("scale", "device", "side", "steps", "out")}
            child.give(asked | {"model": model, "variants": pending})
            before = len(pending)
            _follow(report, given, child, model, pending)
            vain = vain + 1 if before - len(pending) <= 1 else 0
        finally:
            child.stop()
        if vain == 3:
            break
    for variant in pending:
        reason = "three processes failed in a row" if report.left() > 0 else "the time is up"
        report.add(model, variant, "skipped", error=reason)
    return True


def _follow(report: Report, given: argparse.Namespace, child: Child, model: str, pending: list[str]) -> None:
    """Put down what a process finds until it is through or one variant fails; that one is no longer pending."""
    more = BUILDING
    while pending:
        limit = given.limit or LIMITS.get(pending[0], LIMIT) + more
        left, more = report.left(), 0.0
        try:
            event = child.next(min(limit, left))
        except queue.Empty:
            if left <= limit:
                return  # the time is up, which is no fault of the variant
            report.add(model, pending.pop(0), "timeout", error=f"longer than {limit:g} s")
            return
        if event is None:
            text = f"its process ended with code {child.ended()}: {_last_line(given.out)}"
            report.add(model, pending.pop(0), "failed", error=text)
            return
        report.add(model, pending.pop(0), **event)
        if event["status"] == "failed":
            return


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def serve() -> None:
    """Be a child: import, wait for a job, measure its variants. After a failure end: the next one is to start clean."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is log

    def say(event: Event) -> None:
        print(json.dumps(event), file=out, flush=True)

    from true_size_measure import Session

    say({"ready": True})
    line = sys.stdin.readline()
    if not line:
        return
    job = json.loads(line)
    session = Session(job["model"], job["scale"], job["device"], int(job["side"]), int(job["steps"]), Path(job["out"]))
    for variant in job["variants"]:
        event = attempt(session.measure, variant)
        say(event)
        if event["status"] == "failed":
            return


def attempt(measure: Callable[[str], Row], variant: str) -> Event:
    """The values of a variant, or what went wrong in one line; the whole of it is in the log."""
    import traceback

    from dopsd.config import SettingsError
    from dopsd.models.base import ModelError

    print(f"--- {variant}", file=sys.stderr, flush=True)
    try:
        return {"status": "measured", **measure(variant)}
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip() or "no message").splitlines()[0][:200]
        # a library that is not there is no failure of the step
        if isinstance(error, SettingsError | ModelError):
            return {"status": "skipped", "error": first}
        return {"status": "failed", "error": f"{type(error).__name__}: {first}"}


if __name__ == "__main__":
    main()
