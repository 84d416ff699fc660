"""The project's own work on fake tensors at true widths: what each piece of it needs above the weights it works with.

A training step is counted on few blocks and extended to all of them: every block adds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor, nn

from dopsd.config.groups import LoraSettings
from dopsd.distill.adapters import AdapterPair, adapter_parameters, add_adapters
from dopsd.distill.pair import STUDENT, Pair, TeacherKind
from dopsd.distill.rollout import rollout, sample
from dopsd.distill.weights import Waiting, WeightPair, matched_weights
from dopsd.models.base import BATCH, Conditioning, Configs, Family, Parts, Shapes, Teaching
from dopsd.models.sizes import block_lists, shortened, skeleton
from dopsd.sizing.counter import Counter, counting, materialise

CPU = torch.device("cpu")
CAPTION_TOKENS = 96
"""Of a caption, where nobody has read it: a long one."""


@dataclass(frozen=True)
class Cost:
    """Of a piece of work; all of it adds up and scales."""

    peak: float = 0.0
    """Bytes at the most, above what was there before."""
    operations: float = 0.0
    moved: float = 0.0
    """Bytes that all but matrix products read and write."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.peak + other.peak, self.operations + other.operations, self.moved + other.moved)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.peak * factor, self.operations * factor, self.moved * factor)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1


