"""What was given away, brought back to the form that training leaves: our exports, and plain LoRAs with such names.

Taken are the file for diffusers, the one for ComfyUI, the folder of an export, and a transformer as diffusers saves
one. Which rows of ComfyUI's layers are whose is asked of the family itself, by what it writes for each layer alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dopsd.distill.kinds import kind_of, module_of
from dopsd.distill.targets import AdapterError, linear_layers
from dopsd.distill.weights import FORMAT
from dopsd.export import DIFFUSERS_FILE, WEIGHTS
from dopsd.files import write_tensors
from dopsd.models.base import Family
from dopsd.models.folder import ModelError, Source, tensors_of
from dopsd.models.lora_files import LoraFileError

_TRAINED: Final = "dopsd-lora"
_DIFFUSERS, _COMFYUI = "transformer.", "diffusion_model."
_HALF: Final = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<a>A|down)|lora_(?P<b>B|up))\.weight")
_FOREIGN: Final = {"lokr_": "a LoKr", "hada_": "a LoHa", "oft_": "an OFT", "dora_scale": "a DoRA"}


def find_given(path: Path) -> Path:
    """The file, or folder of a transformer, that a person means by ``path``. Raises :class:`AdapterError`."""
    if path.is_dir():
        for found in (path / DIFFUSERS_FILE, path / WEIGHTS):
            if found.exists():
                return found
        if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
            return path
        raise AdapterError(
            f"{path}: neither an export nor a transformer; give a .safetensors file, or runs/NAME/export"
        )
    if not path.is_file():
        raise AdapterError(f"{path}: no such adapter; trained ones are in runs/*/adapters")
    if path.suffix != ".safetensors":
        raise AdapterError(
            f"{path}: only .safetensors is read; a {path.suffix or 'file'} can run code when it is opened"
        )
    return path


def check_transformer(folder: Path, transformer: nn.Module) -> None:
    """Raise :class:`AdapterError` unless the folder of a transformer is whole and of this base; no value is read."""
    shapes = {name: shape for shard in _shards(folder) for name, shape in _read_header(shard).shapes.items()}
    _check_weights(folder, shapes, transformer)


def as_trained(path: Path, out: Path, transformer: nn.Module, family: type[Family]) -> Path:
    """``path`` itself where training left it, or ``out``, written from it.

    ``transformer``: the base's, which may be without values (on the meta device). Raises :class:`AdapterError` for what
    cannot be taken, or is of another base; all of it by names and shapes, before a value is read.
    """
    if path.is_dir():
        check_transformer(path, transformer)
        return read_export(path, out)
    header = _read_header(path)
    if header.metadata.get("format") == FORMAT:
        _check_weights(path, header.shapes, transformer)
        return path
    if header.metadata.get("format") == _TRAINED:
        _check_rank(path, header, _scale_of(path, header.metadata, "rank", "alpha")[0])
        _check_layers(path, header.shapes, transformer)
        return path
    if all(key.startswith(_DIFFUSERS) for key in header.shapes) and _of_peft(path, header):
        if config := _config_of(path, header):
            _check_rank(path, header, int(config["transformer.r"]))
        _check_layers(path, {k.removeprefix(_DIFFUSERS): shape for k, shape in header.shapes.items()}, transformer)
        return read_export(path, out)
    _refuse_foreign(path, header.shapes)
    _write_plain(path, out, transformer, family)
    return out


def read_export(path: Path, out: Path) -> Path:
    """Write the adapter in a file for diffusers, or the weights in a folder of a transformer, to ``out``, in the form
    that training leaves; returns ``out``.

    A bfloat16 file gives the rounded adapter, which is the one that was given away.
    """
    if path.is_dir():
        tensors = {key: value for shard in _shards(path) for key, value in load_file(shard).items()}
        write_tensors(out, tensors, {"format": FORMAT})
        return out
    header = _read_header(path)
    tensors = {key.removeprefix(_DIFFUSERS): value.float() for key, value in load_file(path).items()}
    if kind_of(list(tensors)) == "lokr":
        rank = _lokr_rank(tensors)
        alpha = float(rank)
    else:
        rank, alpha = _scale_of(path, _config_of(path, header), "transformer.r", "transformer.lora_alpha")
    write_tensors(out, tensors, {"format": _TRAINED, "rank": str(rank), "alpha": repr(alpha)})
    return out


@dataclass(frozen=True)
class _Header:
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def _read_header(path: Path) -> _Header:
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            header = _Header(file.metadata() or {}, {key: tuple(file.get_slice(key).get_shape()) for key in keys})
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({error}); fetch or export it again") from None
    if not header.shapes:
        raise AdapterError(f"{path}: there is no tensor in it; export it again")
    return header


def _scale_of(path: Path, values: Mapping[str, Any], rank: str, alpha: str) -> tuple[int, float]:
    """Rank and alpha that a header says. Raises :class:`AdapterError` where they are none."""
    try:
        found = int(values[rank]), float(values[alpha])
        if found[0] > 0 and isfinite(found[1]):
            return found
    except (KeyError, TypeError, ValueError):
        pass
    raise AdapterError(f"{path}: its header has no rank and alpha ({rank}, {alpha}); export it again")


def _check_rank(path: Path, header: _Header, rank: int) -> None:
    for key, shape in header.shapes.items():
        if key.endswith(".lora_A.weight") and shape[:1] != (rank,):
            raise AdapterError(f"{path}: its header says rank {rank}, and {key} is {_size(shape)}; export it again")


def _config_of(path: Path, header: _Header) -> dict[str, Any]:
    """What diffusers writes into the header of a LoRA; empty where there is nothing."""
    text = header.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: its header's lora_adapter_metadata cannot be read; export it again")
    _scale_of(path, config, "transformer.r", "transformer.lora_alpha")
    return config


def _shards(folder: Path) -> list[Path]:
    """The files of a transformer. Raises :class:`AdapterError` unless they are all there and whole."""
    try:
        tensors_of(Source(folder), "", shown=str(folder))
    except ModelError as error:
        raise AdapterError(str(error)) from None
    return sorted(folder.glob("*.safetensors"))


# --- does it fit? -----------------------------------------------------------------------------------------------------


def _check_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], transformer: nn.Module) -> None:
    own = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    for name, shape in shapes.items():
        if own.get(name) != shape:
            raise _misfit(path, name, shape, own.get(name))


def _check_layers(path: Path, shapes: Mapping[str, tuple[int, ...]], transformer: nn.Module) -> None:
    """Of each layer of an adapter the shape of its product."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        module = module_of(key)
        parts.setdefault(module, {})[key.removeprefix(f"{module}.").removesuffix(".weight")] = shape
    layers = _linear(transformer)
    for module, have in parts.items():
        own = tuple(layers[module].weight.shape) if module in layers else None
        if own != _product(have):
            raise _misfit(path, module, _product(have), own)


