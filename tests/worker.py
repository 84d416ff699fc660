"""One of several data-parallel processes that train the tiny family: ``python -m tests.worker FOLDER RUNS``.

``RUNS`` is JSON, settings by method. Where it stands among them comes from the environment, as from ``torchrun``. It
counts what is exchanged. It trains all that it is given, one after the other: a process spends most of its life
importing.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dopsd.config.groups import TrainSettings
from dopsd.train import trainer
from dopsd.train.parallel import exchange
from tests import tiny

SHARDED = "sharded"
"""A run of d-opsd whose processes divide the transformer among them."""
FULL = "full"
"""A run of d-opsd that trains the transformer's own weights."""


def method_of(name: str) -> Any:
    """What a run of that name trains by."""
    return "d-opsd" if name in (SHARDED, FULL) else name


@contextmanager
def kept_gradients(path: Path) -> Iterator[None]:
    """Write the adapters' gradients as the first optimizer step gets them."""

    def keeping(accelerator: Any, parameters: Any, *rest: Any) -> Any:
        answer = exchange(accelerator, parameters, *rest)
        if not path.exists():
            save_file({str(i): p.grad.clone() for i, p in enumerate(parameters)}, path)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "exchange", keeping)
        yield


def main() -> None:
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    counts = Counter[str]()
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "reduce"):
        setattr(dist, name, _counted(getattr(dist, name), counts, name))
    rank = os.environ["RANK"]
    for name, settings in runs.items():
        counts.clear()
        method, blocks = method_of(name), "sharded" if name == SHARDED else "there"
        with kept_gradients(folder / name / f"gradients-{rank}.safetensors"):
            tiny.run_tiny(method, folder / name / rank, TrainSettings.model_validate(settings), blocks=blocks)
        (folder / name / f"counts-{rank}.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


def _counted(original: Callable[..., Any], counts: Counter[str], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return original(*args, **kwargs)

    return call


if __name__ == "__main__":
    main()
