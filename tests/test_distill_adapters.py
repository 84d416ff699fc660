"""Adapters: which layers, who is selected, and the float32 average."""

import warnings

import pytest
import torch

from dopsd.config import load_settings
from dopsd.config.groups import LoraSettings
from dopsd.distill import adapters
from dopsd.distill.adapters import (
    AdapterError,
    AdapterPair,
    adapted_layers,
    adapter_parameters,
    add_adapters,
    linear_layers,
    match_targets,
    remove_adapters,
)
from tests import tiny
from tests.tiny_project import ROOT

LORA = LoraSettings(rank=4)


def randomise(pair, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pair.student_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def velocity(family, seed=0):
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


def test_a_pattern_that_matches_nothing_is_told_what_there_is():
    """The layers' endings: what comes before the first number, and the number, say nothing."""
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"to_q": torch.nn.Linear(1, 1)}) for _ in range(2))
    inner = torch.nn.ModuleDict({"parts": torch.nn.ModuleList([torch.nn.Linear(1, 1)]), "head": torch.nn.Linear(1, 1)})
    model = torch.nn.ModuleDict({"blocks": blocks, "top": torch.nn.ModuleDict({"all": torch.nn.ModuleList([inner])})})
    with pytest.raises(AdapterError) as error:
        match_targets(model, ("to_q", "to_k", "to_v"))
    assert str(error.value) == (
        "lora.targets: 'to_k', 'to_v' matches no linear layer of the transformer; it has head, parts.0, to_q"
    )
    with pytest.raises(AdapterError, match="empty"):
        match_targets(model, ())


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
    assert [record.getMessage() for record in caplog.records if record.name == "dopsd.distill.adapters"] == [
        r"LoRA target layers\.1\.attention\.to_q matches 1 layers"
    ]
    pair.remove()
    assert not [n for n, _ in family.transformer.named_parameters() if "lora" in n]


# --- who is selected


def test_the_start_is_the_base_and_depends_on_the_seed_alone(family):
    base = velocity(family)
    starts = []
    for seed, noise in ((0, 1), (0, 2), (1, 3)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        pair = add_adapters(family.transformer, LORA, family.lora_targets, seed)
        assert torch.equal(torch.get_rng_state(), before)
        for name in ("student", "teacher", None):
            with pair.select(name):
                assert torch.equal(velocity(family), base)
        starts.append(pair.state_dict())
        pair.remove()
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert not all(torch.equal(starts[0][key], starts[2][key]) for key in starts[0])


@pytest.mark.parametrize(("init", "rank"), [("kaiming", 3), ("gaussian", 3), ("gaussian", 5)])
def test_the_start_is_drawn_as_the_settings_say(family, init, rank):
    """Uniform within one over the root of the fan in, or normal with deviation one over the rank; B is zero."""
    pair = add_adapters(family.transformer, LoraSettings(rank=rank, init=init), family.lora_targets, seed=9)
    generator = torch.Generator().manual_seed(9)
    for key, value in pair.state_dict().items():
        if key.startswith("teacher"):
            assert torch.equal(value, pair.state_dict()[key.replace("teacher", "student")])
        elif "lora_B" in key:
            assert not value.any()
        elif init == "gaussian":
            expected = torch.randn(value.shape, generator=generator) / rank
            torch.testing.assert_close(value, expected)
        else:
            expected = (2 * torch.rand(value.shape, generator=generator) - 1) / value.shape[1] ** 0.5
            torch.testing.assert_close(value, expected)


def test_a_second_adapter_is_no_warning_and_other_warnings_come_through(family, monkeypatch):
    add = family.transformer.add_adapter

    def adding(*args, **kwargs):
        warnings.warn("something else", stacklevel=1)
        return add(*args, **kwargs)

    monkeypatch.setattr(family.transformer, "add_adapter", adding)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        add_adapters(family.transformer, LORA, family.lora_targets, seed=0)
    assert [str(w.message) for w in caught] == ["something else"] * 2


def test_an_adapter_elsewhere_than_asked_is_refused(family):
    """peft takes names by their endings: where it finds more than the list says, nothing is trained."""
    inner = torch.nn.ModuleDict({"attention": torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2)})})
    family.transformer.outer = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"1": inner})})
    settings = LoraSettings(rank=2, targets=(r"^layers\.1\.attention\.to_q",))
    with pytest.raises(AdapterError, match=r"outer\.layers\.1\.attention\.to_q.*unambiguously"):
        add_adapters(family.transformer, settings, (), seed=0)


