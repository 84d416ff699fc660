"""What a base's text encoder takes of a text: how long it may be, and which words it would not read as words.

Nothing is loaded but the base's own tokenizer, and that only where it is here (a folder, or in the hub's cache) and a
text may be too long or holds a token's form. Where it is not here, what is certain is said: a word is a token or more,
and ``<|...|>`` is no word. So a text that is refused without the tokenizer is refused with it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dopsd.config import Settings
from dopsd.data.images import bucket_size

from . import family_class, known_commit, teaching_of
from .base import Configs, Family, Teaching
from .folder import ModelError, Source, quoted
from .loading import load_tokenizer
from .sizes import configurations
from .sources import at_hand

_TURN = 64
"""More tokens than any family's turn has around a caption."""
_CONTROL = re.compile(r"<\|[^\s<>|]+\|>")
"""How Qwen's tokenizers, and most others', write the tokens that no text holds."""
_MOST = 64 << 10
"""Characters: a longer text is not counted, for it may be of any length."""
_IN_WORDS = "remove it or say it in words"
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Reader:
    """A base's text encoder as far as a text's fitness goes. Every answer is what is wrong, empty where nothing is."""

    family: type[Family]
    teaching: Teaching
    resolution: int
    """Pictures are shown to the teacher at a size of this area (:func:`~dopsd.data.images.bucket_size`)."""
    configs: Configs
    source: Source | None = None
    """The base, where its tokenizer is here."""

    @cached_property
    def tokenizer(self) -> Any:
        """The base's own; ``None`` where it is not here. Raises :class:`ModelError` where a folder's is damaged."""
        if self.source is None:
            return None
        try:
            tokenizer = load_tokenizer(self.source.folder / "tokenizer")
            self.family.prompt_lengths(tokenizer, [""])
        except Exception as error:  # the libraries raise whatever they trip over
            if self.source.name is not None:  # single files in the cache are no tokenizer yet
                return None
            raise ModelError(f"{self.source.shown}: its tokenizer cannot be loaded ({quoted(error)}); "
                             f"{self.source.again('tokenizer')}") from None  # fmt: skip
        return tokenizer

    @cached_property
    def controls(self) -> frozenset[str]:
        """The tokens beside the vocabulary that are written in angle brackets; none where the tokenizer is not here.

        Others are words that a base adds on purpose, as the embedded one adds ``[V]``.
        """
        added = self.tokenizer.added_tokens_decoder.values() if self.tokenizer is not None else ()
        return frozenset(token.content for token in added if re.fullmatch(r"<.+>", token.content))

    @cached_property
    def room(self) -> int | None:
        """Tokens that a caption itself may have, the turn around it left out; ``None`` where that is not known."""
        if self.tokenizer is None:
            return None
        return self.family.longest_prompt - self.family.prompt_lengths(self.tokenizer, [""])[0]

    def as_prompt(self, text: str) -> str:
        """What is wrong with a text that is to be read as inference reads it."""
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return "it holds bytes that are no text; write it in UTF-8"
        return self._control(text) or self._too_long(text, 0, self.family.longest_prompt, "", "shorten it")

    def picture_tokens(self, sizes: Collection[tuple[int, int]] | None) -> int:
        """Most tokens that a picture of one of these sizes (width, height) takes in the teacher's turn; ``None``: of
        whichever."""
        fitted = {None} if sizes is None else {bucket_size(*size, self.resolution) for size in sizes}
        return max((self.family.picture_tokens(self.configs, self.teaching, size) for size in fitted), default=0)

    def as_context(self, text: str, shown: int) -> str:
        """What is wrong with a sound prompt where the teacher reads it with its suffix, beside a picture of ``shown``
        tokens."""
        told, advice = " as the teacher reads it", "shorten it"
        if self.teaching.suffix:
            told, advice = f"{told} with model.context_suffix", f"{advice} or model.context_suffix"
        if shown:
            told, advice = f"{told}, {shown} of them its picture", f"{advice} or lower model.context_pixels"
        return self._too_long(
            text + self.teaching.suffix, shown, self.family.longest_context(self.configs), told, advice
        )

    def _control(self, text: str) -> str:
        """What to say of the first token in the text that is none of its words."""
        if found := _CONTROL.search(text):
            return f"{quoted(found[0])} is how tokenizers write their control tokens, not text; {_IN_WORDS}"
        held = (control for control in sorted(self.controls) if control in text) if "<" in text else iter(())
        token = next(held, "")
        return token and f"{quoted(token)} is a control token of the base's tokenizer, not text; {_IN_WORDS}"

    def _too_long(self, text: str, shown: int, limit: int, told: str, advice: str) -> str:
        # a token is a byte or more, so most texts fit without being counted
        if len(unicodedata.normalize("NFC", text).encode()) + _TURN + shown <= limit:
            return ""
        if len(text) > _MOST:
            return f"{len(text):,} characters{told}, and {limit:,} tokens are read; {advice}"
        counted = self.tokenizer is not None
        length = self.family.prompt_lengths(self.tokenizer, [text])[0] if counted else len(_WORD.findall(text))
        if length + shown <= limit:
            return ""
        least = "" if counted else "at least "
        return f"{least}{length + shown:,} tokens{told}, and {limit:,} are read; {advice}"


def reader_of(settings: Settings, root: Path) -> Reader:
    """The reader of the settings' base, as far as it is here. Nothing is fetched. Raises :class:`ModelError` for a
    family or context that there is not, and for a folder of another family."""
    model = settings.model
    patterns = ["model_index.json", "*/config.json", "tokenizer/*"]
    source = at_hand(model.path, root, revision=known_commit(model.path, model.revision, root), patterns=patterns)
    vlm = model.vlm and at_hand(
        model.vlm, root, revision=known_commit(model.vlm, model.vlm_revision, root), patterns=["config.json"]
    )
    found = {key: str(place.folder) for key, place in (("path", source), ("vlm", vlm)) if place}
    configs = configurations(model.model_copy(update=found), root) or configurations(model, root) or {}
    whole = source and any((source.folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return Reader(family_class(model), teaching_of(model), settings.data.resolution, configs, source if whole else None)
