"""What orchestration costs: the time of a run outside of the stages' own work, Ray's start included.

    python benchmarks/orchestration.py            # 3 rounds; starts a service of its own on free ports

A tiny project (random weights, a dozen steps), so that hardly anything but the orchestration is left. In each round, in
turn: the stages in one process with nothing around them; the flow without a server, training in its own process; the
same with a Ray of its own; the flow on a service (`make up`), training on its Ray; and that run again with nothing
changed. Each is a new process, or a new flow run; each round has a seed of its own, so that nothing is reused before
the last. Writes ``docs/benchmarks/orchestration.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.stack import Stack

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "docs" / "benchmarks" / "orchestration.json"
CONCEPT = "blots"

PLAIN = """
import sys
from pathlib import Path
from dopsd.config import load_settings
from dopsd.stages import STAGES
settings = load_settings(Path("params.yaml"), tuple(sys.argv[1:]))
for stage in STAGES.values():
    stage("blots", settings, Path())
"""


def main() -> None:
    """Run the arrangements in turn and write medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    from tests import stack

    with tempfile.TemporaryDirectory() as place:
        here = stack.Stack.with_free_ports(stack.project(Path(place) / "project"))
        up = _seconds(lambda: _checked(here.run("up")))
        try:
            rounds = [_round(here, seed) for seed in range(given.rounds)]
        finally:
            down = _seconds(lambda: _checked(here.run("down")))
    kinds = list(rounds[0])
    report = {
        "command": f"python benchmarks/orchestration.py --rounds {given.rounds}",
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "seconds": {kind: statistics.median(r[kind] for r in rounds) for kind in kinds},
        "outside_the_stages": {
            kind: statistics.median(r[kind] - r["stages alone"] for r in rounds) for kind in kinds[1:-1]
        },
        "make up": up,
        "make down": down,
        "rounds": rounds,
    }
    OUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: report[k] for k in ("seconds", "outside_the_stages", "make up")}, indent=1))


def _round(here: Stack, seed: int) -> dict[str, float]:
    """Seconds of each arrangement."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_", "MLFLOW_"))}
    own |= {"PREFECT_HOME": str(here.root / ".prefect"), "PYTHONPATH": str(here.root)}
    local, changed = "compute.launcher=local", f"train.seed={10 * seed}"

    def process(*command: str) -> None:
        _checked(
            subprocess.run([sys.executable, *command], cwd=here.root, env=own, capture_output=True, encoding="utf-8")
        )

    def flow(number: int, *overrides: str) -> None:
        settings = [f"train.seed={10 * seed + number}", *overrides]
        process("-m", "flows.train", "--concept", CONCEPT, *(f"--set={setting}" for setting in settings))

    def service() -> None:
        run = here.start(concepts=[CONCEPT], overrides=[f"train.seed={10 * seed + 3}"])
        state = here.end(run)
        if state["type"] != "COMPLETED":
            raise SystemExit(f"the flow run ended {state['type']}: {state['message']}")

    arrangements: dict[str, Callable[[], None]] = {
        "stages alone": lambda: process("-c", PLAIN, local, changed),
        "flow, no server, no Ray": lambda: flow(1, local),
        "flow, no server, its own Ray": lambda: flow(2),
        "flow on the service": service,
        "flow on the service, all reused": service,
    }
    seconds = {}
    for kind, run in arrangements.items():
        seconds[kind] = _seconds(run)
        print(f"round {seed + 1}: {kind}: {seconds[kind]:.1f} s", flush=True)
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    started = time.monotonic()
    run()
    return time.monotonic() - started


def _checked(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise SystemExit(f"{done.args}: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
