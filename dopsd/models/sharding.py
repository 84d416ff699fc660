"""A transformer that several processes hold together: each has its share of every block's frozen weights (FSDP2).

A block is put together when it computes, and let go after it. Adapters are added later and are whole in every process:
their gradients are exchanged as without this (:mod:`dopsd.train.parallel`), and the optimizer knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Divide the weights of frozen blocks among all processes, which must each call it; block by block they go from
    host memory to the device, so that it never holds all of them."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
