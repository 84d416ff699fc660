"""What settings need, stage by stage, and which settings fit a card. Computed; nothing is loaded.

Bytes are bytes, GB are 10^9 of them. Of a card's memory :data:`RESERVE` is nobody's to plan with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dopsd.config import Settings
from dopsd.config.groups import Offload, Optimizer, Quantization
from dopsd.distill.weights import Waiting
from dopsd.models import family_class, teaching_of
from dopsd.models.checkpointing import Checkpointing
from dopsd.models.sizes import PartSize, configurations, skeleton
from dopsd.sizing.cards import Card
from dopsd.sizing.runs import CAPTION_TOKENS, Cost, Work

RESERVE = 1.5e9
"""Bytes for CUDA's context, cuDNN's workspaces and what the allocator cannot use."""
CAUTION = 1.1
"""How much more than counted a training may turn out to need, where the count alone decides."""
SMALL = 200_000_000
"""A transformer of fewer parameters fits anywhere: nothing is planned for it."""
_ENCODERS = ("text_encoder", "vision", "vae_encoder")
_BITS: Mapping[str, float] = {"none": 16, "int8": 8.02, "fp8": 8.02, "nf4": 4.127}
"""Of a quantised weight, scales included."""
_MOMENTS: Mapping[str, float] = {"adamw": 8, "adamw-8bit": 2 * (1 + 4 / 256)}
"""Bytes of the optimizer's state a parameter."""
_HOST_LINK = 20e9
"""Bytes a second between host and device, as PCIe 4.0 x16 gives them."""


@dataclass(frozen=True)
class Choice:
    """The settings that memory depends on, and that a person may change."""

    checkpointing: Checkpointing = "none"
    quantization: Quantization = "none"
    offload: Offload = "none"
    optimizer: Optimizer = "adamw"
    resolution: int = 1024
    batch: int = 1
    accumulation: int = 1
    waiting: Waiting = "device"
    """Of full tuning alone."""

    @classmethod
    def of(cls, settings: Settings) -> Choice:
        """Of settings; ``auto`` is :meth:`Plan.checkpointing`'s to say, and ``none`` here."""
        model, train = settings.model, settings.train
        given = model.gradient_checkpointing
        return cls(
            "none" if given == "auto" else given, model.quantization, model.offload, train.optimizer,
            settings.data.resolution, train.batch_size, train.accumulation,
            train.teacher.weights,
        )  # fmt: skip

    def lines(self, before: Choice) -> dict[str, dict[str, Any]]:
        """What to write into the settings to have this instead of ``before``, by group."""
        names = {
            "checkpointing": ("model", "gradient_checkpointing"), "quantization": ("model", "quantization"),
            "offload": ("model", "offload"), "optimizer": ("train", "optimizer"),
            "resolution": ("data", "resolution"), "batch": ("train", "batch_size"),
            "accumulation": ("train", "accumulation"),
        }  # fmt: skip
        found: dict[str, dict[str, Any]] = {}
        for key, (group, name) in names.items():
            if getattr(self, key) != getattr(before, key):
                found.setdefault(group, {})[name] = getattr(self, key)
        if self.waiting != before.waiting:
            found.setdefault("train", {})["teacher"] = {"weights": self.waiting}
        return found

    def allowed(self, settings: Settings) -> bool:
        """Whether ``settings`` may be changed to this: some of them forbid others."""
        values = settings.model_dump()
        for group, names in self.lines(Choice.of(settings)).items():
            for name, value in names.items():
                values[group][name] = values[group][name] | value if isinstance(value, dict) else value
        try:
            Settings.model_validate(values)
        except ValidationError:
            return False
        return True


@dataclass(frozen=True)
class Stage:
    """Who is on the device at the moment when most is, in bytes."""

    name: str
    rows: Mapping[str, float]
    note: str = ""

    @property
    def peak(self) -> float:
        return sum(self.rows.values())

    def fits(self, card_bytes: float) -> bool:
        return self.peak + RESERVE <= card_bytes