def test_each_selection_gives_its_own_answer_and_restores_the_one_before(family):
    base = velocity(family)
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0)
    randomise(pair)
    student = velocity(family)
    assert not torch.equal(student, base)
    with pair.select("teacher"):
        assert torch.equal(velocity(family), base)
        with pair.select(None):
            assert torch.equal(velocity(family), base)
        with pair.select("student"):
            assert torch.equal(velocity(family), student)
        assert pair.selected == "teacher"
    assert pair.selected == "student"
    assert torch.equal(velocity(family), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["merged", "two adapters"])
def test_only_the_student_is_ever_trainable(family, dtype):
    family.transformer.requires_grad_(True)
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0, dtype=dtype)

    def trainable():
        return {name for name, p in family.transformer.named_parameters() if p.requires_grad}

    for name in ("student", "teacher", None, "student", None, "teacher"):
        with pair.select(name):
            assert not [n for n in trainable() if ".student." not in n]
    expected = {id(p) for p in adapter_parameters(family.transformer, "student").values()}
    assert {id(p) for p in pair.student_parameters()} == expected
    assert {id(p) for _, p in family.transformer.named_parameters() if p.requires_grad} == expected


def _select_as_peft_does(layers, name):
    """peft's own calls, on every layer."""
    for layer in layers:
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter([name], inference_mode=name != "student")


@pytest.mark.parametrize("kind", ["ema", "frozen", "copy"])
def test_a_selection_is_to_the_layers_what_pefts_own_calls_are(monkeypatch, kind):
    """Their answers, flags and trainable parameters; also where nothing changes and after an exception."""
    monkeypatch.setattr(adapters, "_MERGED_PARAMETERS", 0)
    ours, theirs = tiny.tiny_family(), tiny.tiny_family()
    pairs = [add_adapters(f.transformer, LORA, f.lora_targets, seed=0, kind=kind) for f in (ours, theirs)]
    for pair in pairs:
        randomise(pair)
        pair.update(0.5)
        randomise(pair, seed=1)
    layers = [list(adapted_layers(f.transformer, "student").values()) for f in (ours, theirs)]

    def compare():
        flags = [[(layer.active_adapters, layer.disable_adapters) for layer in mine] for mine in layers]
        assert flags[0] == flags[1]
        trainable = [{n: p.requires_grad for n, p in f.transformer.named_parameters()} for f in (ours, theirs)]
        assert trainable[0] == trainable[1]
        assert torch.equal(velocity(ours), velocity(theirs))

    _select_as_peft_does(layers[1], "student")
    compare()
    names = ["student", "student", None, "student", None, None, "student"]
    if kind == "ema":
        names += ["teacher", "student", "teacher", None, "teacher", "teacher", "student"]

    def visit_and_fail(name):
        with pairs[0].select(name):
            for inner in dict.fromkeys(names):
                with pairs[0].select(inner):
                    _select_as_peft_does(layers[1], inner)
                    compare()
                _select_as_peft_does(layers[1], name)
                compare()
            raise ZeroDivisionError

    for name in names:
        with pytest.raises(ZeroDivisionError):
            visit_and_fail(name)
        _select_as_peft_does(layers[1], "student")
        compare()


@pytest.mark.parametrize("kind", ["ema", "frozen", "copy"])
def test_teacher_kinds(family, kind):
    base = velocity(family)
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0, kind=kind)
    randomise(pair)
    student = velocity(family)
    with pair.select(pair.teacher):
        answer = velocity(family)
    assert torch.equal(answer, student if kind == "copy" else base)
    pair.update(0.5)
    with pair.select(pair.teacher):
        moved = not torch.equal(velocity(family), answer)
    assert moved == (kind == "ema")


