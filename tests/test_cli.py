"""The command line as a person meets it: the six stages on a tiny base, and what is said about mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from dopsd import cli
from dopsd.config import load_settings
from dopsd.stages import STAGES
from tests.tiny_project import make_project

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return project


def _run(*arguments: str) -> str:
    """Run a command in this process; it must succeed."""
    result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def _mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run a command as a person does, who made a mistake; returns what they are told."""
    monkeypatch.setattr(sys, "argv", ["dopsd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_the_six_stages_one_after_another(inside: Path) -> None:
    for stage in STAGES:
        said = _run(stage, "--concept", "blots")
        assert said.startswith(f"{stage}: "), "each says what it did"
        assert len(said.strip().splitlines()) <= 3, said
    run = inside / "runs" / "blots"
    for made in (
        "validated.json", "encoded/index.json", "train/d-opsd/log.jsonl", "adapters/d-opsd.safetensors",
        "adapters/sft-compute.safetensors", "evaluation/metrics.json", "evaluation/few_step.csv", "report.html",
        "export/pytorch_lora_weights.safetensors", "export/README.md",
    ):  # fmt: skip
        assert (run / made).is_file(), made
    assert not list(run.rglob("*.partial")), "nothing half-written is left"

    said = _run("show", "--concept", "blots")
    assert "D-OPSD" in said
    assert str(run / "report.html") in said
    assert "mlflow.db" in said

    # the tracker was told all of it
    client = MlflowClient(tracking_uri=f"sqlite:///{inside}/mlflow.db")
    experiment = client.get_experiment_by_name("dopsd")
    assert experiment is not None
    runs = {r.info.run_name.partition(" v1 promoted: ")[0]: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"blots", "blots d-opsd", "blots sft"}
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(runs["blots d-opsd"].info.run_id, "train/loss")
    assert [m.step for m in history] == [1, 2, 3]
    assert "system/cpu_utilization_percentage" in runs["blots d-opsd"].data.metrics
    top = {item.path for item in client.list_artifacts(runs["blots"].info.run_id)}
    assert {"evaluation", "report.html", "export", "settings.json"} <= top
    assert runs["blots"].inputs.dataset_inputs[0].dataset.name == "blots"
    assert runs["blots"].data.params["train.max_steps"] == "3"
    assert {"tuned/kept", "score/kept"} <= runs["blots d-opsd"].data.metrics.keys()
    assert client.list_artifacts(runs["blots d-opsd"].info.run_id, "images"), "previews"
    assert [a.path for a in client.list_artifacts(runs["blots sft"].info.run_id, "adapters")] == [
        "adapters/sft-compute.safetensors", "adapters/sft.safetensors"
    ]  # fmt: skip
    assert any(key.startswith("export/") for key in runs["blots"].data.metrics)


def test_training_again_returns_at_once_and_is_the_same_run(inside: Path) -> None:
    adapter = inside / "runs/blots/adapters/d-opsd.safetensors"
    before = adapter.read_bytes()
    train = inside / "runs/blots/train"
    files = {path: path.read_bytes() for path in train.rglob("*") if path.is_file()}
    _run("train", "--concept", "blots")
    assert adapter.read_bytes() == before
    assert {path: path.read_bytes() for path in train.rglob("*") if path.is_file()} == files, "no stage is due again"
    client = MlflowClient(tracking_uri=f"sqlite:///{inside}/mlflow.db")
    experiment = client.get_experiment_by_name("dopsd")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 3


def test_sample_takes_a_seed_for_each_prompt(inside: Path, tmp_path: Path) -> None:
    def drawn(name: str, *arguments: str) -> list[bytes]:
        _run("sample", "--steps", "1", "--out", str(tmp_path / name), *arguments)
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("[0-9]*.png"))]

    three = drawn("three", *("-p", "a blot") * 3, "--seed", "7")
    assert len(set(three)) == 3
    assert drawn("again", *("-p", "a blot") * 2, "--seed", "9", "--seed", "7") == [three[2], three[0]]
    done = CliRunner().invoke(cli.app, ["sample", *("-p", "x") * 3, "--seed", "1", "--seed", "2"])
    assert str(done.exception).startswith("--seed: 2 seeds for 3 prompts")


@pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"])
def test_sample_takes_what_is_given_away(inside: Path, tmp_path: Path, file: str) -> None:
    pictures = []
    for name, adapter in (("own", "runs/blots/adapters/d-opsd.safetensors"), ("given", f"runs/blots/export/{file}")):
        _run("sample", "-p", "a blot", "--steps", "2", "--out", str(tmp_path / name), "--adapter", adapter)
        pictures.append(np.asarray(Image.open(tmp_path / name / "00.png"), float))
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.25, "rounded to bfloat16"