def _product(have: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """(out, in) of the change that these parts make; nothing where one is missing."""
    try:
        if "lora_A" in have or "lora_B" in have:
            (out, rank), (other, inner) = have["lora_B"], have["lora_A"]
            return (out, inner) if rank == other else ()
        sides = [[have.get(f"lokr_w{n}") or (have[f"lokr_w{n}_a"][0], have[f"lokr_w{n}_b"][1])] for n in (1, 2)]
        return tuple(prod(side[0][axis] for side in sides) for axis in (0, 1))
    except (KeyError, IndexError, ValueError):
        return ()


def _misfit(path: Path, name: str, shape: tuple[int, ...], own: tuple[int, ...] | None) -> AdapterError:
    has = f"{_size(own)} there" if own else "no such layer"
    return AdapterError(f"{path}: {name} is {_size(shape)}, and the base has {has}; it was made for another base")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "incomplete"


def _of_peft(path: Path, header: _Header) -> bool:
    """Whether diffusers wrote it with its scale in the header, or it is a LoKr under the names that peft has."""
    if config := _config_of(path, header):
        for name in ("rank_pattern", "alpha_pattern", "use_rslora"):
            if config.get(_DIFFUSERS + name):
                raise AdapterError(f"{path}: its layers differ in scale ({name}); only one scale for all is read")
        return True
    return all(".lokr_" in key and module_of(key) != key for key in header.shapes)


def _refuse_foreign(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        for sign, what in _FOREIGN.items():
            if sign in key:
                raise AdapterError(
                    f"{path}: {what} of another tool ({key}); plain LoRAs of others, and our own, are read"
                )
    odd = [key for key in keys if not key.startswith((_DIFFUSERS, _COMFYUI)) or not key.endswith((".weight", ".alpha"))]
    if odd or not list(keys):
        raise AdapterError(
            f"{path}: {odd[0] if odd else 'empty'} is no name of diffusers' or ComfyUI's; export it again"
        )


def _linear(transformer: nn.Module) -> dict[str, Any]:
    return {name: transformer.get_submodule(name) for name in linear_layers(transformer)}


def _lokr_rank(tensors: Mapping[str, Tensor]) -> int:
    """peft keeps a factor whole where the rank is large for it: any such rank gives the same shapes."""
    ranks = {value.shape[1] for key, value in tensors.items() if key.endswith("_a")}
    return ranks.pop() if ranks else max(side for value in tensors.values() for side in value.shape)


# --- plain LoRA under diffusers' or ComfyUI's names -------------------------------------------------------------------


def _write_plain(path: Path, out: Path, transformer: nn.Module, family: type[Family]) -> None:
    """Each layer's B and A of one rank, the scale in B. A part of a fused layer keeps the columns that it uses."""
    layers, tensors = _linear(transformer), load_file(path)
    places = _places(layers, family)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (a, b) in _halves(path, tensors).items():
        short = name.removeprefix(_DIFFUSERS).removeprefix(_COMFYUI)
        owners = {short: None} if short in layers else places.get(name, {})
        if not owners:
            raise AdapterError(f"{path}: the base has no layer {short}; it was made for another base")
        for module, rows in owners.items():
            own = b if rows is None or rows.max() >= len(b) else b[rows]
            shape = (len(own), a.shape[1])
            if shape != tuple(layers[module].weight.shape):
                raise _misfit(path, short, shape, tuple(layers[module].weight.shape))
            used = own.any(dim=0)
            if used.any():
                found[module] = a[used], own[:, used]
    if not found:
        raise AdapterError(f"{path}: all of it is zero; there is nothing to apply")
    rank = max(len(a) for a, _ in found.values())
    adapter = {}
    for module, (a, b) in found.items():
        adapter[f"{module}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, rank - len(a)))
        adapter[f"{module}.lora_B.weight"] = nn.functional.pad(b, (0, rank - len(a)))
    write_tensors(out, adapter, {"format": _TRAINED, "rank": str(rank), "alpha": repr(float(rank))})


def _halves(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the layers' names in the file, with ``alpha / rank`` in B."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := _HALF.fullmatch(key):
            halves.setdefault(match["layer"], {})["A" if match["a"] else "B"] = value.float()
        elif not key.endswith(".alpha"):
            raise AdapterError(f"{path}: {key} is no part of a plain LoRA; the rest would be something else without it")
    for layer, pair in halves.items():
        if len(pair) < 2:
            raise AdapterError(f"{path}: {layer} has one half of a LoRA alone; fetch or export it again")
        if pair["A"].ndim != 2 or pair["B"].ndim != 2 or len(pair["A"]) != pair["B"].shape[1]:
            sizes = f"{_size(tuple(pair['B'].shape))} and {_size(tuple(pair['A'].shape))}"
            raise AdapterError(f"{path}: {layer} is {sizes}, which are no two halves of a LoRA of a linear layer")
        if (alpha := tensors.get(f"{layer}.alpha")) is not None:
            if alpha.numel() != 1:
                raise AdapterError(f"{path}: {layer}.alpha is no single number")
            pair["B"] = pair["B"] * (float(alpha) / len(pair["A"]))
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}


def _places(layers: Mapping[str, Any], family: type[Family]) -> dict[str, dict[str, Tensor]]:
    """ComfyUI's layers, by their names in a file: the modules in each, and which of its rows are theirs, in order."""
    places: dict[str, dict[str, Tensor]] = {}
    for module, layer in layers.items():
        numbers = torch.arange(1.0, layer.weight.shape[0] + 1, dtype=torch.float64)[:, None]
        alone = {f"{module}.lora_A.weight": torch.ones(1, 1), f"{module}.lora_B.weight": numbers}
        try:
            written = family.comfyui_lora(alone, 1)
        except LoraFileError:  # it has no place there
            continue
        ((key, b),) = ((key, b) for key, b in written.items() if key.endswith(".lora_B.weight"))
        rows = torch.argsort(b[:, 0])[-len(numbers) :]  # zero elsewhere
        places.setdefault(key.removesuffix(".lora_B.weight"), {})[module] = rows
    return places
