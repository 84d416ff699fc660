"""Captions as words: what a VLM is asked, and how its answer becomes a caption that names the concept once.

D-OPSD trains on several captions of a picture: a short, a medium and a detailed one, and one phrased as a request. What
``[V]`` is to mean must not be said in them by other words. So of a style the VLM describes the content and not the
look, and of a subject the scene and not the subject's own look. All of this is pure text; nothing here knows a model.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .records import is_text

Kind = Literal["subject", "style"]
Variant = Literal["short", "medium", "detailed", "request"]
VARIANTS: tuple[Variant, ...] = ("short", "medium", "detailed", "request")

# --- what the VLM is asked --------------------------------------------------------------------------------------------

PROMPTS: dict[Kind, dict[Variant, str]] = {
    "style": {
        "short": "Name what is in this picture in one phrase of at most ten words.",
        "medium": "Describe what is in this picture in one sentence of about twenty words: who or what is there, what "
        "they do, and where.",
        "detailed": "Describe what is in this picture in three or four sentences: who or what is there, in which pose, "
        "what is beside and behind it, from where one looks at it, and the time of day.",
        "request": "Which sentence would a person type to ask an artist for a picture with the same content? Write "
        "that one sentence of at most twenty words. It begins with the word Draw.",
    },
    "subject": {
        "short": "Say in one phrase of at most ten words what {name} does in this picture, and where.",
        "medium": "Describe this picture in one sentence of about twenty words: what {name} does, and what is around "
        "it.",
        "detailed": "Describe this picture in three or four sentences: the pose of {name}, what is beside and behind "
        "it, from where one looks at it, the light, and how the picture is made.",
        "request": "Which sentence would a person type to ask an artist for this picture of {name}? Write that one "
        "sentence of at most twenty words. It begins with the word Draw.",
    },
}
INTRODUCTION: dict[Kind, str] = {"style": "", "subject": "The {noun} in this picture is called {name}. "}
"""Before each question."""
RULES: dict[Kind, str] = {
    "style": " Speak only of the content. Do not say how the picture is made or looks: no style, medium, technique, "
    "artist, or colours. Answer with the text alone.",
    "subject": ' Write "{name}" exactly once, letter by letter. Do not say what {name} looks like: no colours, shape, '
    "material, or markings of it. Answer with the text alone.",
}
"""After each question."""
AGAIN = "An earlier answer could not be used: {why}. "
"""Before the same question, asked once more: by greedy decoding the same question has the same answer."""

MOST_WORDS: dict[Variant, int] = {"short": 16, "medium": 45, "detailed": 130, "request": 40}
"""Where an answer is cut. All stay well below the encoders' 512 tokens."""
_LEAST_WORDS: dict[Variant, int] = {"short": 1, "medium": 3, "detailed": 6, "request": 2}
_LETTERS_PER_WORD = 12
"""An answer without spaces is cut by its length: a word counts as so many characters."""


@dataclass(frozen=True)
class Naming:
    """How captions name the concept. ``noun``: the class word of a subject, without an article; else empty."""

    kind: Kind
    placeholder: str
    noun: str = ""

    @property
    def name(self) -> str:
        """What stands in a caption, exactly once: ``[V] wolf``, or ``in [V] style``."""
        return f"{self.placeholder} {self.noun}" if self.kind == "subject" else f"in {self.placeholder} style"

    def question(self, variant: Variant) -> str:
        """What the VLM is asked for a caption of that length."""
        return self.asked(PROMPTS[self.kind][variant])

    def asked(self, prompt: str) -> str:
        """``prompt``, with what is said before and after every one."""
        text = INTRODUCTION[self.kind] + prompt + RULES[self.kind]
        return text.replace("{name}", self.name).replace("{noun}", self.noun)


