"""Which linear layers of a transformer are trained: patterns for the ends of their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class AdapterError(ValueError):
    """An adapter that cannot be made or loaded; the message says which and what to do."""


def linear_layers(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the linear layers below ``module``, also of those that carry adapters already."""
    for name, child in module.named_children():
        path = prefix + name
        if isinstance(child, BaseTunerLayer):
            if isinstance(child.get_base_layer(), nn.Linear):
                yield path
        elif isinstance(child, nn.Linear):
            yield path
        else:
            yield from linear_layers(child, path + ".")


def match_targets(transformer: nn.Module, patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each pattern (a regular expression for the end of a module's name) the linear layers that it matches.

    Raises :class:`AdapterError` naming every pattern that matches nothing.
    """
    if not patterns:
        raise AdapterError("lora.targets: empty; name at least one pattern, or leave it out for the family's own")
    names = list(linear_layers(transformer))
    matched: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        try:
            ending = re.compile(rf"(?:^|\.)(?:{pattern})$")
        except re.error as error:
            raise AdapterError(f"lora.targets: {pattern!r} is not a regular expression: {error}") from None
        matched[pattern] = tuple(name for name in names if ending.search(name))
    lost = [pattern for pattern, found in matched.items() if not found]
    if lost:
        endings = sorted({re.sub(r"^.*?\d+\.", "", name) for name in names})
        raise AdapterError(
            f"lora.targets: {', '.join(map(repr, lost))} matches no linear layer of the transformer; "
            f"it has {', '.join(endings)}"
        )
    return matched
