"""The judge: a real VLM, tiny, that is shown the reference and then the picture, and whose answer is one digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd.config.groups import EvaluationSettings, ModelSettings
from dopsd.evaluation.backbones import BackboneError, check_backbones, load_backbones
from dopsd.evaluation.backbones.judge import grade_of, read_rubric, rubric_of
from dopsd.models import captioner, qwen_vl
from dopsd.models.captioner import find_captioner, load_captioner
from tests import published
from tests.concept_folders import picture
from tests.model_folders import one_line
from tests.speaking import write_speaking_vlm

CPU = torch.device("cpu")
TEXT = "a red boat on the water"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_speaking_vlm(root / "three", "3")
    write_speaking_vlm(root / "owl", "an owl sits")
    published.write_qwen3_vl(root / "babble")
    return root


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("3", 3), (" 4.\n", 4), ("**2**", 2), ("Grade: 1", 1), ("3/4", 3), ("3 out of 4", 3), ("4 of 4", 4),
        ("2, surely 2", 2), ("<think>1 or 2? 2 of 3</think>\n4", 4),
        ("", None), ("close", None), ("5", None), ("0", None), ("3.5", None), ("between 2 and 3", None), ("13", None),
        ("3/5", None),
    ],
)  # fmt: skip
def test_a_grade_is_the_one_number_in_an_answer(answer: str, grade: int | None) -> None:
    assert grade_of(answer) == grade


def test_grades_are_what_the_model_answers(models: Path, tmp_path: Path) -> None:
    backbones = load_backbones(["efficientnet-lite0", f"judge:{models / 'three'}"], CPU, tmp_path)
    (judge,) = backbones.judges
    pictures = [picture(seed, (64, 48)) for seed in range(2)]
    assert judge(pictures, ["a [V]", "a fox"], pictures).tolist() == [3, 3]
    backbones.release()
    assert judge(pictures[:1], ["a [V]"], pictures[:1]).tolist() == [3], "it loads itself again"
    assert judge([], [], []).shape == (0,)
    with pytest.raises(ValueError, match="shorter"):
        judge(pictures, ["a"], pictures)


def test_an_answer_without_a_grade_names_picture_and_answer(models: Path, tmp_path: Path) -> None:
    (judge,) = load_backbones([f"judge:{models / 'owl'}"], CPU, tmp_path).judges
    with pytest.raises(BackboneError) as caught:
        judge([picture(0)], ["a [V] wolf"], [picture(1)])
    one_line(caught.value, "the picture of 'a [V] wolf' got no grade", "asked twice", "'an owl sits'", "judge:owl#")


def test_an_answer_without_a_grade_is_asked_again_for_a_digit(models: Path, tmp_path: Path) -> None:
    (judge,) = load_backbones([f"judge:{models / 'owl'}"], CPU, tmp_path).judges
    asked: list[str] = []

    def answer(pictures: Any, question: str) -> str:
        asked.append(question)
        return "I give it a 3 because 2 details differ" if len(asked) == 1 else "3"

    judge._ask = answer  # type: ignore[attr-defined]
    assert judge([picture(0)], ["a [V] wolf"], [picture(1)]).tolist() == [3]
    assert asked[1].startswith(asked[0])
    assert asked[1].endswith("one digit, 1, 2, 3 or 4, and nothing else.")


def test_several_pictures_stand_in_the_turn_in_their_order(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model itself, on inputs that are put together from the parts."""
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    monkeypatch.setattr(captioner, "MAX_NEW_TOKENS", 12)
    settings = ModelSettings(path="unused", device="cpu", dtype="float32")
    ask = load_captioner(find_captioner(settings, Path(), str(models / "babble")), settings)
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(models / "babble", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models / "babble")
    processor = qwen_vl.load_image_processor(models / "babble")
    shown = [picture(2, (300, 260)), picture(3, (260, 300))]
    answers = []
    for images in (shown, shown[::-1]):
        pixels = processor(images=images, return_tensors="pt")
        blocks = "".join(qwen_vl.image_blocks(pixels["image_grid_thw"], processor.merge_size))
        text = f"<|im_start|>user\n{blocks}which?<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer([text], return_tensors="pt").input_ids
        vlm.model.rope_deltas = None
        with torch.no_grad():
            types = qwen_vl.token_types(tokenizer, ids)
            made = vlm.generate(input_ids=ids, mm_token_type_ids=types, max_new_tokens=12, do_sample=False, **pixels)
        answers.append(ask(images, "which?"))
        assert answers[-1] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert answers[0] != answers[1]


def test_the_judge_sees_the_reference_first_and_reads_the_rubric_with_the_prompt(models: Path, tmp_path: Path) -> None:
    """What it is asked is what the model below it is asked."""
    (tmp_path / "mine.txt").write_text("1 2 3 4 {text}")
    (judge,) = load_backbones([f"judge:{models / 'babble'}"], CPU, tmp_path, "mine.txt").judges
    settings = ModelSettings(path="unused", device="cpu", dtype="float32")
    ask = load_captioner(find_captioner(settings, Path(), str(models / "babble")), settings, 16)
    image, reference = picture(3, (300, 260)), picture(2, (300, 260))
    expected = ask([reference, image], f"1 2 3 4 {TEXT}")
    others = (([image, reference], f"1 2 3 4 {TEXT}"), ([reference, image], "1 2 3 4 {text}"))
    assert expected not in [ask(*other) for other in others]
    with pytest.raises(BackboneError) as caught:
        judge([image], [TEXT], [reference])
    assert repr(" ".join(expected.split())[:100]) in str(caught.value)


def test_the_shipped_rubric_has_a_place_for_the_prompt_and_every_grade() -> None:
    text = read_rubric(None, Path())
    assert "{text}" in text
    assert rubric_of(EvaluationSettings(backbones=("dinov2", "judge:x/y")), Path()) == text
    assert rubric_of(EvaluationSettings(backbones=("dinov2",), rubric="missing.txt"), Path()) == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read (No such file or directory)"), (b"\xff\xfe1234", "no text in UTF-8"),
     (b"1 2 3", "never says 4"), (b"1234" * 20000, "larger than 64 KiB")],
)  # fmt: skip
def test_a_rubric_that_is_none_is_one_line_before_anything_is_loaded(content, words, models, tmp_path) -> None:
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(BackboneError) as caught:
        check_backbones([f"judge:{models / 'three'}"], tmp_path, "mine.txt")
    one_line(caught.value, words, "evaluation.rubric")


def test_a_judge_that_is_no_vlm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"evaluation\.backbones, judge: .*no config\.json") as caught:
        check_backbones([f"judge:{tmp_path / 'empty'}"], tmp_path)
    one_line(caught.value)