@dataclass
class _Runs:
    """Costs of one size, each run once."""

    work: Work
    train: dict[Checkpointing, Cost] = field(default_factory=dict)

    def training(self, checkpointing: Checkpointing) -> Cost:
        """``every-second`` is half of both others; where the last block is one that is kept, half a block too much."""
        if checkpointing == "every-second":
            return (self.training("none") + self.training("every")) * 0.5
        if checkpointing not in self.train:
            self.train[checkpointing] = self.work.train(checkpointing)
        return self.train[checkpointing]

    @cached_property
    def sample(self) -> Cost:
        return self.work.sample()

    @cached_property
    def preview(self) -> float:
        drawn = self.work.sample(training=True).peak if self.work.tune == "full" else self.sample.peak
        return max(drawn, self.decode.peak)

    @cached_property
    def decode(self) -> Cost:
        return self.work.decode()

    @cached_property
    def encode(self) -> float:
        return max(self.work.encode_text().peak, self.work.encode_images().peak)

    @property
    def draw(self) -> float:
        return max(self.sample.peak, self.decode.peak)


class Plan:
    """One base and one training, for whatever :class:`Choice`: what was counted once is not counted again."""

    def __init__(
        self, work: Work, *, rollout_steps: int = 4, replay: bool = False,
        allowed: Callable[[Choice], bool] = lambda _: True,
    ) -> None:  # fmt: skip
        """``allowed``: which choices may be proposed."""
        self.work, self._rollouts, self._allowed = work, rollout_steps * (2 if replay else 1), allowed
        self._full = work.tune == "full"
        self._runs: dict[tuple[int, int, Waiting], _Runs] = {}
        parts = ["text_encoder", "vae_encoder", "vae_decoder", *(["vision"] if self._sees else [])]
        self.sizes = {part: PartSize.of(skeleton(part, work.configs, work.family)) for part in parts}
        self.sizes["transformer"] = PartSize.of(work.transformer)
        self._whole_encoder = PartSize.of(skeleton("text_encoder", work.configs, None))

    @property
    def _beside(self) -> int:
        """Parameters that a trained model has beside the base's; trained weights take the place of those."""
        return 0 if self._full else self.work.adapter

    @property
    def _sees(self) -> bool:
        return "vlm" in self.work.configs and self.work.family.needs_vlm(self.work.teaching)

    def runs(self, choice: Choice) -> _Runs:
        """Of the choice's size."""
        key = choice.resolution, choice.batch, choice.waiting
        if key not in self._runs:
            side, batch, waiting = key
            self._runs[key] = _Runs(replace(self.work, height=side, width=side, batch=batch, waiting=waiting))
        return self._runs[key]

    def count(self, choice: Choice) -> Iterator[str]:
        """Run whatever that choice and its ladder are counted from, and say what; the rest is arithmetic then."""
        runs = self.runs(choice)
        pieces: dict[str, Callable[[], object]] = {
            "encoding": lambda: runs.encode, "drawing": lambda: runs.draw,
            "training": lambda: runs.training("every"), "training at full speed": lambda: runs.training("none"),
        }  # fmt: skip
        for what, run in pieces.items():
            yield what
            run()

    # --- memory ---------------------------------------------------------------------------------------------------

    def weights(self, part: str, choice: Choice) -> float:
        """Bytes of a component on the device."""
        size = self.sizes[part]
        bits = _BITS[choice.quantization] if part in ("transformer", "text_encoder") else 16
        whole = 2.0 * (size.parameters - size.linear) + size.linear * bits / 8
        if part == "transformer" and choice.offload == "group":
            kept = 2.0 * (size.parameters - sum(size.blocks))
            return kept + 2 * max(size.blocks) * bits / 8
        return whole

    def _unpacked(self, choice: Choice, *parts: str) -> dict[str, float]:
        """The largest layer as it is multiplied with."""
        if choice.quantization == "none":
            return {}
        return {"one layer unpacked": 2.0 * max(self.sizes[part].largest for part in parts)}

    def stages(self, choice: Choice) -> list[Stage]:
        """All that use the device."""
        return [self._encode(choice), self.train(choice), self._draw(choice), self._register(choice)]

    def _encode(self, choice: Choice) -> Stage:
        rows = {part.replace("_", " "): self.weights(part, choice) for part in _ENCODERS if part in self.sizes}
        rows |= self._unpacked(choice, "text_encoder")
        return Stage("encode", rows | {"a batch of captions, or a picture": self.runs(choice).encode})

    def train(self, choice: Choice) -> Stage:
        """The step, or the preview where that takes more."""
        trained, runs = self.work.adapter, self.runs(choice)
        rows = self._learning(choice)
        if choice.offload == "none":
            rows["vae decoder"] = self.weights("vae_decoder", choice)
        rows |= self._unpacked(choice, "transformer")
        step = {"gradients": 4.0 * trained, "activations": runs.training(choice.checkpointing).peak}
        preview = {"a preview picture": runs.preview}
        if choice.offload != "none":
            preview["vae decoder"] = self.weights("vae_decoder", choice)
        more = max(step, preview, key=lambda added: sum(added.values()))
        return Stage("train", rows | more)

    def _learning(self, choice: Choice) -> dict[str, float]:
        """What student and teacher are made of, and what the optimizer keeps."""
        trained, ema = self.work.adapter, self.work.teacher == "ema"
        rows = {"transformer": self.weights("transformer", choice)}
        if not self._full:
            rows["adapters in float32"] = 4.0 * trained * (2 if ema else 1)
        elif choice.waiting == "device":
            rows |= {"student in float32": 4.0 * trained, "teacher in float32": 4.0 * trained * ema}
        else:  # of the base only what is not trained stays; who visits is among the activations
            rows = {"transformer": rows["transformer"] - 2.0 * trained, "student in float32": 4.0 * trained}
        return rows | {"optimizer": trained * _MOMENTS[choice.optimizer]}

    def _draw(self, choice: Choice) -> Stage:
        """Evaluation and ``dopsd sample``: what is asked is encoded first, and its encoders are freed."""
        adapter, runs = self._beside, self.runs(choice)
        rows = {part.replace("_", " "): self.weights(part, choice) for part in ("transformer", "vae_decoder")}
        rows |= {"adapter": 4.0 * adapter} | self._unpacked(choice, "transformer") | {"one picture": runs.draw}
        drawing, encoding = Stage("evaluate, sample", rows), self._encode(choice)
        if encoding.peak > drawing.peak:
            return Stage("evaluate, sample", encoding.rows, "encoding first")
        return drawing

    def _register(self, choice: Choice) -> Stage:
        """The export is compared with plain diffusers: unrounded components take turns on the device, rounded ones are
        all there."""
        whole, bits = self._whole_encoder, _BITS[choice.quantization]
        large = {
            "text encoder, all of it": 2.0 * (whole.parameters - whole.linear) + whole.linear * bits / 8,
            "transformer": self.weights("transformer", choice),
        }
        if choice.quantization == "none" and choice.offload != "group":
            large = dict([max(large.items(), key=lambda part: part[1])])
        rows = large | {part.replace("_", " "): self.weights(part, choice) for part in ("vae_encoder", "vae_decoder")}
        rows |= self._unpacked(choice, "transformer", "text_encoder") | {"adapter": 4.0 * self._beside}
        return Stage("register", rows | {"one picture": self.runs(choice).draw})

    def host(self, choice: Choice) -> float:
        """Bytes of host memory: a component passes through it when it is loaded, and what is offloaded waits in it."""
        size, bits = self.sizes["transformer"], _BITS[choice.quantization]
        staying = {
            "none": 0.0, "group": sum(size.blocks) * bits / 8,
            "model": sum(self.weights(part, choice) for part in ("transformer", "text_encoder")),
        }[choice.offload]  # fmt: skip
        if self._full:  # base and teacher in training, the base where the trained weights draw
            second = 4.0 if choice.waiting == "cpu" and self.work.teacher == "ema" else 0.0
            staying += self.work.adapter * (2.0 + second)
        return 2e9 + max(staying, 2.0 * max(part.parameters for part in self.sizes.values()))

    def disk(self) -> dict[str, float]:
        """Bytes that a project keeps."""
        adapter, shapes = 4.0 * self.work.adapter, self.work.shapes  # bytes
        trained = {"trained weights, twice, and the export": 6.0 * self.work.adapter}
        conditionings = [*shapes.prompt.values(), *shapes.context.values()]
        base = [size.parameters for part, size in self.sizes.items() if part != "text_encoder"]
        example = 2.0 * sum(map(prod, conditionings)) + 4.0 * prod(shapes.latents)
        return {
            "base, where published in bfloat16": 2.0 * (sum(base) + self._whole_encoder.parameters),
            "a hundred captions encoded": 2 * 100 * example,  # in the cache, and in the run's folder
            "two checkpoints": 2 * 4 * adapter,
            **(trained if self._full else {"adapter and two exports": 3 * adapter}),
        }  # fmt: skip

    # --- time -----------------------------------------------------------------------------------------------------

    def hours(self, choice: Choice, card: Card) -> float:
        """Of a thousand optimizer steps: matrix products at the card's rate, then all other traffic at its
        bandwidth. Within a half of the truth, one hopes."""
        cost, size = self.runs(choice).training(choice.checkpointing), self.sizes["transformer"]
        seconds = cost.operations / (card.teraflops * 1e12) + cost.moved / (card.terabytes * 1e12)
        passes = 3.0  # teacher, student, backward
        if choice.quantization != "none":
            unpacking = size.linear * (_BITS[choice.quantization] / 8 + 2)
            seconds += passes * unpacking / (card.terabytes * 1e12)
        if choice.offload == "group":
            seconds = max(seconds, passes * sum(size.blocks) * _BITS[choice.quantization] / 8 / _HOST_LINK)
        if self._full and choice.waiting == "cpu":
            seconds += 4.0 * self.work.adapter / _HOST_LINK  # the teacher, for each of its answers
        return seconds * self._rollouts * choice.accumulation * 1000 / 3600

    def drawing_hours(self, pictures: int, steps: int, choice: Choice, card: Card) -> float:
        """Of so many pictures, drawn in so many steps together: counted as :meth:`hours` is."""
        runs = self.runs(choice)
        cost = runs.sample * steps + runs.decode * pictures
        return (cost.operations / (card.teraflops * 1e12) + cost.moved / (card.terabytes * 1e12)) / 3600

    # --- what fits ------------------------------------------------------------------------------------------------

    def fits(self, choice: Choice, card_bytes: float) -> bool:
        """Every stage does."""
        encoders = sum(self.weights(part, choice) for part in self.sizes if part in _ENCODERS)
        least = max(encoders, sum(self._learning(choice).values()))
        # nothing need be run to see that the weights alone are too much
        return least + RESERVE <= card_bytes and all(stage.fits(card_bytes) for stage in self.stages(choice))

    def ladder(self, choice: Choice) -> Iterator[Choice]:
        """Ever smaller choices, the least loss of time and quality first, from ``choice``'s size down; without those
        that the other settings forbid."""
        low = replace(choice, checkpointing="none", quantization="none", offload="none", optimizer="adamw",
                      waiting="device")  # fmt: skip
        if choice.batch > 1:
            low = replace(low, batch=1, accumulation=choice.accumulation * choice.batch)
        yield low
        steps: list[dict[str, Any]] = [
            {"checkpointing": "every-second"}, {"checkpointing": "every"}, {"quantization": "int8"},
            {"quantization": "nf4"}, {"optimizer": "adamw-8bit"}, {"offload": "group"}, {"waiting": "cpu"},
            *({"resolution": side} for side in (768, 512) if side < choice.resolution),
        ]  # fmt: skip
        for step in steps:
            if self._allowed(lower := replace(low, **step)):
                low = lower
                yield low

    def proposal(self, choice: Choice, card_bytes: float) -> Choice | None:
        """The first of the ladder that fits; ``None`` where nothing does."""
        return next((one for one in self.ladder(choice) if self.fits(one, card_bytes)), None)

    def checkpointing(self, choice: Choice, card_bytes: float) -> Checkpointing:
        """What ``auto`` means on that card: the least checkpointing with which training fits, else ``every``.

        Nobody looks at what it chose, so it believes no count by more than :data:`CAUTION`.
        """
        kinds: tuple[Checkpointing, ...] = ("none", "every-second")
        if choice.offload == "group":
            return "every"
        stages = ((kind, self.train(replace(choice, checkpointing=kind))) for kind in kinds)
        return next((kind for kind, stage in stages if CAUTION * stage.peak + RESERVE <= card_bytes), "every")

    def chosen(self, settings: Settings, card_bytes: float) -> Choice:
        """What the settings are on that card."""
        choice = Choice.of(settings)
        if settings.model.gradient_checkpointing != "auto":
            return choice
        divided = settings.compute.sharded  # whose processes all take the same way
        return replace(choice, checkpointing="every" if divided else self.checkpointing(choice, card_bytes))


