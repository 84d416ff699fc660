"""``dopsd runs``: every training is listed, and goes only when it is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dopsd.cli import app
from dopsd.config.groups import ComputeSettings
from dopsd.lock import ConceptBusy, concept_lock
from dopsd.params import SettingsError
from dopsd.runs import remove_runs, runs_in, runs_table
from dopsd.train.storage import JobStorage
from tests import tiny
from tests.tiny_project import ROOT


def _train(root: Path, method: str = "d-opsd", **settings: object) -> None:
    """As a stage has it: each method in a folder of its own."""
    from dopsd.train.trainer import Place, Training, train

    how, examples, prompts = tiny.tiny_settings(**settings), tiny.tiny_examples(), tiny.tiny_prompts()
    identity, made_of = (
        make(how, method, examples, prompts)  # type: ignore[arg-type]
        for make in (tiny.tiny_identity, tiny.tiny_made_of)
    )
    run = root / "runs/blots"
    training = Training(method, how, examples, identity, prompts, name="0" * 12, made_of=made_of)  # type: ignore[arg-type]
    train(tiny.tiny_family(), training, Place(run / "train" / method, run / "adapters", tiny.Recorder()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """D-OPSD of three settings, the last in its place; and SFT."""
    _train(tmp_path, max_steps=3)
    _train(tmp_path, max_steps=2, learning_rate=2e-2)
    _train(tmp_path, max_steps=1, learning_rate=3e-2)
    _train(tmp_path, "sft", max_steps=1)
    return tmp_path


def _names(root: Path) -> list[str]:
    return [run.folder.name for run in runs_in(root)]


def test_all_runs_are_listed_with_their_steps_and_what_was_other_about_them(root: Path) -> None:
    runs = {run.folder.name: run for run in runs_in(root)}
    assert {name: run.steps for name, run in runs.items()} == {
        "d-opsd": 1, "d-opsd.previous-1": 3, "d-opsd.previous-2": 2, "sft": 2,
    }  # fmt: skip
    assert {name for name, run in runs.items() if run.aside} == {"d-opsd.previous-1", "d-opsd.previous-2"}
    assert {run.status for run in runs.values()} == {"finished"}
    for run in runs.values():
        assert run.time == pytest.approx((run.folder / "run.json").stat().st_mtime * 1000, abs=5000)
        assert run.size == sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    table = runs_table(list(runs.values()), root)
    settings = dict(zip(runs, table.columns[-1].cells, strict=True))
    assert settings["d-opsd"] == "max_steps 1, batch_size 2, learning_rate 0.03, lora.rank 4"
    assert settings["d-opsd.previous-1"] == "learning_rate 0.01 -> 0.03, max_steps 3 -> 1"
    assert settings["d-opsd.previous-2"] == "learning_rate 0.02 -> 0.03, max_steps 2 -> 1"


def test_a_run_goes_when_it_is_named_and_no_other(root: Path) -> None:
    (gone,) = remove_runs(root, "blots", ["d-opsd.previous-1"], ComputeSettings())
    assert (gone.folder.name, gone.steps) == ("d-opsd.previous-1", 3)
    assert _names(root) == ["d-opsd", "d-opsd.previous-2", "sft"]
    with pytest.raises(
        SettingsError, match=r"blots has no run d-opsd\.previous-1; it has d-opsd, d-opsd\.previous-2, sft"
    ):
        remove_runs(root, "blots", ["sft", "d-opsd.previous-1"], ComputeSettings())
    for name in ("../train", "..", "", "sft/checkpoints"):
        with pytest.raises(SettingsError, match="has no run"):
            remove_runs(root, "blots", [name], ComputeSettings())
    with concept_lock("blots", root, "dopsd train"), pytest.raises(ConceptBusy):
        remove_runs(root, "blots", ["sft"], ComputeSettings())
    assert _names(root) == ["d-opsd", "d-opsd.previous-2", "sft"]


def test_a_run_of_a_version_that_wrote_nothing_down_is_listed_too(root: Path) -> None:
    for path in (root / "runs/blots/train/d-opsd.previous-1/checkpoints").glob("*/state.json"):
        path.write_text('{"step": 3, "fingerprint": "x"}')
    (run, *_) = [run for run in runs_in(root, "blots") if run.folder.name == "d-opsd.previous-1"]
    assert (run.steps, dict(run.made_of)) == (3, {})
    assert "not written down" in list(runs_table([run], root).columns[-1].cells)


def test_one_that_is_moved_back_goes_on_with_its_settings(root: Path) -> None:
    """As the help says."""
    train = root / "runs/blots/train"
    remove_runs(root, "blots", ["d-opsd"], ComputeSettings())
    (train / "d-opsd.previous-1").rename(train / "d-opsd")
    _train(root, max_steps=4)
    assert {run.folder.name: run.steps for run in runs_in(root)} == {"d-opsd": 4, "d-opsd.previous-2": 2, "sft": 2}


def test_what_a_job_on_ray_keeps_of_a_run_goes_with_it(root: Path, tmp_path: Path) -> None:
    """Else its workers would go on with what was removed."""
    runs, compute = root / "runs/blots/train", ComputeSettings(storage=str(tmp_path / "storage"))
    (runs / "training.json").write_text('{"training": "aaaaaaaaaaaa"}')
    storage = JobStorage(str(tmp_path / "storage"), "blots-aaaaaaaaaaaa")
    storage.save(runs, ["d-opsd", "sft"])
    remove_runs(root, "blots", ["d-opsd.previous-1"], compute)
    assert storage.further_than(tmp_path / "nothing") == ["d-opsd", "sft"]
    remove_runs(root, "blots", ["d-opsd"], compute)
    assert storage.further_than(tmp_path / "nothing") == ["sft"]


def test_a_link_to_a_run_is_left_alone(root: Path, tmp_path: Path) -> None:
    runs = root / "runs/blots/train"
    (runs / "sft").rename(tmp_path / "elsewhere")
    (runs / "sft").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match="sft is a link"):
        remove_runs(root, "blots", ["d-opsd", "sft"], ComputeSettings())
    assert "d-opsd" in _names(root)


def test_the_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    shutil.copy(ROOT / "params.yaml", root)  # it says where jobs keep their checkpoints
    monkeypatch.setenv("COLUMNS", "200")
    listed = CliRunner().invoke(app, ["runs"])
    assert listed.exit_code == 0, listed.output
    assert "blots d-opsd.previous-2" in listed.output
    removed = CliRunner().invoke(
        app, ["runs", "-c", "blots", "--remove", "d-opsd.previous-2", "--remove", "d-opsd.previous-1"]
    )
    assert "removed: runs/blots/train/d-opsd.previous-2, 2 steps" in removed.output
    assert _names(root) == ["d-opsd", "sft"]
    assert "--concept NAME" in str(CliRunner().invoke(app, ["runs", "--remove", "sft"]).exception)
    assert _names(root) == ["d-opsd", "sft"]
