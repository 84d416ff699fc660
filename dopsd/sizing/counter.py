"""Memory and work of code that runs on fake tensors: shapes and types flow through it, and no number is computed.

Fakes are CPU tensors whatever is here, so that a count is the same on every machine; :class:`_CudaTypes` gives them the
types that CUDA's autocast would. Attention counts as a fused kernel: queries, keys, values, the answer and one number a
row are kept.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten


@contextmanager
def counting() -> Iterator[Counter]:
    """Fake tensors inside the block, and a counter that sees each of them."""
    counter = Counter()
    _forget()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _CudaTypes(), counter:
            yield counter
    finally:
        _forget()


def _forget() -> None:
    """Families keep small tensors from call to call: no real run may be given a fake one, and the other way round."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dopsd.models."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear") and hasattr(value, "cache_parameters"):
                    value.cache_clear()


class Counter(TorchDispatchMode):
    """Counts every storage that is made while it is active, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes now."""
        self.peak = 0
        """Most bytes since :meth:`reset`."""
        self.operations = 0
        """Of matrix products, convolutions and attention."""
        self.moved = 0
        """Bytes that all other operations read and write."""
        self._seen: set[int] = set()

    def reset(self) -> int:
        """Begin a new peak and new sums; returns the bytes that are live now."""
        self.peak, self.operations, self.moved = self.live, 0, 0
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for with nearly every operation
            return args[0].fake_device
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        for value in made:
            self._add(value.untyped_storage())
        packet = func.overloadpacket
        if packet in _OPERATIONS:
            self.operations += _OPERATIONS[packet](*args, **kwargs, out_val=out)
        elif not func.is_view and packet not in _NOTHING_MOVED:
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.moved += sum(value.numel() * value.element_size() for value in [*read, *made])
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # the object lives as long as the storage does
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        weakref.finalize(storage, self._drop, key, size).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products; keys may have fewer heads than queries."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    """Five products, of which one is computed again."""
    return 5 * _attention(query, key, value) // 2


_OPERATIONS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_NOTHING_MOVED = {
    _ATEN.detach, _ATEN.empty, _ATEN.empty_like, _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.empty_strided,
    _ATEN._unsafe_view, _ATEN.scalar_tensor,
}  # fmt: skip

_IN_FLOAT32 = {
    "exp", "log", "pow", "__pow__", "reciprocal", "rsqrt", "layer_norm", "rms_norm", "group_norm", "softmax", "sum",
    "norm", "cumsum",
}  # fmt: skip
"""What CUDA's autocast computes in float32 and a CPU's does not, as far as models call it."""


class _CudaTypes(TorchFunctionMode):
    """CUDA's types and kernels for functions that a CPU has others for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_float(value) for value in args)
            kwargs = {key: _float(value) for key, value in kwargs.items()}
        if func is Tensor.backward:  # what checkpointing computes again in it has these types too
            with self:  # the engine itself: its public doors would leave this mode again
                return _engine_run_backward(
                    (args[0],), (torch.ones_like(args[0]),), False, False, (), allow_unreachable=True,
                    accumulate_grad=True,
                )  # fmt: skip
        if name in ("__bool__", "item"):  # nobody knows a value; the libraries ask only to warn
            return name == "item" and 0
        if name == "numpy" and isinstance(args[0], Tensor):  # a picture leaves the device
            return np.zeros(args[0].shape, np.float32)
        if name == "rms_norm" and torch.overrides.is_tensor_like(args[0]):  # one kernel, where a CPU has seven
            return _ATEN._fused_rms_norm(*_rms_arguments(*args, **kwargs))[0]
        return func(*args, **kwargs)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _rms_arguments(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Any, ...]:
    return input, list(normalized_shape), weight, eps


def materialise(module: torch.nn.Module) -> None:
    """Give a module of the meta device fake CPU tensors in place; what is shared stays shared."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    held[name] = made.setdefault(id(value), _fake(value))


def _fake(value: Tensor) -> Tensor:
    fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    return torch.nn.Parameter(fake, value.requires_grad) if isinstance(value, torch.nn.Parameter) else fake
