"""Full fine-tuning: the transformer's own weights are trained, and base and teacher are other weights for its places.

A place is where a module holds a parameter; whoever is selected has his own there. The student is float32, however the
base is stored: autocast makes of it what the device multiplies with (``Family.velocity``). The teacher is its float32
average. The base's parameters are kept as they are, the same objects, and come back to their places in the end.

A file of trained weights is safetensors keyed as the transformer names its parameters, each in the type that the base
has it in: beside a bfloat16 base that is half of float32, and what is evaluated is what is given away, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dopsd.distill.pair import STUDENT, TEACHER, Pair, Selection, TeacherKind
from dopsd.distill.targets import AdapterError, match_targets
from dopsd.files import write_tensors
from dopsd.models.quantized import blocks_of, is_quantized

FORMAT: Final = "dopsd-full"
ALL: Final = "all"
"""In ``matched``, where no pattern chooses."""
Waiting = Literal["device", "cpu"]


@dataclass(frozen=True)
class _Places:
    """Everywhere that one parameter is held: shared ones in several places."""

    held: tuple[tuple[nn.Module, str], ...]

    def put(self, parameter: nn.Parameter) -> None:
        for module, leaf in self.held:
            module._parameters[leaf] = parameter

    @property
    def parameter(self) -> nn.Parameter:
        module, leaf = self.held[0]
        found = module._parameters[leaf]
        assert found is not None
        return found


def _places_of(transformer: nn.Module) -> dict[str, _Places]:
    """All parameters by name (a shared one by its first), in the transformer's own order."""
    names: dict[int, str] = {}
    held: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in transformer.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names.setdefault(id(parameter), f"{path}.{leaf}" if path else leaf)
            held.setdefault(name, []).append((module, leaf))
    return {name: _Places(tuple(places)) for name, places in held.items()}


def train_weights(
    transformer: nn.Module, targets: Sequence[str] | None, kind: TeacherKind = "ema", waiting: Waiting = "device"
) -> WeightPair:
    """Make the transformer's weights the student: all of them, or those of the linear layers that ``targets`` match.

    ``waiting``: where base and teacher are while they do not answer. Raises :class:`AdapterError` for a pattern that
    matches nothing, and for weights that are not plain numbers on the device.
    """
    _check_plain(transformer, "train.tune: full trains")
    return WeightPair(transformer, kind, matched_weights(transformer, targets), waiting)


