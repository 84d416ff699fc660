"""Student and teacher as two LoRA adapters on one transformer: exact names, one place that switches, float32 EMA.

Parameters are found through the layers that carry them, by exact adapter name, never by a substring of theirs.
Adapter files are safetensors keyed ``<module>.lora_A.weight`` / ``<module>.lora_B.weight`` (other kinds: their own
names, :mod:`dopsd.distill.kinds`) with a header of text values (``rank``, ``alpha``, ``targets``);
:mod:`dopsd.export` turns them into what diffusers and ComfyUI load.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dopsd.config.groups import LoraSettings
from dopsd.distill.kinds import carries, config_of, kind_of, leave_out_scale, module_of, start, tensors_of
from dopsd.distill.pair import STUDENT, TEACHER, Pair, Selection, TeacherKind
from dopsd.distill.targets import AdapterError, linear_layers, match_targets
from dopsd.distill.weights import holds_weights, weights_applied
from dopsd.files import write_tensors

_APPLIED: Final = "applied"

_log = logging.getLogger(__name__)


def adapted_layers(transformer: nn.Module, name: str) -> dict[str, Any]:
    """The layers that carry adapter ``name`` (peft's), by module path, in a fixed order."""
    return dict(sorted((path, module) for path, module in transformer.named_modules() if carries(module, name)))


def adapter_parameters(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of adapter ``name`` alone, keyed as in an adapter file, in a fixed order."""
    return {
        f"{path}.{part}": tensor
        for path, layer in adapted_layers(transformer, name).items()
        for part, tensor in tensors_of(layer, name)
    }


# --- student and teacher ----------------------------------------------------------------------------------------------


class AdapterPair(Pair):
    """The two adapters of a run on one transformer, and the only place that switches between them.

    ``kind`` says who the teacher is: ``ema``, a second adapter that follows the student (its master copy is float32
    whatever the adapters' dtype is, because at m = .9999 a bfloat16 average stands still); ``frozen``, the base without
    adapter; ``copy``, the student's own weights.
    """

    def __init__(self, transformer: nn.Module, kind: TeacherKind, matched: Mapping[str, tuple[str, ...]]) -> None:
        self.transformer, self.kind, self.matched = transformer, kind, dict(matched)
        self._layers = list(adapted_layers(transformer, STUDENT).values())
        self._student = adapter_parameters(transformer, STUDENT)
        self._live = adapter_parameters(transformer, TEACHER)
        # a float32 teacher is its own master copy; any other dtype gets one beside it
        self._master = {key: value.data.float() for key, value in self._live.items()}
        plain = kind_of(list(self._student)) == "lora"
        self._merged = _Merged(transformer) if self._live and plain and _merges(transformer) else None
        self._follow()
        self.selected: Selection = None
        self._activate(STUDENT)

    def _activate(self, name: Selection) -> None:
        if name == TEACHER and not self._live:
            raise AdapterError(f"there is no teacher adapter: the teacher is {self.kind!r}")
        if name == self.selected:
            return
        self.selected = name
        active = name
        if self._merged is not None:
            self._merged.use(name == TEACHER)
            active = None if name == TEACHER else name
        # what peft's enable_adapters and set_adapter come to, without their walk through every parameter, which takes
        # 80 times as long (docs/benchmarks.md); peft would make whatever it activates trainable: only the student is
        for layer in self._layers:
            layer._disable_adapters = active is None
            if active is not None:
                layer._active_adapter = [active]
        for parameter in self._student.values():
            parameter.requires_grad = active == STUDENT

    def student(self) -> Mapping[str, Tensor]:
        """As :meth:`Pair.student`."""
        return self._student

    def student_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets, in a fixed order."""
        return list(self._student.values())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """``teacher <- decay * teacher + (1 - decay) * student`` in float32; nothing to do for the other kinds."""
        for key, live in self._live.items():
            master = self._master[key]
            master.lerp_(self._student[key].float(), 1.0 - decay)
            if live.data_ptr() != master.data_ptr():
                live.copy_(master)
        self._follow()

    def _follow(self) -> None:
        if self._merged is not None:
            self._merged.follow()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU of everything that training changes here: ``student/...``, and ``teacher/...`` in float32.

        Each is copied straight from its device, where nothing is held twice.
        """
        state = {f"{STUDENT}/{key}": value.detach().to("cpu", copy=True) for key, value in self._student.items()}
        return state | {f"{TEACHER}/{key}": value.to("cpu", copy=True) for key, value in self._master.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave; a missing tensor is a ``KeyError``."""
        for key, value in self._student.items():
            value.copy_(state[f"{STUDENT}/{key}"])
        for key, live in self._live.items():
            self._master[key].copy_(state[f"{TEACHER}/{key}"])
            live.copy_(self._master[key])
        self._follow()

    def remove(self) -> None:
        """Give the transformer back as it was, without adapters."""
        if self._merged is not None:
            self._merged.use(False)
        remove_adapters(self.transformer, (STUDENT, TEACHER))


_MERGED_PARAMETERS = 200_000_000
"""Up to this size the teacher's adapter is also kept merged: above, a second copy of the weights costs too much."""


def _merges(transformer: nn.Module) -> bool:
    parameters = list(transformer.parameters())
    if getattr(transformer, "borrowed_weights", False):  # what a layer holds, it holds while it computes
        return False
    # in bfloat16 the teacher's small steps would be lost in the sum
    exact = all(type(p.data) is Tensor and p.dtype == torch.float32 for p in parameters)
    return exact and sum(p.numel() for p in parameters) <= _MERGED_PARAMETERS


class _Merged:
    """The teacher as plain weights, ``W + scale B A``: its forwards, without gradient, skip the adapter's products.

    The base's own weights are kept as they are, bit for bit, and are what the layers hold unless :meth:`use` says.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._merged = False
        self._parts = [
            (layer, weight, weight.data, weight.data.clone())
            for layer in adapted_layers(transformer, TEACHER).values()
            for weight in (layer.get_base_layer().weight,)
        ]

    @torch.no_grad()
    def follow(self) -> None:
        """Add up anew, after the teacher changed."""
        for layer, _, base, total in self._parts:
            a, b = layer.lora_A[TEACHER].weight, layer.lora_B[TEACHER].weight
            torch.addmm(base, b, a, alpha=layer.scaling[TEACHER], out=total)

    def use(self, merged: bool) -> None:
        """Let the layers hold the sums, or the base's own weights."""
        if merged != self._merged:
            self._merged = merged
            for _, weight, base, total in self._parts:
                weight.data = total if merged else base


def add_adapters(
    transformer: nn.Module,
    settings: LoraSettings,
    default_targets: Sequence[str],
    seed: int,
    kind: TeacherKind = "ema",
    dtype: torch.dtype = torch.float32,
) -> AdapterPair:
    """Freeze the transformer and add ``student`` (and ``teacher`` for an EMA), equal to each other and to the base.

    ``settings.targets`` or else ``default_targets`` say where; how many layers each pattern matched is logged and kept
    as ``matched``. The start is drawn from ``seed`` alone, so that every method starts from the same adapter.
    """
    matched = match_targets(transformer, settings.targets if settings.targets is not None else default_targets)
    for pattern, names in matched.items():
        _log.info("LoRA target %s matches %d layers", pattern, len(names))
    modules = sorted({name for names in matched.values() for name in names})
    for name in (TEACHER, STUDENT) if kind == "ema" else (STUDENT,):
        config = config_of(settings.kind, settings.rank, settings.alpha or settings.rank, modules)
        _inject(transformer, name, config, dtype)
        _initialise(transformer, name, seed, settings.init)
    return AdapterPair(transformer, kind, matched)


def _inject(transformer: nn.Module, name: str, config: Any, dtype: torch.dtype) -> None:
    """Add an adapter on exactly the configuration's modules, all else frozen; its values are whatever peft draws,
    without touching the global RNG."""
    model: Any = transformer  # diffusers' PeftAdapterMixin, too
    modules = config.target_modules
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # two adapters on one model is what is wanted here
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # we merge nothing there
        model.add_adapter(config, adapter_name=name)
    layers = adapted_layers(transformer, name)
    if set(layers) != set(modules):
        raise AdapterError(
            f"adapter {name!r}: peft adapted {sorted(set(layers) ^ set(modules))[:5]} where the list of targets says "
            "otherwise; give lora.targets that name layers unambiguously"
        )
    for parameter in adapter_parameters(transformer, name).values():
        # the layer below may wait in host memory; what is trained does not
        parameter.data = parameter.data.to(model.device, dtype)
        parameter.requires_grad_(False)
    for layer in layers.values():
        leave_out_scale(layer)
        # peft raises every input to the adapter's float32, and the autocast that such a base always runs in
        # (Family.velocity) brings it back to bfloat16: the same bits, for nothing. The model says which it is: a
        # layer's own weights may be packed in bytes
        layer.cast_input_dtype_enabled = not (dtype == torch.float32 and model.dtype == torch.bfloat16)


def _initialise(transformer: nn.Module, name: str, seed: int, init: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in adapter_parameters(transformer, name).items():
        start(key, parameter, init, generator)


def remove_adapters(transformer: nn.Module, names: Sequence[str]) -> None:
    """Remove these adapters; with the last one the layers' wrappers go too. An absent adapter is nothing to do."""
    model: Any = transformer
    present = set(getattr(transformer, "peft_config", None) or {})
    if not present & set(names):
        return
    if present <= set(names):
        model.unload_lora()
    else:
        model.delete_adapters(sorted(present & set(names)))


# --- files ------------------------------------------------------------------------------------------------------------


def save_adapter(path: Path, transformer: nn.Module, name: str, settings: LoraSettings) -> Path:
    """Write adapter ``name`` to ``path`` (safetensors), whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter_parameters(transformer, name).items()}
    if not tensors:
        raise AdapterError(f"{path}: the transformer has no adapter {name!r} to save")
    modules = sorted(set(map(module_of, tensors)))
    header = {
        "format": "dopsd-lora",
        "rank": str(settings.rank),
        "alpha": repr(float(settings.alpha or settings.rank)),
        "targets": json.dumps(modules),
    }
    write_tensors(path, tensors, header)
    return path


def read_adapter(path: Path) -> tuple[dict[str, Tensor], int, float]:
    """``(tensors, rank, alpha)`` of an adapter file; :class:`AdapterError` where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such adapter; train first") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file ({error}); train again") from None
    if not tensors:
        raise AdapterError(f"{path}: there is no tensor in it; train again")
    try:
        return tensors, int(header["rank"]), float(header["alpha"])
    except (KeyError, ValueError):
        raise AdapterError(f"{path}: no rank and alpha in its header; it was not written by dopsd") from None


def load_adapter(transformer: nn.Module, path: Path, name: str) -> None:
    """Add the adapter of a file as ``name``, frozen and active. Raises where it does not fit the transformer."""
    tensors, rank, alpha = read_adapter(path)
    modules = sorted(set(map(module_of, tensors)))
    unknown = set(modules) - set(linear_layers(transformer))
    if unknown:
        raise AdapterError(f"{path}: the transformer has no linear layer {sorted(unknown)[0]!r}; wrong base model?")
    _inject(
        transformer, name, config_of(kind_of(list(tensors)), rank, alpha, modules), next(iter(tensors.values())).dtype
    )
    parameters = adapter_parameters(transformer, name)
    faults = [key for key, value in parameters.items() if key not in tensors or tensors[key].shape != value.shape]
    if faults or len(parameters) != len(tensors):
        remove_adapters(transformer, (name,))
        raise AdapterError(f"{path}: {(faults or sorted(set(tensors) - set(parameters)))[0]} does not fit the base")
    with torch.no_grad():
        for key, value in parameters.items():
            value.copy_(tensors[key])


@contextmanager
def adapter_applied(transformer: nn.Module, path: Path | None) -> Iterator[None]:
    """The transformer with the adapter, or the trained weights, of a file inside the block, and as it was after;
    ``None`` is the base as it is."""
    if path is None:
        yield
        return
    if holds_weights(path):
        with weights_applied(transformer, path):
            yield
        return
    load_adapter(transformer, path, _APPLIED)
    try:
        yield
    finally:
        remove_adapters(transformer, (_APPLIED,))
