"""What one process of ``benchmarks/true_size.py`` measures, on the models of ``benchmarks/true_size_plain.py``."""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor
from true_size_plain import (
    Encode,
    Step,
    encode_captions,
    make_family,
    noise_picture,
    ours,
    plain,
    plain_encoders,
    predictor,
    random_encodings,
    sizes_of,
)

from dopsd.config import LoraSettings, TrainSettings
from dopsd.distill.adapters import add_adapters
from dopsd.distill.rollout import sample

Row = dict[str, Any]

_GROUPS = (
    ("attention", r"flash|fmha|attention|sdpa|efficient_"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|\bmm\b|addmm|bmm|linear|conv"),
    ("casts and copies", r"copy|memcpy|memset|catarray|_to_copy|fill|\bcat\b|clone"),
    ("optimizer and EMA", r"multi_tensor|adam|lerp|foreach"),
    ("element-wise, norms, sums", r"elementwise|reduce|norm|triton|softmax|silu|gelu|mul|add|sum|mean|pow|rsqrt|div"),
)
"""Kernels by what their names hold, the first that fits."""


class Session:
    """One model in this process; its parts are built when a variant first asks for them."""

    def __init__(self, model: str, scale: str, device: str, side: int, steps: int, out: Path) -> None:
        if device == "cpu":
            torch.set_num_threads(1)
        self.device, self.scale, self.side, self.steps, self.out = torch.device(device), scale, side, steps, out
        torch.manual_seed(0)
        self.meter = Meter(self.device)
        dtype = torch.bfloat16 if scale == "true" else torch.float32
        self.family = make_family(model, scale, self.device, dtype)
        self.sizes = sizes_of(model, scale)
        self.predict = predictor(self.family)
        self.settings = TrainSettings(
            max_steps=1, batch_size=1, learning_rate=1e-4, lora=LoraSettings(rank=64 if scale == "true" else 4)
        )
        self.sigmas = self.family.sigmas(self.settings.rollout_steps, side, side).to(self.device)
        self.noises = torch.Generator().manual_seed(0)
        self._adapters: Any = None
        self._encode: Encode | None = None

    def measure(self, variant: str) -> Row:
        """The values of a variant. Every one starts from the same switches: nothing left from the one before."""
        measures: dict[str, Callable[[], Row]] = {
            "machine": self.machine, "floor": self.floor, "profile": self.profile, "sampling": self.sampling,
            "decoding": self.decoding, "encoding": self.encoding, "agreement": self.agreement, "plain": self.plain_step,
        }  # fmt: skip
        if self.meter.cuda:
            torch.cuda.empty_cache()
        if variant in measures:
            return measures[variant]()
        return self.our_step(set(variant.split("+")[1:]))

    # --- what variants share --------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Any:
        if self._adapters is None:
            family = self.family
            self._adapters = add_adapters(family.transformer, self.settings.lora, family.lora_targets, seed=0)
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

    def switch(self, checkpointing: bool = False, nocast: bool = False) -> None:
        """Set both, on every layer: casts are peft's default, whatever the project has made of it."""
        transformer = self.family.transformer
        transformer.enable_gradient_checkpointing() if checkpointing else transformer.disable_gradient_checkpointing()
        for module in transformer.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = not nocast

    def optimizer_step(self, step: Step) -> Callable[[], tuple[Tensor, Tensor]]:
        """As the training loop has it: roll-out, clipping, AdamW, the teacher's average. Gives loss and norm."""
        settings, adapters = self.settings, self.adapters
        parameters = adapters.student_parameters()
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )

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
            "first_step_seconds": first, "seconds": seconds, "loss": loss, "gradient_norm": norm,
        }  # fmt: skip

    # --- steps ----------------------------------------------------------------------------------------------------

    def our_step(self, options: set[str]) -> Row:
        self.switch("checkpointing" in options, "nocast" in options)
        if "compile" not in options:
            return self.timed(self._ours())
        from torch._dynamo import config
        from torch._dynamo.utils import counters

        config.recompile_limit = 64  # one graph per adapter, length and kind of block: the default of 8 gives up
        counters.clear()
        self.family.transformer.compile_repeated_blocks()
        row = self.timed(self._ours())
        row["compile_seconds"] = row["first_step_seconds"] - row["seconds_per_step"]
        breaks = sum(counters["graph_break"].values())
        return row | {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}

    def _ours(self) -> Step:
        return ours(self.predict, self.adapters, self.sigmas, self.encodings)

    def plain_step(self) -> Row:
        self.switch(checkpointing=True)
        return self.timed(plain(self.predict, self.adapters, self.sigmas, self.encode))

    def agreement(self) -> Row:
        """Ours and plain from the same noise and the plain encoders' encodings: loss and gradients."""
        self.switch(checkpointing=True)
        made, noise, parameters = self.encode(), self.noise(), self.adapters.student_parameters()
        losses, gradients = {}, {}
        for name, kind in (("ours", ours), ("plain", plain)):
            step = kind(self.predict, self.adapters, self.sigmas, lambda: made)
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

        self.switch(nocast=True)
        (prompts, contexts), x, sigma = self.encodings(), self.noise(), self.sigmas[0]
        counters = {name: FlopCounterMode(display=False) for name in ("teacher", "student", "backward")}
        with self.adapters.select("teacher"), torch.no_grad(), counters["teacher"]:
            target = self.predict(x, sigma, contexts)
        with self.adapters.select("student"):
            with counters["student"]:
                loss = F.mse_loss(self.predict(x, sigma, prompts), target)
            with counters["backward"]:
                loss.backward()
        for parameter in self.adapters.student_parameters():
            parameter.grad = None
        row = {f"{name}_tflop": counter.get_total_flops() / 1e12 for name, counter in counters.items()}
        return row | {"step_tflop": self.settings.rollout_steps * sum(row.values())}

    def profile(self) -> Row:
        """One step of ``ours+nocast``: milliseconds by group of kernels; the 25 longest go to ``profile.txt``."""
        from torch.profiler import ProfilerActivity

        self.switch(nocast=True)
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
        self.switch()
        (prompts, _), side, steps = self.encodings(), self.side, self.family.few_steps
        stages = []
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.family.dtype == torch.bfloat16)
        for what, region in (("under autocast", half), ("without autocast", nullcontext())):
            with self.adapters.select("student"), region:
                sample(self.family, prompts, 1, side, side, self.noise())
                with self.meter.stage(stages, f"sample 1 picture, {steps} steps, adapter, {what}"):
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
        for package in ("transformers", "diffusers", "peft", "accelerate", "triton"):
            try:
                row[package] = version(package)
            except PackageNotFoundError:
                row[package] = ""
        if cuda:
            seen = torch.cuda.get_device_properties(0)
            row |= {"card": seen.name, "memory_bytes": seen.total_memory, "multiprocessors": seen.multi_processor_count}
            row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver()}
        return row


