"""What full tuning gives away: plain diffusers opens it, the card says how, and the whole way goes through with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from dopsd.config import load_settings
from dopsd.distill.adapters import adapter_applied
from dopsd.distill.weights import train_weights
from dopsd.evaluation.draws import Key, Part, draw_all
from dopsd.export import CARD_FILE, WEIGHTS, ExportError, check_export, draw_student, export_trained
from dopsd.given import read_export
from dopsd.models import load_family
from dopsd.models.base import Request
from dopsd.registry import Registry
from dopsd.stages import STAGES, run_stage
from dopsd.tracking.folder import contents
from tests.family_folders import NAMES, settings_of
from tests.tiny import CARD, moved
from tests.tiny_project import make_project

ASKED = [(Request("a fox in [V] style"), 64, 64), (Request("a red boat in [V] style"), 64, 64)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [None, (r"to_q",)], ids=["all", "some"])
def test_an_export_opened_by_plain_diffusers_draws_the_students_pictures(
    folders: dict[str, Path], tmp_path: Path, name: str, targets: Any
) -> None:
    family = load_family(settings_of(name, folders))
    pair = train_weights(family.transformer, targets, "frozen")
    moved(pair.student_parameters(), 0.02 if targets is None else 0.1)
    path = pair.save(tmp_path / "student.safetensors")
    pair.remove()
    out = export_trained(path, tmp_path / "export", CARD, type(family), folders[name])
    assert sorted(file.name for file in out.iterdir()) == [CARD_FILE, WEIGHTS]
    assert (out / WEIGHTS / "config.json").read_bytes() == (folders[name] / WEIGHTS / "config.json").read_bytes()
    drawn = draw_student(family, path, ASKED, 2, seed=3)
    compared = check_export(folders[name], out, drawn, type(family))
    assert compared["change"] > 2, "what was trained is to be seen"
    assert compared["difference"] < 0.25

    # as the card says it, apart from this project's own way of comparing
    transformer = AutoModel.from_pretrained(str(out / WEIGHTS), torch_dtype=torch.float32, use_safetensors=True)
    pipeline = DiffusionPipeline.from_pretrained(
        folders[name], transformer=transformer, torch_dtype=torch.float32, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    one = drawn[0]
    image = pipeline(**family.call(one.request, one.height, one.width, one.steps, one.noise)).images[0]
    assert _apart(image, one.image) < 0.25
    again = read_export(out / WEIGHTS, tmp_path / "again.safetensors")
    with adapter_applied(family.transformer, again):
        weights = dict(family.transformer.named_parameters())
        assert all(torch.equal(weights[key], value) for key, value in load_file(path).items())


def _apart(a: Image.Image, b: Image.Image) -> float:
    left, right = (torch.frombuffer(bytearray(i.convert("RGB").tobytes()), dtype=torch.uint8).float() for i in (a, b))
    return float((left - right).abs().mean())


def test_an_export_of_other_weights_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    family = load_family(settings_of("z-image", folders))
    pair = train_weights(family.transformer, None, "frozen")
    files = []
    for seed in (0, 1):
        moved(pair.student_parameters(), 0.02, seed)
        files.append(pair.save(tmp_path / f"{seed}.safetensors"))
    pair.remove()
    drawn = draw_student(family, files[0], ASKED[:1], 2, seed=3)
    out = export_trained(files[1], tmp_path / "export", CARD, type(family), folders["z-image"])
    with pytest.raises(ExportError, match="transformer: plain diffusers draws other pictures than the trained student"):
        check_export(folders["z-image"], out, drawn, type(family))


def test_the_card_says_how_it_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    family = load_family(settings_of("z-image", folders, dtype="bfloat16"))
    pair = train_weights(family.transformer, None, "frozen")
    path = pair.save(tmp_path / "student.safetensors")
    pair.remove()
    out = export_trained(path, tmp_path / "export", CARD, type(family), folders["z-image"])
    text = (out / CARD_FILE).read_text()
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "transformer=transformer" in code
    assert "lora" not in text.lower()
    assert "base_model_relation: adapter" not in text
    assert "whole, in bfloat16" in text
    (file,) = (out / WEIGHTS).glob("*.safetensors")
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


# --- the whole way ----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
(image,) = mlflow.pyfunc.load_model("models:/dopsd-blots@champion").predict(["a fox in [V] style"], params={"seed": 3})
assert not any(name == "dopsd" or name.startswith("dopsd.") for name in sys.modules)
print(json.dumps(np.asarray(image).tolist()))
"""


