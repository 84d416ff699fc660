"""A service whose processes are killed and whose runs are cancelled."""

from __future__ import annotations

import signal
from typing import Any

from tests.stack import Stack, until


def test_killed_and_cancelled_runs_leave_no_process_and_the_next_one_goes_on(service: Stack) -> None:
    """kill -9 to Prefect's worker and to the flow run; the next run of the same goes on, and is cancelled."""
    how: dict[str, Any] = {"concepts": ["spots"], "overrides": ["train.max_steps=100000"]}
    first = service.start(**how)
    until(lambda: service.steps(first) > 8)
    assert service.training()
    for process in [*service.find("worker start"), *service.find("prefect.engine")]:
        process.send_signal(signal.SIGKILL)
    until(lambda: not service.training())
    until(lambda: service.find("worker start"))  # supervisord starts it again

    second = service.start(**how)
    until(lambda: service.training() and service.rows("spots") > 0 and "resuming at step" in _worker_log(service))
    cancelled = service.prefect_cli("flow-run", "cancel", second)
    said, _ = cancelled.communicate()
    assert cancelled.returncode == 0, said
    assert service.end(second)["type"] == "CANCELLED"
    until(lambda: not service.training())
    until(lambda: not service.find("prefect.engine"))
    until(lambda: not service.find("ray::PlacementGroupCleaner"))  # one for each job, if left to itself
    until(lambda: service.state(first)["type"] == "CRASHED")  # it has said nothing since


def _worker_log(service: Stack) -> str:
    return (service.folder / "logs" / "worker.log").read_text()
