"""Full fine-tuning's pair and files: each answers with its own weights, the base comes back, files load."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dopsd.distill.adapters import AdapterError, adapter_applied
from dopsd.distill.rollout import rollout
from dopsd.distill.weights import holds_weights, train_weights
from dopsd.models import load_family
from dopsd.models.base import Family, Request
from dopsd.models.quantized import blocks_of
from tests import tiny
from tests.family_folders import NAMES, settings_of

REFINER = (r"context_refiner\.\d+\.attention\.to_q", r"layers\.0\.feed_forward\.w[13]")


def _answer(family: Family) -> torch.Tensor:
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return family.velocity(noise, torch.tensor(0.8), tiny.tiny_prompts(1))


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
