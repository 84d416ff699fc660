"""The published protocol's four numbers (docs/evaluation.md), of the splits that it asks.

Intervals are over training pictures: what is asked of one picture is not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .compare import Cells
from .draws import Key
from .headline import Numbers
from .prompts import CONCEPT, REWRITE
from .protocol import TESTS
from .scoring import Bootstrap

_TARGETS = {"dino_d": ("target@dinov3", "target@dinov2"), "lpips_d": ("target@lpips",)}
"""Distances to the training picture, of the rewrite alone: the first that there is."""
_OVER_ALL = {"clip_s": "prompt", "judge": "judge"}
"""Means over the rewrite and the four tests."""


def published(cells: Cells, models: Sequence[str], few: int, bootstrap: Bootstrap) -> dict[str, Numbers]:
    """Model to DINO-D, LPIPS-D, CLIP-S and the judge's grade, as far as their backbones were named."""
    out = {}
    for model in models:
        numbers = Numbers()
        rewrite, tests = (cells.get(Key(split, model, few)) for split in (REWRITE, CONCEPT))
        if rewrite is not None:
            for name, scores in _TARGETS.items():
                if score := next((score for score in scores if score in rewrite.values), None):
                    values = rewrite.values[score]
                    numbers.add(name, float(values.mean()), bootstrap.means(values), len(values))
        for name, score in _OVER_ALL.items():
            found = [cell.values[score] for cell in (rewrite, tests) if cell is not None and score in cell.values]
            if len(found) == 2:  # over all five or not at all: the teacher rewrites nothing
                first, others = found
                of_picture = np.column_stack([first, others.reshape(len(first), TESTS)]).mean(1)
                numbers.add(name, float(of_picture.mean()), bootstrap.means(of_picture), len(first))
        out[model] = numbers
    return out
