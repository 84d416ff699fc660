"""One small, resumable training loop for the stages of the base build.

The build has its own loop because its stages train whole modules from scratch on data made on the fly; the product's
trainer tunes adapters on a data set. State is safetensors and JSON, written atomically; a killed build continues.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .muon import Muon

MUON_RATE = 2.5
"""Muon's learning rate, in AdamW's."""


def train(
    name: str,
    folder: Path,
    modules: Mapping[str, nn.Module],
    loss_fn: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    warmup: int = 50,
    ema: float | None = None,
    seed: int = 0,
    max_minutes: float = math.inf,
    save_minutes: float = 3.0,
    weight_decay: float = 0.01,
    muon: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> dict[str, dict[str, Tensor]]:
    """Minimise ``loss_fn(step, generator)`` over the parameters of ``modules``; return their (averaged) weights.

    The learning rate warms up, then follows a cosine to 3 % over ``steps`` or ``max_minutes``, whichever is further
    along. The optimizer is AdamW, and Muon at :data:`MUON_RATE` times the rate for the matrices ``muon`` (by the names
    ``MODULE/PARAMETER``). ``ema`` keeps a float32 average whose decay ramps up as (1 + t) / (10 + t). The loss runs in
    bfloat16 autocast where the processor or the accelerator multiplies it natively.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params = {f"{m}/{k}": p for m, module in modules.items() for k, p in module.named_parameters() if p.requires_grad}
    device = next(iter(params.values())).device
    others = [p for key, p in params.items() if key not in muon]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    ]
    if muon:
        optimizers.append(Muon(muon.values(), lr=MUON_RATE * lr, weight_decay=weight_decay))
    optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    average = {k: p.detach().clone().float() for k, p in params.items()} if ema else {}
    generator = torch.Generator().manual_seed(seed)
    state_file = folder / f"{name}.state.safetensors"
    step, spent = _resume(state_file, params, average, optimizer_of, generator)
    started = saved = time.monotonic()
    smooth = math.nan
    log = (folder / f"{name}.jsonl").open("a")
    bar = tqdm(total=steps, initial=step, desc=name, mininterval=10)
    while step < steps and spent + (time.monotonic() - started) / 60 < max_minutes:
        elapsed = spent + (time.monotonic() - started) / 60
        progress = max(step / steps, elapsed / max_minutes)
        rate = lr * min(1, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (MUON_RATE if isinstance(optimizer, Muon) else 1)
            optimizer.zero_grad(set_to_none=True)
        with fast_math(device):
            loss = loss_fn(step, generator)
            loss.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if not torch.isfinite(loss):
            raise RuntimeError(f"{name}: the loss is {loss.item()} at step {step}")
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in params.values()], 1 - decay)
        step += 1
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
            log.write(json.dumps({"step": step, "loss": smooth, "minutes": round(elapsed, 3)}) + "\n")
            log.flush()
        if time.monotonic() - saved > 60 * save_minutes:
            _save(state_file, params, average, optimizer_of, generator, step, spent + (time.monotonic() - started) / 60)
            saved = time.monotonic()
    bar.close()
    log.close()
    _save(state_file, params, average, optimizer_of, generator, step, spent + (time.monotonic() - started) / 60)
    weights: dict[str, dict[str, Tensor]] = {}
    for m, module in modules.items():
        weights[m] = {k: v.detach().clone() for k, v in module.state_dict().items()}
        for k in weights[m]:
            if f"{m}/{k}" in average:
                weights[m][k] = average[f"{m}/{k}"].clone()
    return weights


@contextlib.contextmanager
def fast_math(device: torch.device) -> Iterator[None]:
    """bfloat16 autocast where it pays; on a CPU also plain attention, whose backward is several times faster than the
    fused kernel's for sequences this short (a quarter of a whole training step)."""
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)), attention:
        yield


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are fast: always on CUDA; on a CPU only with AVX-512 BF16 (else 100 times slower)."""
    if device.type == "cuda":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _save(
    path: Path,
    params: Mapping[str, nn.Parameter],
    average: Mapping[str, Tensor],
    optimizer_of: Mapping[nn.Parameter, torch.optim.Optimizer],
    generator: torch.Generator,
    step: int,
    minutes: float,
) -> None:
    tensors = {f"param/{k}": p.detach().cpu().contiguous() for k, p in params.items()}
    tensors |= {f"ema/{k}": v.cpu().contiguous() for k, v in average.items()}
    for name, p in params.items():
        for key, value in optimizer_of[p].state[p].items():
            tensors[f"optimizer/{name}/{key}"] = value.detach().cpu().contiguous()
    tensors["generator"] = generator.get_state()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "minutes": str(minutes)})
    partial.replace(path)


def _resume(
    path: Path,
    params: Mapping[str, nn.Parameter],
    average: Mapping[str, Tensor],
    optimizer_of: Mapping[nn.Parameter, torch.optim.Optimizer],
    generator: torch.Generator,
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as handle:
        meta = handle.metadata()
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[f"param/{name}"])
            prefix = f"optimizer/{name}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            optimizer_of[p].state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
        for name, v in average.items():
            v.copy_(tensors[f"ema/{name}"])
    generator.set_state(tensors["generator"])
    return int(meta["step"]), float(meta["minutes"])
