"""What settings are made of: a file of keys and values, one ``a.b=value`` of a command line, and the kinds of values.
Which ones there are is :mod:`dopsd.config`'s to say."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, Field

MAX_BYTES = 1 << 20
"""Of a file of settings: larger is none."""
MAX_SEED = 2**63 - 1


# --- values -----------------------------------------------------------------------------------------------------------

_Values = TypeVar("_Values", bound=tuple[Hashable, ...])


def _each_once(values: _Values) -> _Values:
    if twice := next((value for number, value in enumerate(values) if value in values[:number]), None):
        raise ValueError(f"{twice} is there twice; name each once")
    return values


def _not_empty(values: _Values) -> _Values:
    if not values:
        raise ValueError("empty; name at least one")
    return values


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


FEATURES = ("efficientnet-lite0", "dinov2", "dinov3", "clip", "siglip")
"""Kinds of backbone that give features; the first of them that is named is the primary one."""
FOLLOWING = ("clip", "siglip")
"""Those of which the first says how well a picture follows its prompt."""
BACKBONES = (*FEATURES, "lpips", "reward", "judge")


def _known_backbones(names: tuple[str, ...]) -> tuple[str, ...]:
    kinds = [name.partition(":")[0] for name in names]
    if unknown := next((name for name, kind in zip(names, kinds, strict=True) if kind not in BACKBONES), None):
        raise ValueError(f"unknown backbone {unknown!r}; choose of {', '.join(BACKBONES)}")
    if twice := next((kind for place, kind in enumerate(kinds) if kind in kinds[:place]), None):
        raise ValueError(f"two of the kind {twice}, whose scores have its name; keep one")
    if not set(kinds) & set(FEATURES):
        raise ValueError(f"none gives features, which all else is measured by; name one of {', '.join(FEATURES)} too")
    return names


EachOnce = AfterValidator(_each_once)
AtLeastOne = AfterValidator(_not_empty)  # not Field(min_length): it counts the valid ones, and adds a second fault
Pattern = Annotated[str, AfterValidator(_pattern)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Rate = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Eyes = Annotated[tuple[str, ...], AtLeastOne, EachOnce, AfterValidator(_known_backbones)]


@dataclass(frozen=True)
class Seen:
    """What an evaluation sees with beside the embedded backbone: names with their weights, and a judge's rubric."""

    backbones: tuple[str, ...] = ()
    rubric: str = ""


NOTHING_SEEN = Seen()


# --- text -------------------------------------------------------------------------------------------------------------


class SettingsError(ValueError):
    """A person's mistake in the settings: one line saying which key, what is wrong and what is allowed."""


def read_params(path: Path) -> dict[str, Any]:
    """Keys and values of a file; an empty one has none. Raises :class:`SettingsError` where it is no such file."""
    try:
        if not path.exists():
            raise SettingsError(f"{path}: no such file; run from the project's root or pass --params")
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"{path}: larger than {MAX_BYTES >> 20} MiB, so no file of settings")
        text = path.read_text(encoding="utf-8")
    except OSError as error:  # a folder, or one that may not be read
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); give a file of settings") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    try:
        raw = _yaml(text)
    except _KeyTwice as error:
        raise SettingsError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no date, say, and brackets in a thousand brackets
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict | None):
        raise SettingsError(f"{path}: expected keys and values, found {type(raw).__name__}")
    return raw or {}


def read_prompts(root: Path, name: str, key: str) -> tuple[str, ...]:
    """A file's prompts, each once: a line each, apart from empty ones and those that begin with ``#``. ``name``: of the
    file, from ``root`` on; ``key``: the setting that says so. Raises :class:`SettingsError`."""
    path = root / name
    try:
        if not path.is_file():
            raise SettingsError(f"{key}: {path} is no file; name one with a prompt in each line, or list the prompts")
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"{key}: {path} is larger than {MAX_BYTES >> 20} MiB, so no list of prompts")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{key}: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{key}: {path} is not UTF-8 ({error}); save it as that") from None
    lines = [" ".join(line.split()) for line in text.splitlines()]
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise SettingsError(f"{key}: {path} holds no prompt; write one in each line")
    return prompts


class _KeyTwice(ValueError):
    """A key that stands twice in one group of a text."""


def _yaml(text: str) -> Any:
    """The value of a YAML text. Of a key that is there twice the library takes the last, and with it drops all that was
    under the first; here it is :class:`_KeyTwice`. Every other text that is none is a ``YAMLError``, ``ValueError`` or
    ``RecursionError``."""
    _check_keys(yaml.compose(text, yaml.SafeLoader), "", set())
    try:
        value = yaml.safe_load(text)
        repr(value)  # a number of too many digits can be read as hexadecimal, and never be shown
    except (LookupError, AttributeError, ArithmeticError) as error:  # the library's own on "!!bool x" or "!!int ''"
        raise ValueError(f"a value that is not what its tag (!!) says, or out of range ({error})") from None
    return value


def _check_keys(node: yaml.Node | None, place: str, seen: set[int]) -> None:
    if node is None or id(node) in seen:  # an alias names a node again, maybe from within it
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check_keys(item, f"{place}{number}.", seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise _KeyTwice(f"`{place}{name}` is there twice (lines {lines[name]} and {line}); keep one")
            lines[name] = line
            _check_keys(value, f"{place}{name}.", seen)


def override(given: dict[str, Any], said: str) -> None:
    """Put one ``a.b=value`` into ``given``. Raises :class:`SettingsError` where it is none."""
    key, equals, value = said.partition("=")
    if not equals or not key:
        raise SettingsError(f"override {said!r}: expected KEY=VALUE, for example train.max_steps=100")
    *parents, last = key.split(".")
    node: Any = given
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise SettingsError(f"override {said!r}: {parent} is a value, not a group of settings")
    try:
        node[last] = _yaml(value)
    except _KeyTwice as error:
        raise SettingsError(f"override {said!r}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SettingsError(f"override {said!r}: {value!r} is not a YAML value") from None
