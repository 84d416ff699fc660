"""Weights are read as safetensors alone: a pickle in a folder of weights is somebody's code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_pickles_or_code(path: Path) -> None:
    for owner, method, given in _calls(path):
        if method in ("from_pretrained", "load_lora_weights") and not NO_WEIGHTS.search(owner):
            assert given.get("use_safetensors") is True, f"{owner}.{method}"
        if (owner, method) == ("torch", "load"):
            assert given.get("weights_only") is True, f"{owner}.{method}"
        assert given.get("trust_remote_code") is not True, f"{owner}.{method}"


def test_the_check_sees_the_loaders() -> None:
    found = {(owner, method) for path in SOURCES for owner, method, _ in _calls(path)}
    assert {("DiffusionPipeline", "from_pretrained"), ("AutoModelForImageTextToText", "from_pretrained")} <= found
    assert ("self.pipeline", "load_lora_weights") in found


def test_the_card_tells_to_load_safetensors() -> None:
    text = (ROOT / "dopsd" / "card.md.j2").read_text()
    calls = re.findall(r"\.(?:from_pretrained|load_lora_weights)\((.*?)\)\n", text, re.DOTALL)
    assert len(calls) == 4, "of an adapter two, and two of a transformer"
    assert all("use_safetensors=True" in call for call in calls)