def kernel_table(totals: dict[str, list[float]], wall: float, path: Path) -> Row:
    """Groups and shares of ``name -> [ms, calls]``, and how much of the step's time kernels ran."""
    whole = sum(ms for ms, _ in totals.values()) or 1.0
    groups: dict[str, list[float]] = {name: [0.0, 0] for name, _ in _GROUPS} | {"other": [0.0, 0]}
    placed = {}
    for name, (ms, calls) in totals.items():
        group = next((g for g, pattern in _GROUPS if re.search(pattern, name.lower())), "other")
        placed[name] = group
        groups[group][0] += ms
        groups[group][1] += calls
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])
    lines = [f"one optimizer step, {wall:.3f} s; kernels {whole / 1e3:.3f} s", ""]
    lines += [f"{ms:10.1f} ms {ms / whole:6.1%} {calls:8.0f} x  {group}" for group, (ms, calls) in groups.items()]
    lines += ["", "the 25 longest"]
    lines += [f"{ms:10.1f} ms {ms / whole:6.1%} {n:8.0f} x  [{placed[k]}] {k[:160]}" for k, (ms, n) in ranked[:25]]
    for group in groups:  # what the patterns may have put wrongly can be seen
        lines += ["", f"the longest of: {group}"]
        found = [(k, v) for k, v in ranked if placed[k] == group][:8]
        lines += [f"{ms:10.1f} ms {n:8.0f} x  {k[:160]}" for k, (ms, n) in found]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "wall_seconds": wall, "kernel_seconds": whole / 1e3, "busy_share": whole / 1e3 / wall,
        "groups": {k: {"ms": ms, "share": ms / whole, "calls": int(n)} for k, (ms, n) in groups.items()},
        "longest": [{"ms": ms, "calls": int(n), "name": k[:160], "group": placed[k]} for k, (ms, n) in ranked[:25]],
    }  # fmt: skip


class Meter:
    """Time and memory of a GPU; on a CPU the process's clock and resident pages."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long it takes, what it left running on the device included."""
        self._sync()
        started = time.perf_counter()
        work()
        self._sync()
        return time.perf_counter() - started

    def median(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """Seconds of short work, each repeat between two events of the device."""
        started = time.perf_counter()
        while time.perf_counter() - started < 0.3:  # an idle card needs a while to raise its clocks
            work()
            self._sync()
        if not self.cuda:
            return statistics.median(self.seconds(work) for _ in range(repeats))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in marks:
            before.record()
            work()
            after.record()
        self._sync()
        return statistics.median(before.elapsed_time(after) for before, after in marks) / 1e3

    def reset(self) -> int:
        """Start a new peak; what is resident now."""
        if self.cuda:
            self._sync()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5", encoding="utf-8")
        return _pages("VmRSS")

    def peak(self) -> int:
        """The most since :meth:`reset`."""
        return torch.cuda.max_memory_allocated() if self.cuda else _pages("VmHWM")

    @contextmanager
    def stage(self, into: list[Row], what: str) -> Iterator[None]:
        """Add a row about the work inside the block."""
        resident = self.reset()
        started = time.perf_counter()
        yield
        self._sync()
        seconds = time.perf_counter() - started
        into.append({"what": what, "seconds": seconds, "resident_bytes": resident, "peak_bytes": self.peak()})

    def _sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def _pages(name: str) -> int:
    """A line of Linux's own account of this process; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
