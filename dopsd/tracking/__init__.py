"""Tracking in MLflow that a training never waits for.

Everything goes to a queue on disk first (:mod:`.spool`); a thread (:mod:`.sender`) brings it to the server
(:mod:`.server`). When the server is away, training goes on, the user is told once, and the rest is sent when the server
answers, at the next stage, or by ``dopsd track sync``.

One MLflow run is one training of a concept (parameters, data set, before-and-after table, report), and below it there
is one run per method (metrics by step, previews, adapters).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image
from tqdm import tqdm

from dopsd.config import TrackingSettings

from .sender import Sender
from .server import PARAM_LENGTH, Server, connect, public_uri, tracking_uri, without_secrets
from .spool import Spool

__all__ = [
    "Tracker",
    "connect",
    "flatten",
    "git_tags",
    "public_uri",
    "run_id",
    "sync",
    "tracking_uri",
    "without_secrets",
]

PREVIEW_SIDE = 128
"""Small pictures are enlarged to this many pixels a side: the tracker's page shows files as they are."""


def say(text: str) -> None:
    """A line to the terminal that does not break a progress bar."""
    tqdm.write(text, file=sys.stderr)


class Tracker:
    """Where a training's news go (an :class:`dopsd.train.observer.Observer`), as one run of the tracker.

    ``training`` names the training (the same name goes on with the same run, also after a kill), ``method`` the run
    below it; without a method it is the training's own run. ``folder`` is ``runs/<concept>/tracking``.
    """

    def __init__(
        self, root: Path, folder: Path, concept: str, training: str, method: str | None, settings: TrackingSettings,
        *, tell: Callable[[str], None] = say,
    ) -> None:  # fmt: skip
        self._tell = tell
        self._run = f"{training}/{method}" if method else training
        self._captioned: set[str] = set()
        self._sender: Sender | None = None
        if not settings.enabled:
            return
        self._spool, self._sender = _open(root, folder, settings, tell)
        about: dict[str, Any] = {"name": concept, "time": _now()}
        if method:
            about = {"name": f"{concept} {method}", "time": _now(), "parent": about}
        tags = {"dopsd.concept": concept, "dopsd.training": training} | ({"dopsd.method": method} if method else {})
        self._put("start", about=about, values=tags)
        self._sender.start()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self.close("FINISHED" if error is None else stopped)

    # --- what training tells ---

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step."""
        self._put("metrics", step=step, time=_now(), values={key: float(value) for key, value in values.items()})

    def images(self, step: int, key: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Pictures at a step, as one row; their captions once per key, beside them."""
        if self._sender is None or not images:
            return
        name, path = self._spool.new_file("image.png")
        picture_row(images).save(path)
        self._put("image", step=step, time=_now(), key=key, file=name)
        if key not in self._captioned:
            self._captioned.add(key)
            self.text("\n".join(captions) + "\n", f"{key}.captions.txt")

    def message(self, text: str) -> None:
        """A line for the person at the terminal."""
        self._tell(text)

    # --- what stages tell ---

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings, nested or flat; they are written once and must not change within a run."""
        texts = {key: str(value) for key, value in flatten(values).items()}
        too_long = {key for key, value in texts.items() if len(value) > PARAM_LENGTH}
        self._put("params", values={k: "see settings.json" if k in too_long else v for k, v in texts.items()})
        self.text(json.dumps(values, indent=1, default=str) + "\n", "settings.json")

    def tags(self, values: Mapping[str, str]) -> None:
        """Notes that may change."""
        self._put("tags", values=dict(values))

    def dataset(self, name: str, content_hash: str, source: str, **profile: int) -> None:
        """The data set that a training used, with the hash of its content."""
        self._put("dataset", name=name, hash=content_hash, source=source, profile=json.dumps(profile))
        self.tags({"dopsd.data.hash": content_hash})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, or a folder with all that is in it, as it is now."""
        if self._sender is None:
            return
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            below = file.parent.relative_to(path) if path.is_dir() else Path()
            self._put("artifact", file=self._spool.keep(file), folder=(Path(folder) / below).as_posix().strip("."))

    def text(self, content: str, name: str) -> None:
        """A small text file, ``name`` with its folders."""
        if self._sender is None:
            return
        path = Path(name)
        kept, place = self._spool.new_file(path.name)
        place.write_text(content)
        self._put("artifact", file=kept, folder=path.parent.as_posix().strip("."))

    def close(self, status: str = "FINISHED") -> None:
        """End the run, try a last time to send what is left, and say where it is if that fails."""
        if self._sender is None:
            return
        self._put("end", status=status, time=_now())
        _finish(self._sender, self._spool, self._tell)
        self._sender = None

    def _put(self, kind: str, **record: Any) -> None:
        if self._sender is not None:
            self._spool.put({"run": self._run, "kind": kind, **record})
            self._sender.wake()


