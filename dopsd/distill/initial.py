"""What a student begins as, where that is not the base: trained weights of a file, put into it and its EMA teacher.

Four forms: an adapter or weights as training leaves them, an adapter as diffusers keeps it (``transformer.`` names),
and as ComfyUI does (``diffusion_model.`` names, which differ from family to family). The strength that a file has is
kept: its alpha is folded into the weights where the settings have another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dopsd.config import LoraSettings, TrainSettings
from dopsd.distill.kinds import SCALED, kind_of, module_of
from dopsd.distill.pair import STUDENT, TEACHER, Pair
from dopsd.distill.targets import AdapterError
from dopsd.distill.weights import FORMAT
from dopsd.models.lora_files import LoraFileError, Writer, from_comfyui

Form = Literal["trained", "weights", "diffusers", "comfyui"]
_PREFIX: Final[Mapping[Form, str]] = {"diffusers": "transformer.", "comfyui": "diffusion_model."}


def check_initial(path: Path, settings: TrainSettings) -> None:
    """Raise :class:`AdapterError`, one line with both values, where the file cannot be what these settings begin with.
    Its header alone is read; whether it is for the same layers of the same base, :func:`begin_as` sees."""
    try:
        with safe_open(path, framework="pt") as file:
            header, shapes = file.metadata() or {}, {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise _fault(path, "there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise _fault(path, f"not a readable safetensors file ({error})") from None
    form = _form_of(path, header, shapes)
    if (form == "weights") != (settings.tune == "full"):
        held = "weights" if form == "weights" else "an adapter"
        raise _fault(path, f"holds {held}, and train.tune is {settings.tune}")
    if form == "weights":
        return
    kind, lora = kind_of(list(shapes)), settings.lora
    if kind != lora.kind:
        raise _fault(path, f"is a {kind}, and train.lora.kind is {lora.kind}")
    rows = {shape[0] for key, shape in shapes.items() if key.endswith(".lora_A.weight")}
    if not rows and kind != "lokr":
        raise _fault(path, f"there is no .lora_A.weight in it, but {sorted(shapes)[:1]}")
    ranks = {int(header["rank"])} if form == "trained" else {min(rows)} if form == "comfyui" else rows
    if form == "comfyui" and ranks <= {2 * lora.rank, 3 * lora.rank}:  # of several layers that are one there
        return
    if ranks and ranks != {lora.rank}:
        raise _fault(path, f"is of rank {' and '.join(map(str, sorted(ranks)))}, and train.lora.rank is {lora.rank}")


def begin_as(path: Path, pair: Pair, settings: TrainSettings, write: Writer) -> None:
    """Let student and teacher begin as what is in the file. ``write``: the family's ``comfyui_lora``.

    Raises :class:`AdapterError`, one line with both values, where it does not fit what the settings train.
    """
    check_initial(path, settings)
    own = {key.removeprefix(f"{STUDENT}/"): v for key, v in pair.state_dict().items() if key.startswith(f"{STUDENT}/")}
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    form = _form_of(path, header, tensors)
    if form == "comfyui":
        try:
            tensors = from_comfyui(tensors, own, settings.lora.rank, write)
        except LoraFileError as error:
            raise _fault(path, str(error)) from None
    if form == "diffusers":
        tensors = _diffusers(path, header, tensors)
    if form == "trained":
        tensors = _times(tensors, float(header["alpha"]) / int(header["rank"]))
    _check_fits(path, tensors, own, "weights" if form == "weights" else "layers")
    if form != "weights":
        tensors = _times(tensors, 1 / _scale(settings.lora))
    pair.load_state_dict(
        {f"{who}/{key}": value.float() for who in (STUDENT, TEACHER) for key, value in tensors.items()}
    )


def _form_of(path: Path, header: Mapping[str, str], keys: Iterable[str]) -> Form:
    if header.get("format") == FORMAT:
        return "weights"
    if header.get("format") == "dopsd-lora":
        return "trained"
    for form, prefix in _PREFIX.items():
        if strange := [key for key in keys if not key.startswith(prefix)]:
            continue
        return form
    raise _fault(path, f"{strange[0]}: neither our name of a tensor nor diffusers' (transformer. ...) nor ComfyUI's "
                       "(diffusion_model. ...)")  # fmt: skip


def _diffusers(path: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under our names, the strength folded in: alpha in the header, in tensors of its own, or as the rank."""
    config: dict[str, Any] = json.loads(header.get("lora_adapter_metadata", "{}"))
    if config.get("transformer.alpha_pattern") or config.get("transformer.rank_pattern"):
        raise _fault(path, "its layers have ranks or alphas of their own, and train.lora has one of each")
    named = {key.removeprefix(_PREFIX["diffusers"]): value for key, value in tensors.items()}
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in named.items() if key.endswith(".alpha")}
    scale = config["transformer.lora_alpha"] / config["transformer.r"] if config else 1.0
    return {
        key: next(iter(_times({key: value}, _own(alphas, key, value, scale)).values()))
        for key, value in named.items()
        if not key.endswith(".alpha")
    }


def _own(alphas: Mapping[str, float], key: str, value: Tensor, scale: float) -> float:
    module = module_of(key)
    return alphas[module] / value.shape[1] if module in alphas and key.endswith(SCALED) else scale


def _times(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    if scale == 1:
        return dict(tensors)
    return {key: value.float() * scale if key.endswith(SCALED) else value for key, value in tensors.items()}


def _scale(lora: LoraSettings) -> float:
    return (lora.alpha or lora.rank) / lora.rank


def _check_fits(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    mine, theirs = ({module_of(key) for key in keys} for keys in (tensors, own))
    if mine != theirs:
        lost = sorted(mine ^ theirs)[0]
        raise _fault(path, f"it has {len(mine)} {what}, and train.lora.targets choose {len(theirs)}: {lost} is "
                           f"{'in the file' if lost in mine else 'trained'} alone")  # fmt: skip
    for key in sorted({*tensors, *own}):
        shapes = [tuple(tensors[key].shape) if key in tensors else None for tensors in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise _fault(path, f"{key} is {shapes[0]}, and {shapes[1]} in what is trained; is it for another base?")


def _fault(path: Path, what: str) -> AdapterError:
    return AdapterError(f"train.init_from: {path}: {what}")