@dataclass(frozen=True)
class Work:
    """What is worked on: a base by its configurations, and the sizes of one batch."""

    family: type[Family]
    configs: Configs
    teaching: Teaching
    height: int
    width: int
    tokens: int = CAPTION_TOKENS
    """Of a caption."""
    batch: int = 1
    lora: LoraSettings = field(default_factory=LoraSettings)
    teacher: TeacherKind = "ema"
    guidance: float = 1.0
    tune: Literal["adapter", "full"] = "adapter"
    waiting: Waiting = "device"
    """With full tuning: where base and teacher are while they do not answer."""

    @cached_property
    def shapes(self) -> Shapes:
        """Of one example. Raises ``ValueError`` for a family that does not say."""
        found = self.family.shapes(self.configs, self.teaching, self.tokens, self.height, self.width)
        if found is None:
            raise ValueError(f"{self.family.__name__} does not say how large its conditionings are (Family.shapes)")
        return found

    # --- training -------------------------------------------------------------------------------------------------

    def train(self, checkpointing: Literal["none", "every"]) -> Cost:
        """One state of a roll-out: the teacher's answer, the student's, its gradients. The gradients' own memory is
        there before: from the second state on it is."""
        teacher, student = self._extended(lambda few: self.train_shortened(checkpointing, few), self.transformer)
        return Cost(max(teacher.peak, student.peak), student.operations, student.moved)

    def train_shortened(
        self, checkpointing: Literal["none", "every"], lengths: Mapping[str, int], states: int = 1
    ) -> tuple[Cost, Cost]:
        """The same with fewer blocks, over ``states`` of the roll-out: up to the last answer of the teacher, and all.

        The two peaks are apart because they grow at other rates: a teacher that is shown a picture reads more tokens.
        """
        transformer: Any = shortened(self.transformer, lengths)
        make_pair = self._prepared(transformer, self.teacher)
        if checkpointing != "none":
            transformer.enable_gradient_checkpointing()
        with counting() as counter:
            materialise(transformer)
            family = self._family({"transformer": transformer})
            pair = make_pair()
            for parameter in pair.student_parameters():
                parameter.grad = torch.empty_like(parameter)
            prompts, contexts = self._conditionings()
            noise, sigmas = torch.empty(self.batch, *self.shapes.latents), torch.ones(states + 1)
            before, taught = counter.reset(), Cost()

            def predict(latents: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
                nonlocal taught
                if torch.is_grad_enabled():
                    taught = _cost(counter, before)
                    counter.peak = counter.live
                return family.velocity(latents, sigma, conditioning)

            rollout(predict, pair, noise, sigmas, prompts, contexts, teacher=pair.teacher, guidance=self.guidance)
            return taught, _cost(counter, before)

    def _extended(self, run: Callable[[Mapping[str, int]], tuple[Cost, ...]], module: nn.Module) -> tuple[Cost, ...]:
        """Costs of all blocks, from runs with one block, and with one more, of each list."""
        lists = block_lists(module)
        few = dict.fromkeys(lists, 1)
        first = run(few)
        total = first
        for name, length in lists.items():
            more = run(few | {name: 2})
            total = tuple(t + (m - f) * (length - 1) for t, m, f in zip(total, more, first, strict=True))
        return total

    def _prepared(self, transformer: nn.Module, teacher: TeacherKind) -> Callable[[], Pair]:
        """Makes student and teacher, once the transformer has fakes for values."""
        if self.tune == "full":
            matched = matched_weights(transformer, self.lora.targets)
            transformer.eval()
            return lambda: WeightPair(transformer, teacher, matched, self.waiting)
        adapted = self._adapted(transformer, teacher)
        return lambda: AdapterPair(transformer, teacher, adapted)

    def _adapted(self, transformer: nn.Module, teacher: TeacherKind) -> Mapping[str, tuple[str, ...]]:
        with torch.device("meta"):
            matched = add_adapters(transformer, self.lora, self.family.lora_targets, 0, teacher).matched
        transformer.eval()  # some kinds of adapters else ask a random number whether they drop out
        return matched

    @cached_property
    def transformer(self) -> Any:
        """Without values; to be copied."""
        return skeleton("transformer", self.configs, self.family)

    @cached_property
    def adapter(self) -> int:
        """Parameters that are trained: those of one adapter, or the transformer's own."""
        if self.tune == "full":
            values = dict(self.transformer.named_parameters())
            names = {name for found in matched_weights(self.transformer, self.lora.targets).values() for name in found}
            return sum(v.numel() for key, v in values.items() if {key, key.rpartition(".")[0]} & names)

        def run(lengths: Mapping[str, int]) -> tuple[Cost]:
            transformer = shortened(self.transformer, lengths)
            self._adapted(transformer, "frozen")
            return (Cost(sum(value.numel() for value in adapter_parameters(transformer, STUDENT).values())),)

        return round(self._extended(run, self.transformer)[0].peak)

    # --- pictures -------------------------------------------------------------------------------------------------

    def sample(self, training: bool = False) -> Cost:
        """One step towards one picture, from what the teacher is shown: pictures of its are drawn too, and it reads the
        most. With an adapter in float32; of full tuning with trained weights in the base's place, or in ``training``
        with the float32 student's."""

        def run(lengths: Mapping[str, int]) -> tuple[Cost]:
            transformer = shortened(self.transformer, lengths)
            make_pair = self._prepared(transformer, "frozen")
            with counting() as counter:
                materialise(transformer)
                family, pair = self._family({"transformer": transformer}), make_pair()
                _, contexts = self._conditionings()
                noise = torch.empty(1, *self.shapes.latents)
                before = counter.reset()
                with pair.select(None if self.tune == "full" and not training else STUDENT):
                    sample(family, contexts[:1], 1, self.height, self.width, noise)
                return (_cost(counter, before),)

        return self._extended(run, self.transformer)[0]

    def decode(self) -> Cost:
        """One picture from its latents."""
        with counting() as counter:
            family = self._family({"vae_decoder": self._real("vae_decoder")})
            latents = torch.empty(1, *self.shapes.latents)
            before = counter.reset()
            family.decode(latents)
            return _cost(counter, before)

    # --- encodings ------------------------------------------------------------------------------------------------

    def encode_images(self) -> Cost:
        """One picture to latents."""
        with counting() as counter:
            family = self._family({"vae_encoder": self._real("vae_encoder")})
            before = counter.reset()
            family.encode_images([Image.new("RGB", (self.width, self.height))])
            return _cost(counter, before)

    def encode_text(self) -> Cost:
        """A batch of captions, or of the turns with a picture where those are longer; with all hidden states."""
        shapes, encoder = self.shapes, skeleton("text_encoder", self.configs, self.family)
        turns = (BATCH, shapes.read), (shapes.shown_together, shapes.shown)
        rows, tokens = max(turns, key=lambda turn: turn[0] * turn[1])

        def run(lengths: Mapping[str, int]) -> tuple[Cost]:
            short = shortened(encoder, lengths)
            with counting() as counter, torch.no_grad():
                materialise(short)
                ids = torch.ones(rows, tokens, dtype=torch.long)
                before = counter.reset()
                short(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)
                return (_cost(counter, before),)

        return self._extended(run, encoder)[0]

    # --- on fakes -------------------------------------------------------------------------------------------------

    def _real(self, part: str) -> Any:
        module = skeleton(part, self.configs, self.family)
        materialise(module)
        return module

    def _family(self, modules: Mapping[str, Any]) -> Family:
        loaders: dict[Any, Any] = {name: (lambda _, module=module: module) for name, module in modules.items()}
        family = self.family(Parts(loaders, self.configs), self.teaching, CPU, torch.bfloat16, "")
        # the grid's values are nobody's size, and a scheduler computes with them
        cast("Any", family).sigmas = lambda num_steps, *_: torch.ones(num_steps + 1)
        return family

    def _conditionings(self) -> tuple[list[Conditioning], list[Conditioning]]:
        def make(shapes: Mapping[str, tuple[int, ...]]) -> list[Conditioning]:
            return [
                {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
                for _ in range(self.batch)
            ]

        return make(self.shapes.prompt), make(self.shapes.context)


def _cost(counter: Counter, before: int) -> Cost:
    return Cost(counter.peak - before, counter.operations, counter.moved)
