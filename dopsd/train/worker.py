"""What Ray's workers run: a job in a folder of its own, that goes to the job's storage and to the starting side.

Ray's controller and helper processes import this module too, so it imports nothing heavy: each would pay for torch.
"""

from __future__ import annotations

import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class _Relay:
    """An observer of the first worker: every file that is written below ``folder`` goes to the machine that started the
    job, whole or line by line, as messages ``(name, content)``. A message without a name is for the terminal."""

    queue: Any
    folder: Path

    def wrote(self, path: Path, line: str | None = None) -> None:
        content = line if line is not None else path.read_bytes() if path.is_file() else None
        self.queue.put((path.relative_to(self.folder).as_posix(), content))

    def message(self, text: str) -> None:
        self.queue.put((None, text))


class _Silent:
    """An observer of the workers beside the first."""

    def wrote(self, path: Path, line: str | None = None) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


def run(config: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. A job's own fault is an answer, not an exception: trying again would not help."""
    import ray
    import ray.train

    from dopsd.train.job import run_job
    from dopsd.train.trainer import OutOfMemory, TrainError

    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    job, storage = ray.get(config["job"]), config["storage"]
    if refusal := storage.refusal():
        return {"error": refusal}
    with tempfile.TemporaryDirectory(prefix="dopsd-") as place:
        home = Path(place)
        train = home / "train"
        storage.load(train)

        def on_saved() -> None:
            if first:
                storage.save(train, [method for method in job.train.methods if (train / method).is_dir()])

        try:
            observer = _Relay(config["queue"], train) if first else _Silent()
            observer.message(f"{job.name}: began on {socket.gethostname()}, loading the base")
            results = run_job(job, train, home / "adapters", observer, on_saved)
        except OutOfMemory as error:
            if context.get_world_size() == 1:
                return {"error": str(error)}
            storage.refuse(str(error))  # the next try finds it
            raise  # that Ray ends the others too: they may wait for this one
        except (TrainError, ValueError) as error:
            if type(error).__module__.partition(".")[0] != "dopsd":
                raise
            return {"error": str(error)}
        on_saved()  # that the last run ended is written after its last checkpoint
        return {"results": {method: asdict(found) for method, found in results.items()}}
