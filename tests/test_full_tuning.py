"""Full fine-tuning against a plain loop in float32, broken-off runs, and what cannot be trained is refused."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dopsd import identity
from dopsd.config import SettingsError, load_settings
from dopsd.config.groups import TrainSettings
from dopsd.data.dataset import BucketSampler
from dopsd.models.base import Family
from tests import tiny

ROOT = Path(__file__).parent.parent
FULL: dict[str, Any] = {
    "tune": "full", "max_steps": 5, "batch_size": 2, "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 1,
    "betas": (0.8, 0.95), "weight_decay": 0.3, "clip_norm": 0.5, "rollout_steps": 3, "checkpoint_steps": 5,
    "teacher": {"decay": 0.7, "guidance": 1.7, "gain_images": 1}, "replay": {"weight": 3.0, "prompts": ["x"]},
    "methods": ["d-opsd"], "sft_compute_factor": 1.0,
}  # fmt: skip
REFINER = (r"context_refiner\.\d+\.attention\.to_q", r"layers\.0\.feed_forward\.w[13]")


def full(**changes: Any) -> TrainSettings:
    """:data:`FULL` with some settings changed, the teacher's one by one."""
    teacher = FULL["teacher"] | changes.pop("teacher", {})
    return TrainSettings.model_validate(FULL | changes | {"teacher": teacher})


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "train" / "checkpoints").iterdir())[-1] / "tensors.safetensors")


# --- the plain loop ---------------------------------------------------------------------------------------------------


