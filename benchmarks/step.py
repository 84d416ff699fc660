"""Seconds and memory of one D-OPSD training step, ours against the published algorithm written plainly.

    OMP_NUM_THREADS=2 python benchmarks/step.py                 # on emoji-turbo; writes docs/benchmarks/step.json
    OMP_NUM_THREADS=2 python benchmarks/step.py --runs 5 --steps 10

Plainly: the encoders (the pipeline's own ``encode_prompt``, the VLM) run on the batch in every step, the targets are
encoded by the VAE (for their shape, as the recipe does), peft's own ``set_adapter`` switches between student and
teacher, and one backward follows the K steps of the roll-out, as in the authors' released code. Ours: encodings come
from the cache, each step of the roll-out is back-propagated at once, the adapters are the project's (the teacher's
merged where the model is small), and attention is what the family chooses for a CPU, unfused. ``plain-shared`` is
plainly with our adapters: what the other differences make alone.

All draw the same noise and end with the same gradients (their norm is in the output). Each measurement is a process of
its own, they alternate, and what is compared are ratios of one run. Two more processes say what a step of ours is made
of (``parts``), and what memory it takes for K = 1 to 8: every tensor that is alive is counted (``memory``).

On a machine that others use too, ``--cpu-time`` with one thread measures the process's own time instead of the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks" / "step.json"
VARIANTS = ("ours", "plain", "plain-shared")
_KERNELS = (
    ("matrix products", r"mm$"),
    ("element-wise, norms, sums", r"mul|add|sub|div|pow|sum|mean|sqrt|silu|softmax|neg|tanh|exp|where|all|square|fill"
                                  r"|zero|lerp|adam|norm|sin|cos|lt|eq|mse|ones"),
    ("copies", r"copy|cat$|clone"),
)  # fmt: skip
"""What takes time by itself, by the ends of operators' names; the rest is Python, autograd and views."""


def main() -> None:
    """Run the variants in turn and write the medians, spreads and ratios."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=3, help="processes per variant (default 3)")
    arguments.add_argument("--steps", type=int, default=5, help="timed steps in each, after one untimed (default 5)")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--cpu-time", action="store_true", help="of the process, in one thread, not of the clock")
    arguments.add_argument("--out", type=Path, default=OUT)
    arguments.add_argument("--one", choices=(*VARIANTS, "parts", "memory"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.cpu_time and os.environ.get("OMP_NUM_THREADS") != "1":
        arguments.error("--cpu-time counts threads that wait for each other: set OMP_NUM_THREADS=1")
    if given.one:
        work = {"parts": parts, "memory": memory}.get(given.one)
        print(json.dumps(work(given) if work else measure(given)))
        return

    def one(what: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--one", what, "--steps", str(given.steps), "--batch", str(given.batch)]
        command += ["--cpu-time"] * given.cpu_time
        load = os.getloadavg()[0]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        print(what, done.stdout.splitlines()[-1], flush=True)
        said = json.loads(done.stdout.splitlines()[-1])
        return said if what == "memory" else said | {"load_before": round(load, 2)}

    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(given.runs):
        for variant in VARIANTS:
            results[variant].append(one(variant))
    report = summarise(results, given) | {"parts": one("parts"), "memory": one("memory")}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(tables(report)))


def summarise(results: dict[str, list[dict[str, Any]]], given: argparse.Namespace) -> dict[str, Any]:
    """Medians over the processes, and the two ratios that the project promises."""
    seconds = {k: statistics.median(r["seconds_per_step"] for r in v) for k, v in results.items()}
    peak = {k: statistics.median(r["peak_growth_mib"] for r in v) for k, v in results.items()}
    import torch

    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "command": (f"OMP_NUM_THREADS={threads} " if threads else "")
        + f"python benchmarks/step.py --runs {given.runs} --steps {given.steps} --batch {given.batch}"
        + " --cpu-time" * given.cpu_time,
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "torch": torch.__version__,
                    "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "seconds_per_step": seconds,
        "peak_growth_mib": peak,
        "speed_ratio": seconds["plain"] / seconds["ours"],
        "speed_ratio_shared": seconds["plain-shared"] / seconds["ours"],
        "peak_ratio": peak["ours"] / peak["plain"],
        "runs": results,
    }  # fmt: skip


def tables(report: dict[str, Any]) -> list[str]:
    """What docs/benchmarks.md shows of it."""
    rows = ["| | seconds per step, median (range) | over ours, pair by pair | peak growth, MiB |", "|---|---|---|---|"]
    ours = [run["seconds_per_step"] for run in report["runs"]["ours"]]
    for variant, runs in report["runs"].items():
        seconds = [run["seconds_per_step"] for run in runs]
        ratios = ", ".join(f"{ratio:.2f}" for ratio in sorted(s / o for s, o in zip(seconds, ours, strict=True)))
        rows.append(
            f"| {variant} | {report['seconds_per_step'][variant]:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
            f"| {'' if variant == 'ours' else ratios} | {report['peak_growth_mib'][variant]:.0f} |"
        )
    whole = report["parts"]["whole_ms"]
    for title in ("by kind", "by phase"):
        rows += ["", f"| {title} | ms | share |", "|---|---|---|"]
        rows += [f"| {name} | {ms:.0f} | {ms / whole:.0%} |" for name, ms in report["parts"][title].items()]
        rows += [f"| whole optimizer step | {whole:.0f} | 100% |"]
    counts = {name: found["peak_mib"] for name, found in report["memory"].items()}
    numbers = list(next(iter(counts.values())))
    rows += ["", f"| peak, MiB, for K = | {' | '.join(numbers)} |", "|---|" + "---|" * len(numbers)]
    return rows + [
        f"| {name} | {' | '.join(f'{mib:.1f}' for mib in peaks.values())} |" for name, peaks in counts.items()
    ]


def _set_up(batch: int) -> tuple[Any, ...]:
    """Family, adapters, captions, images, and the side of the pictures."""
    from PIL import Image

    from dopsd.config import load_settings
    from dopsd.config.groups import LoraSettings
    from dopsd.distill.adapters import add_adapters
    from dopsd.models import load_family

    settings = load_settings(ROOT / "params.yaml")
    family = load_family(settings.model, ROOT)
    adapters = add_adapters(family.transformer, LoraSettings(), family.lora_targets, seed=0)
    folder = ROOT / "data" / "concepts" / "style-ink"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()][:batch]
    captions = [row["captions"]["short"] for row in rows]
    images = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
    return family, adapters, captions, images, settings.data.resolution


def _clock(given: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if given.cpu_time else time.perf_counter


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Seconds per step, peak memory growth over the loaded model, and the gradient norm, in this process."""
    import torch

    variant, steps, batch, clock = given.one, given.steps, given.batch, _clock(given)
    family, adapters, captions, images, side = _set_up(batch)
    parameters = adapters.student_parameters()
    sigmas = family.sigmas(4, side, side).to(family.device)
    if variant == "ours":
        step = ours(family, adapters, captions, images, sigmas)
    else:
        step = plain(family, adapters, captions, images, sigmas, shared=variant == "plain-shared")
    before = _memory(reset=True)
    generator = torch.Generator().manual_seed(0)
    norms = []
    for number in range(steps + 1):
        if number == 1:
            started = clock()
        noise = family.initial_latents(batch, side, side, generator)
        step(noise)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        for parameter in parameters:
            parameter.grad = None
    return {
        "seconds_per_step": (clock() - started) / steps,
        "peak_growth_mib": (_memory() - before) / 2**20,
        "gradient_norm": norms[-1],
    }


