"""Text files as people have them: read in the encoding that they say they have, and captions brought to one line."""

from __future__ import annotations

import codecs
import re

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
          codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}  # fmt: skip
"""Byte order mark to encoding; UTF-32's before UTF-16's, which is its beginning."""
_WRITING = {
    "Windows-1251 (cp1251)": ("cp1251", "[А-яЁё]"),
    "EUC-KR (cp949)": ("euc_kr", "[가-힣]"),
    "Shift JIS (cp932)": ("cp932", "[ぁ-ヿ一-鿿]"),
    "EUC-JP": ("euc_jp", "[ぁ-ヿ一-鿿]"),
    "GBK (gb18030)": ("gb18030", "[一-鿿]"),
}
"""Encodings without a mark, the most telling first: what they are called, and the letters of their languages."""
_KANA = ("cp932", "euc_jp")
_UNUSED = {0x81, 0x8D, 0x8F, 0x90, 0x9D, 0}
"""Bytes that mean nothing in Windows-1252, or in any text."""


def decoded(content: bytes) -> str:
    """The text of a file: UTF-8, or what its byte order mark says (UTF-8, UTF-16, UTF-32), without the mark.

    Raises ``ValueError`` with what is wrong and what to do, without the file's name.
    """
    mark, encoding = next(((mark, name) for mark, name in _MARKS.items() if content.startswith(mark)), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: len(mark) + error.start].count(b"\n") + 1
        if encoding != "utf-8" or mark:
            raise ValueError(f"is damaged {encoding.upper()} (line {line}); save it as UTF-8 again") from None
        raise ValueError(f"is not UTF-8 (line {line}); {_guess(content)}save it as UTF-8") from None
    if text.count("\0") > len(text) // 4:  # in UTF-16, every other byte of plain English
        raise ValueError("is not UTF-8; it looks like UTF-16 without a byte order mark: save it as UTF-8")
    return text


def _guess(content: bytes) -> str:
    """The likely encoding, in words. Of Western languages most letters are ASCII, and the others stand among them."""
    for name, (encoding, letter) in _WRITING.items():
        text = content.decode(encoding, "replace")
        words = re.findall(r"[^\W\d_]+", text)
        foreign = [word for word in words if not word.isascii()]
        sound = "\ufffd" not in text and all(re.fullmatch(f"{letter}+", word) for word in foreign)
        if sound and max(map(len, foreign), default=0) > 1 and (encoding not in _KANA or re.search("[ぁ-ヿ]", text)):
            return f"it looks like {name}: "
    return "it looks like Windows-1252 (cp1252): " if not set(content) & _UNUSED else ""


def folded(text: str) -> str:
    """``text`` on one line: line breaks of every kind, tabs and blanks become single spaces, none at the ends."""
    return " ".join(text.split())