def matched_weights(transformer: nn.Module, targets: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """What :func:`train_weights` trains: pattern to the linear layers that it matches, or the names of all weights."""
    return {ALL: tuple(_places_of(transformer))} if targets is None else match_targets(transformer, targets)


def _check_plain(transformer: nn.Module, what: str) -> None:
    if is_quantized(transformer) or getattr(transformer, "borrowed_weights", False):
        raise AdapterError(f"{what} plain weights: set model.quantization to none, model.offload to none or model, and "
                           "compute.sharded to false")  # fmt: skip


class WeightPair(Pair):
    """The student, in the transformer's own places, and its teacher.

    ``ema`` has second weights, float32, because at m = .9999 a bfloat16 average stands still.
    """

    def __init__(
        self, transformer: nn.Module, kind: TeacherKind, matched: Mapping[str, tuple[str, ...]],
        waiting: Waiting = "device",
    ) -> None:  # fmt: skip
        self.transformer, self.kind, self.matched = transformer, kind, dict(matched)
        chosen = {name for names in matched.values() for name in names}
        self._places = {
            name: places
            for name, places in _places_of(transformer).items()
            if name in chosen or name.rpartition(".")[0] in chosen
        }
        self._base: dict[str, nn.Parameter] = {}
        self._student: dict[str, nn.Parameter] = {}
        self._teacher: dict[str, nn.Parameter] = {}
        for name, places in self._places.items():
            base = self._base[name] = places.parameter
            self._student[name] = nn.Parameter(base.detach().to(torch.float32, copy=True))
            if kind == "ema":
                self._teacher[name] = _waits(self._student[name].detach(), waiting, copy=True)
            if waiting == "cpu":
                base.data = _waits(base.detach(), waiting).data
        devices = {name: student.device for name, student in self._student.items()}
        self._visits = _Visits(transformer, self._places, devices) if waiting == "cpu" else None
        self.selected: Selection = None
        self._activate(STUDENT)

    def _activate(self, name: Selection) -> None:
        if name == TEACHER and not self._teacher:
            raise AdapterError(f"there are no weights of a teacher: the teacher is {self.kind!r}")
        if name == self.selected:
            return
        self.selected = name
        weights = {STUDENT: self._student, TEACHER: self._teacher, None: self._base}[name]
        for key, places in self._places.items():
            places.put(weights[key])
        if self._visits is not None:
            self._visits.of({} if name == STUDENT else weights)

    @contextmanager
    def select(self, name: Selection) -> Iterator[None]:
        """As :meth:`Pair.select`. Inside, autocast keeps no weights: it would hold all of them in bfloat16 to the
        end of a forward, past checkpointing."""
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with super().select(name):
                yield
        finally:
            torch.set_autocast_cache_enabled(before)

    def student(self) -> Mapping[str, Tensor]:
        """As :meth:`Pair.student`."""
        return self._student

    def student_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets, in the transformer's own order."""
        return list(self._student.values())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """As :meth:`Pair.update`, where the teacher waits."""
        for key, teacher in self._teacher.items():
            teacher.lerp_(self._student[key].to(teacher.device), 1.0 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """As :meth:`Pair.state_dict`: the tensors themselves, because copies would take all of the memory again."""
        state = {f"{STUDENT}/{key}": value.detach() for key, value in self._student.items()}
        return state | {f"{TEACHER}/{key}": value.detach() for key, value in self._teacher.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """As :meth:`Pair.load_state_dict`."""
        for who, weights in ((STUDENT, self._student), (TEACHER, self._teacher)):
            for key, value in weights.items():
                value.copy_(state[f"{who}/{key}"])

    def remove(self) -> None:
        """Give the transformer back with the base's own parameters, to the last bit."""
        if self._visits is not None:
            self._visits.end()
        for key, places in self._places.items():
            base, device = self._base[key], self._student[key].device
            base.data = base.data.to(device)
            places.put(base)

    def save(self, path: Path) -> Path:
        """Write the student to ``path``, each tensor in the type that the base has it in; whole or not at all."""
        dtypes = {key: base.dtype for key, base in self._base.items()}
        write_tensors(path, self._student, {"format": FORMAT}, dtypes)
        return path


def _waits(tensor: Tensor, waiting: Waiting, copy: bool = False) -> nn.Parameter:
    """Frozen, where it is to wait; in host memory so that a copy to the device does not hold it up."""
    moved = tensor.to("cpu" if waiting == "cpu" else tensor.device, copy=copy)
    pinned = waiting == "cpu" and tensor.device.type == "cuda"
    return nn.Parameter(moved.pin_memory() if pinned else moved, requires_grad=False)


class _Visits:
    """Weights that wait in host memory come to the device block by block, each while it computes; those outside of the
    blocks for as long as they are selected. They are frozen: nothing is copied back."""

    def __init__(
        self, transformer: nn.Module, places: Mapping[str, _Places], devices: Mapping[str, torch.device]
    ) -> None:
        self._places, self._devices = places, devices
        self._weights: Mapping[str, nn.Parameter] = {}
        blocks = blocks_of(transformer)
        within = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
        self._names: list[list[str]] = [[] for _ in range(len(blocks) + 1)]  # the last: outside of the blocks
        for name, place in places.items():
            numbers = {within.get(id(module), -1) for module, _ in place.held}
            self._names[numbers.pop() if len(numbers) == 1 else -1].append(name)
        self._hooks = [
            hook
            for number, block in enumerate(blocks)
            for hook in (
                block.register_forward_pre_hook(lambda *_, number=number: self._come(number)),
                block.register_forward_hook(lambda *_, number=number: self._go(number), always_call=True),
            )
        ]

    def of(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Whose weights come, from now on; without any, those in the places are on the device already."""
        self._weights = weights
        self._come(-1)

    def _come(self, number: int) -> None:
        for name in self._names[number] if self._weights else ():
            weight, device = self._weights[name], self._devices[name]
            # always a copy, on a CPU too: the same things are alive there
            copy = weight.detach().to(device, non_blocking=True, copy=True)
            self._places[name].put(nn.Parameter(copy, requires_grad=False))

    def _go(self, number: int) -> None:
        for name in self._names[number] if self._weights else ():
            self._places[name].put(self._weights[name])

    def end(self) -> None:
        """Leave the blocks as they were."""
        for hook in self._hooks:
            hook.remove()


# --- files ------------------------------------------------------------------------------------------------------------


def holds_weights(path: Path) -> bool:
    """Whether a file holds trained weights; no for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


@contextmanager
def weights_applied(transformer: nn.Module, path: Path) -> Iterator[None]:
    """The transformer with the weights of a file inside the block, and with its own, to the last bit, after it.

    Its own wait in host memory meanwhile, so that the device holds either once. Raises :class:`AdapterError` where they
    do not fit the transformer.
    """
    _check_plain(transformer, f"{path}: trained weights take the place of")
    places = _places_of(transformer)
    kept: dict[str, tuple[Tensor, torch.device]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            shape = list(places[name].parameter.shape) if name in places else None
            if file.get_slice(name).get_shape() != shape:
                raise AdapterError(f"{path}: {name} does not fit the base; wrong base model?")
        try:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                own = places[name].parameter
                kept[name] = own.data.to("cpu"), own.device
                own.data = kept[name][0]  # the device lets go of it before the other comes
                own.data = file.get_tensor(name).to(kept[name][1], own.dtype)
            yield
        finally:
            for name, (tensor, device) in kept.items():
                places[name].parameter.data = tensor.to(device)
