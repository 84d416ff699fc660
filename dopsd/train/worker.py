"""What Ray's workers run: a job in a folder of its own, whose checkpoints go to Ray and whose news go to the starter.

Ray's controller and helper processes import this module too, so it imports nothing heavy: each would pay for torch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.config import Method

if TYPE_CHECKING:
    from PIL import Image

    from dopsd.train.trainer import Observer


@dataclass(frozen=True)
class _Relay:
    """An observer whose news go to the machine that started the job."""

    news: Any
    method: Method

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.news.put(("metrics", self.method, (step, dict(values))))

    def images(self, step: int, key: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        self.news.put(("images", self.method, (step, key, list(images), list(captions))))

    def message(self, text: str) -> None:
        self.news.put(("message", self.method, (text,)))


class _Silent:
    """An observer of the workers beside the first."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def images(self, step: int, key: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


def run(config: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. A job's own fault is an answer, not an exception: trying again would not help."""
    import ray
    import ray.train

    from dopsd.train.job import run_job
    from dopsd.train.trainer import TrainError

    first = ray.train.get_context().get_world_rank() == 0
    job, news = ray.get(config["job"]), config["news"]

    @contextmanager
    def observe(method: Method) -> Iterator[Observer]:
        if not first:
            yield _Silent()
            return
        news.put(("begin", method, None))
        yield _Relay(news, method)
        news.put(("end", method, None))

    with tempfile.TemporaryDirectory(prefix="dopsd-") as place:
        home = Path(place)
        _begin_with(home, ray.train.get_checkpoint(), config["before"])

        def on_saved() -> None:
            checkpoint = ray.train.Checkpoint.from_directory(home) if first else None
            ray.train.report({}, checkpoint=checkpoint)

        try:
            results = run_job(job, home / "train", home / "adapters", observe, on_saved)
        except (TrainError, ValueError) as error:
            if type(error).__module__.partition(".")[0] != "dopsd":
                raise
            return {"error": str(error)}
        on_saved()  # the adapters are published after the last checkpoint
        return {"results": {method: asdict(found) for method, found in results.items()}}


def _begin_with(home: Path, checkpoint: Any, before: Mapping[str, bytes]) -> None:
    """Fill the worker's folder: Ray's newest checkpoint of this job, else what the starting side had."""
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            shutil.copytree(saved, home, dirs_exist_ok=True)
        return
    for name, content in before.items():
        path = home / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
