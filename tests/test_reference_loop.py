"""The trainer against the method written down plainly: one loop, without peft, accelerate or checkpoints.

Everything that a setting promises is in it: guidance, the x0 loss, replay by the frozen base beside either method, the
schedule, betas and decay, clipping, the EMA, flow matching at the grid's shifted levels. A trainer that ignores one of
them ends elsewhere.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dopsd.config.groups import TrainSettings
from dopsd.data.dataset import BucketSampler
from tests import tiny

FULL = {
    "max_steps": 4, "batch_size": 2, "learning_rate": 3e-3, "warmup_steps": 2, "schedule": "cosine", "loss": "x0",
    "betas": (0.8, 0.95), "weight_decay": 0.3, "clip_norm": 0.05, "rollout_steps": 3, "checkpoint_steps": 4,
    "lora": {"rank": 4, "alpha": 6.0}, "teacher": {"decay": 0.7, "guidance": 1.7, "gain_images": 1},
    "replay": {"weight": 3.0, "prompts": ["x"]}, "methods": ["d-opsd"], "sft_compute_factor": 1.0,
}  # fmt: skip


class PlainLora:
    """Two adapters by forward hooks; ``active`` is the one whose products are added, ``None`` for the base."""

    def __init__(self, family, rank: int, alpha: float, seed: int) -> None:
        endings = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
        self.layers = {
            name: module
            for name, module in sorted(family.transformer.named_modules())
            if isinstance(module, torch.nn.Linear) and name.endswith(endings)
        }
        draw = torch.Generator().manual_seed(seed)
        self.student = {}
        for name, layer in self.layers.items():
            bound = layer.in_features**-0.5
            a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=draw)
            self.student[name] = [a, torch.zeros(layer.out_features, rank)]
        self.teacher = copy.deepcopy(self.student)
        self.active, self.scale = None, alpha / rank
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda _, args, out, name=name: self.add(name, args[0], out))

    def add(self, name, x, out):
        if self.active is None:
            return out
        a, b = self.active[name]
        return out + self.scale * F.linear(F.linear(x, a), b)


def reference(s: TrainSettings, method: str) -> tuple[PlainLora, list[dict[str, float]]]:
    """The adapters at the end, and what the log has to say of each step."""
    family, examples, replay = tiny.tiny_family(), tiny.tiny_examples(), tiny.tiny_prompts()
    lora = PlainLora(family, s.lora.rank, s.lora.alpha or s.lora.rank, s.seed)
    theta = [tensor.requires_grad_() for pair in lora.student.values() for tensor in pair]
    moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in theta]
    draw = torch.Generator().manual_seed(s.seed)
    batches = BucketSampler([(e.height, e.width) for e in examples], s.batch_size * s.accumulation, s.seed)
    rows = []
    sigmas = [3 * u / (1 + 2 * u) for u in torch.linspace(1, 1 / s.rollout_steps, s.rollout_steps).tolist()] + [0.0]

    def u(x, sigma, told, who):
        lora.active = who
        return family.predict_velocity(x, torch.as_tensor(sigma), [told])

    def roll_out(x, told, shown, who, guidance):
        loss = 0.0
        for sigma, after in pairwise(sigmas):
            with torch.no_grad():
                target = u(x, sigma, shown, who)
                target = target + (guidance - 1) * (target - u(x, sigma, told, who))
            mine = u(x, sigma, told, lora.student)
            weight = sigma**2 if s.loss == "x0" else 1.0
            loss = loss + weight * (mine - target).square().mean() / s.rollout_steps
            x = (x + (after - sigma) * mine).detach()
        return loss

    for step in range(1, s.max_steps + 1):
        loss, kept, turns = 0.0, 0.0, []
        for index in next(batches):
            noise = family.initial_latents(1, 64, 64, draw)
            uniform = float(torch.rand(1, generator=draw)) if method == "sft" else 0.0
            old = int(torch.randint(len(replay), (1,), generator=draw)) if s.replay.weight else 0
            other = family.initial_latents(1, 64, 64, draw) if s.replay.weight else noise
            turns.append((examples[index], noise, uniform, replay[old], other))
        for e, noise, uniform, old, other in turns:
            if method == "sft":
                level = 3 * uniform / (1 + 2 * uniform)
                mine = u((1 - level) * e.latents + level * noise, level, e.prompt, lora.student)
                loss = loss + (mine - (noise - e.latents)).square().mean()
            else:
                loss = loss + roll_out(noise, e.prompt, e.context, lora.teacher, s.teacher.guidance)
            if s.replay.weight:
                kept = kept + roll_out(other, old, old, None, 1.0)
        grads = torch.autograd.grad((loss + s.replay.weight * kept) / len(turns), theta)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        warm = step / s.warmup_steps if step <= s.warmup_steps else None
        place = (step - 1 - s.warmup_steps) / (s.max_steps - s.warmup_steps)
        shape = {"constant": 1.0, "linear": 1 - place, "cosine": 0.5 * (1 + math.cos(math.pi * place))}[s.schedule]
        rate = s.learning_rate * (warm if warm is not None else shape)
        rows.append({"train/loss": float(loss.detach()) / len(turns), "train/grad_norm": float(norm)})
        rows[-1]["train/learning_rate"] = rate
        if s.replay.weight:
            rows[-1]["train/replay_loss"] = float(kept.detach()) / len(turns)
        with torch.no_grad():
            for tensor, g, (m, v) in zip(theta, grads, moments, strict=True):
                g = g * min(1.0, s.clip_norm / (float(norm) + 1e-6))
                m.lerp_(g, 1 - s.betas[0])
                v.lerp_(g * g, 1 - s.betas[1])
                tensor *= 1 - rate * s.weight_decay
                tensor -= rate * (m / (1 - s.betas[0] ** step)) / ((v / (1 - s.betas[1] ** step)).sqrt() + 1e-8)
            for mine, theirs in zip(lora.student.values(), lora.teacher.values(), strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    b.lerp_(a, 1 - s.teacher.decay)
    return lora, rows


@pytest.mark.parametrize(
    ("method", "changes"),
    [("d-opsd", {}), ("d-opsd", {"loss": "velocity", "schedule": "linear", "replay": {"weight": 0.0}}),
     ("d-opsd", {"teacher": {"decay": 0.7, "guidance": 1.0}, "clip_norm": 1e9, "weight_decay": 0.0}),
     ("d-opsd", {"batch_size": 2, "accumulation": 2, "max_steps": 2, "warmup_steps": 3, "rollout_steps": 2}),
     ("sft", {}), ("sft", {"loss": "velocity"}),
     ("sft", {"replay": {"weight": 0.0}, "schedule": "constant", "warmup_steps": 0, "clip_norm": 1e9})],
)  # fmt: skip
def test_the_trainer_ends_where_the_plain_loop_ends(tmp_path, method, changes):
    settings = TrainSettings.model_validate(FULL | changes | {"methods": [method]})
    seen = tiny.Recorder()
    tiny.run_tiny(method, tmp_path, settings, seen)
    trained = load_file(tmp_path / "adapters" / f"{method}.safetensors")
    plain, rows = reference(settings, method)
    logged = [row for step, row in zip(seen.steps, seen.values, strict=True) if step]
    for step, (ours, theirs) in enumerate(zip(logged[: settings.max_steps], rows, strict=True)):
        del ours["train/images_per_second"], ours["train/seconds"]
        assert ours == pytest.approx(theirs, rel=1e-4 if step == 0 else 1e-2), f"step {step + 1}"
    kept = load_file(sorted((tmp_path / "train" / "checkpoints").iterdir())[-1] / "tensors.safetensors")
    start = PlainLora(tiny.tiny_family(), settings.lora.rank, settings.lora.alpha or 0.0, settings.seed).student
    students, teachers = [], []
    for name, pair in plain.student.items():
        for part in (0, 1):
            key = f"{name}.lora_{'AB'[part]}.weight"
            students.append(error(trained[key], pair[part], start[name][part]))
            if method == "d-opsd":
                teachers.append(error(kept[f"teacher/{key}"], plain.teacher[name][part], start[name][part]))
    for errors in filter(None, (students, teachers)):
        # single layers with next to no gradient feel float32's rounding most: Adam makes steps of equal size of it
        assert sorted(errors)[len(errors) // 2] < 1e-3, errors
        assert max(errors) < 2e-2, errors


def error(ours: torch.Tensor, theirs: torch.Tensor, start: torch.Tensor) -> float:
    """The difference as a share of what training moved."""
    return float((ours - theirs).detach().norm() / (theirs - start).detach().norm())