def plan_for(settings: Settings, root: Path) -> Plan | None:
    """The plan for resolved settings; ``None`` where the base is small, unknown here, or of a family that does not say
    what it handles. Raises :class:`dopsd.models.ModelError` where base and family do not go together."""
    model, train = settings.model, settings.train
    configs = configurations(model, root)
    if configs is None:
        return None
    family, side = family_class(model), settings.data.resolution
    work = Work(
        family, configs, teaching_of(model), side, side, CAPTION_TOKENS, train.batch_size, train.lora,
        train.teacher.kind or "ema", train.teacher.guidance, train.tune, train.teacher.weights,
    )  # fmt: skip
    if family.shapes(configs, work.teaching, work.tokens, side, side) is None:
        return None
    if sum(value.numel() for value in work.transformer.parameters()) < SMALL:
        return None
    return Plan(work, rollout_steps=train.rollout_steps, replay=train.replay.weight > 0,
                allowed=lambda choice: choice.allowed(settings))  # fmt: skip


def checkpointing_that_fits(settings: Settings, free_bytes: float, root: Path = Path()) -> Checkpointing:
    """What ``model.gradient_checkpointing: auto`` means where so many bytes are free before anything is loaded.

    Seconds, for the run on fakes; nothing is loaded, no random number is drawn. ``none`` for a base that is small or
    not known.
    """
    plan = plan_for(settings, root)
    return "none" if plan is None else plan.checkpointing(Choice.of(settings), free_bytes)


def advice(settings: Settings, card_bytes: float, root: Path = Path()) -> str:
    """One line for a person whose card is out of memory: which settings to change. The base is counted whole, where
    ``compute.sharded`` divides it too."""
    plan = plan_for(settings, root)
    if plan is None:
        return "out of memory: lower train.batch_size (raise train.accumulation as much) or data.resolution"
    before = plan.chosen(settings, card_bytes)
    if plan.fits(before, card_bytes):
        most = max(stage.peak for stage in plan.stages(before))
        return (f"out of memory, though {most / 1e9:.1f} GB should do: is something else on the card (nvidia-smi)? "
                "Else set model.gradient_checkpointing=every")  # fmt: skip
    found = plan.proposal(before, card_bytes)
    if found is None and settings.compute.sharded:
        return "out of memory: raise compute.workers, so that each holds less of the base, or lower data.resolution"
    if found is None:
        return "out of memory: no settings known here fit this card; `dopsd doctor` says what each stage needs"
    changes = ", ".join(
        f"{group}.{name}.weights={value['weights']}" if isinstance(value, dict) else f"{group}.{name}={value}"
        for group, names in found.lines(before).items()
        for name, value in names.items()
    )
    return f"out of memory: set {changes} (computed; `dopsd doctor` says why)"
