"""Graphics cards: how much they hold and how fast they really are, as far as one can say without running on them."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


class CardError(ValueError):
    """A card that nobody knows; the message says which are known."""


@dataclass(frozen=True)
class Card:
    """A card; the rates are what large bfloat16 matrix products and copies reach, about two thirds and 0.85 of the
    data sheet's."""

    name: str
    gib: float
    teraflops: float
    terabytes: float
    """A second, read and written."""

    @property
    def bytes(self) -> int:
        return int(self.gib * GIB)


CARDS = (
    Card("RTX 4060", 8, 19, 0.23), Card("RTX 3060", 12, 16, 0.30), Card("RTX 4070", 12, 37, 0.43),
    Card("RTX 4060 Ti", 16, 28, 0.24), Card("RTX 4080", 16, 62, 0.61), Card("L4", 24, 60, 0.25),
    Card("RTX 3090", 24, 46, 0.80), Card("RTX 4090", 24, 105, 0.86), Card("RTX 5090", 32, 135, 1.5),
    Card("A100 40GB", 40, 210, 1.3), Card("RTX A6000", 48, 98, 0.65), Card("L40S", 48, 200, 0.73),
    Card("A100 80GB", 80, 210, 1.7), Card("H100", 80, 540, 2.8), Card("RTX PRO 6000", 96, 250, 1.5),
    Card("H200", 140, 540, 4.0), Card("B200", 180, 1200, 6.5),
)  # fmt: skip
_TYPICAL = ("RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090", "RTX 5090", "A100 40GB", "L40S", "H100", "RTX PRO 6000",
            "H200", "B200")  # fmt: skip
"""Which one is meant where only a size is given: the first that is no smaller."""


def card_of(text: str) -> Card:
    """``24`` (GiB) or ``RTX 4090``. Raises :class:`CardError`."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GiB|GB)?", text.strip(), re.IGNORECASE):
        size = float(match[1])
        typical = [card for card in CARDS if card.name in _TYPICAL]
        like = next((card for card in typical if card.gib >= size), typical[-1])
        return Card(f"{size:g} GB card, as fast as an {like.name}", size, like.teraflops, like.terabytes)
    words = re.sub(r"nvidia|geforce|\s+", " ", text, flags=re.IGNORECASE).lower().split()
    found = [card for card in CARDS if set(card.name.lower().split()) <= set(words)]
    if not found:
        raise CardError(f"--card {text}: give its memory in GB, or one of {', '.join(card.name for card in CARDS)}")
    return max(found, key=lambda card: len(card.name))
