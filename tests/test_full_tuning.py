"""Full fine-tuning against a plain loop in float32, and its promises: the base comes back, files load, refusals."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dopsd import identity
from dopsd.config import SettingsError, TrainSettings, load_settings
from dopsd.data.dataset import BucketSampler
from dopsd.distill.adapters import AdapterError, adapter_applied
from dopsd.distill.rollout import rollout
from dopsd.distill.weights import holds_weights, train_weights
from dopsd.models import load_family
from dopsd.models.base import Family, Request
from dopsd.models.quantized import blocks_of
from tests import tiny
from tests.family_folders import NAMES, settings_of

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


def _answer(family: Family) -> torch.Tensor:
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return family.velocity(noise, torch.tensor(0.8), tiny.tiny_prompts(1))


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


# --- the pair ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waiting", ["device", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_each_answers_with_its_own_weights_and_the_base_comes_back(
    folders: dict[str, Path], name: str, dtype: str, waiting: Any
) -> None:
    """Of every family, beside a bfloat16 base too: all weights learn, and the base answers as ever while they do."""
    family = load_family(settings_of(name, folders, dtype=dtype))
    (prompt,) = family.encode_prompt([Request("a fox")])
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(2))

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return family.velocity(noise, torch.tensor(0.8), [prompt])

    own = list(family.transformer.named_parameters())
    before, hooks, base = [p.clone() for _, p in own], _hooks(family.transformer), answer()
    pair = train_weights(family.transformer, None, "ema", waiting)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.1, "atol": 0.1 * float(base.abs().max())}
    torch.testing.assert_close(answer(), base, **close)
    state = pair.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    parameters = pair.student_parameters()
    assert len(parameters) == len(own)
    tiny.moved(parameters)
    rollout(family.velocity, pair, noise, family.sigmas(2, 64, 64), [prompt], [prompt], teacher=None)
    unmoved = [
        key
        for (key, _), p in zip(own, parameters, strict=True)
        if p.grad is None or not p.grad.abs().max() > 0 or not p.grad.isfinite().all()
    ]
    assert not unmoved
    student = answer()
    with pair.select("teacher"):
        torch.testing.assert_close(answer(), base, **close)
    pair.update(0.5)
    with pair.select("teacher"):
        teacher = answer()
        with pair.select(None):
            # the same bits of weights; a product's last bit depends on where in memory they begin
            assert all(torch.equal(p, b) for p, b in zip(family.transformer.parameters(), before, strict=True))
            torch.testing.assert_close(answer(), base, rtol=1e-5, atol=1e-5)
        assert torch.equal(answer(), teacher)
    assert torch.equal(answer(), student)
    assert not torch.equal(student, base)
    assert not torch.equal(teacher, base)
    assert not torch.equal(teacher, student)
    pair.remove()
    after = list(family.transformer.named_parameters())
    assert all(a is b and n == m for (n, a), (m, b) in zip(after, own, strict=True))
    assert all(torch.equal(a, b) and not a.requires_grad for (_, a), b in zip(after, before, strict=True))
    assert _hooks(family.transformer) == hooks
    assert torch.equal(answer(), base)


def _hooks(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())


def test_weights_that_wait_are_on_the_device_a_block_at_a_time() -> None:
    """Looked at from within every block, as it computes: its own are copies, all others' are those that wait."""
    family = tiny.tiny_family()
    pair = train_weights(family.transformer, None, "ema", "cpu")
    blocks, seen = blocks_of(family.transformer), []
    assert len(blocks) > 3

    def look(number: int) -> None:
        waiting = {id(value) for value in (*pair._teacher.values(), *pair._base.values())}
        seen.append([any(id(p) in waiting for p in block.parameters()) for block in blocks])
        assert seen[-1] == [other != number for other in range(len(blocks))]
        within = {id(p) for block in blocks for p in block.parameters()}
        outside = [p for p in family.transformer.parameters() if id(p) not in within]
        assert outside
        assert not {id(p) for p in outside} & waiting

    for number, block in enumerate(blocks):
        first = next(child for child in block.modules() if isinstance(child, nn.Linear))
        first.register_forward_hook(lambda *_, number=number: look(number))
    for who in ("teacher", None):
        with pair.select(who):
            _answer(family)
    assert len(seen) == 2 * len(blocks)
    for block in blocks:  # the student's own stay
        assert {id(p) for p in block.parameters()} <= {id(p) for p in pair.student_parameters()}


