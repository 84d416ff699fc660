"""The sender: a thread that brings a spool's records to the server in order, and waits out the server's absences."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from filelock import FileLock, Timeout
from tenacity import RetryError, Retrying, retry_if_exception_type
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set
from tenacity.wait import wait_exponential

from .server import Server, is_rejection, public_uri, without_secrets
from .spool import Record, Spool

BATCH_SECONDS = 1.0
"""Metrics of this long travel together."""
LONGEST_WAIT = 30.0
"""Seconds between two tries, at most, while the server is away."""
METRICS_PER_BATCH = 200


class Away(Exception):
    """The tracker could not be reached or would not talk to us; the records stay where they are."""


class Sender:
    """Delivers ``spool`` to ``server`` in the background; ``say`` gets a line when the server goes and comes back."""

    def __init__(self, spool: Spool, server: Server, say: Callable[[str], None]) -> None:
        self._spool, self._server, self._say = spool, server, say
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        self._wake.set()

    def close(self) -> bool:
        """Stop the thread, try a last time, and tell whether everything was delivered."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self.drain()
        except Away as error:
            self._report(error)
        return self._spool.backlog() == 0

    def drain(self) -> int:
        """Deliver all that waits, in order; how many records went. Raises :class:`Away`, losing nothing.

        Whoever else delivers this spool at the moment goes on; we leave it to them.
        """
        try:
            with FileLock(self._spool.lock, timeout=0):
                return sum(self._deliver(records, position) for records, position in _batches(self._spool))
        except Timeout:
            return 0

    def _work(self) -> None:
        patient = Retrying(
            retry=retry_if_exception_type(Away),
            wait=wait_exponential(multiplier=0.5, max=LONGEST_WAIT),
            stop=stop_when_event_set(self._closing),
            sleep=sleep_using_event(self._closing),
            before_sleep=lambda state: self._report(state.outcome.exception() if state.outcome else None),
        )
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            self._closing.wait(BATCH_SECONDS)
            try:
                sent = patient(self.drain)
            except RetryError:
                return  # closing while the server is away; close() tries once more and says so
            if self._away:
                self._away = False
                self._say(f"tracking: {public_uri(self._server.uri)} answers again, {sent} kept records were sent")

    def _deliver(self, records: list[Record], position: int) -> int:
        try:
            if records[0]["kind"] == "metrics":
                self._server.metrics(records)
            else:
                self._server.deliver(records[0])
        except Exception as error:
            # whatever went wrong there must not reach the training: keep the records, or set aside what is refused
            self._server.forget()
            if not is_rejection(error):
                raise Away(self._plain(error)) from None
            self._reject(records, error)
        self._spool.acknowledge(position)
        for record in records:
            if "file" in record:
                self._spool.drop(record["file"])
        return len(records)

    def _reject(self, records: list[Record], error: Exception) -> None:
        for record in records:
            path = self._spool.reject(record, self._plain(error))
        self._say(f"tracking: the tracker refused {len(records)} record(s), listed in {path}: {self._plain(error)}")

    def _report(self, error: BaseException | None) -> None:
        """Tell of an outage, once."""
        if not self._away:
            self._away = True
            self._say(
                f"tracking: {public_uri(self._server.uri)} cannot be reached ({error}); the run goes on, "
                f"its records are kept in {self._spool.folder} and sent when it answers"
            )

    def _plain(self, error: Exception) -> str:
        """One short line about an error, without passwords."""
        text = " ".join(without_secrets(str(error), self._server.uri).split())
        return f"{type(error).__name__}: {text[:160]}"


def _batches(spool: Spool) -> Iterator[tuple[list[Record], int]]:
    """The waiting records, neighbouring metrics of one run together."""
    group: list[Record] = []
    end = 0
    for record, position in spool.pending():
        together = record["kind"] == "metrics" and group and group[0]["run"] == record["run"]
        if group and not (together and group[0]["kind"] == "metrics" and len(group) < METRICS_PER_BATCH):
            yield group, end
            group = []
        group.append(record)
        end = position
    if group:
        yield group, end
