"""``make ui``: MLflow's pages over the runs in this folder, without the rest of the stack, on 127.0.0.1:MLFLOW_PORT.

It asks for the same password as `make up`'s MLflow: other users of the machine reach the port too, and so does every
page in the browser.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console

from dopsd.process import prepare_process

from . import health
from .logins import FOREIGN
from .stack import HOST, ServiceError, Stack

OUT, ERR = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)


def command(stack: Stack) -> list[str]:
    """What is run, as in ``supervisord.conf``."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"),
        *("--host", HOST, "--port", str(stack.ports["mlflow"])),
        *("--backend-store-uri", f"sqlite:///{stack.root}/mlflow.db"),
        *("--default-artifact-root", f"{stack.root}/mlartifacts"),
        *("--artifacts-destination", f"{stack.root}/mlartifacts"),
    ]


def variables(stack: Stack) -> dict[str, str]:
    """The caller's, and what the log-in wants."""
    own = stack.mlflow_variables()
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
        **own,
        "PYTHONPATH": own["DOPSD_MLFLOW_PYTHONPATH"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def explain(stack: Stack) -> None:
    """Say where it is and how to log in. The password itself only to a terminal: other output may be kept."""
    OUT.print(f"MLflow: {stack.address('mlflow')}  (Ctrl-C ends it)")
    if OUT.is_terminal:
        user, password = stack.logins.mlflow
        OUT.print(f"Log in: user {user}, password {password}")
    else:
        OUT.print(f"Log in: user:password in {stack.shown(stack.logins.mlflow_file)}")


def main() -> int:
    """The command: becomes MLflow's server. Returns 1 where it cannot."""
    prepare_process()
    try:
        stack = Stack.from_environment()
        health.check_port(stack, "mlflow")
        stack.make_folder()
        stack.logins.make()
    except ServiceError as error:
        ERR.print(str(error), style="red", markup=False)
        return 1
    explain(stack)
    sys.stdout.flush()
    os.chdir(stack.root)
    os.execve(sys.executable, command(stack), variables(stack))


if __name__ == "__main__":
    sys.exit(main())
