"""``make up`` and ``make down``: MLflow, Prefect with a worker, and Ray on this machine, as plain processes.

    python -m infra.local.services up | down | status

``up`` returns when all of it answers and the deployments of ``prefect.yaml`` are registered; a second one changes
nothing. ``down`` ends every process of it. Inside: ``stack`` says where things are, ``processes`` speaks to
supervisord, ``health`` asks the services.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import deque
from pathlib import Path

import psutil
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from dopsd.process import prepare_process

from . import health
from .logins import USER
from .processes import Supervisor, below, end, of_stack
from .stack import PORTS, SERVICES, ServiceError, Stack

LOG_LINES = 15  # shown of the log of a service that failed
FLOW_SECONDS = 20  # for flow runs to say that they were ended
OUT, ERR = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True, highlight=False)


def up(stack: Stack) -> None:
    """Start what does not run, wait until all of it answers, register the deployments, and say what is where."""
    supervisor = Supervisor(stack)
    if running := supervisor.pid() is not None:
        stack = stack.as_started()
        if not stack.logins.made:
            raise ServiceError("what runs is of an earlier version that asks for no password: `make down`, `make up`")
        if all(health.is_healthy(stack, name) for name in SERVICES) and health.registered(stack):
            OUT.print("It already runs.")
            return _explain(stack, supervisor)
    else:
        stack = _prepare(stack)
    try:
        if not running:
            Supervisor(stack).start()
        _wait(stack, supervisor)
    except (ServiceError, KeyboardInterrupt):
        if not running:
            _stop(stack)
        raise
    _deploy(stack)
    _explain(stack, supervisor)


def down(stack: Stack) -> None:
    """End every process of the stack, flow runs first so that they can still report it."""
    stack = stack.as_started()
    if Supervisor(stack).pid() is None and not of_stack(stack):
        stack.forget()
        OUT.print("Nothing runs.")
        return
    _stop(stack)
    OUT.print("All services have ended. Their logs and data are kept.")


def status(stack: Stack) -> None:
    """Show what runs where. Raises ServiceError where something does not."""
    stack, supervisor = stack.as_started(), Supervisor(stack)
    OUT.print(_table(stack, supervisor))
    if wrong := [name for name in SERVICES if not health.is_healthy(stack, name)]:
        raise ServiceError(f"not answering: {', '.join(wrong)}; `make up` starts what is missing")


def _prepare(stack: Stack) -> Stack:
    """Make sure that nothing of an earlier stack and no other program is in the way, and make what services need."""
    if left := of_stack(stack.as_started()):
        OUT.print(f"{len(left)} processes of a stack whose supervisor is gone are ended first.")
        _stop(stack)
    health.check_ports(stack)
    return stack.prepare()


def _wait(stack: Stack, supervisor: Supervisor) -> None:
    for name in PORTS:  # all at once; they need nothing of one another
        supervisor.ensure(name)
    for name in SERVICES:
        supervisor.ensure(name)  # the worker, now that Prefect answers
        with OUT.status(f"waiting for {name} (log: {stack.shown(stack.log(name))})"):
            health.wait_for(stack, supervisor, name)


def _deploy(stack: Stack) -> None:
    """Register the deployments of ``prefect.yaml``: that imports the flows, so it fails where they do."""
    with (
        OUT.status("registering the deployments of prefect.yaml"),
        stack.log("deploy").open("w", encoding="utf-8") as log,
    ):
        for module in (["prefect", "--no-prompt", "deploy", "--all"], ["flows.automations"]):
            done = subprocess.run(
                [sys.executable, "-m", *module],
                cwd=stack.root,
                env=stack.variables(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            if done.returncode:
                break
    if done.returncode:
        raise ServiceError(
            "the services run, but the deployments of prefect.yaml could not be registered; `make up` tries again",
            stack.log("deploy"),
        )


def _stop(stack: Stack) -> None:
    stack = stack.as_started()
    supervisor = Supervisor(stack)
    worker = supervisor.states().get("worker")
    with OUT.status("stopping the services"):
        if worker and worker.pid and psutil.pid_exists(worker.pid):
            end(below(psutil.Process(worker.pid)), FLOW_SECONDS)
        seen = of_stack(stack)  # before their parents are gone
        supervisor.shutdown()
        left = end({*seen, *of_stack(stack)}, patience=10)
    if left:
        raise ServiceError("could not be ended: " + ", ".join(f"{p.name()} (PID {p.pid})" for p in left))
    stack.forget()


def _table(stack: Stack, supervisor: Supervisor) -> Table:
    table = Table("service", "address", "state", "PID", box=None, header_style="bold")
    states = supervisor.states()
    for name in SERVICES:
        state = states.get(name)
        table.add_row(
            name,
            stack.address(name),
            state.name.lower() if state else "stopped",
            str(state.pid) if state and state.pid else "",
        )
    return table


def _explain(stack: Stack, supervisor: Supervisor) -> None:
    prefect, mlflow = stack.shown(stack.logins.prefect_file), stack.shown(stack.logins.mlflow_file)
    OUT.print(_table(stack, supervisor))
    OUT.print(
        "\nLog in, in a browser once:\n"
        f"  Prefect                      the whole line in {prefect}\n"
        f"  MLflow                       user {USER}, password after the colon in {mlflow}\n"
        f"In a shell that is to use it:  source {stack.shown(stack.env_file)}   (logs in too)\n"
        "Train on it:                   prefect deployment run dopsd/train\n"
        "After changing prefect.yaml:   prefect --no-prompt deploy --all\n"
        f"See what they say:             tail -f {stack.shown(stack.log('worker'))}   (or mlflow, prefect, ray)\n"
        f"Stop it:                       make down   (Ray's own logs, in {stack.ray_temp}, go with it)",
        highlight=False,
    )


def _fail(stack: Stack, error: ServiceError) -> None:
    if error.log is not None and error.log.exists():
        ERR.print(f"The end of {stack.shown(error.log)}:", style="bold")
        ERR.print("".join(_tail(error.log)), end="", markup=False)
    ERR.print(str(error), style="red", markup=False)


def _tail(log: Path) -> deque[str]:
    with log.open(errors="replace", encoding="utf-8") as lines:
        return deque(lines, LOG_LINES)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 0, 1 where something does not work, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.services", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["up", "down", "status"])
    command = {"up": up, "down": down, "status": status}[parser.parse_args(arguments).command]
    prepare_process()
    try:
        stack = Stack.from_environment()
    except ServiceError as error:
        ERR.print(str(error), style="red", markup=False)
        return 1
    try:
        if command is status:
            status(stack)
        else:
            stack.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(stack.folder / "lock"):
                command(stack)
    except ServiceError as error:
        _fail(stack, error)
        return 1
    except KeyboardInterrupt:
        ERR.print("Interrupted.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
