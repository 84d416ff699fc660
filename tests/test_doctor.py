"""``dopsd doctor``: what it says before anything is fetched or measured (more of it in test_cli and test_places)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dopsd import doctor
from dopsd.config import SettingsError, load_settings
from dopsd.doctor import Finding, examine, what_is_needed
from dopsd.evaluation.backbones.sources import device_bytes
from dopsd.models import ModelError, resolved
from dopsd.sizing.cards import card_of
from dopsd.sizing.plan import plan_for

ROOT = Path(__file__).resolve().parents[1]
KLEIN = "black-forest-labs/FLUX.2-klein-4B"


def params(folder: Path, recipe: str, path: str) -> Path:
    """A recipe with another base."""
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    before = load_settings(ROOT / "recipes" / f"{recipe}.yaml").model.path
    file = folder / "params.yaml"
    file.write_text(text.replace(f"path: {before}", f"path: {path}"), encoding="utf-8")
    return file


def base_found(file: Path, root: Path) -> Finding:
    (found,) = (finding for finding in examine(file, root) if finding.what == "base model")
    return found


def test_a_base_of_another_family_is_named_though_it_is_not_here(tmp_path: Path) -> None:
    file = params(tmp_path, "z-image-turbo", KLEIN)
    said = f"{KLEIN}: its pipeline is Flux2KleinPipeline, and ZImagePipeline is needed"
    found = base_found(file, tmp_path)
    assert found.state == "fault"
    assert said in found.found
    with pytest.raises(ModelError, match=said):
        plan_for(resolved(load_settings(file)), tmp_path)
    assert [*what_is_needed(file, tmp_path, card_of("24"))] == [""]
    assert base_found(params(tmp_path, "flux2-klein-9b", KLEIN), tmp_path).state == "note"


def full_card(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    """A card of which others hold every byte."""

    def allocate(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=name, total_memory=size))
    monkeypatch.setattr(torch, "randn", allocate)


@pytest.mark.parametrize(
    ("name", "gib", "like"), [("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"), ("Graphics Device", 47.4, "48")]
)
def test_a_full_card_is_taken_for_as_fast_as_its_like(
    monkeypatch: pytest.MonkeyPatch, name: str, gib: float, like: str
) -> None:
    full_card(monkeypatch, name, int(gib * 2**30))
    found, typical = doctor.card_here(), card_of(like)
    assert found is not None
    assert (found.name, found.teraflops, found.terabytes) == (name, typical.teraflops, typical.terabytes)
    assert found.gib == pytest.approx(gib)


def test_the_card_is_measured_where_something_is_planned_and_after_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[bool] = []
    monkeypatch.setattr(doctor, "card_here", lambda: measured.append(True))
    assert doctor.card_meant(None) is None
    lines = [*what_is_needed(params(tmp_path, "z-image-turbo", "nobody/knows-it"), tmp_path, doctor.card_meant(None))]
    assert not measured
    assert "little" in lines[1]
    lines_of_klein = what_is_needed(params(tmp_path, "flux2-klein-4b", KLEIN), tmp_path, None)
    assert next(lines_of_klein) == ""
    assert not measured
    next(lines_of_klein)
    assert measured


def test_every_backbone_counts_and_a_judge_comes_alone() -> None:
    """Two of a kind are two; LPIPS is float32, others are halves; the embedded one is nothing to speak of."""
    beside, judge = device_bytes(("efficientnet-lite0", "dinov2", "dinov2:models/large", "clip", "lpips", "judge"))
    assert beside == pytest.approx(2e9 * (2 * 0.022 + 0.428) + 4e9 * 0.015)
    assert judge == pytest.approx(2e9 * 8.767)
    assert device_bytes(("efficientnet-lite0",)) == (0, 0)


def test_what_is_asked_is_what_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A concept's own settings over those of the file, and KEY=VALUE over both, as in a training."""
    asked: list[int] = []
    monkeypatch.setattr("dopsd.sizing.plan.plan_for", lambda settings, _: asked.append(settings.train.lora.rank))
    file = params(tmp_path, "z-image-turbo", load_settings(ROOT / "recipes/z-image-turbo.yaml").model.path)
    own = tmp_path / "data/concepts/big/train.yaml"
    own.parent.mkdir(parents=True)
    (tmp_path / "data/prompts").mkdir()
    (tmp_path / "data/prompts/general.txt").write_text("a red house\n")
    own.write_text("lora: {rank: 8}\n", encoding="utf-8")

    def ask(*overrides: str, concept: str | None = None) -> None:
        list(what_is_needed(file, tmp_path, card_of("24"), overrides, concept))

    ask()
    ask(concept="big")
    ask("train.lora.rank=4")
    ask("train.lora.rank=4", concept="big")
    assert asked == [64, 8, 4, 4]
    own.write_text("ranks: 8\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="ranks"):
        ask(concept="big")
    with pytest.raises(SettingsError, match="No Name"):
        ask(concept="No Name")
