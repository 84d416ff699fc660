"""The evaluation with other eyes: all kinds of backbones together, the published protocol, and large pictures one at a
time. Tiny random models of the real classes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dopsd.data.cache import EncodingCache
from dopsd.data.manifest import PROTOCOL, DataError
from dopsd.data.schema import validate_dataset
from dopsd.data.wording import Naming
from dopsd.distill import drawing
from dopsd.evaluation import prompts
from dopsd.evaluation.draws import Job, Key, Subject, drawn_at_most, parts_of
from dopsd.evaluation.extras import Extras
from dopsd.evaluation.protocol import write_protocol
from dopsd.evaluation.report import write_report
from dopsd.evaluation.suite import evaluate
from dopsd.models import resolved
from dopsd.models.base import Family
from dopsd.train.workers import Workers
from tests.seeing import write_eyes
from tests.speaking import write_speaking_vlm
from tests.tiny import tiny_family
from tests.tiny_evaluation import small_world, tiny_run_settings, write_adapter, write_concept


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("eyes")
    folders = write_eyes(root / "eyes")
    write_speaking_vlm(root / "three", "3")
    named = {kind: f"{kind}:{folders[kind]}" for kind in ("dinov2", "dinov3", "clip", "siglip", "lpips")}
    return named | {"judge": f"judge:{root / 'three'}"}


class InThisProcess(Workers):
    """One worker that is this process, and knows whether it still holds its base."""

    def __init__(self) -> None:
        self.family: Family | None = tiny_family()

    def map(self, function: Callable[[Family, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        assert self.family is not None
        yield from (function(self.family, item) for item in items)

    def close(self) -> None:
        self.family = None


def _evaluate(root: Path, table: Any, holdout: Any, workers: Workers | None = None, **changes: Any) -> dict[str, Any]:
    subjects = [
        Subject("base", None), Subject("d-opsd", write_adapter(root / "a.safetensors", 0.5)),
        Subject("sft", write_adapter(root / "b.safetensors", 0.0)),
    ]  # fmt: skip
    return evaluate(
        tiny_family(), table, holdout, None, subjects, tiny_run_settings(max_prompts=6, **changes),
        EncodingCache(root / "cache"), root / "evaluation", workers,
    )  # fmt: skip


def test_all_kinds_together(tmp_path: Path, eyes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    workers, judge = InThisProcess(), Extras.judge

    def look(self: Extras, cells: Any) -> Any:
        assert workers.family is None, "a judge may need the room that workers hold"
        return judge(self, cells)

    monkeypatch.setattr(Extras, "judge", look)
    table, holdout = write_concept(tmp_path / "concept", small_world(), None)
    kinds = ("dinov2", "clip", "siglip", "lpips", "judge")
    metrics = _evaluate(tmp_path, table, holdout, workers, backbones=[eyes[kind] for kind in kinds])
    scores = metrics["scores"]
    assert metrics["backbone"].startswith("dinov2:")
    assert {"likeness", "likeness@clip", "likeness@siglip", "prompt", "prompt@siglip", "judge", "target@dinov2",
            "target@clip", "target@lpips"} <= scores["concept"]["d-opsd"].keys()  # fmt: skip
    assert {"kept", "kept@clip", "kept@siglip", "kept@lpips", "prompt"} <= scores["kept"]["d-opsd"].keys()
    kept = {score: scores["kept"]["sft"][score] for score in scores["kept"]["sft"] if score.startswith("kept")}
    assert kept == pytest.approx(dict.fromkeys(kept, 1), abs=1e-4), "an adapter that changes nothing"
    assert all(scores["kept"]["d-opsd"][score] < 1 for score in kept)
    assert scores["concept"]["d-opsd"]["judge"] == 3
    assert not [path for path in tmp_path.iterdir() if "waiting" in path.name]
    page = write_report(tmp_path / "evaluation", tmp_path / "none", {}, tmp_path / "report.html").read_text()
    assert "prompt following" in page
    assert "(clip)" in page
    # by hand, for one: the paired scores hold what a text-image model says of the samples themselves
    paired = json.loads((tmp_path / "evaluation/paired.json").read_text())
    assert paired["models"]["sft"]["prompt"] == paired["models"]["base"]["prompt"]
    assert len(paired["models"]["sft"]["prompt"]["first"]) == 6


def test_the_published_protocol(tmp_path: Path, eyes: dict[str, str]) -> None:
    table, _ = write_concept(tmp_path / "concept", small_world(), None, holdout=False)
    backbones = [eyes[kind] for kind in ("dinov3", "clip", "lpips", "judge")]
    settings = tiny_run_settings(protocol="published")
    with pytest.raises(DataError, match=PROTOCOL):
        prompts.published(table, settings)
    write_protocol(table, Naming("style", "[V]"), None, 10**6, None)
    asked = prompts.published(table, settings)
    assert {split: len(found) for split, found in asked.items()} == {"rewrite": 4, "concept": 16}
    for split, indices in (("rewrite", [0]), ("concept", [1, 2, 3, 4])):
        conditioning = [{"x": torch.zeros(1)}] * len(asked[split])
        parts = parts_of(Job(Key(split, "base", 1), None, asked[split], conditioning), settings.evaluation.seed, 100)
        assert [seed for part in parts for seed in part.seeds] == [
            30 + 100 * row + i for row in range(4) for i in indices
        ]
    metrics = _evaluate(tmp_path, table, None, protocol="published", backbones=backbones)
    assert metrics["published"]["d-opsd"].keys() == {"dino_d", "lpips_d", "clip_s", "judge"}
    assert metrics["published"]["sft"] == metrics["published"]["base"]
    assert metrics["counts"]["concept_prompts"] == 16, "all of them, whatever max_prompts says"
    page = write_report(tmp_path / "evaluation", tmp_path / "none", {}, tmp_path / "report.html").read_text()
    assert "DINO-D" in page


def test_the_preset_names_the_published_backbones_unless_others_are_named() -> None:
    own = tiny_run_settings(protocol="published")
    assert resolved(own).evaluation.backbones == ("dinov3", "clip", "lpips", "judge")
    named = tiny_run_settings(protocol="published", backbones=["dinov2"])
    assert resolved(named).evaluation.backbones == ("dinov2",)


def test_large_pictures_are_held_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 x 1,024 on a tiny base: what the whole evaluation holds beside its networks is a few pictures, however
    many prompts and training pictures there are."""
    side, picture = 1024, 3 * 1024 * 1024
    folder, draw = tmp_path / "concept", np.random.default_rng(0)
    for place, count in ((folder, 4), (folder / "holdout", 3)):
        place.mkdir(parents=True)
        rows = []
        for number in range(count):
            small = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((side, side)).save(place / f"{number}.png")
            rows.append(json.dumps({"image": f"{number}.png", "caption": f"{place.name} {number} in [V] style"}))
        (place / "metadata.jsonl").write_text("\n".join(rows))
    kept = [f"a house, number {number}" for number in range(2)]
    settings = tiny_run_settings(steps=[1], few_steps=1, many_steps=1, curve_prompts=1, kept_prompts=kept)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"resolution": side})})
    table, holdout = validate_dataset(folder, "large", settings.data)
    decoded, resident, process = list[int](), list[int](), psutil.Process()

    def pictures(family: Any, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        decoded.append(len(latents))
        resident.append(process.memory_info().rss)
        return drawing_pictures(family, latents, height, width)

    drawing_pictures = drawing.pictures
    monkeypatch.setattr(drawing, "pictures", pictures)
    subjects = [Subject("base", None), Subject("teacher", None), Subject("sft", write_adapter(tmp_path / "a", 0.5))]
    tracemalloc.start()  # of Python and of Pillow's and NumPy's pictures, not of torch's networks
    try:
        metrics = evaluate(
            tiny_family(), table, holdout, None, subjects, settings, EncodingCache(tmp_path / "cache"), tmp_path / "out"
        )
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert metrics["counts"]["concept_prompts"] == 3
    assert set(decoded) == {1}
    asked = settings.evaluation.model_copy(update={"max_prompts": 3})
    assert len(decoded) == drawn_at_most(asked, tuned=1, training=4)[0], "what doctor says beforehand"
    drawn = len(decoded) + 7  # and those of the data set
    assert drawn > 25
    assert most < 10 * picture, f"{most / picture:.1f} pictures' worth, of {drawn}"
    # and the whole process, torch's blocks and what the C library keeps: in float32 a picture is four times as large
    assert max(resident[-6:]) - min(resident[6:12]) < 10 * 4 * picture