def test_a_frozen_teacher_has_no_weights_and_a_pattern_must_match() -> None:
    family = tiny.tiny_family()
    pair = train_weights(family.transformer, REFINER, "frozen")
    assert pair.teacher is None
    assert sorted(len(names) for names in pair.matched.values()) == [1, 2]
    assert len(pair.student_parameters()) == 3, "a query, and two of the feed-forward's three"
    with pytest.raises(AdapterError, match="no weights of a teacher: the teacher is 'frozen'"), pair.select("teacher"):
        pass
    pair.remove()
    with pytest.raises(AdapterError, match="'nothing' matches no linear layer"):
        train_weights(family.transformer, ("nothing",))


def test_a_parameter_in_two_places_is_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    model = Tied().requires_grad_(False)
    pair = train_weights(model, None)
    assert list(pair.state_dict()) == [f"{who}/{key}" for who in ("student", "teacher")
                                       for key in ("first.weight", "first.bias", "second.bias")]  # fmt: skip
    for who in ("student", "teacher", None):
        with pair.select(who):
            assert model.first.weight is model.second.weight


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def student(tmp_path: Path) -> tuple[Family, Path, torch.Tensor, torch.Tensor]:
    """A family, a file of weights trained on it, what they answer, and what the base does."""
    family = tiny.tiny_family()
    base = _answer(family)
    pair = train_weights(family.transformer, None)
    tiny.moved(pair.student_parameters())
    trained = _answer(family)
    path = pair.save(tmp_path / "student.safetensors")
    pair.remove()
    return family, path, trained, base


def test_a_file_loads_to_the_identical_output_and_the_base_comes_back(student: Any) -> None:
    family, path, trained, base = student
    own = {name: (parameter, parameter.clone()) for name, parameter in family.transformer.named_parameters()}
    for ends in (nullcontext(), pytest.raises(RuntimeError, match="in the middle")):
        with ends, adapter_applied(family.transformer, path):
            assert torch.equal(_answer(family), trained)
            if not isinstance(ends, nullcontext):
                raise RuntimeError("in the middle")
        assert torch.equal(_answer(family), base)
        after = dict(family.transformer.named_parameters())
        assert all(after[name] is kept and torch.equal(kept, value) for name, (kept, value) in own.items())
    assert not holds_weights(path.with_name("none.safetensors"))


def test_beside_a_bfloat16_base_a_file_is_half_and_the_rounded_student(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    family = load_family(settings_of("flux2-klein", folders, dtype="bfloat16"))
    pair = train_weights(family.transformer, None, "frozen")
    tiny.moved(pair.student_parameters(), 1e-3)
    names = [name for name, _ in family.transformer.named_parameters()]
    expected = dict(zip(names, (p.detach().bfloat16() for p in pair.student_parameters()), strict=True))
    path = pair.save(tmp_path / "student.safetensors")
    pair.remove()
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == torch.bfloat16 for key, value in expected.items())
    with adapter_applied(family.transformer, path):
        assert all(torch.equal(p, expected[name]) for name, p in family.transformer.named_parameters())


def test_a_file_that_does_not_fit_is_refused_and_the_base_stays(student: Any, folders: dict[str, Path]) -> None:
    family, path, _, base = student
    tensors = load_file(path)
    for change in ({"other.weight": torch.zeros(2)}, {"layers.0.attention.to_q.weight": torch.zeros(2, 2)}):
        save_file(tensors | change, path, metadata={"format": "dopsd-full"})
        with (
            pytest.raises(AdapterError, match=f"{next(iter(change))} does not fit the base; wrong base model"),
            adapter_applied(family.transformer, path),
        ):
            pass
        assert torch.equal(_answer(family), base)
    quantized = load_family(settings_of("z-image", folders, quantization="int8"))
    with (
        pytest.raises(AdapterError, match=r"take the place of plain weights: set model\.quantization to none"),
        adapter_applied(quantized.transformer, path),
    ):
        pass


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
