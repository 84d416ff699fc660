"""What one process of ``benchmarks/true_size.py`` measures, on the models of ``benchmarks/true_size_plain.py``."""

from __future__ import annotations

import gc
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor
from true_size_meter import Meter, Row, driver, kernel_table
from true_size_plain import (
    Encode,
    Step,
    encode_captions,
    make_family,
    noise_picture,
    ours,
    plain,
    plain_encoders,
    random_encodings,
    sizes_of,
)

from dopsd.config.groups import LoraSettings, ModelSettings, TrainSettings
from dopsd.distill.adapters import AdapterPair, add_adapters
from dopsd.distill.kinds import leave_out_scale
from dopsd.distill.rollout import sample
from dopsd.models.base import Family
from dopsd.models.checkpointing import checkpoint_blocks
from dopsd.train.optimizer import check_optimizer, make_optimizer

_PLAIN = {"checkpointing", "cast"}
"""What the published algorithm has."""
HALF = "512px"
"""Of a variant whose pictures have half the side, which is 512 pixels at true size."""


def model_settings(options: set[str]) -> ModelSettings:
    """What a person would write under ``model`` for a variant."""
    every = bool(options & {"checkpointing", "offload"})
    return ModelSettings.model_validate({
        "path": "random", "compile": "compile" in options, "offload": "group" if "offload" in options else "none",
        "quantization": next((kind for kind in ("int8", "fp8", "nf4") if kind in options), "none"),
        "gradient_checkpointing": "every" if every else "every-second" if "every-second" in options else "none",
    })  # fmt: skip