def parts(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of an optimizer step of ours: by kind of work, over its floor, and by phase.

    The floor is what the counted operations of teacher's forward, student's forward and backward take at the rate of
    large products. Kinds are from the profiler; phases and the whole are timed without it. The fastest of the steps
    counts, because others on the machine only make it slower.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dopsd.config.groups import TrainSettings
    from dopsd.train.optimizer import make_optimizer

    family, adapters, captions, images, side = _set_up(given.batch)
    parameters, sigmas = adapters.student_parameters(), family.sigmas(4, side, side).to(family.device)
    settings = TrainSettings(max_steps=1, batch_size=given.batch, learning_rate=1e-4)
    clock = _clock(given)
    optimizer = make_optimizer(settings, parameters, family.device)
    noise = family.initial_latents(given.batch, side, side, torch.Generator().manual_seed(0))
    phases: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        started = clock()
        made = work(*arguments)
        phases[name] = phases.get(name, 0.0) + 1e3 * (clock() - started)
        return made

    def predict(*arguments: Any) -> torch.Tensor:
        who = "student's forward" if torch.is_grad_enabled() else "teacher's forward"
        return timed(who, family.velocity, *arguments)

    def backward(loss: torch.Tensor) -> None:
        timed("backward", loss.backward)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    roll = ours(family, adapters, captions, images, sigmas, predict, backward)

    def step() -> None:
        roll(noise)
        timed("clipping and optimizer", update)
        timed("the teacher's average", adapters.update, settings.teacher.decay)

    step()
    found: list[tuple[float, dict[str, float]]] = []
    for _ in range(given.steps):
        phases = {}
        started = clock()
        step()
        found.append((1e3 * (clock() - started), phases))
    phases = {}
    whole, by_phase = min(found, key=lambda entry: entry[0])
    with FlopCounterMode(display=False) as counter:
        roll(noise)
    optimizer.zero_grad(set_to_none=True)
    kinds = _kinds(step, given.steps)
    rate = _product_rate()
    floor = 1e3 * counter.get_total_flops() / rate
    products = kinds.pop("matrix products")
    by_kind = {"floor": floor, "matrix products beyond it": products - floor, **kinds}
    return {
        "whole_ms": whole, "gflop": counter.get_total_flops() / 1e9, "product_gflop_per_second": rate / 1e9,
        "by kind": by_kind | {"Python, autograd and views": whole - products - sum(kinds.values())},
        "by phase": by_phase | {"switching and the rest": whole - sum(by_phase.values())},
    }  # fmt: skip


def _kinds(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Milliseconds of a step by kind of work. All steps make the same operations: of each the fastest one counts."""
    import torch

    seen: list[dict[str, list[float]]] = []
    for _ in range(steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
        seen.append({})
        for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
            seen[-1].setdefault(event.name, []).append(event.self_cpu_time_total / 1e3)
    kinds = dict.fromkeys((name for name, _ in _KERNELS), 0.0)
    for name in seen[0]:
        operator = name.removeprefix("aten::")
        kind = next((kind for kind, pattern in _KERNELS if re.search(pattern, operator)), None)
        if kind is not None and operator != name:
            kinds[kind] += sum(map(min, zip(*(step[name] for step in seen), strict=True)))
    return kinds


def _product_rate(size: int = 512) -> float:
    """Operations per second of a product of large matrices in float32, the fastest of many."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(300):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def memory(given: argparse.Namespace) -> dict[str, Any]:
    """The most bytes alive at once of gradients and all else that a roll-out makes, for each number of its steps: where
    it is the first of an optimizer step, before which there are no gradients, and where they are there."""
    import gc

    import torch

    from dopsd.sizing.counter import Counter

    torch.set_num_threads(1)  # nothing is timed
    family, adapters, captions, images, side = _set_up(given.batch)
    steps = {k: ours(family, adapters, captions, images, family.sigmas(k, side, side)) for k in range(1, 9)}
    noise = family.initial_latents(given.batch, side, side, torch.Generator().manual_seed(0))
    steps[1](noise)  # tables are made once
    found = {}
    for name, there in (("first of a step", False), ("with gradients there", True)):
        peaks = {}
        for number, step in steps.items():
            if not there:
                for parameter in adapters.student_parameters():
                    parameter.grad = None
            gc.collect()
            with Counter() as counter:
                for parameter in adapters.student_parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(1)  # what is touched is counted
                step(noise)
            peaks[str(number)] = counter.peak / 2**20
        found[name] = {"peak_mib": peaks, "spread": max(peaks.values()) / min(peaks.values()) - 1}
    return found


def ours(
    family: Any, adapters: Any, captions: Any, images: Any, sigmas: Any, predict: Any = None, backward: Any = None
) -> Callable[[Any], None]:
    """The product's own roll-out on encodings made once."""
    import torch

    from dopsd.distill.rollout import rollout
    from dopsd.models.base import Request

    requests = [Request(caption) for caption in captions]
    prompts, contexts = family.encode_prompt(requests), family.encode_context(requests, images)
    family.release_encoders()

    def step(noise: Any) -> None:
        rollout(
            predict or family.velocity, adapters, noise, sigmas, prompts, contexts, teacher="teacher",
            backward=backward or torch.Tensor.backward,
        )  # fmt: skip

    return step


def plain(
    family: Any, adapters: Any, captions: Any, images: Any, sigmas: Any, shared: bool = False
) -> Callable[[Any], None]:
    """Everything in every step, one backward at its end; peft's own adapters, or, ``shared``, ours."""
    import torch
    import torch.nn.functional as F
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    from dopsd.models.base import Request

    transformer = family.transformer
    select = adapters._activate if shared else transformer.set_adapter
    if not shared:
        for layer in adapters._layers:
            del layer.forward  # peft's own is the class's

    vae = family.parts["vae_decoder"]
    parts = {name: family.parts[name] for name in ("scheduler", "text_encoder", "tokenizer", "transformer")}
    pipeline = ZImagePipeline(vae=vae, **parts)
    requests = [Request(caption) for caption in captions]
    transformer.reset_attention_backend()  # the library's default, as published code has it

    @torch.no_grad()
    def encode_prompt() -> Any:
        states, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        return [{"caption": state} for state in states]

    def step(noise: Any) -> None:
        prompts = encode_prompt()
        contexts = family.encode_context(requests, images)
        x = torch.empty_like(family.encode_images(images)).copy_(noise)
        losses = []
        for sigma, sigma_next in pairwise(sigmas):
            select("teacher")
            with torch.no_grad():
                target = family.predict_velocity(x, sigma, contexts)
            select("student")
            u = family.predict_velocity(x, sigma, prompts)
            losses.append(F.mse_loss(u, target))
            x = (x + (sigma_next - sigma) * u).detach()
        torch.stack(losses).mean().backward()

    return step


def _memory(reset: bool = False) -> int:
    """Peak bytes so far: of the accelerator, or of this process (Linux: resettable; elsewhere since its start)."""
    import torch

    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    clear = Path("/proc/self/clear_refs")
    if reset and clear.exists():
        clear.write_text("5", encoding="utf-8")
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
