"""A frozen base in fewer bits: the linear layers of its repeated blocks, by torchao (int8, fp8) or bitsandbytes (nf4).

Weights alone are small; activations, adapters and every product stay in the model's own dtype, so gradients through the
base are exactly those of its rounded weights. What is outside of the blocks (embeddings, the first and last layers,
norms) keeps its precision: it is a few per cent of the weights, and the most sensitive.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dopsd.config.groups import Quantization

from .folder import ModelError

_GROUP = 64
"""Weights that share a scale in nf4."""
_PACKAGES: dict[Quantization, str] = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def check_installed(kind: Quantization) -> None:
    """Raise :class:`ModelError` where the library that does it is not installed."""
    package = _PACKAGES.get(kind)
    if package is not None and find_spec(package) is None:
        raise ModelError(f"model.quantization: {kind} needs {package}; `pip install -e '.[quantization]'` brings it")


def quantize(block: nn.Module, kind: Quantization, device: torch.device) -> None:
    """Bring a block to ``device``, and store its linear layers' weights there in ``kind``."""
    block.to(device)
    if kind == "nf4":
        _to_nf4(block, device)
    elif kind != "none":
        _by_torchao(block, kind)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks that a model's class names, in the order of its modules: what is counted, rounded, divided,
    checkpointed and moved. FSDP puts a class of its own before a block's, so its ancestors are asked."""
    names = set(getattr(module, "_no_split_modules", None) or ())
    return [part for part in module.modules() if names & {kind.__name__ for kind in type(part).__mro__}]


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight is stored in another form than plain numbers."""
    return any(_packed(parameter) for parameter in module.parameters())


def _packed(parameter: nn.Parameter) -> bool:
    return type(parameter.data) is not torch.Tensor or hasattr(parameter, "quant_state")


def _by_torchao(block: nn.Module, kind: Quantization) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(block, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def _to_nf4(block: nn.Module, device: torch.device) -> None:
    """The scales are quantized once more, which takes 4.13 bits a weight in all. A layer that is no whole number of
    groups stays as it is; no published model has one."""
    from bitsandbytes.nn import Params4bit

    for linear in block.modules():
        if type(linear) is not nn.Linear or linear.weight.numel() % _GROUP:
            continue
        # as rows of one group: the library's CPU code garbles rows that are shorter than that
        weights = linear.weight.data.reshape(-1, _GROUP).cpu()
        packed: Any = Params4bit(weights, requires_grad=False, compress_statistics=True, quant_type="nf4")
        linear.weight = packed.to(device)  # this quantizes
        linear.forward = MethodType(_nf4_forward, linear)  # type: ignore[method-assign]


def _nf4_forward(self: Any, x: Tensor) -> Tensor:
    return _NF4Product.apply(x, self.weight, self.weight.quant_state, self.in_features, self.bias)


class _NF4Product(torch.autograd.Function):
    """``x W + b`` with the weights unpacked for the moment. bitsandbytes' own product holds on to the packed ones from
    the forward to the backward pass, past checkpointing: blocks that wait in host memory would all stay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: Any, width: int, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state, ctx.width = state, width
        weight = _unpacked(packed, state, width, x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (packed,), grad = ctx.saved_tensors, grads[0]
        return grad @ _unpacked(packed, ctx.state, ctx.width, grad.dtype), None, None, None, None


def _unpacked(packed: Tensor, state: Any, width: int, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, state).view(-1, width).to(dtype)


assert set(_PACKAGES) | {"none"} == set(get_args(Quantization))
