"""A vision-language model that grades a picture against its reference, by a written rubric.

The rubric is a text file (``rubric.txt`` beside this one, or ``evaluation.rubric``); ``{text}`` in it stands for the
picture's prompt. The model sees the reference, then the picture, and answers greedily. Where an answer holds no single
grade it is asked once more for one digit alone; then that is an error that names prompt and answer: a hole in a column
of grades would be an average over other pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dopsd.config.groups import EvaluationSettings, ModelSettings
from dopsd.models.captioner import Ask, Captioner, load_captioner

from .base import BackboneError, kind_of

MOST_TOKENS = 16
"""Of an answer: a digit is one, and some models think of a sentence first."""
_ONE_DIGIT = "Answer with one digit, 1, 2, 3 or 4, and nothing else."
_MOST_BYTES = 64 << 10
_SHIPPED = Path(__file__).with_name("rubric.txt")
_OUT_OF = re.compile(r"(?:/|\bout of\b|\bof\b)\s*4\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def read_rubric(path: str | None, root: Path) -> str:
    """The text of ``evaluation.rubric``, relative to ``root``; of the shipped one where that is ``None``. Raises
    :class:`BackboneError` for a file that cannot be read as one."""
    file = _SHIPPED if path is None else root / Path(path).expanduser()
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise BackboneError(f"evaluation.rubric: {file}: larger than {_MOST_BYTES >> 10} KiB; a page will do")
        text = file.read_text("utf-8").strip()
    except OSError as error:
        raise BackboneError(f"evaluation.rubric: {file}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise BackboneError(f"evaluation.rubric: {file}: no text in UTF-8; save it as that") from None
    if missing := [grade for grade in "1234" if grade not in text]:
        raise BackboneError(f"evaluation.rubric: {file}: never says {missing[0]}; say what each grade of 1, 2, 3, 4 is")
    return text


def rubric_of(evaluation: EvaluationSettings, root: Path) -> str:
    """The text that the settings' judges grade by; empty where none is named. Raises as :func:`read_rubric`."""
    judged = any(kind_of(name) == "judge" for name in evaluation.backbones)
    return read_rubric(evaluation.rubric, root) if judged else ""


def grade_of(answer: str) -> int | None:
    """The grade in an answer: the one number in it, if that is 1, 2, 3 or 4 ("3", "Grade: 3/4"); else ``None``."""
    said = _OUT_OF.sub(" ", answer.rpartition("</think>")[2])
    numbers = set(_NUMBER.findall(said))
    return int(numbers.pop()) if len(numbers) == 1 and numbers <= {"1", "2", "3", "4"} else None


class VisionJudge:
    """A :class:`~.base.Judge`. The model is loaded at the first picture (it may be larger than all else together), and
    again after :meth:`release`."""

    def __init__(self, name: str, found: Captioner, rubric: str, device: torch.device) -> None:
        self.name, self.found, self.rubric = name, found, rubric
        self.model = ModelSettings.model_validate({"path": str(found.folder), "device": device.type})
        self._ask: Ask | None = None

    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], references: Sequence[Image.Image]
    ) -> Tensor:
        """Raises :class:`BackboneError` for an answer without a grade, and ``ModelError`` as
        :func:`~dopsd.models.captioner.load_captioner` does."""
        grades = []
        for image, text, reference in zip(images, texts, references, strict=True):
            self._ask = self._ask or load_captioner(self.found, self.model, MOST_TOKENS)
            question = self.rubric.replace("{text}", text)
            answer = self._ask([reference, image], question)
            grade = grade_of(answer) or grade_of(self._ask([reference, image], f"{question}\n\n{_ONE_DIGIT}"))
            if grade is None:
                raise BackboneError(f"{self.name}: the picture of {text[:60]!r} got no grade of 1 to 4, asked twice: "
                                    f"{' '.join(answer.split())[:100]!r}; say in evaluation.rubric that one digit is "
                                    "wanted, or take a larger judge")  # fmt: skip
            grades.append(grade)
        return torch.tensor(grades, dtype=torch.float32)

    def release(self) -> None:
        """Free the model's memory."""
        self._ask = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
