"""Adapter files: what they say, that they load to what was trained, and that what does not fit leaves no trace."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dopsd.config.groups import LoraSettings
from dopsd.distill.adapters import (
    AdapterError,
    adapter_applied,
    adapter_parameters,
    add_adapters,
    load_adapter,
    save_adapter,
)
from tests import tiny
from tests.test_distill_adapters import LORA, randomise, velocity


def test_a_file_says_what_it_is(family, tmp_path):
    settings = LoraSettings(rank=2, alpha=5, targets=(r"layers\.[01]\.attention\.to_q",))
    add_adapters(family.transformer, settings, (), seed=0)
    path = save_adapter(tmp_path / "a.safetensors", family.transformer, "student", settings)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "dopsd-lora",
            "rank": "2",
            "alpha": "5.0",
            "targets": '["layers.0.attention.to_q", "layers.1.attention.to_q"]',
        }


def test_an_adapter_is_loaded_in_the_precision_of_its_file(family, tmp_path):
    add_adapters(family.transformer, LORA, family.lora_targets, seed=0, dtype=torch.bfloat16)
    path = save_adapter(tmp_path / "a.safetensors", family.transformer, "student", LORA)
    other = tiny.tiny_family().transformer
    load_adapter(other, path, "x")
    assert {p.dtype for p in adapter_parameters(other, "x").values()} == {torch.bfloat16}


@pytest.mark.parametrize("alpha", [None, 10.0])
def test_a_saved_adapter_loads_to_the_identical_output(family, tmp_path, alpha):
    settings = LoraSettings(rank=4, alpha=alpha)
    pair = add_adapters(family.transformer, settings, family.lora_targets, seed=0)
    randomise(pair)
    trained = velocity(family)
    path = save_adapter(tmp_path / "new" / "a.safetensors", family.transformer, "student", settings)
    pair.remove()
    base = velocity(family)
    other = tiny.tiny_family()
    with adapter_applied(other.transformer, path):
        assert torch.equal(velocity(other), trained)
        assert not [n for n, p in other.transformer.named_parameters() if p.requires_grad]
    assert torch.equal(velocity(other), base)
    assert not torch.equal(trained, base)
    with adapter_applied(other.transformer, None):
        assert torch.equal(velocity(other), base)
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


@pytest.mark.parametrize("lost", ["A", "B"])
def test_half_an_adapter_is_refused_and_leaves_no_trace(family, tmp_path, lost):
    key = "layers.1.attention.to_q.lora_{}.weight"
    tensors = {"A": torch.zeros(4, 32), "B": torch.zeros(32, 4)}
    path = tmp_path / "a.safetensors"
    kept = {key.format(part): value for part, value in tensors.items() if part != lost}
    save_file(kept, path, {"rank": "4", "alpha": "4.0"})
    with pytest.raises(AdapterError, match=rf"to_q\.lora_{lost}\.weight does not fit"):
        load_adapter(family.transformer, path, "x")
    assert not [n for n, _ in family.transformer.named_parameters() if "lora" in n]
    more = {key.format(part): value for part, value in tensors.items()} | {key.format("C"): torch.zeros(1)}
    save_file(more, path, {"rank": "4", "alpha": "4.0"})
    with pytest.raises(AdapterError, match=r"to_q\.lora_C\.weight does not fit"):
        load_adapter(family.transformer, path, "x")
    assert not [n for n, _ in family.transformer.named_parameters() if "lora" in n]


@pytest.mark.parametrize("header", [None, {"rank": "4"}, {"alpha": "4"}, {"rank": "four", "alpha": "4"}])
def test_a_file_that_does_not_say_its_rank_and_alpha_was_not_written_here(family, tmp_path, header):
    save_file({"layers.1.attention.to_q.lora_A.weight": torch.zeros(4, 32)}, tmp_path / "a.safetensors", header)
    with pytest.raises(AdapterError, match="no rank and alpha"):
        load_adapter(family.transformer, tmp_path / "a.safetensors", "x")


def test_an_adapter_that_is_not_there_is_not_saved(family, tmp_path):
    with pytest.raises(AdapterError, match="no adapter 'student' to save"):
        save_adapter(tmp_path / "a.safetensors", family.transformer, "student", LORA)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_adapter_is_one_clear_line(family, tmp_path):
    with pytest.raises(AdapterError, match="no such adapter"):
        load_adapter(family.transformer, tmp_path / "none.safetensors", "x")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_adapter(family.transformer, tmp_path / "broken.safetensors", "x")
    save_file({}, tmp_path / "empty.safetensors", {"rank": "4", "alpha": "4.0"})
    with pytest.raises(AdapterError, match="there is no tensor in it"):
        load_adapter(family.transformer, tmp_path / "empty.safetensors", "x")
