"""One of several data-parallel processes that train the tiny family: ``python -m tests.worker METHOD FOLDER SETTINGS``.

Where it stands among them comes from the environment, as from ``torchrun``. It counts what is exchanged.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dopsd.config import TrainSettings
from tests import tiny


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
    tiny.run_tiny(method, folder / os.environ["RANK"], settings)  # type: ignore[arg-type]
    (folder / f"counts-{os.environ['RANK']}.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
