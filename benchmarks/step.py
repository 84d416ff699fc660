"""Seconds and memory of one D-OPSD training step, ours against the published algorithm written plainly.

    python benchmarks/step.py                 # on emoji-turbo; writes docs/benchmarks/step.json
    python benchmarks/step.py --runs 5 --steps 10

Plainly: the encoders (the pipeline's own ``encode_prompt``, the VLM) run on the batch in every step, the targets are
encoded by the VAE (for their shape, as the recipe does), and one backward follows the K steps of the roll-out. Ours:
encodings come from the cache and each step of the roll-out is back-propagated at once. Both draw the same noise and end
with the same gradients (their norm is in the output). Ours also has what the family chooses for a CPU, unfused
attention. Each measurement is a process of its own, the two alternate, and
what is compared are ratios of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks" / "step.json"


def main() -> None:
    """Run both variants in turn and write the medians, spreads and ratios."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=3, help="processes per variant (default 3)")
    arguments.add_argument("--steps", type=int, default=5, help="timed steps in each, after one untimed (default 5)")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--one", choices=("ours", "plain"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.steps, given.batch)))
        return
    results: dict[str, list[dict]] = {"ours": [], "plain": []}
    for run in range(given.runs):
        for variant in ("ours", "plain"):
            command = [sys.executable, __file__, "--one", variant, "--steps", str(given.steps)]
            done = subprocess.run(
                [*command, "--batch", str(given.batch)], capture_output=True, encoding="utf-8", check=True
            )
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"run {run + 1}/{given.runs}, {variant}: {results[variant][-1]}", flush=True)
    report = summarise(results, given)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['speed_ratio']:.2f}x the plain speed, {report['peak_ratio']:.2f}x its peak growth -> {OUT}")


def summarise(results: dict[str, list[dict]], given: argparse.Namespace) -> dict:
    """Medians over the processes, and the two ratios that the project promises."""
    seconds = {k: statistics.median(r["seconds_per_step"] for r in v) for k, v in results.items()}
    peak = {k: statistics.median(r["peak_growth_mib"] for r in v) for k, v in results.items()}
    import torch

    return {
        "command": f"python benchmarks/step.py --runs {given.runs} --steps {given.steps} --batch {given.batch}",
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "torch": torch.__version__,
                    "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "seconds_per_step": seconds,
        "peak_growth_mib": peak,
        "speed_ratio": seconds["plain"] / seconds["ours"],
        "peak_ratio": peak["ours"] / peak["plain"],
        "runs": results,
    }  # fmt: skip


def measure(variant: str, steps: int, batch: int) -> dict[str, float]:
    """Seconds per step, peak memory growth over the loaded model, and the gradient norm, in this process."""
    import torch
    from PIL import Image

    from dopsd.config import LoraSettings, load_settings
    from dopsd.distill.adapters import add_adapters
    from dopsd.models import load_family

    settings = load_settings(ROOT / "params.yaml")
    family = load_family(settings.model, ROOT)
    adapters = add_adapters(family.transformer, LoraSettings(), family.lora_targets, seed=0)
    parameters = adapters.student_parameters()
    folder = ROOT / "data" / "concepts" / "style-ink"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()][:batch]
    captions = [row["captions"]["short"] for row in rows]
    images = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
    side = settings.data.resolution
    sigmas = family.sigmas(4, side, side).to(family.device)
    step = {"ours": ours, "plain": plain}[variant](family, adapters, captions, images, sigmas)
    before = _memory(reset=True)
    generator = torch.Generator().manual_seed(0)
    norms = []
    for number in range(steps + 1):
        if number == 1:
            started = time.perf_counter()
        noise = family.initial_latents(batch, side, side, generator)
        step(noise)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        for parameter in parameters:
            parameter.grad = None
    return {
        "seconds_per_step": (time.perf_counter() - started) / steps,
        "peak_growth_mib": (_memory() - before) / 2**20,
        "gradient_norm": norms[-1],
    }


def ours(family, adapters, captions, images, sigmas):
    """The product's own roll-out on encodings made once."""
    from dopsd.distill.rollout import rollout
    from dopsd.models.base import Request

    requests = [Request(caption) for caption in captions]
    prompts, contexts = family.encode_prompt(requests), family.encode_context(requests, images)
    family.release_encoders()

    def step(noise):
        rollout(family.predict_velocity, adapters, noise, sigmas, prompts, contexts, teacher="teacher")

    return step


def plain(family, adapters, captions, images, sigmas):
    """Everything in every step, one backward at its end."""
    import torch
    import torch.nn.functional as F
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    from dopsd.models.base import Request

    vae = family.parts["vae_decoder"]
    parts = {name: family.parts[name] for name in ("scheduler", "text_encoder", "tokenizer", "transformer")}
    pipeline = ZImagePipeline(vae=vae, **parts)
    requests = [Request(caption) for caption in captions]
    family.transformer.reset_attention_backend()  # the library's default, as published code has it

    @torch.no_grad()
    def encode_prompt():
        states, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        return [{"caption": state} for state in states]

    def step(noise):
        prompts = encode_prompt()
        contexts = family.encode_context(requests, images)
        x = torch.empty_like(family.encode_images(images)).copy_(noise)
        losses = []
        for sigma, sigma_next in pairwise(sigmas):
            with adapters.select("teacher"), torch.no_grad():
                target = family.predict_velocity(x, sigma, contexts)
            with adapters.select("student"):
                u = family.predict_velocity(x, sigma, prompts)
            losses.append(F.mse_loss(u, target))
            x = (x + (sigma_next - sigma) * u).detach()
        with adapters.select("student"):
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
