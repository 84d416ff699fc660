"""One small, resumable training loop for the stages of the base build.

The build has its own loop because its stages train whole modules from scratch on data made on the fly; the product's
trainer tunes adapters on a data set. State is safetensors and JSON, written atomically; a killed build continues.
Several processes (``torchrun``) draw the same batches, each works on its share, and gradients are added up.
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
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dopsd.train.parallel import exchange

from .muon import Muon

MUON_RATE = 2.5
"""Muon's learning rate, in AdamW's."""


def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    state = PartialState()
    return state.process_index, state.num_processes


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
    rates: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, dict[str, Tensor]]:
    """Minimise ``loss_fn(step, generator)`` over the parameters of ``modules``; return their (averaged) weights.

    The learning rate warms up, then follows a cosine to 3 % over ``steps`` or ``max_minutes``, whichever is further
    along; ``rates`` are factors of it by module. The optimizer is AdamW, and Muon at :data:`MUON_RATE` times the rate
    for the matrices ``muon`` (by the names ``MODULE/PARAMETER``). ``loss_fn`` is the mean over this process's share.
    ``ema`` keeps a float32 average whose decay ramps up as (1 + t) / (10 + t). The loss runs in bfloat16 autocast where
    the processor or the accelerator multiplies it natively.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params = {f"{m}/{k}": p for m, module in modules.items() for k, p in module.named_parameters() if p.requires_grad}
    device = next(iter(params.values())).device
    groups = [
        {"params": [p for k, p in params.items() if k.startswith(f"{m}/") and k not in muon], "rate": rates.get(m, 1)}
        for m in modules
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    ]
    if muon:
        optimizers.append(Muon([{"params": list(muon.values()), "rate": MUON_RATE}], lr=lr, weight_decay=weight_decay))
    accelerator = Accelerator(cpu=device.type == "cpu")
    optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    average = {k: p.detach().clone().float() for k, p in params.items()} if ema else {}
    generator = torch.Generator().manual_seed(seed)
    state_file = folder / f"{name}.state.safetensors"
    step, spent = _resume(state_file, params, average, optimizer_of, generator)
    started = saved = time.monotonic()
    smooth = math.nan
    log = (folder / f"{name}.jsonl").open("a", encoding="utf-8")
    main = accelerator.is_main_process
    bar = tqdm(total=steps, initial=step, desc=name, mininterval=10, disable=not main)
    elapsed = spent
    while step < steps and elapsed < max_minutes:
        progress = max(step / steps, elapsed / max_minutes)
        rate = lr * min(1, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            optimizer.zero_grad(set_to_none=True)
        with fast_math(device):
            part = loss_fn(step, generator) / accelerator.num_processes
            part.backward()
        minutes = spent + (time.monotonic() - started) / 60
        sums, elapsed = exchange(accelerator, list(params.values()), {"loss": part.detach()}, minutes)
        loss = sums["loss"]
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if not math.isfinite(loss):
            raise RuntimeError(f"{name}: the loss is {loss} at step {step}")
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in params.values()], 1 - decay)
        step += 1
        smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        bar.update()
        if main and step % 50 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
            log.write(json.dumps({"step": step, "loss": smooth, "minutes": round(elapsed, 3)}) + "\n")
            log.flush()
        if main and time.monotonic() - saved > 60 * save_minutes:
            _save(state_file, params, average, optimizer_of, generator, step, elapsed)
            saved = time.monotonic()
    bar.close()
    log.close()
    if main:
        _save(state_file, params, average, optimizer_of, generator, step, elapsed)
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
