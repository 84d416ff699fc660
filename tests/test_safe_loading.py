"""Weights are read as safetensors alone: a pickle in a folder of weights is somebody's code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("dopsd", "emoji_turbo", "flows") for path in (ROOT / package).rglob("*.py"))
NO_WEIGHTS = re.compile(r"(Config|Tokenizer\w*|Processor\w*|Scheduler)$")
"""Classes whose ``from_pretrained`` reads JSON and text."""


def _calls(path: Path) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Owner, method and constant keyword arguments of each method call."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func.value), node.func.attr, given


def _unsafe(path: Path) -> Iterator[str]:
    """Its calls that would read a pickle, or run what came with the weights."""
    for owner, method, given in _calls(path):
        reads = method in ("from_pretrained", "load_lora_weights") and not NO_WEIGHTS.search(owner)
        if (
            (reads and given.get("use_safetensors") is not True)
            or ((owner, method) == ("torch", "load") and given.get("weights_only") is not True)
            or given.get("trust_remote_code") is True
        ):
            yield f"{owner}.{method}"


def test_nothing_loads_pickles_or_code() -> None:
    assert len(SOURCES) > 100
    assert not [f"{path.relative_to(ROOT)}: {call}" for path in SOURCES for call in _unsafe(path)]


def test_a_pickle_or_code_would_be_noticed(tmp_path: Path) -> None:
    calls = ["torch.load(f)", "torch.load(f, weights_only=False)", "Model.from_pretrained(p)",
             "pipe.load_lora_weights(p)", "Model.from_pretrained(p, use_safetensors=True, trust_remote_code=True)",
             "load.it(trust_remote_code=True)"]  # fmt: skip
    sound = ["torch.load(f, weights_only=True)", "Model.from_pretrained(p, use_safetensors=True)",
             "AutoConfig.from_pretrained(p)"]  # fmt: skip
    (tmp_path / "a.py").write_text("\n".join([*calls, *sound]))
    assert list(_unsafe(tmp_path / "a.py")) == [call.partition("(")[0] for call in calls]


def test_the_check_sees_the_loaders() -> None:
    found = {(owner, method) for path in SOURCES for owner, method, _ in _calls(path)}
    assert ("DiffusionPipeline", "from_pretrained") in found
    whole = {(owner, method) for owner, method, _ in _calls(ROOT / "dopsd" / "models" / "whole.py")}
    assert ("cls", "from_pretrained") in whole, "VLMs and backbones"
    assert ("self.pipeline", "load_lora_weights") in found


def test_the_card_tells_to_load_safetensors() -> None:
    text = (ROOT / "dopsd" / "card.md.j2").read_text()
    calls = re.findall(r"\.(?:from_pretrained|load_lora_weights)\((.*?)\)\n", text, re.DOTALL)
    assert len(calls) == 4, "of an adapter two, and two of a transformer"
    assert all("use_safetensors=True" in call for call in calls)
