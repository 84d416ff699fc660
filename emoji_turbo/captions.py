"""How the emoji world is put into words, for training the base and for asking it afterwards."""

from __future__ import annotations

import torch

PLACEHOLDER = "[V]"
_FORMS = ("{article} {label}, {style} style", "{article} {label} in {style} style")


def caption(label: str, style: str) -> str:
    """The short caption of a concept in a named style: "a fox, noto style"."""
    return _FORMS[0].format(article=article(label), label=label, style=style)


def concept_caption(label: str) -> str:
    """The short caption of a concept in the style that the placeholder stands for: "a fox in [V] style"."""
    return _FORMS[1].format(article=article(label), label=label, style=PLACEHOLDER)


def caption_variants(label: str) -> dict[str, str]:
    """The caption variants of a style data set, by length."""
    a = article(label)
    return {
        "short": f"{a} {label} in {PLACEHOLDER} style",
        "medium": f"{a} {label}, {PLACEHOLDER} style",
        "request": f"draw {a} {label} in {PLACEHOLDER} style",
    }


def subject_captions(style: str) -> dict[str, str]:
    """The caption variants of a subject data set: the placeholder stands for the thing, the style is named."""
    return {
        "short": f"a {PLACEHOLDER}, {style} style",
        "medium": f"a {PLACEHOLDER} in {style} style",
        "request": f"draw a {PLACEHOLDER} in {style} style",
    }


def random_caption(label: str, style: str, generator: torch.Generator) -> str:
    """One of the forms the base is trained on. ``label`` or ``style`` may be the placeholder."""
    draw = torch.rand((), generator=generator).item()
    form = _FORMS[0] if draw < 0.5 else _FORMS[1]
    text = form.format(article="a" if label == PLACEHOLDER else article(label), label=label, style=style)
    return f"draw {text}" if draw % 0.5 < 0.1 else text


def article(label: str) -> str:
    """The indefinite article by the first letter."""
    return "an" if label[0] in "aeiou" else "a"


def restyled(text: str, style: str, other: str) -> str:
    """The same caption in another style. Raises ValueError if ``text`` does not end with ``style``."""
    end = f"{style} style"
    if not text.endswith(end):
        raise ValueError(f"{text!r} does not ask for {style!r}")
    return f"{text.removesuffix(end)}{other} style"