class Session:
    """One model in this process; it is built when a variant first asks for it, and anew for one stored otherwise."""

    def __init__(self, model: str, scale: str, device: str, side: int, steps: int, out: Path) -> None:
        if device == "cpu":
            torch.set_num_threads(1)
        self.device, self.model, self.scale, self.steps, self.out = torch.device(device), model, scale, steps, out
        self.meter = Meter(self.device)
        self.sizes = sizes_of(model, scale)
        self.settings = TrainSettings(
            max_steps=1, batch_size=1, learning_rate=1e-4, lora=LoraSettings(rank=64 if scale == "true" else 4)
        )
        self.whole_side = self.side = side
        self.noises = torch.Generator()
        self._stored: tuple[str, ...] | None = None
        self._casts: dict[LoraLayer, bool] = {}

    def measure(self, variant: str) -> Row:
        """The values of a variant. Every one starts from the same switches: nothing left from the one before.

        Raises ``ModelError`` or ``SettingsError`` where a library that it takes is not installed.
        """
        measures: dict[str, Callable[[], Row]] = {
            "machine": self.machine, "floor": self.floor, "profile": self.profile, "sampling": self.sampling,
            "decoding": self.decoding, "encoding": self.encoding, "agreement": self.agreement, "plain": self.plain_step,
        }  # fmt: skip
        options = _PLAIN if variant in ("plain", "agreement") else set(variant.split("+")[1:])
        self.side = self.whole_side // 2 if HALF in options else self.whole_side
        if variant != "machine":
            self.prepare(options)
        return measures.get(variant, self.our_step)()

    # --- what variants share --------------------------------------------------------------------------------------

    def prepare(self, options: set[str]) -> None:
        """The model as the variant wants it stored, and nothing left of another; then everything that is switched."""
        settings = model_settings(options)
        optimizer = "adamw-8bit" if "8bit" in options else "adamw"
        self.settings = self.settings.model_copy(update={"optimizer": optimizer})
        check_optimizer(self.settings)
        stored = (settings.quantization, settings.offload, str(settings.compile))
        if stored != self._stored:
            self._stored = self._adapters = self._encode = self._family = None
            self._casts = {}
            gc.collect()
            dtype = torch.bfloat16 if self.scale == "true" else torch.float32
            torch.manual_seed(0)
            self._family = make_family(self.model, self.scale, self.device, dtype, settings)
            self._stored = stored
        if self.meter.cuda:
            torch.cuda.empty_cache()
        self.sigmas = self.family.sigmas(self.settings.rollout_steps, self.side, self.side).to(self.device)
        transformer = self.adapters.transformer
        checkpoint_blocks(transformer, settings.gradient_checkpointing)
        for layer, own in self._casts.items():
            layer.cast_input_dtype_enabled = own or "cast" in options
            layer.__dict__.pop("forward", None)
            if options is not _PLAIN:
                leave_out_scale(layer)
        torch.manual_seed(0)  # every variant is shown the same
        self.noises.manual_seed(0)

    @property
    def family(self) -> Family:
        assert self._family is not None
        return self._family

    @property
    def adapters(self) -> AdapterPair:
        if self._adapters is None:
            family = self.family
            self._adapters = add_adapters(family.transformer, self.settings.lora, family.lora_targets, seed=0)
            layers = [m for m in family.transformer.modules() if isinstance(m, LoraLayer)]
            self._casts = {layer: layer.cast_input_dtype_enabled for layer in layers}
        return self._adapters

    @property
    def encode(self) -> Encode:
        """The plain variant's encoders."""
        if self._encode is None:
            self._encode = plain_encoders(self.family, self.sizes, self.side)
        return self._encode

    def encodings(self) -> Any:
        return random_encodings(self.family, self.sizes, self.side)

    def noise(self) -> Tensor:
        return self.family.initial_latents(1, self.side, self.side, self.noises)

    # --- steps ----------------------------------------------------------------------------------------------------

    def optimizer_step(self, step: Step) -> Callable[[], tuple[Tensor, Tensor]]:
        """As the training loop has it: roll-out, clipping, AdamW, the teacher's average. Gives loss and norm."""
        settings, adapters = self.settings, self.adapters
        parameters = adapters.student_parameters()
        optimizer = make_optimizer(settings, parameters, self.device)

        def run() -> tuple[Tensor, Tensor]:
            loss = step(self.noise())
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            adapters.update(settings.teacher.decay)
            return loss, norm

        return run

    def timed(self, step: Step) -> Row:
        """The first optimizer step apart, because it compiles, chooses kernels and makes the optimizer's state."""
        run = self.optimizer_step(step)
        first = self.meter.seconds(run)
        resident = self.meter.reset()
        seconds, answers = [], []
        for _ in range(self.steps):
            seconds.append(self.meter.seconds(lambda: answers.append(run())))
        loss, norm = (float(value) for value in answers[-1])
        if not (loss == loss and norm == norm):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
        return {
            "seconds_per_step": statistics.median(seconds), "resident_bytes": resident, "peak_bytes": self.meter.peak(),
            "first_step_seconds": first, "seconds": seconds, "loss": loss, "gradient_norm": norm, "side": self.side,
        }  # fmt: skip

    def our_step(self) -> Row:
        from torch._dynamo.utils import counters

        counters.clear()
        row = self.timed(self._ours())
        if not counters["stats"]["unique_graphs"]:
            return row
        row["compile_seconds"] = row["first_step_seconds"] - row["seconds_per_step"]
        breaks = sum(counters["graph_break"].values())
        return row | {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}

    def _ours(self) -> Step:
        return ours(self.family.velocity, self.adapters, self.sigmas, self.encodings)

    def plain_step(self) -> Row:
        return self.timed(plain(self.family.velocity, self.adapters, self.sigmas, self.encode))

    def agreement(self) -> Row:
        """Ours and plain from the same noise and the plain encoders' encodings: loss and gradients."""
        made, noise, parameters = self.encode(), self.noise(), self.adapters.student_parameters()
        losses, gradients = {}, {}
        for name, kind in (("ours", ours), ("plain", plain)):
            step = kind(self.family.velocity, self.adapters, self.sigmas, lambda: made)
            losses[name] = float(step(noise))
            gradients[name] = torch.cat([p.grad.flatten().float() for p in parameters])
            for parameter in parameters:
                parameter.grad = None
        norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        return {
            "loss_ours": losses["ours"], "loss_plain": losses["plain"],
            "gradient_norm_ours": norms["ours"], "gradient_norm_plain": norms["plain"],
            "gradient_difference": float((gradients["ours"] - gradients["plain"]).norm()) / norms["plain"],
        }  # fmt: skip

    def floor(self) -> Row:
        """Operations of one step of the roll-out, counted, without what checkpointing computes again."""
        from torch.utils.flop_counter import FlopCounterMode

        (prompts, contexts), x, sigma = self.encodings(), self.noise(), self.sigmas[0]
        predict = self.family.velocity
        counters = {name: FlopCounterMode(display=False) for name in ("teacher", "student", "backward")}
        with self.adapters.select("teacher"), torch.no_grad(), counters["teacher"]:
            target = predict(x, sigma, contexts)
        with self.adapters.select("student"):
            with counters["student"]:
                loss = F.mse_loss(predict(x, sigma, prompts), target)
            with counters["backward"]:
                loss.backward()
        for parameter in self.adapters.student_parameters():
            parameter.grad = None
        row = {f"{name}_tflop": counter.get_total_flops() / 1e12 for name, counter in counters.items()}
        return row | {"step_tflop": self.settings.rollout_steps * sum(row.values())}

    def profile(self) -> Row:
        """One step of ``ours``: milliseconds by group of kernels; the 25 longest go to ``profile.txt``."""
        from torch.profiler import ProfilerActivity

        run = self.optimizer_step(self._ours())
        run()
        cuda = self.device.type == "cuda"
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            wall = self.meter.seconds(run)
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for event in profiler.events():
            if cuda and (
                event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False)
            ):
                continue
            totals[event.name][0] += (event.time_range.elapsed_us() if cuda else event.self_cpu_time_total) / 1e3
            totals[event.name][1] += 1
        if not totals:
            raise RuntimeError("the profiler saw no kernel")
        return kernel_table(totals, wall, self.out / "profile.txt")

    # --- other stages ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sampling(self) -> Row:
        """One picture in the published number of steps, with an adapter, the second time: the first one warms up."""
        (prompts, _), side, steps = self.encodings(), self.side, self.family.few_steps
        stages: list[Row] = []
        with self.adapters.select("student"):
            sample(self.family, prompts, 1, side, side, self.noise())
            with self.meter.stage(stages, f"sample 1 picture, {steps} steps, adapter"):
                sample(self.family, prompts, steps, side, side, self.noise())
        return {"stages": stages}

    def decoding(self) -> Row:
        """Pictures from latents, beside the transformer and the adapters; both counts from cold."""
        self.family.parts["vae_decoder"]
        stages: list[Row] = []
        for count in (1, 4):
            latents = torch.cat([self.noise() for _ in range(count)])
            with self.meter.stage(stages, f"decode {count} picture{'s' * (count > 1)}"):
                self.family.decode(latents)
        self.family.parts.release(["vae_decoder"])
        return {"stages": stages}

    def encoding(self) -> Row:
        """The product's encoders on captions and on a picture, beside whatever the plain variant holds."""
        stages: list[Row] = []
        tokens = self.sizes["caption"]
        self.family.parts["text_encoder"], self.family.parts["vae_encoder"]
        for count in (1, 8):
            with self.meter.stage(stages, f"encode {count} caption{'s' * (count > 1)} of {tokens} tokens"):
                encode_captions(self.family, count, tokens)
        with self.meter.stage(stages, "encode 1 picture to latents"):
            self.family.encode_images([noise_picture(self.side)])
        return {"stages": stages}

    # --- the machine ----------------------------------------------------------------------------------------------

    def machine(self) -> Row:
        """What the card is and does: products of random bfloat16 matrices, copies counted as read and written."""
        cuda = self.device.type == "cuda"
        size, count = (8192, 2**30) if cuda else (256, 2**22)
        dtype = torch.bfloat16 if cuda else torch.float32
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        product = self.meter.median(lambda: a @ b)
        source = torch.randint(256, (count,), device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        copied = self.meter.median(lambda: target.copy_(source))
        row: Row = {
            "card": platform.processor() or platform.machine(),
            "matmul_tflop_per_second": 2 * size**3 / product / 1e12,
            "copy_terabytes_per_second": 2 * count / copied / 1e12,
            "python": platform.python_version(), "torch": torch.__version__,
        }  # fmt: skip
        for package in ("transformers", "diffusers", "peft", "accelerate", "triton", "torchao", "bitsandbytes"):
            try:
                row[package] = version(package)
            except PackageNotFoundError:
                row[package] = ""
        if cuda:
            seen = torch.cuda.get_device_properties(0)
            row |= {"card": seen.name, "memory_bytes": seen.total_memory, "multiprocessors": seen.multi_processor_count}
            row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver()}
        return row
