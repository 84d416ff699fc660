"""The kinds of adapter: LoRA, DoRA and LoKr, as peft has them. What each is made of, and where it starts.

LoRA adds ``B A``. DoRA gives every output's weights a length of their own, which is trained beside ``B A``. LoKr adds a
Kronecker product of two small matrices. All start as the base: ``B``, or LoKr's first matrix, is zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any, Final

import torch
from peft import LoKrConfig, LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dopsd.config.groups import AdapterKind

_KEY: Final = re.compile(r"(?P<module>.+)\.(lora|lokr)_\w+(\.weight)?")
_ZERO: Final = ("lora_B", "lokr_w1", "lokr_w1_a")
SCALED: Final = (".lora_B.weight", ".lokr_w1", ".lokr_w1_a")
"""Which tensor of a layer carries a scale that is folded in."""
NAMES: Final[dict[str, str]] = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}
"""As people write them."""
MAGNITUDE: Final = "lora_magnitude_vector"
"""DoRA's lengths, which begin as those of the base's own weights."""


def config_of(kind: AdapterKind, rank: int, alpha: float, modules: Sequence[str]) -> Any:
    """peft's configuration of an adapter on exactly ``modules``."""
    if kind == "lokr":
        return LoKrConfig(r=rank, alpha=alpha, target_modules=list(modules), decompose_both=True)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules), use_dora=kind == "dora")


def leave_out_scale(layer: nn.Module) -> None:
    """Let a layer compute as peft has it, to the bit, but not multiply by a scale of 1: that is a pass over the layer's
    whole output, and one over its gradient."""
    if isinstance(layer, LoraLinear):
        layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer._disable_adapters:
        return type(layer).forward(layer, x, *args, **kwargs)
    name = layer._active_adapter[0]
    if len(layer._active_adapter) > 1 or name in layer.lora_variant or layer.scaling.get(name) != 1 or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    down, up = layer.lora_A[name], layer.lora_B[name]
    return (result + up(down(layer._cast_input_dtype(x, down.weight.dtype)))).to(result.dtype)


def carries(layer: nn.Module, name: str) -> bool:
    """Whether a layer has an adapter of that name."""
    return isinstance(layer, BaseTunerLayer) and any(True for _ in tensors_of(layer, name))


def tensors_of(layer: Any, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """What adapter ``name`` of a layer is made of, by the ends of their keys in an adapter file."""
    for part in layer.adapter_layer_names:
        held = getattr(layer, part, None)
        if held is None or name not in held:
            continue
        if isinstance(held[name], nn.Module):
            yield f"{part}.weight" if part != MAGNITUDE else part, held[name].weight
        else:
            yield part, held[name]


def module_of(key: str) -> str:
    """The layer that a key of an adapter file is about; the key itself where it is none."""
    found = _KEY.fullmatch(key)
    return found["module"] if found else key


def kind_of(keys: Sequence[str]) -> AdapterKind:
    """What an adapter file with these keys holds."""
    if any(".lokr_" in key for key in keys):
        return "lokr"
    return "dora" if any(key.endswith(f".{MAGNITUDE}") for key in keys) else "lora"


@torch.no_grad()
def start(key: str, parameter: Tensor, init: str, generator: torch.Generator) -> None:
    """Where a tensor of an adapter begins: uniform within ``1 / sqrt(fan in)`` (kaiming), or normal with deviation
    ``1 / rank`` (gaussian), as peft draws both; zero where the whole must be nothing at first. Drawn on the CPU:
    devices agree."""
    part = key.removesuffix(".weight").rpartition(".")[2]
    if part == MAGNITUDE:
        return
    if part in _ZERO:
        parameter.zero_()
        return
    drawn, bound = torch.empty(parameter.shape), parameter.shape[1] ** -0.5
    if init == "gaussian":
        parameter.copy_(drawn.normal_(std=1 / len(drawn), generator=generator))
    else:
        parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))
