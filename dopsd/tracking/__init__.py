"""Tracking in MLflow that a training never waits for.

The run folder ``runs/<concept>/`` is the truth (:mod:`.folder` says what is where) and the tracker a copy of it: a
comparison (:mod:`.sender`) sends what is missing there. While a training runs, a thread compares whenever something was
written; every stage compares once more at its end, and ``dopsd track sync`` does nothing else. One MLflow run is one
training of a concept (parameters, data set, table, report); below it is one per method (metrics, previews, adapters).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tenacity import RetryError, Retrying, retry_if_exception_type
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set
from tenacity.wait import wait_exponential
from tqdm import tqdm

from dopsd.config.groups import TrackingSettings
from dopsd.files import disk_full, is_disk_full
from dopsd.process import proxy_note

from .sender import Comparison
from .server import Away, LoginNeeded, Refused, connect, public_uri, tracking_uri, without_secrets

__all__ = ["Sender", "connect", "public_uri", "run_id", "send", "tracking_uri", "without_secrets"]

BATCH_SECONDS = 1.0  # what is written within this long travels together
Log = Callable[[str], None]
LONGEST_WAIT = 30.0  # seconds between two tries, at most, while the server is away


def log_line(text: str) -> None:
    """A line to the terminal that does not break a progress bar."""
    tqdm.write(text, file=sys.stderr)


class Sender:
    """Keeps the tracker's copy of the run folder ``run`` up to date while it is entered; the end of the block waits for
    one last comparison. Call ``wake`` whenever something was written. One process at a time sends a folder; another
    logs that, and leaves it to the first."""

    def __init__(self, root: Path, run: Path, settings: TrackingSettings, log: Log = log_line) -> None:
        self._run, self._enabled, self._log = run, settings.enabled, log
        self._comparison = Comparison(root, run, settings, log)
        self._uri = public_uri(self._comparison.uri)
        self._wake, self._closing, self._away = threading.Event(), threading.Event(), False
        self.wake = self._wake.set
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def __enter__(self) -> Sender:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        self._wake.set()
        if self._enabled:
            self._thread.join()

    def send(self) -> bool:
        """Compare once, in this thread; whether all of the folder is on the server then, but for what it refuses."""
        return self._alone(self._finish)

    def _alone(self, work: Callable[[], bool]) -> bool:
        """Do ``work`` unless another process sends this folder."""
        try:
            with FileLock(self._run / "tracking" / "lock", timeout=0):
                return work()
        except Timeout:
            self._comparison.warn(f"another process is sending {self._run}; this one leaves it to that")
        except OSError as error:
            full = disk_full(error, self._run) if is_disk_full(error) else None
            self._comparison.warn(f"nothing of {self._run} is sent ({full or error})")
        return False

    def _work(self) -> None:
        while not self._closing.is_set():
            self._alone(self._follow)
            self._closing.wait(LONGEST_WAIT)

    def _follow(self) -> bool:
        """Compare whenever something was written; where the server is away, until it answers or all ends."""
        patient = Retrying(
            retry=retry_if_exception_type(Away), wait=wait_exponential(multiplier=0.5, max=LONGEST_WAIT),
            stop=stop_when_event_set(self._closing), sleep=sleep_using_event(self._closing),
        )  # fmt: skip
        while not self._closing.is_set():
            self._wake.clear()
            if self._closing.is_set():  # the last wake came just before
                break
            try:
                patient(self._compare, last=False)
            except RetryError:
                break
            self._wake.wait()
            self._closing.wait(BATCH_SECONDS)
        return self._finish()

    def _finish(self) -> bool:
        self._comparison.forget()
        try:
            self._compare(last=True)
        except Away:
            self._log(
                f"tracking: not all of {self._run} is in the tracker; the next stage sends the rest, "
                f"or `dopsd track sync --concept {self._run.name}` once the tracker is back"
            )
            return False
        return True

    def _compare(self, last: bool) -> None:
        """One comparison. That the server went or came back is said; :class:`Away` is raised while it is gone."""
        try:
            self._comparison.send(last)
        except Exception as error:
            self._comparison.forget()
            if isinstance(error, LoginNeeded):
                how = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                self._comparison.warn(f"login needed at {self._uri} (HTTP 401): {how}; the run goes on without it")
            elif is_disk_full(error):
                self._comparison.warn(f"{disk_full(error, self._run)}; the run goes on, and is sent later")
            elif not isinstance(error, Away):  # a mistake of ours: training must not pay for it
                self._comparison.warn(f"something of {self._run} was not sent ({type(error).__name__}: {error})")
            elif not self._away:
                self._log(f"tracking: {self._uri} cannot be reached ({error}){proxy_note(self._uri)}; "
                          "the run goes on, and is sent later")  # fmt: skip
            self._away = isinstance(error, Away)
            if last or self._away:
                raise Away from error
            return
        if self._away:
            self._log(f"tracking: {self._uri} answers again, and has all that was written")
        self._away = False


def send(root: Path, run: Path, settings: TrackingSettings, log: Log = log_line) -> bool:
    """Send what the tracker lacks of ``run`` (``runs/<concept>``); whether it has all of it then. Never raises."""
    return not settings.enabled or Sender(root, run, settings, log).send()


def run_id(root: Path, run: Path, training: str, settings: TrackingSettings) -> str | None:
    """The tracker's id of a training's own run; ``None`` while the tracker does not answer or has not got it."""
    try:
        found = Comparison(root, run, settings, log_line).find(training)
    except (Away, Refused, OSError) as error:
        log_line(f"tracking: {error}")
        return None
    return found.info.run_id if found else None
