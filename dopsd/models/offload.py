"""A transformer larger than the device: its blocks wait in host memory, and each is there while it computes.

The next block is copied beside the one that computes. Frozen weights alone travel: adapters stay on the device, and
nothing is ever copied back. A block's copies live as long as something needs them, a backward pass too: that holds
one or two blocks at once where every block is checkpointed, and all of them where none is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Weight:
    module: nn.Module
    name: str
    kept: nn.Parameter
    """In host memory."""


class BlockOffload:
    """Blocks that wait in host memory. They are added in the order in which they compute."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks: list[list[_Weight]] = []
        self._last, self._direction = -1, 1
        self._coming: tuple[int, list[nn.Parameter]] | None = None

    def add(self, block: nn.Module) -> None:
        """Move the block's weights to host memory for good; from now on it borrows copies while it computes.

        It must be frozen, and without adapters yet: those are added later, on the device.
        """
        number, pinned = len(self._blocks), self._stream is not None
        self._blocks.append(
            [
                _Weight(part, name, _in_host_memory(parameter, pinned))
                for part in block.modules()
                for name, parameter in part.named_parameters(recurse=False)
            ]
        )
        for part in block.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self._device)
        self._restore(number)
        block.register_forward_pre_hook(lambda *_: self._enter(number))
        block.register_forward_hook(lambda *_: self._restore(number), always_call=True)

    def _enter(self, number: int) -> None:
        """Let the block hold copies on the device, and send for the one that comes after it."""
        if number != self._last:
            self._direction = 1 if number > self._last else -1
        elif len(self._blocks) > 1:  # the last block, once more: a backward pass begins
            self._direction = -1 if number else 1
        self._last = number
        if self._coming is None or self._coming[0] != number:
            self._coming = (number, self._fetch(number))
        copies = self._coming[1]
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            for copy in copies:
                for tensor in _plain(copy):
                    tensor.record_stream(here)
        for weight, copy in zip(self._blocks[number], copies, strict=True):
            weight.module._parameters[weight.name] = copy
        following = (number + self._direction) % len(self._blocks)
        self._coming = None if following == number else (following, self._fetch(following))

    def _fetch(self, number: int) -> list[nn.Parameter]:
        if self._stream is None:
            return [_copy(weight.kept, self._device) for weight in self._blocks[number]]
        with torch.cuda.stream(self._stream):
            return [_copy(weight.kept, self._device) for weight in self._blocks[number]]

    def _restore(self, number: int) -> None:
        for weight in self._blocks[number]:
            weight.module._parameters[weight.name] = weight.kept


def _in_host_memory(parameter: nn.Parameter, pinned: bool) -> nn.Parameter:
    kept = _parameter(parameter.to("cpu"))
    if pinned and type(kept.data) is Tensor:
        kept.data = kept.data.pin_memory()  # else a copy makes the device wait
    return kept


def _copy(kept: nn.Parameter, device: torch.device) -> nn.Parameter:
    """On the device; always a copy, on a CPU too, so that the same things are alive there."""
    if device.type == "cpu" and not hasattr(kept, "quant_state"):
        return _parameter(kept.detach().clone())
    return _parameter(kept.to(device, non_blocking=True))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of."""
    inner: Any = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield tensor.data
        return
    for name in inner()[0]:
        yield from _plain(getattr(tensor, name))
