"""AdamW with both moments in a byte: what it holds, how near to AdamW it is, and that a cut run ends as if uncut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dopsd.config import SettingsError
from dopsd.train.optimizer import check_optimizer, make_optimizer
from tests import tiny

SETTINGS = {"optimizer": "adamw-8bit", "max_steps": 6, "checkpoint_steps": 2, "lora": {"rank": 64}}
"""Only from 4,096 values on are moments kept in a byte: a layer of 64 x 64."""


def test_moments_take_a_byte_and_steps_are_nearly_adamws():
    steps = {}
    for name in ("adamw", "adamw-8bit"):
        settings = tiny.tiny_settings(optimizer=name, learning_rate=1e-2)
        parameter = torch.nn.Parameter(torch.zeros(128, 64))
        optimizer = make_optimizer(settings, [parameter], torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        steps[name] = parameter.detach().clone()
        held = sum(v.nbytes for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor))
        assert held / parameter.numel() < 2.7 if name == "adamw-8bit" else held / parameter.numel() >= 8
    away = (steps["adamw-8bit"] - steps["adamw"]).norm() / steps["adamw"].norm()
    assert 0 < away < 0.1


def test_a_cut_run_ends_where_the_unbroken_one_ends(tmp_path: Path):
    settings = tiny.tiny_settings(**SETTINGS)
    tiny.run_tiny("d-opsd", tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path / "cut", settings, tiny.Cut(5))
    checkpoints = tmp_path / "cut" / "train" / "checkpoints"
    saved = load_file(checkpoints / "step-00000004" / "tensors.safetensors")
    assert any(value.dtype == torch.uint8 and key.startswith("optimizer/") for key, value in saved.items())
    tiny.run_tiny("d-opsd", tmp_path / "cut", settings)
    whole, cut = (load_file(tmp_path / who / "adapters" / "d-opsd.safetensors") for who in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_without_the_library_it_is_one_line(monkeypatch):
    monkeypatch.setattr("dopsd.train.optimizer.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"adamw-8bit needs bitsandbytes; `pip install -e '.\[quantization\]'`"):
        check_optimizer(tiny.tiny_settings(optimizer="adamw-8bit"))
