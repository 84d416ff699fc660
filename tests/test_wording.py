"""Captions as words: cleaning, the placeholder, asking again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd.data.records import is_text
from dopsd.data.wording import (
    AGAIN,
    MOST_WORDS,
    VARIANTS,
    Caption,
    Naming,
    Variant,
    caption,
    clean,
    doubtful,
    naming_of,
    unusable,
    with_placeholder,
)

STYLE = Naming("style", "[V]")
WOLF = Naming("subject", "[V]", "wolf")

# --- cleaning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ('Sure! Here is a short caption:\n\n**"A fox sits on a hill."**<|im_end|>', "A fox sits on a hill."),
        ("Sure, here's the description: A fox\non a hill.", "A fox on a hill."),
        ("Okay. A fox on a hill", "A fox on a hill"),
        ("Caption: “A fox on a hill”", "A fox on a hill"),
        ("Great Wall of China at dawn.", "Great Wall of China at dawn."),
        ("OK sign on a wall: red", "OK sign on a wall: red"),
        ("1. A fox runs away.\n2. A fox sits.", "A fox runs away."),
        ("Some ideas:\n- A fox runs\n- A fox sits", "A fox runs"),
        ("A fox on a hill.\n\nNote: the light is guessed.", "A fox on a hill."),
        ("A fox on a hill.\nLet me know if you want more!", "A fox on a hill."),
        ("<think>is it a dog? no</think>\n\nA fox on a hill", "A fox on a hill"),
        ("<think>is it a dog? perhaps it", ""),
        ("```text\nA *red* fox with __one__ eye, 2 * 3 * 4 and an_under_score\n```",
         "A red fox with one eye, 2 * 3 * 4 and an_under_score"),
        ("# A fox\nsits on [a hill](https://example.org/hill)", "A fox sits on a hill"),
        ("This image shows a fox.", "A fox."),
        ("A watercolor painting of a fox", "A fox"),
        ("The picture is a close-up of a fox", "A close-up of a fox"),
        ("a\u2028fox\tsits \x00here\ufffd", "a fox sits here"),
        ("<|vision_start|><|image_pad|>a fox<|endoftext|> </tool_call>", "a fox"),
        ("a fox <**|im_end|> on <|im**_end|> a __hill", "a fox on a hill"),
        ("a fox on a hill a fox on a hill a fox on a hill", "a fox on a hill"),
        ("a fox in front of a tree in front of a house in front of a hill",
         "a fox in front of a tree in front of a house in front of a hill"),
        ("far away from the old house and far away from the old mill", "far away from the old house and far away from "
         "the old mill"),
        ("[V](the fox) sits", "[V](the fox) sits"),
        ("a fox lolololololololololol and more", "a fox"),
        ("雪の上の狐。", "雪の上の狐。"),
    ],
)  # fmt: skip
def test_an_answer_is_cleaned(answer: str, caption: str) -> None:
    assert clean(answer, "medium") == caption


def test_a_short_caption_is_one_sentence() -> None:
    answer = "Mr. Fox, 4.5 feet tall, sits. He looks up."
    assert clean(answer, "short") == clean(answer, "request") == "Mr. Fox, 4.5 feet tall, sits."
    assert clean(answer, "detailed") == answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_long_answer_is_cut_where_a_sentence_ends(variant: Variant) -> None:
    sentences = [f"Thing{n} stands beside thing{n + 1} there." for n in range(60)]
    assert len(clean(" ".join(sentences), variant).split()) <= MOST_WORDS[variant]
    assert clean(" ".join(sentences), variant).endswith("there.")
    endless = " ".join(f"word{n}" for n in range(400))
    assert clean(endless, variant) == " ".join(f"word{n}" for n in range(MOST_WORDS[variant] - 1))
    assert len(clean("".join(map(str, range(5000))), variant)) <= 12 * MOST_WORDS[variant]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no words"),
        ("12 ... 4!", "no words"),
        ("a fox", "too short"),
        ("I'm sorry, but I can't see the image.", "declines"),
        ("Please provide an image so that I may describe it.", "declines"),
        ("a fox on a hill", ""),
        ("雪の上の狐", ""),
    ],
)
def test_what_is_no_caption_is_known(text: str, why: str) -> None:
    assert why in unusable(text, "medium")
    assert bool(unusable(text, "medium")) == bool(why)


def test_what_the_placeholder_is_to_mean_is_not_said_by_other_words() -> None:
    assert "watercolor" in doubtful("a fox in soft watercolor", STYLE)
    assert doubtful("a fox with a hairstyle", STYLE) == ""
    assert "wolf" in doubtful("an animal howls", WOLF)
    assert doubtful("a werewolf howls", WOLF), "that is another word"
    assert doubtful("a Wolf howls", WOLF) == doubtful("[v] howls", WOLF) == ""
    assert doubtful("a wolf in watercolor", WOLF) == "", "how it is made is no part of a subject"


# --- the placeholder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("naming", "variant", "text", "expected"),
    [
        (STYLE, "short", "A fox on a hill.", "A fox on a hill in [V] style"),
        (STYLE, "medium", "A fox on a hill.", "A fox on a hill, in [V] style."),
        (STYLE, "detailed", "A fox sits. Behind it are trees.", "A fox sits, in [V] style. Behind it are trees."),
        (STYLE, "request", "Draw a fox.", "Draw a fox in [V] style."),
        (STYLE, "request", "A fox sits.", "Draw a fox sits in [V] style."),
        (STYLE, "request", "Anna sits.", "Draw Anna sits in [V] style."),
        (STYLE, "request", "Could you draw a fox?", "Could you draw a fox in [V] style?"),
        (STYLE, "medium", "A fox in the [v] style, [V], sits.", "A fox sits, in [V] style."),
        (WOLF, "short", "[V] wolf on snow.", "[V] wolf on snow"),
        (WOLF, "medium", "A wolf sits by a wolf.", "A [V] wolf sits by a wolf."),
        (WOLF, "medium", "[v] wolf licks the [V] wolf's paw by [V].", "[V] wolf licks the wolf's paw by the wolf."),
        (WOLF, "medium", "[V] sits on a forest path.", "[V] sits on a forest path."),
        (WOLF, "short", "asleep on snow", "[V] wolf, asleep on snow"),
        (WOLF, "medium", "The animal sleeps.", "[V] wolf: The animal sleeps."),
        (WOLF, "request", "Draw the animal asleep.", "Draw the animal asleep: [V] wolf"),
        (WOLF, "request", "a wolf on snow", "Draw a [V] wolf on snow"),
        (Naming("subject", "[V]", "coffee mug"), "short", "a mug on a desk", "a [V] mug on a desk"),
        (Naming("subject", "sks", "dog"), "short", "a dog asks for food", "a sks dog asks for food"),
        (Naming("style", "\\1", ""), "short", "a dog", "a dog in \\1 style"),
    ],
)  # fmt: skip
def test_the_placeholder_is_put_in(naming: Naming, variant: Variant, text: str, expected: str) -> None:
    assert with_placeholder(text, variant, naming) == expected


@settings(max_examples=200, deadline=None)
@given(
    answer=st.lists(
        st.sampled_from(["[V]", "[v]", "wolf", "Wolf.", "in", "style", "the", "<|im_end|>", "<**|im_end|>", "**", '"',
                         "\n", "- ", ":", "sure", "draw", "a fox", ".", "!", "[V] wolf's"])
        | st.text(max_size=8),
        max_size=40,
    ).map(" ".join),
    variant=st.sampled_from(VARIANTS),
    naming=st.sampled_from([STYLE, WOLF]),
)  # fmt: skip
def test_whatever_the_answer_a_caption_is_one_clean_line_with_one_placeholder(
    answer: str, variant: Variant, naming: Naming
) -> None:
    made = caption(lambda question: answer, variant, naming)
    assert made.text or made.note
    if made.text:
        assert made.text.count("[V]") == 1
        assert is_text(made.text)
        assert made.text == made.text.strip()
        assert "<|" not in made.text
        assert len(made.text) <= 12 * MOST_WORDS[variant] + 30


@pytest.mark.parametrize("kind", ["style", "subject"])
def test_every_question_is_whole_and_tells_a_subject_by_its_name(kind: str) -> None:
    naming = STYLE if kind == "style" else WOLF
    for variant in VARIANTS:
        question = naming.question(variant)
        assert "{" not in question
        assert ("[V] wolf" in question) == (kind == "subject")
        assert ("Do not say how the picture is made" in question) == (kind == "style")
        assert ("Do not say what [V] wolf looks like" in question) == (kind == "subject")


def test_a_subject_needs_a_class_word() -> None:
    assert naming_of("subject", " a  coffee mug ", "[V]") == Naming("subject", "[V]", "coffee mug")
    assert naming_of("style", None, "[V]") == STYLE
    for subject in (None, "", "a ", "x\ny;", "<|im_end|>", "1", "wolf" * 20, "[V] wolf"):
        with pytest.raises(ValueError, match=r"--subject|class word"):
            naming_of("subject", subject, "[V]")
    with pytest.raises(ValueError, match="sks"):
        naming_of("subject", "sks dog", "sks")
    with pytest.raises(ValueError, match="style"):
        naming_of("style", "a wolf", "[V]")


# --- asking -----------------------------------------------------------------------------------------------------------


def _asked(*answers: str, naming: Naming = STYLE) -> tuple[Caption, list[str]]:
    """What is made of a model's answers, in order, and what it was asked."""
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return answers[len(questions) - 1]

    return caption(ask, "medium", naming), questions


def test_a_good_answer_is_asked_for_once() -> None:
    made, questions = _asked("A fox on a hill.")
    assert made == Caption("A fox on a hill, in [V] style.")
    assert questions == [STYLE.question("medium")]


def test_another_answer_is_asked_for_once_more_and_then_what_is_wrong_is_said() -> None:
    made, questions = _asked("", "A fox on a hill.")
    assert made == Caption("A fox on a hill, in [V] style.")
    assert questions[1] == AGAIN.format(why="it has no words") + STYLE.question("medium")
    assert _asked("", "I'm sorry, I can't see it.")[0] == Caption("", "it declines")
    doubted, _ = _asked("A painted fox on a hill.", "A fox on a sketched hill.")
    assert doubted == Caption("A fox on a sketched hill, in [V] style.", 'it says "sketched", which [V] is to mean')
    kept, _ = _asked("An animal on a hill.", "...", naming=WOLF)
    assert kept == Caption("[V] wolf: An animal on a hill.", "it does not mention the wolf"), "the one that can be used"