def test_broken_files_of_a_run_stop_no_stage(inside: Path) -> None:
    run = inside / "runs/blots"
    contents = {path: path.read_bytes() for path in (run / "about.json", run / "train/sft/run.json")}
    for path in (*contents, run / "train/training.json"):
        path.write_text("")
    with (run / "train/sft/log.jsonl").open("a") as log:
        log.write('{"step": 4, "tra')
    told = {}
    for command in (("report",), ("train",), ("track", "sync")):
        done = CliRunner().invoke(cli.app, [*command, "--concept", "blots"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        told[command[0]] = done.output
    assert "training.json cannot be read" in told["report"], "nothing can be sent, but all goes on"
    assert "sft/log.jsonl: line" in told["track"]
    assert "has all of runs/blots" in told["track"]


def test_other_training_code_starts_afresh(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dopsd.identity.METHOD_VERSION", "another")
    _run("train", "--concept", "blots", "--set", "train.methods=[sft]")
    assert (inside / "runs/blots/train/sft.previous-1").is_dir()
    left = {path.stem for path in (inside / "runs/blots/adapters").iterdir()}
    assert left == {"sft", "sft-compute"}, "what is not asked for any more would stay in every table"


def test_sample_draws_with_and_without_an_adapter(inside: Path, tmp_path: Path) -> None:
    prompts = ("-p", "a blot in [V] style", "-p", "a blot")
    _run("sample", *prompts, "--steps", "2", "--out", str(tmp_path / "base"))
    _run("sample", *prompts, "--steps", "2", "--out", str(tmp_path / "again"))
    _run(
        "sample", *prompts, "--steps", "2", "--out", str(tmp_path / "tuned"),
        "--adapter", "runs/blots/adapters/sft.safetensors",
    )  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert files == ["00.png", "01.png", "grid.png"]
    base, again, tuned = ([(tmp_path / d / f).read_bytes() for f in files] for d in ("base", "again", "tuned"))
    assert base == again, "a seed is a picture"
    assert base != tuned


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "-c", "blots", "--set", "train.max_stepz=3"], "train.max_stepz: unknown setting"),
        (["train", "-c", "blots", "--params", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["validate", "-c", "nothing"], "nothing"),
        (["train", "-c", "nothing"], "run stage encode first"),
        (["evaluate", "-c", "nothing"], "nothing"),
        (["report", "-c", "nothing"], "run stage validate first"),
        (["show", "-c", "nothing"], "make demo CONCEPT=nothing"),
        (["sample", "-p", "x", "-a", "no.safetensors"], "no.safetensors: no such adapter"),
        (["sample", "-p", "x", "--set", "model.path=no/where", "--seed", str(2**63)], "--seed: 9223372036854775808: "),
        (["sample", *("-p", "x") * 2, "--set", "model.path=no/where", "--seed", str(2**63 - 1)], "--seed: 922337203"),
        (["sample", *("-p", "x") * 2, "--set", "model.path=no/where", "--seed", "3", "--seed", "-1"], "--seed: -1: "),
        (["validate", "-c", "blots", "--params", "runs"], "runs: cannot be read (Is a directory)"),
        (["sample", "-p", "x", "--set", "model.path=no/where/at/all"], "no such folder"),
        (["concept", "add", "no/where", "--name", "x"], "no such folder"),
        (["concept", "add", "no/where", "--name", "../x"], "use 1 to 64 of a-z, 0-9 and -"),
        (["plan", "-c", "../../x"], "use 1 to 64 of a-z, 0-9 and -"),
        (["show", "-c", "../../x"], "use 1 to 64 of a-z, 0-9 and -"),
        (["track", "sync", "-c", "../../x"], "use 1 to 64 of a-z, 0-9 and -"),
        (["gain", "-c", "../../x"], "use 1 to 64 of a-z, 0-9 and -"),
    ],
)
def test_a_mistake_is_said_in_words(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    told = _mistake(capsys, monkeypatch, *arguments)
    assert said in told
    assert told.startswith("error: ")


def test_a_cluster_that_is_away_is_said_in_words(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    told = _mistake(capsys, monkeypatch, "train", "-c", "blots", "--set", "compute.launcher=ray")
    assert "error: cannot reach the cluster at 127.0.0.1:9" in told


def test_debug_shows_where(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dopsd", "--debug", "train", "-c", "blots", "--set", "x=1"])
    with pytest.raises(ValueError, match="x: unknown setting"):
        cli.main()


def test_doctor_tells_what_is_missing(inside: Path) -> None:
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1, "DVC is not initialised there"
    assert "dvc init" in result.output
    assert "data/base/tiny" in result.output
    assert "What these settings need: little" in result.output
    told = CliRunner().invoke(cli.app, ["doctor", "--card", "Voodoo"])
    assert "--card Voodoo" in str(told.exception)


def test_help_is_quick_and_shows_examples() -> None:
    code = (
        "import sys; from dopsd.cli import app; app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.splitlines()[-1] == "False", "the help needs no torch"
    for word in ("dvc repro", "concept add", "--set train.max_steps=20", *STAGES):
        assert word in done.stdout


def test_a_run_ended_by_the_clock_is_compared_at_as_many_images(project: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(project / "data")
    settings = load_settings(project / "params.yaml", ("train.max_minutes=1e-9", "tracking.enabled=false"))
    for stage in ("validate", "encode", "train"):
        STAGES[stage]("blots", settings, tmp_path)
    adapters = tmp_path / "runs/blots/adapters"
    drawn = {path.stem: json.loads(path.read_text())["images"] for path in adapters.glob("*.json")}
    assert drawn["d-opsd"] == drawn["sft"] == settings.train.batch_size
