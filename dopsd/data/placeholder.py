"""Whether captions name the concept: by the placeholder, as it is written in the settings, to the letter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise

_WIDTH = ord("！") - ord("!")
"""From an ASCII character to its full-width twin."""
_BRACKETS = {"[": "[［【〔", "]": "]］】〕"}
_SMALL = {"a", "an", "and", "at", "by", "for", "from", "in", "is", "it", "its", "of", "on", "style", "the", "to",
          "with"}  # fmt: skip
"""Words that call nothing."""
_GAP = r"[\s\\\u200b\ufeff]*"


def lacking(captions: Mapping[str, str], placeholder: str) -> dict[str, str]:
    """The variants of ``captions`` without the placeholder, each with what nearly is one there as it is written, or an
    empty text."""
    missing = {variant: text for variant, text in captions.items() if placeholder not in text and text.strip()}
    found = {variant: _near(placeholder).search(text) for variant, text in missing.items()}
    return {variant: match[0] if match else "" for variant, match in found.items()}


def describe(variant: str, near: str, placeholder: str) -> str:
    """What to say of a caption that lacks it."""
    if not near:
        return (
            f'{variant!r} does not hold the placeholder {placeholder}; write it, as in "a fox in {placeholder} style"'
        )
    if "\\" in near:
        what = "is escaped"
    elif any(ord(c) > 127 and not c.isspace() for c in near):
        what = "has other characters, which look alike"
    elif any(c.isspace() for c in near) > any(c.isspace() for c in placeholder):
        what = "has a blank inside"
    else:
        what = "is written in other letters, small or large"
    return f"{variant!r} holds {near!r}, which {what}, in place of the placeholder; write {placeholder}"


def describe_none(captions: Iterable[str], placeholder: str) -> str:
    """What to say where no caption holds it: captions of other tools have a word of their own, or nothing."""
    words = [set(re.findall(r"\w+", text.lower())) for text in captions]  # as --trigger takes them
    common = sorted(set.intersection(*words) - _SMALL)[:3] if words else []
    trigger = f"--trigger {common[0]} (every caption has {', '.join(common)})" if common else "--trigger WORD"
    return (
        f"no caption holds the placeholder {placeholder}; name the concept with it, for example "
        f'"a fox in {placeholder} style" (data.placeholder), or let `dopsd concept add` do so in its copy: {trigger} '
        f'writes it in place of a word, --wording "{{}} in {placeholder} style" puts that around each caption'
    )


def alone(captions: Mapping[str, str], placeholder: str) -> list[str]:
    """The variants that are the placeholder and nothing else."""
    return [variant for variant, text in captions.items() if text.strip(" .,") == placeholder.strip(" .,")]


@lru_cache
def _near(placeholder: str) -> re.Pattern[str]:
    parts = [_either(placeholder[0])]
    for before, after in pairwise(placeholder):
        # between two letters a blank ends a word: "desk still" is no "sks"
        parts += ["" if before.isalnum() and after.isalnum() else _GAP, _either(after)]
    return re.compile(r"\\*" + "".join(parts), re.IGNORECASE)


def _either(character: str) -> str:
    wide = chr(ord(character) + _WIDTH) if "!" <= character <= "~" else ""
    return f"[{re.escape(_BRACKETS.get(character, character) + wide)}]"
