"""One of several data-parallel processes that train the tiny family: ``python -m tests.worker METHOD FOLDER SETTINGS``.

Where it stands among them comes from the environment, as from ``torchrun``. It counts what is exchanged.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dopsd.config import TrainSettings
from dopsd.train import trainer
from dopsd.train.parallel import exchange
from tests import tiny


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
    method, folder, settings = sys.argv[1], Path(sys.argv[2]), TrainSettings.model_validate_json(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    counts = {"exchanges": 0, "others": 0}
    reduce = dist.all_reduce

    def counted(*args, **kwargs):
        counts["exchanges"] += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counted
    for name in ("all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "reduce"):
        original = getattr(dist, name)

        def other(*args, _original=original, **kwargs):
            counts["others"] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, other)
    with kept_gradients(folder / f"gradients-{os.environ['RANK']}.safetensors"):
        tiny.run_tiny(method, folder / os.environ["RANK"], settings)  # type: ignore[arg-type]
    (folder / f"counts-{os.environ['RANK']}.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
