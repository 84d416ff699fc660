"""What a student begins as, where that is not the base: trained weights of a file, put into it and its EMA teacher."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dopsd.config.groups import LoraSettings
from dopsd.distill.adapters import read_adapter
from dopsd.distill.kinds import NAMES, SCALED, kind_of, module_of
from dopsd.distill.pair import STUDENT, TEACHER, Pair
from dopsd.distill.targets import AdapterError
from dopsd.distill.weights import WeightPair, holds_weights


@torch.no_grad()
def begin_as(path: Path, pair: Pair, lora: LoraSettings) -> None:
    """Let student and teacher begin as what is in ``path``, a file as training leaves one or the folder of a
    transformer; what it leaves out begins as it would without. On the meta device it is checked alone.

    The strength that an adapter has in its file is kept: it is folded into the weights where ``lora`` has another
    alpha. Raises :class:`AdapterError`, one line with both values, where the file is not what ``pair`` trains.
    """
    full = isinstance(pair, WeightPair)
    if (path.is_dir() or holds_weights(path)) != full:
        what, tune = ("an adapter", "full") if full else ("weights", "adapter")
        raise AdapterError(f"it holds {what}, and train.tune is {tune}")
    own = pair.student()
    if full:
        shapes = _shapes_of(path)
        _check_names(shapes, own, "weights")
        for key, shape in shapes.items():
            _check_shape(key, shape, own[key])
        if any(value.is_meta for value in own.values()):
            return  # and tens of gigabytes need not be read
        found = {key: value for file in _files_of(path) for key, value in load_file(file).items()}
        _check_finite(found)
    else:
        found = _adapter(path, own, lora)
    begun = {key: found.get(key, value) for key, value in own.items()}
    pair.load_state_dict({f"{who}/{key}": value for who in (STUDENT, TEACHER) for key, value in begun.items()})


def _files_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _files_of(path):
        with safe_open(name, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def _adapter(path: Path, own: Mapping[str, Tensor], lora: LoraSettings) -> dict[str, Tensor]:
    """The file's tensors in the shapes and at the scale of ``own``."""
    tensors, rank, alpha = read_adapter(path)
    _check_finite(tensors)
    kind = kind_of(list(tensors))
    if kind != lora.kind:
        raise AdapterError(f"it is a {NAMES[kind]}, and train.lora.kind is {lora.kind}")
    if kind == "lora" and rank > lora.rank:
        raise AdapterError(f"it is of rank {rank}, and train.lora.rank is {lora.rank}; set it to {rank} or more")
    modules = {module_of(key) for key in tensors}
    _check_names(modules, map(module_of, own), "layers")
    scale = (alpha / rank) / ((lora.alpha or lora.rank) / lora.rank)
    found = {key: value.float() * scale if key.endswith(SCALED) else value.float() for key, value in tensors.items()}
    for module in modules if kind == "lora" else ():
        a, b = (f"{module}.lora_{half}.weight" for half in "AB")
        found[a], found[b] = _filled(found[a], found[b], own[a], own[b])
    for key, value in found.items():
        _check_shape(key, tuple(value.shape), own.get(key))
    return found


def _filled(a: Tensor, b: Tensor, own_a: Tensor, own_b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B at the rank of ``own``: directions that the file leaves out begin as any do, A drawn and B zero. Where
    both were zero nothing would ever be learnt."""
    if a.shape[1] != own_a.shape[1] or b.shape[0] != own_b.shape[0]:
        return a, b  # of another base, which is said
    used = a.any(dim=1) | b.any(dim=0)
    a, b = a[used], b[:, used]
    whole_a, whole_b = own_a.detach().float().clone(), torch.zeros_like(own_b, dtype=torch.float32)
    whole_a[: len(a)] = a.to(whole_a.device)
    whole_b[:, : len(a)] = b.to(whole_b.device)
    return whole_a, whole_b


def _check_names(names: Collection[str], own: Iterable[str], what: str) -> None:
    if extra := sorted(set(names) - set(own)):
        raise AdapterError(
            f"of its {len(names)} {what} {len(extra)} are none that train.lora.targets choose, such as "
            f"{extra[0]}; add them there"
        )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise AdapterError(f"{key} holds values that are no numbers (NaN or infinite)")


def _check_shape(key: str, shape: tuple[int, ...], own: Tensor | None) -> None:
    mine = tuple(own.shape) if own is not None else None
    if shape != mine:
        raise AdapterError(f"{key} is {shape}, and {mine} in what is trained; train.lora must be as it was for the "
                           "file, on the same base")  # fmt: skip
