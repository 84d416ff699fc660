"""Copies of the base that encode and draw side by side, one in each of Ray's workers, where ``compute`` asks for more.

What they give back is what one family would, in the same order: batches are handed out whole, so not even their
rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dopsd.config.groups import ComputeSettings, ModelSettings
from dopsd.train.launch import connect_ray, resources

if TYPE_CHECKING:
    from PIL.Image import Image

    from dopsd.models import Use
    from dopsd.models.base import Conditioning, Family, Request

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """``size`` Ray actors that hold a family each."""

    def __init__(self, model: ModelSettings, compute: ComputeSettings, root: Path, use: Use) -> None:
        connect_ray(compute)
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        requested = resources(compute, model.device)
        self.size = min(count_of(compute), max(1, _room_for(requested)))
        # all places at once: two jobs that each had some of what they need would wait for each other
        self._places = placement_group([requested] * self.size)
        ray.get(self._places.ready())
        remote = ray.remote(_Worker).options(
            num_cpus=requested["CPU"], num_gpus=requested.get("GPU", 0), memory=requested.get("memory"),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._places),
        )  # fmt: skip
        self._actors = [remote.remote(model, root.resolve(), use) for _ in range(self.size)]

    def map(self, function: Callable[[Family, T], R], items: Iterable[T]) -> Iterator[R]:
        """``function(family, item)`` for each item, in order; it must be one that can be imported by name."""
        from ray.util import ActorPool

        yield from ActorPool(self._actors).map(lambda actor, item: actor.do.remote(function, item), list(items))

    def close(self) -> None:
        """End the actors and give their places back; nothing the second time."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if self._actors:
            for actor in self._actors:
                ray.kill(actor)
            remove_placement_group(self._places)
        self._actors = []


def _room_for(requested: Mapping[str, float]) -> int:
    """How many workers that ask for this fit on the nodes that there are, when nobody else uses them."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(key, 0) // amount) for key, amount in requested.items() if amount) for node in nodes)


def count_of(compute: ComputeSettings) -> int:
    """How many copies of the base should work side by side: as many as there are workers at least."""
    if compute.launcher == "local":
        return 1
    return compute.workers if isinstance(compute.workers, int) else compute.workers[0]


@contextmanager
def workers(model: ModelSettings, compute: ComputeSettings, root: Path, use: Use) -> Iterator[Workers | None]:
    """Workers where ``compute`` asks for more than one worker, else none: then this process does it all."""
    if count_of(compute) == 1:
        yield None
        return
    made = Workers(model, compute, root, use)
    try:
        yield made
    finally:
        made.close()


class _Worker:
    """What one actor is. It loads the base by itself, from the same path as here."""

    def __init__(self, model: ModelSettings, root: Path, use: Use) -> None:
        from dopsd.models import load_family

        self._family = load_family(model, root, use)

    def do(self, function: Callable[[Family, Any], Any], item: Any) -> Any:
        return function(self._family, item)


class SpreadEncoders:
    """A family whose encoders are the workers'; the rest of it is the one here."""

    def __init__(self, family: Family, workers: Workers, batch: int) -> None:
        self._family, self._workers, self._batch = family, workers, batch
        self.parallel_batches = workers.size
        """How many batches of ``batch`` it takes at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode_prompt(self, requests: Sequence[Request]) -> list[Conditioning]:
        """As :meth:`~dopsd.models.base.Family.encode_prompt`."""
        return self._spread(_encode_prompts, list(requests))

    def encode_context(self, requests: Sequence[Request], targets: Sequence[Image]) -> list[Conditioning]:
        """As :meth:`~dopsd.models.base.Family.encode_context`."""
        return self._spread(_encode_contexts, list(zip(requests, targets, strict=True)))

    def _spread(self, function: Callable[[Family, list[Any]], list[Conditioning]], inputs: list[Any]) -> Any:
        parts = [inputs[start : start + self._batch] for start in range(0, len(inputs), self._batch)]
        return [encoding for part in self._workers.map(function, parts) for encoding in part]


def _encode_prompts(family: Family, requests: list[Request]) -> list[Conditioning]:
    return [_on_cpu(encoding) for encoding in family.encode_prompt(requests)]


def _encode_contexts(family: Family, rows: list[tuple[Request, Image]]) -> list[Conditioning]:
    requests, targets = zip(*rows, strict=True)
    return [_on_cpu(encoding) for encoding in family.encode_context(requests, targets)]


def _on_cpu(encoding: Conditioning) -> Conditioning:
    return {name: tensor.cpu() for name, tensor in encoding.items()}