def naming_of(kind: Kind, subject: str | None, placeholder: str) -> Naming:
    """The naming of a concept. ``subject``: its class word, an article before it does not matter.

    Raises ``ValueError`` (one line) for a subject without a usable class word, and for a style with one.
    """
    if kind == "style":
        if subject is not None:
            raise ValueError("a style has no subject; leave --subject out, or say --kind subject")
        return Naming(kind, placeholder)
    noun = re.sub(r"^(an?|the|my|our)(\s+|$)", "", " ".join((subject or "").split()), flags=re.IGNORECASE)
    if not noun:
        raise ValueError('a subject needs its class word: --subject "a wolf", for what all the pictures show')
    if len(noun) > 60 or not is_text(noun) or not re.fullmatch(r"[\w' -]+", noun) or not re.search(r"[^\W\d_]", noun):
        raise ValueError("--subject: give a word or two for what it is, such as wolf, coffee mug, or toy robot")
    if placeholder.lower() in noun.lower():
        raise ValueError(f"--subject: leave {placeholder} out; it is put before the class word")
    return Naming(kind, placeholder, noun)


# --- what it answers --------------------------------------------------------------------------------------------------

_SPEECH = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok|absolutely|great|yes)(?: thing)?(?:[.:!,]|(?= here))\s*)?"
    r"(?:(?:here(?:'s|’s| is| are)|this is|below is)\b[^.:!\n]{0,60}\b(?:caption|description|phrase|sentence|prompt|"
    r"request|answer)[^.:!\n]{0,40}:\s*)?",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^(?:[\w-]+ )?(?:caption|description|answer|prompt|request|phrase|sentence|short|medium|detailed)(?: \d)?: *",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"^(?:in (?:this|the) (?:image|picture|photo(?:graph)?|scene), +|"
    r"(?:this|the) (?:image|picture|photo(?:graph)?) is (?:of )?|"
    r"(?:this|the|an?) (?:[\w-]+ ){0,4}?(?:image|picture|photo(?:graph)?|illustration|drawing|painting|sketch|artwork|"
    r"cartoon|rendering) (?:of|shows|depicts|features|portrays|captures|presents|displays) +)",
    re.IGNORECASE,
)
_AFTERTHOUGHT = re.compile(r"^\W*(?:note\b|let me know|feel free|i hope|if you\b|would you|this (?:caption|sentence|"
                           r"phrase|description)\b)", re.IGNORECASE)  # fmt: skip
_BULLET = re.compile(r"^(?:[-*•+]|\d{1,2}[.)])\s+")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`", "「": "」"}
_REFUSAL = re.compile(
    r"\b(?:i(?:'m|’m| am) sorry|sorry, (?:i|but)|i (?:can(?:'t|’t|not| not)|do not|don't) (?:see|help|assist|describe|"
    r"provide|view|identify)|(?:i am|i'm|i’m) (?:unable|not able)|as an ai|no (?:image|picture) (?:was|is|has)|"
    r"(?:provide|upload|share|attach) (?:an|the|your|a) (?:image|picture|photo))",
    re.IGNORECASE,
)
_LOOK = re.compile(
    r"\b(?:water-?colou?rs?|oil paint\w*|acrylics?|gouache|paintings?|painted|brush ?-?strokes?|sketch\w*|drawings?|"
    r"drawn|illustrat\w+|cartoon\w*|anime|manga|comic|pixel art|line ?-?art|vector art|3d|render\w*|cgi|photo\w*|"
    r"black[- ]and[- ]white|monochrom\w+|styles?|styli[sz]ed|impressionis\w+|minimalis\w+|realistic|realism)\b",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"<\|?[/\w][^<>\n]{0,40}>")


def clean(answer: str, variant: Variant) -> str:
    """A VLM's answer as one line of plain text without thoughts, tokens, markup, quotes and politeness; bounded."""
    text = unicodedata.normalize("NFC", answer).rpartition("</think>")[2]
    text = text.partition("<think>")[0]  # one that never ended is no answer
    text = _TOKEN.sub(" ", text).replace("\ufffd", "")
    text = re.sub(r"!?\[([^\]\n]+)\]\([^)\s]*[./][^)\s]*\)", r"\1", text)  # a link
    lines = [re.sub(r"^(?:#{1,6}|>)\s+", "", line.strip()) for line in re.sub(r"```\w*", "\n", text).splitlines()]
    text = _one_line([_printable(re.sub(r"\*\*|__|(?<!\w)[*_](?=\w)|(?<=[\w.,])[*_](?!\w)", "", s)) for s in lines])
    text = " ".join(_TOKEN.sub(" ", text).split())  # what the markup kept apart
    for pattern in (_SPEECH, _LABEL):
        text = _unquoted(pattern.sub("", text, count=1))
    text = _bounded(_without_loop(_opened(text)), variant)
    return _sentences(text)[0] if variant in ("short", "request") else text


