"""Adapters: which layers, who is selected, the float32 average, and files."""

import pytest
import torch

from dopsd.config import LoraSettings, load_settings
from dopsd.distill.adapters import (
    AdapterError,
    adapter_applied,
    adapter_parameters,
    add_adapters,
    linear_layers,
    load_adapter,
    match_targets,
    save_adapter,
)
from tests import tiny
from tests.tiny_project import ROOT

LORA = LoraSettings(rank=4)


def _randomise(pair, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pair.student_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def _velocity(family, seed=0):
    noise = family.initial_latents(2, tiny.SIDE, tiny.SIDE, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return family.predict_velocity(noise, torch.tensor(0.9), tiny.tiny_prompts(2))


# --- which layers


def test_every_pattern_of_the_family_matches_in_every_block(family):
    matched = match_targets(family.transformer, family.lora_targets)
    assert {pattern: len(names) for pattern, names in matched.items()} == dict.fromkeys(family.lora_targets, 4)
    attention = {n for n in linear_layers(family.transformer) if "attention" in n or "feed_forward" in n}
    assert {name for names in matched.values() for name in names} == attention


def test_the_shipped_settings_adapt_all_that_reads_the_caption_and_nothing_that_denoises(family):
    targets = load_settings(ROOT / "params.yaml").train.lora.targets
    adapted = [name for names in match_targets(family.transformer, targets).values() for name in names]
    refiner = family.transformer.context_refiner
    inner = [f"context_refiner.{name}" for name in linear_layers(refiner)]
    assert sorted(adapted) == sorted(inner)


@pytest.mark.parametrize(
    "lost", ["to_qto_k", r"ff\.net\.0", "o_q"], ids=["a missing comma", "another model's name", "half a name"]
)
def test_a_pattern_that_matches_nothing_is_named(family, lost):
    with pytest.raises(AdapterError, match="to_v") as error:
        add_adapters(family.transformer, LoraSettings(rank=4, targets=(r"to_v", lost)), (), seed=0)
    assert repr(lost) in str(error.value)
    assert "'to_v' " not in str(error.value)
    assert not [n for n, _ in family.transformer.named_parameters() if "lora" in n]


def test_a_pattern_that_is_no_expression_is_named(family):
    with pytest.raises(AdapterError, match=r"to_\[ab.*regular expression"):
        match_targets(family.transformer, (r"to_[ab",))


def test_only_the_targets_are_adapted_and_the_counts_are_logged(family, caplog):
    with caplog.at_level("INFO"):
        pair = add_adapters(family.transformer, LoraSettings(rank=2, targets=(r"layers\.1\.attention\.to_q",)), (), 0)
    assert list(adapter_parameters(family.transformer, "student")) == [
        "layers.1.attention.to_q.lora_A.weight",
        "layers.1.attention.to_q.lora_B.weight",
    ]
    assert "matches 1 layers" in caplog.text
    pair.remove()
    assert not [n for n, _ in family.transformer.named_parameters() if "lora" in n]


# --- who is selected


def test_the_start_is_the_base_and_depends_on_the_seed_alone(family):
    base = _velocity(family)
    starts = []
    for seed, noise in ((0, 1), (0, 2), (1, 3)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        pair = add_adapters(family.transformer, LORA, family.lora_targets, seed)
        assert torch.equal(torch.get_rng_state(), before)
        for name in ("student", "teacher", None):
            with pair.select(name):
                assert torch.equal(_velocity(family), base)
        starts.append(pair.state_dict())
        pair.remove()
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert not all(torch.equal(starts[0][key], starts[2][key]) for key in starts[0])


def test_each_selection_gives_its_own_answer_and_restores_the_one_before(family):
    base = _velocity(family)
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0)
    _randomise(pair)
    student = _velocity(family)
    assert not torch.equal(student, base)
    with pair.select("teacher"):
        assert torch.equal(_velocity(family), base)
        with pair.select(None):
            assert torch.equal(_velocity(family), base)
        with pair.select("student"):
            assert torch.equal(_velocity(family), student)
        assert pair.selected == "teacher"
    assert pair.selected == "student"
    assert torch.equal(_velocity(family), student)


def test_only_the_student_is_ever_trainable(family):
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0)

    def trainable():
        return {name for name, p in family.transformer.named_parameters() if p.requires_grad}

    for name in ("student", "teacher", None, "student", None, "teacher"):
        with pair.select(name):
            assert not [n for n in trainable() if ".student." not in n]
    expected = {id(p) for p in adapter_parameters(family.transformer, "student").values()}
    assert {id(p) for p in pair.student_parameters()} == expected
    assert {id(p) for _, p in family.transformer.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize("kind", ["ema", "frozen", "copy"])
def test_teacher_kinds(family, kind):
    base = _velocity(family)
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0, kind=kind)
    _randomise(pair)
    student = _velocity(family)
    with pair.select(pair.teacher):
        answer = _velocity(family)
    assert torch.equal(answer, student if kind == "copy" else base)
    pair.update(0.5)
    with pair.select(pair.teacher):
        moved = not torch.equal(_velocity(family), answer)
    assert moved == (kind == "ema")


# --- the average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_a_float64_reference_over_1000_steps(family, dtype):
    """bfloat16 adapters too: averaged in bfloat16 they would not have moved at all."""
    targets = LoraSettings(rank=4, targets=(r"layers\.0\.attention\.to_q",))
    pair = add_adapters(family.transformer, targets, (), seed=0, dtype=dtype)
    key = "teacher/layers.0.attention.to_q.lora_B.weight"
    student = adapter_parameters(family.transformer, "student")["layers.0.attention.to_q.lora_B.weight"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        student.copy_(torch.randn(student.shape, generator=generator))
        pair.load_state_dict({k: v + 1 if k.startswith("teacher") else v for k, v in pair.state_dict().items()})
        reference, stalled = pair.state_dict()[key].double(), pair.state_dict()[key].bfloat16()
        start = reference.clone()
        for _ in range(1000):
            student.add_(0.01 * torch.randn(student.shape, generator=generator))
            pair.update(0.9999)
            reference = 0.9999 * reference + (1 - 0.9999) * student.double()
            stalled = stalled.lerp(student.bfloat16(), 1 - 0.9999)
    master = pair.state_dict()[key]
    moved = (reference - start).abs().mean()
    assert master.dtype == torch.float32
    assert (master.double() - reference).abs().max() < 1e-4 * moved
    assert (stalled.double() - start).abs().mean() < 0.2 * moved
    live = adapter_parameters(family.transformer, "teacher")["layers.0.attention.to_q.lora_B.weight"]
    assert live.dtype == dtype
    assert torch.equal(live, master.to(dtype))


# --- files


@pytest.mark.parametrize("alpha", [None, 10.0])
def test_a_saved_adapter_loads_to_the_identical_output(family, tmp_path, alpha):
    settings = LoraSettings(rank=4, alpha=alpha)
    pair = add_adapters(family.transformer, settings, family.lora_targets, seed=0)
    _randomise(pair)
    trained = _velocity(family)
    path = save_adapter(tmp_path / "new" / "a.safetensors", family.transformer, "student", settings)
    pair.remove()
    base = _velocity(family)
    other = tiny.tiny_family()
    with adapter_applied(other.transformer, path):
        assert torch.equal(_velocity(other), trained)
        assert not [n for n, p in other.transformer.named_parameters() if p.requires_grad]
    assert torch.equal(_velocity(other), base)
    assert not torch.equal(trained, base)
    with adapter_applied(other.transformer, None):
        assert torch.equal(_velocity(other), base)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_base_as_it_was(family, tmp_path):
    add_adapters(family.transformer, LORA, (r"layers\.1\.attention\.to_q",), seed=0)
    path = save_adapter(tmp_path / "a.safetensors", family.transformer, "student", LORA)
    other = tiny.tiny_family().transformer
    other.layers[1] = torch.nn.Identity()
    with pytest.raises(AdapterError, match=r"layers\.1\.attention\.to_q.*wrong base"):
        load_adapter(other, path, "x")
    wider = tiny.tiny_family().transformer
    wider.layers[1].attention.to_q = torch.nn.Linear(48, 32)
    with pytest.raises(AdapterError, match="does not fit"):
        load_adapter(wider, path, "x")
    assert not [n for n, _ in wider.named_parameters() if "lora" in n]


def test_a_file_that_is_no_adapter_is_one_clear_line(family, tmp_path):
    with pytest.raises(AdapterError, match="no such adapter"):
        load_adapter(family.transformer, tmp_path / "none.safetensors", "x")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_adapter(family.transformer, tmp_path / "broken.safetensors", "x")