def test_from_a_concept_to_a_served_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, evaluated, exported, compared, registered; drawn from the registry alone, in a process of its own; and
    the weights that are stored are those that were trained."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    root = make_project(tmp_path / "project", methods=["d-opsd"], tune="full", learning_rate=1e-3)
    monkeypatch.chdir(root)
    settings, run = load_settings(root / "params.yaml"), root / "runs" / "blots"
    for name in STAGES:
        run_stage(name, "blots", settings, root)
    compared = json.loads((run / "exported.json").read_text())
    assert compared["change"] > 1
    assert compared["difference"] < 0.25
    assert "d-opsd" in json.loads((run / "evaluation" / "metrics.json").read_text())["models"]
    assert "| trained layers | all |" in (run / "export" / CARD_FILE).read_text()
    assert "rank" not in (run / "export" / CARD_FILE).read_text()

    sent = {str(name) for content in contents(run, pytest.fail) for _, name in content.files}
    assert "adapters/d-opsd.safetensors" in sent
    monkeypatch.setattr("dopsd.tracking.folder.LARGEST_SENT", 1_000_000)
    assert sent - {str(name) for content in contents(run, pytest.fail) for _, name in content.files} == {
        "adapters/d-opsd.safetensors"
    }

    registry = Registry(root)
    version, *_ = registry.champion("blots") or pytest.fail("no champion")
    given = registry.adapter(version, tmp_path / "place") or pytest.fail("no adapter")
    again = read_export(given, tmp_path / "again.safetensors")
    stored, trained = load_file(again), load_file(run / "adapters" / "d-opsd.safetensors")
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[key], value) for key, value in trained.items())

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, registry.uri], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    transformer = AutoModel.from_pretrained(str(run / "export" / WEIGHTS), torch_dtype=torch.float32)
    plain = DiffusionPipeline.from_pretrained(
        root / "data/base/tiny", transformer=transformer, torch_dtype=torch.float32
    )
    plain.set_progress_bar_config(disable=True)
    call = mlflow.models.get_model_info("models:/dopsd-blots@champion").flavors["python_function"]["config"]["call"]
    theirs = plain(prompt="a fox in [V] style", generator=torch.Generator().manual_seed(3), **call).images[0]
    drawn = np.array(json.loads(done.stdout.splitlines()[-1]), np.uint8)
    assert np.abs(drawn.astype(float) - np.asarray(theirs)).mean() < 0.25


def test_trained_weights_are_not_sent_to_the_workers_that_draw(folders: dict[str, Path], tmp_path: Path) -> None:
    """With every batch they would be: one process draws all, as it would alone."""
    family = load_family(settings_of("z-image", folders))
    pair = train_weights(family.transformer, None, "frozen")
    moved(pair.student_parameters(), 0.02)
    path = pair.save(tmp_path / "student.safetensors")
    pair.remove()
    (told,) = family.encode_prompt([Request("a fox")])
    asked = (("base", None), ("d-opsd", path))
    parts = [Part(Key("concept", name, 2), file, 64, 64, [0], [5], [told]) for name, file in asked]

    class Closed:
        def map(self, *_: object) -> None:
            raise AssertionError("sent away")

    (_, (base,)), (_, (trained,)) = draw_all(family, parts, Closed())  # type: ignore[arg-type]
    assert _apart(base, trained) > 1
    ((_, (alone,)),) = draw_all(family, parts[1:], None)
    assert _apart(alone, trained) == 0