def _printable(line: str) -> str:
    return " ".join("".join(c if is_text(c) and unicodedata.category(c) != "Co" else " " for c in line).split())


def _one_line(lines: list[str]) -> str:
    """Paragraphs joined; of a list the first item alone; neither introduction nor afterthought."""
    lines = [line for line in lines if line and not _AFTERTHOUGHT.match(line)]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    items = [line for line in lines if _BULLET.match(line)]
    return _BULLET.sub("", items[0]) if items else " ".join(lines)


def _unquoted(text: str) -> str:
    text = text.strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text


def _opened(text: str) -> str:
    """Without "This picture shows" at its start; what follows begins as the text began."""
    rest = _OPENING.sub("", text, count=1)
    return rest[:1].upper() + rest[1:] if rest != text and text[:1].isupper() else rest


def _without_loop(text: str) -> str:
    """Cut where a model goes round: at the same few letters again and again, and before five words that come a second
    time and then a third ("in front of the" may)."""
    text = re.split(r"(\S{1,12}?)\1{4,}", text, maxsplit=1)[0].rstrip()
    words = text.split(" ")
    runs = [tuple(words[place : place + 5]) for place in range(len(words) - 4)]
    counted = Counter(runs)
    for place, run in enumerate(runs):
        if counted[run] > 2 and run in runs[:place]:
            return " ".join(words[:place])
    return text


def _bounded(text: str, variant: Variant) -> str:
    """At most so many words, whole sentences where there is one."""
    most = MOST_WORDS[variant]
    cut = " ".join(text.split(" ")[:most])[: most * _LETTERS_PER_WORD]
    if len(cut) == len(text):
        return text
    whole = cut[: max((end.end() for end in _SENTENCE_END.finditer(cut + " ")), default=0)]
    return whole or cut.rsplit(" ", 1)[0].rstrip(" ,;:-–—(")


def _sentences(text: str) -> tuple[str, str]:
    """The first sentence, its full stop included, and what follows it."""
    end = _SENTENCE_END.search(text + " ")
    return (text[: end.end()], text[end.end() :]) if end else (text, "")


def unusable(text: str, variant: Variant) -> str:
    """Why a cleaned answer is no caption; empty where it is one."""
    words = re.findall(r"[\u3040-\u9fff]|[^\W\d_]{2,}", text)
    if not words:
        return "it has no words"
    if _REFUSAL.search(text):
        return "it declines"
    return "it is too short" if len(words) < _LEAST_WORDS[variant] else ""


def doubtful(text: str, naming: Naming) -> str:
    """What a person should look at in a cleaned answer that can be used; mostly nothing."""
    if naming.kind == "style":
        found = _LOOK.search(text)
        return f'it says "{found[0]}", which {naming.placeholder} is to mean' if found else ""
    if _mark(naming).search(text) or _noun_in(text, naming.noun):
        return ""
    return f"it does not mention the {naming.noun}"


# --- the placeholder --------------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?:(?<=[^\W\d_]{3})[.!?]|[.!?](?=[\"”]))(?=\s)|[。!?]")
"""Not the point of "Mr." or "4.5": three letters stand before it."""
_ASKING = re.compile(
    r"^(?:please|draw|paint|create|make|generate|show|design|produce|give|i(?:'d| would)? (?:want|like|need)|"
    r"(?:can|could|would) you)\b",
    re.IGNORECASE,
)


