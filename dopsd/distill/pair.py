"""Student and teacher on one transformer: what the method asks of them, whatever it is that is trained.

Two kinds: adapters beside frozen weights (:mod:`dopsd.distill.adapters`), and the weights themselves
(:mod:`dopsd.distill.weights`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal

from torch import Tensor, nn

Selection = Literal["student", "teacher"] | None
"""Who answers; ``None`` is the base as it was before training."""
TeacherKind = Literal["ema", "frozen", "copy"]
STUDENT: Final = "student"
TEACHER: Final = "teacher"


class Pair(ABC):
    """The student and the teacher of a run, and the only place that switches between them.

    ``kind`` says who the teacher is: ``ema``, weights of its own that follow the student; ``frozen``, the base;
    ``copy``, the student's own weights.
    """

    transformer: nn.Module
    kind: TeacherKind
    matched: Mapping[str, tuple[str, ...]]
    """What is trained: pattern to names in the transformer."""
    selected: Selection

    @property
    def teacher(self) -> Selection:
        """What to select for the teacher's answer."""
        selections: dict[TeacherKind, Selection] = {"ema": TEACHER, "frozen": None, "copy": STUDENT}
        return selections[self.kind]

    @contextmanager
    def select(self, name: Selection) -> Iterator[None]:
        """Let ``name`` answer inside the block, and who did before again after it."""
        before = self.selected
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    @abstractmethod
    def _activate(self, name: Selection) -> None: ...

    @abstractmethod
    def student(self) -> Mapping[str, Tensor]:
        """The student's own tensors, keyed as in a file of it."""

    @abstractmethod
    def student_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets, in a fixed order."""

    @abstractmethod
    def update(self, decay: float) -> None:
        """``teacher <- decay * teacher + (1 - decay) * student`` in float32; nothing to do for the other kinds."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes here, ``student/...``, and ``teacher/...`` in float32; to be written before
        the next step."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave; a missing tensor is a ``KeyError``."""

    @abstractmethod
    def remove(self) -> None:
        """Give the transformer back as it was."""