def run_id(root: Path, folder: Path, training: str, settings: TrackingSettings) -> str | None:
    """The tracker's id of a training's own run; ``None`` while the tracker does not answer or has not got it."""
    spool = Spool(folder / "spool")
    try:
        return Server(tracking_uri(root), settings.experiment, root / "mlartifacts", spool).find(training)
    except Exception as error:  # whatever MLflow raises when it is away
        say(f"tracking: {without_secrets(' '.join(str(error).split()), tracking_uri(root))[:200]}")
        return None


def sync(root: Path, folder: Path, settings: TrackingSettings, tell: Callable[[str], None] = say) -> bool:
    """Send what an outage left behind in ``folder``; whether nothing is left."""
    spool, sender = _open(root, folder, settings, tell)
    waiting = spool.backlog()
    done = _finish(sender, spool, tell)
    if done:
        tell(f"tracking: {waiting} records were sent to {public_uri(tracking_uri(root))}")
    return done


def _open(root: Path, folder: Path, settings: TrackingSettings, tell: Callable[[str], None]) -> tuple[Spool, Sender]:
    spool = Spool(folder / "spool")
    return spool, Sender(spool, Server(tracking_uri(root), settings.experiment, root / "mlartifacts", spool), tell)


def _finish(sender: Sender, spool: Spool, tell: Callable[[str], None]) -> bool:
    done = sender.close()
    if not done:
        tell(
            f"tracking: {spool.backlog()} records wait in {spool.folder}; the next stage sends them, "
            "or `dopsd track sync --concept NAME` once the tracker is back"
        )
    return done


def git_tags(root: Path) -> dict[str, str]:
    """The commit that ``root`` is at, and whether files differ from it. An image has no repository: there it is what
    DOPSD_COMMIT says. Empty where nothing says it."""
    try:
        commit, status = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        built_from = os.environ.get("DOPSD_COMMIT")
        return {"mlflow.source.git.commit": built_from} if built_from else {}
    return {"mlflow.source.git.commit": commit.strip(), "dopsd.git.dirty": str(bool(status.strip())).lower()}


def flow_tags() -> dict[str, str]:
    """The flow run that this process works for, where there is one (flows/train.py sets these)."""
    names = {"DOPSD_FLOW_RUN_ID": "dopsd.flow_run.id", "DOPSD_FLOW_RUN_URL": "dopsd.flow_run.url"}
    return {tag: os.environ[name] for name, tag in names.items() if os.environ.get(name)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def picture_row(images: Sequence[Image.Image]) -> Image.Image:
    """The pictures side by side, small ones enlarged by a whole factor."""
    factor = max(1, PREVIEW_SIDE // max(max(image.size) for image in images))
    large = [i.resize((i.width * factor, i.height * factor), Image.Resampling.NEAREST) for i in images]
    row = Image.new("RGB", (sum(i.width for i in large), max(i.height for i in large)), "white")
    left = 0
    for image in large:
        row.paste(image, (left, 0))
        left += image.width
    return row


def _now() -> int:
    return int(time.time() * 1000)