def test_the_base_comes_back_bit_for_bit_also_while_the_teacher_answers(family):
    before = {name: value.clone() for name, value in family.transformer.state_dict().items()}
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0)
    randomise(pair)
    pair.update(0.5)
    with pair.select("teacher"):
        pair.remove()
        after = family.transformer.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["frozen", "copy"])
def test_a_teacher_that_is_no_adapter_cannot_be_selected(family, kind):
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0, kind=kind)
    with pytest.raises(AdapterError, match=repr(kind)), pair.select("teacher"):
        raise AssertionError
    assert pair.selected == "student"


def test_adapters_are_removed_by_name_and_what_is_not_there_is_nothing_to_do(family):
    def present():
        return {n.split(".")[-2] for n, _ in family.transformer.named_parameters() if "lora_A" in n}

    base = velocity(family)
    remove_adapters(torch.nn.Linear(1, 1), ("student",))
    remove_adapters(family.transformer, ("student",))
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0)
    randomise(pair)
    assert present() == {"student", "teacher"}
    remove_adapters(family.transformer, ("absent",))
    assert present() == {"student", "teacher"}
    remove_adapters(family.transformer, ("student", "absent"))
    assert present() == {"teacher"}
    remove_adapters(family.transformer, ("student", "teacher", "absent"))
    assert present() == set()
    assert not [n for n, _ in family.transformer.named_modules() if "base_layer" in n]
    assert torch.equal(velocity(family), base)


def test_the_teacher_is_merged_up_to_a_size_and_in_float32_alone(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))  # 3 * 4 + 4 + 4 + 1
    for limit, merged in ((21, True), (20, False)):
        monkeypatch.setattr(adapters, "_MERGED_PARAMETERS", limit)
        assert adapters._merges(model) == merged
    monkeypatch.setattr(adapters, "_MERGED_PARAMETERS", 100)
    model[1].to(torch.bfloat16)
    assert not adapters._merges(model)


def test_the_merged_teacher_answers_as_its_adapter_does(family, monkeypatch):
    """The same products added up in another order, with a scale that is not 1; merged they are not worked out."""
    settings, answers = LoraSettings(rank=4, alpha=6), []
    for limit in (0, 10**9):
        monkeypatch.setattr(adapters, "_MERGED_PARAMETERS", limit)
        pair = add_adapters(family.transformer, settings, family.lora_targets, seed=0)
        randomise(pair)
        pair.update(0.25)
        calls: list[str] = []
        for layer in adapted_layers(family.transformer, "teacher").values():
            for name in ("student", "teacher"):
                layer.lora_A[name].register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
        with pair.select("teacher"):
            answers.append(velocity(family))
        assert calls == ["teacher"] * (0 if limit else len(adapted_layers(family.transformer, "teacher")))
        student = velocity(family)
        pair.remove()
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    assert (answers[0] - student).abs().max() > 1e-2


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_a_copy_and_puts_back_what_it_was_taken_of(family, dtype):
    pair = add_adapters(family.transformer, LORA, family.lora_targets, seed=0, dtype=dtype)
    randomise(pair)
    pair.update(0.5)
    state = pair.state_dict()
    kept, answers = {key: value.clone() for key, value in state.items()}, {}
    for name in ("student", "teacher"):
        with pair.select(name):
            answers[name] = velocity(family)
    randomise(pair, seed=1)
    pair.update(0.5)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    pair.load_state_dict(state)
    for name, answer in answers.items():
        with pair.select(name):
            assert torch.equal(velocity(family), answer)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_state_leaves_the_device_that_the_adapters_are_on(family, name):
    """The ``meta`` device stands for a GPU: it has nothing to copy, and says so."""
    add_adapters(family.transformer, LORA, family.lora_targets, seed=0, dtype=torch.bfloat16)
    for layer in adapted_layers(family.transformer, name).values():
        layer.lora_A[name].to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        AdapterPair(family.transformer, "ema", {}).state_dict()