def plain_loop(s: TrainSettings, method: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of student and EMA at the end, of three models beside each other, by torch's own optimizer."""
    base, student, teacher = tiny.tiny_family(), tiny.tiny_family(), tiny.tiny_family()
    examples, replay = tiny.tiny_examples(), tiny.tiny_prompts()
    theta = {
        name: parameter.requires_grad_()
        for name, parameter in student.transformer.named_parameters()
        if s.lora.targets is None or name.startswith(("context_refiner.0.attention.to_q", "layers.0.feed_forward.w1",
                                                      "layers.0.feed_forward.w3"))
    }  # fmt: skip
    optimizer = torch.optim.AdamW(theta.values(), s.learning_rate, s.betas, weight_decay=s.weight_decay, foreach=False)
    draw = torch.Generator().manual_seed(s.seed)
    batches = BucketSampler([(e.height, e.width) for e in examples], s.batch_size, s.seed)
    sigmas = [3 * u / (1 + 2 * u) for u in torch.linspace(1, 1 / s.rollout_steps, s.rollout_steps).tolist()] + [0.0]
    shows = {"ema": teacher, "frozen": base, "copy": student}[s.teacher.kind or "ema"]

    def roll_out(x: torch.Tensor, told: Any, shown: Any, who: Family, guidance: float) -> Any:
        loss: Any = 0.0
        for sigma, after in pairwise(sigmas):
            level = torch.as_tensor(sigma)
            with torch.no_grad():
                target = who.predict_velocity(x, level, [shown])
                target = target + (guidance - 1) * (target - who.predict_velocity(x, level, [told]))
            mine = student.predict_velocity(x, level, [told])
            loss = loss + (mine - target).square().mean() / s.rollout_steps
            x = (x + (after - sigma) * mine).detach()
        return loss

    for step in range(1, s.max_steps + 1):
        loss, turns = 0.0, []
        for index in next(batches):
            noise = student.initial_latents(1, 64, 64, draw)
            uniform = float(torch.rand(1, generator=draw)) if method == "sft" else 0.0
            if s.replay.weight:
                old = int(torch.randint(len(replay), (1,), generator=draw))
                turns.append((examples[index], noise, uniform, replay[old], student.initial_latents(1, 64, 64, draw)))
            else:
                turns.append((examples[index], noise, uniform, None, noise))
        for e, noise, uniform, old_prompt, other in turns:
            if method == "sft":
                level = 3 * uniform / (1 + 2 * uniform)
                mine = student.predict_velocity(
                    (1 - level) * e.latents + level * noise, torch.tensor(level), [e.prompt]
                )
                loss = loss + (mine - (noise - e.latents)).square().mean() / len(turns)
            else:
                loss = loss + roll_out(noise, e.prompt, e.context, shows, s.teacher.guidance) / len(turns)
            if s.replay.weight:
                loss = loss + s.replay.weight * roll_out(other, old_prompt, old_prompt, base, 1.0) / len(turns)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theta.values(), s.clip_norm)
        place = (step - 1 - s.warmup_steps) / (s.max_steps - s.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * place))
        optimizer.param_groups[0]["lr"] = s.learning_rate * (1.0 if step <= s.warmup_steps else shape)
        optimizer.step()
        if step % s.teacher.every == 0:
            average = dict(teacher.transformer.named_parameters())
            keep = s.teacher.decay**s.teacher.every
            for name, parameter in theta.items():
                average[name].data = keep * average[name].data + (1 - keep) * parameter.data
    averaged = dict(teacher.transformer.named_parameters())
    return {name: value.detach() for name, value in theta.items()}, {name: averaged[name].data for name in theta}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("d-opsd", {}),
        ("d-opsd", {"teacher": {"weights": "cpu"}}),
        ("d-opsd", {"teacher": {"every": 2}}),
        ("d-opsd", {"teacher": {"every": 2, "weights": "cpu"}, "replay": {"weight": 0.0}}),
        ("d-opsd", {"teacher": {"kind": "frozen", "weights": "cpu"}, "replay": {"weight": 0.0}}),
        ("d-opsd", {"teacher": {"kind": "copy", "guidance": 1.0}, "replay": {"weight": 0.0}}),
        ("d-opsd", {"lora": {"targets": REFINER}}),
        ("sft", {}),
    ],
)
def test_the_trainer_ends_where_the_plain_loop_ends(tmp_path: Path, method: Any, changes: dict[str, Any]) -> None:
    settings = full(**copy.deepcopy(changes))
    tiny.run_tiny(method, tmp_path, settings)
    trained, state = load_file(tmp_path / "adapters" / f"{method}.safetensors"), _state(tmp_path)
    student, teacher = plain_loop(settings, method)
    start = dict(tiny.tiny_family().transformer.named_parameters())
    assert trained.keys() == student.keys()
    kinds = {"student": (trained, student)}
    averaged = {key.removeprefix("teacher/"): value for key, value in state.items() if key.startswith("teacher/")}
    assert bool(averaged) == (method == "d-opsd" and settings.teacher.kind in (None, "ema"))
    if averaged:
        kinds["teacher"] = averaged, teacher
    for who, (ours, theirs) in kinds.items():
        errors = {
            key: float((ours[key] - value).norm() / way)
            for key, value in theirs.items()
            if (way := float((value - start[key]).norm())) > 0
        }
        assert len(errors) == len(theirs) - sum(torch.equal(ours[k], start[k]) for k in ours), who
        # single layers with next to no gradient feel float32's rounding most: Adam makes steps of equal size of it
        assert sorted(errors.values())[len(errors) // 2] < 1e-3, (who, errors)
        assert max(errors.values()) < 3e-2, (who, errors)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [{"every": 2}, {"weights": "cpu"}], ids=str)