def with_placeholder(text: str, variant: Variant, naming: Naming) -> str:
    """A cleaned answer as a caption with the placeholder in it exactly once, whether the answer had it or not."""
    text = _mark(naming).sub(lambda _: naming.placeholder, text)
    if variant == "short":
        text = text.rstrip(" .")
    if variant == "request" and not _ASKING.match(text):
        text = f"Draw {_begun(text)}"
    return _with_style(text, variant, naming) if naming.kind == "style" else _with_subject(text, variant, naming)


def _begun(text: str) -> str:
    """A sentence as it goes on after a verb: "A fox" as "a fox", while a name keeps its capital."""
    first = text.partition(" ")[0]
    common = first.lower() in ("a", "an", "the", "two", "three", "some", "several", "many", "this", "in", "on")
    return first.lower() + text[len(first) :] if common else text


def _mark(naming: Naming) -> re.Pattern[str]:
    """The placeholder in a text: whole, where it is a word ("sks" is not in "asks")."""
    before, after = (r"\b" if re.match(r"\w", edge) else "" for edge in (naming.placeholder[0], naming.placeholder[-1]))
    return re.compile(before + re.escape(naming.placeholder) + after, re.IGNORECASE)


def _with_style(text: str, variant: Variant, naming: Naming) -> str:
    """Said of the first sentence; an answer that said it elsewhere, or several times, says it there alone."""
    text = re.sub(
        rf"[\s,]*(?:\bin\s+(?:the\s+)?)?{_mark(naming).pattern}(?:[ -]styles?\b)?,?", "", text, flags=re.I
    ).strip()
    first, rest = _sentences(text)
    bare = first.rstrip(" .!?。！？,;:-")
    comma = "" if variant in ("short", "request") else ","
    return f"{bare}{comma} {naming.name}{first[len(bare) :].strip(' ,;:-')}{rest}" if bare else naming.name + rest


def _with_subject(text: str, variant: Variant, naming: Naming) -> str:
    """Before the class word where it comes first, else before everything; later ones become "the wolf"."""
    noun, first = naming.noun, _mark(naming).search(text)
    if first is None:
        found = _noun_in(text, noun)
        if found:
            return f"{text[: found.start()]}{naming.placeholder} {text[found.start() :]}"
        if variant == "request":
            return f"{text.rstrip(' .!?')}: {naming.name}"
        return f"{naming.name}{',' if text[:1].islower() else ':'} {text}"

    def again(found: re.Match[str]) -> str:
        return f"{found[1] or 'the '}{noun}"

    later = rf"(\b(?:an?|the|this|that|its|his|her|their|one)\s+)?{_mark(naming).pattern}(?:\s+{re.escape(noun)}\b)?"
    return text[: first.end()] + re.sub(later, again, text[first.end() :], flags=re.IGNORECASE)


def _noun_in(text: str, noun: str) -> re.Match[str] | None:
    """The class word in a text, whole; of several words the last one will do."""
    for word in (noun, noun.split()[-1]):
        found = re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
        if found:
            return found
    return None


# --- one caption ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """A caption, or none (empty), and what a person should know of it: why there is none, or what to look at."""

    text: str
    note: str = ""


def caption(ask: Callable[[str], str], variant: Variant, naming: Naming, prompt: str | None = None) -> Caption:
    """Ask for one caption, and once more where the answer is unusable or doubtful. ``ask``: question to answer;
    ``prompt``: what is asked in place of the variant's own."""
    question = naming.question(variant) if prompt is None else naming.asked(prompt)
    made, why = Caption("", "the answer was empty"), ""
    for attempt in range(2):
        answer = clean(ask(AGAIN.format(why=why) + question if attempt else question), variant)
        wrong = unusable(answer, variant)
        why = wrong or doubtful(answer, naming)
        if not wrong:
            made = Caption(with_placeholder(answer, variant, naming), why)
            if not why:
                return made
        elif not made.text:
            made = Caption("", why)
    return made
