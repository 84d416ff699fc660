"""``dopsd doctor``: what it says before anything is fetched or measured (more of it in test_cli and test_places)."""

from __future__ import annotations

from pathlib import Path

import pytest

from dopsd.config import load_settings
from dopsd.doctor import Finding, examine, what_is_needed
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