def test_a_broken_off_run_ends_bit_for_bit_where_the_unbroken_one_does(tmp_path: Path, teacher: dict[str, Any]) -> None:
    settings = full(max_steps=6, checkpoint_steps=3, teacher=teacher)
    tiny.run_tiny("d-opsd", tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path / "cut", settings, tiny.Cut(5))
    tiny.run_tiny("d-opsd", tmp_path / "cut", settings)
    whole, cut = _state(tmp_path / "whole"), _state(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert not [key for key in whole if not torch.equal(whole[key], cut[key])]


def test_where_the_weights_wait_changes_no_bit(tmp_path: Path) -> None:
    for where in ("device", "cpu"):
        tiny.run_tiny("d-opsd", tmp_path / where, full(teacher={"weights": where}))
    there, here = _state(tmp_path / "device"), _state(tmp_path / "cpu")
    assert there.keys() == here.keys()
    assert not [key for key in there if not torch.equal(there[key], here[key])]


def test_moments_in_a_byte_train_and_resume_too(tmp_path: Path) -> None:
    settings = full(optimizer="adamw-8bit", max_steps=4, checkpoint_steps=2)
    tiny.run_tiny("d-opsd", tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path / "cut", settings, tiny.Cut(3))
    tiny.run_tiny("d-opsd", tmp_path / "cut", settings)
    whole, cut = _state(tmp_path / "whole"), _state(tmp_path / "cut")
    assert {value.dtype for key, value in whole.items() if key.endswith("state1")} >= {torch.uint8}
    assert not [key for key in whole if not torch.equal(whole[key], cut[key])]


def test_a_checkpoint_holds_each_thing_once(tmp_path: Path) -> None:
    tiny.run_tiny("d-opsd", tmp_path, full(max_steps=1))
    count = sum(p.numel() for p in tiny.tiny_family().transformer.parameters())
    large = {key: value for key, value in _state(tmp_path).items() if "/" in key and value.ndim and "random" not in key}
    sums = {kind: sum(v.numel() for k, v in large.items() if k.startswith(kind)) for kind in ("student", "teacher")}
    assert sums == {"student": count, "teacher": count}
    assert {value.dtype for value in large.values()} == {torch.float32}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("z-image-turbo", ("train.tune=full", "model.quantization=int8"), "train.tune: full trains the base's own"),
        ("z-image-turbo", ("train.tune=full", "model.offload=group", "model.gradient_checkpointing=every"),
         "train.tune: full trains the base's own"),
        ("z-image-turbo", ("train.tune=full", "compute.sharded=true"), "train.tune: full trains the base's own"),
        ("z-image-turbo", ("train.teacher.weights=cpu",), "train.teacher.weights: cpu is for train.tune: full"),
        ("z-image-turbo", ("train.tune=full", "train.teacher.weights=cpu", "model.compile=true"),
         "weights: cpu changes blocks; leave model.compile false"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_one_line(recipe: str, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        load_settings(ROOT / "recipes" / f"{recipe}.yaml", overrides)
    assert "\n" not in str(caught.value)


def test_a_concepts_own_settings_are_held_to_the_models(tmp_path: Path) -> None:
    settings = load_settings(ROOT / "recipes" / "z-image-turbo.yaml", ("model.quantization=int8",))
    own = tmp_path / "data" / "concepts" / "fox" / "train.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("tune: full\n")
    with pytest.raises(SettingsError, match=r"train\.yaml.*train\.tune: full trains the base's own weights"):
        settings.of("fox", tmp_path)


def test_only_what_decides_is_in_an_identity() -> None:
    def made(**changes: Any) -> str:
        return identity.training_identity(full(**changes), "d-opsd", "common")

    same = made()
    assert made(teacher={"weights": "cpu"}) == same
    assert made(lora={"rank": 3, "alpha": 7.0, "kind": "dora", "init": "gaussian"}) == same
    others = {made(tune="adapter"), made(teacher={"every": 2}), made(lora={"targets": ["to_q"]}), same}
    assert len(others) == 4
    adapter = identity._deciding(tiny.tiny_settings(), "d-opsd")
    assert not {"tune", "every", "weights"} & {*adapter, *adapter["teacher"]}, "what was trained before stays as it is"


def test_the_file_says_what_it_is_and_the_run_what_it_trains(tmp_path: Path) -> None:
    seen = tiny.Recorder()
    tiny.run_tiny("d-opsd", tmp_path, full(max_steps=1), seen)
    with safe_open(tmp_path / "adapters" / "d-opsd.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "dopsd-full"}
    assert any("the transformer's own weights, 363,680 of them" in text for text in seen.messages)
    assert json.loads((tmp_path / "adapters" / "d-opsd.json").read_text())["settings"]["tune"] == "full"
