"""A training that its machine has not the memory for: said in one line, nothing lost, and not tried again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from dopsd.config import load_settings
from dopsd.config.groups import ComputeSettings
from dopsd.data.encoded import read_encoded
from dopsd.models import Family, load_family
from dopsd.stages import STAGES, StageError
from dopsd.train import device_memory
from dopsd.train.job import Job
from dopsd.train.launch import run_training
from dopsd.train.storage import JobStorage
from dopsd.train.trainer import OutOfMemory, TrainError
from tests import tiny
from tests.family_folders import settings_of
from tests.tiny_project import make_project

GIB = 2**30
FEWER = "lower train.batch_size"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything is encoded."""
    root = make_project(tmp_path_factory.mktemp("project"), methods=["d-opsd"], max_steps=4, checkpoint_steps=2)
    for stage in ("validate", "encode"):
        STAGES[stage]("blots", load_settings(root / "params.yaml"), root)
    return root


def _job(root: Path, **example: Any) -> Job:
    settings = load_settings(root / "params.yaml").of("blots", root)
    encoded = read_encoded(root / "runs/blots/encoded")
    changed = tuple(replace(one, **example) for one in encoded.examples)
    return Job("memory", replace(encoded, examples=changed), settings.train, settings.model, root, "made from")


def _train(job: Job, folder: Path, watcher: Any = None, **compute: Any) -> Any:
    how = ComputeSettings(**{"storage": str(folder / "storage"), **compute})
    return run_training(job, how, job.root, folder / "train", folder / "adapters", watcher or tiny.Recorder())


def test_a_run_that_runs_out_ends_in_one_line_and_goes_on_from_its_checkpoint(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train(_job(project), tmp_path / "unbroken", launcher="local")
    velocity, asked = Family.velocity, 0

    def runs_out(self: Family, *inputs: Any) -> torch.Tensor:
        nonlocal asked
        asked += torch.is_grad_enabled()
        if asked > 2 * steps:  # tiny settings have two states, and two examples a step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.61 GiB.\nmore")
        return velocity(self, *inputs)

    steps = 3
    with monkeypatch.context() as broken:
        broken.setattr(Family, "velocity", runs_out)
        with pytest.raises(OutOfMemory, match=f"^d-opsd: out of memory.*{FEWER}.*checkpoints are kept$") as said:
            _train(_job(project), tmp_path / "broken", launcher="local")
    assert "\n" not in str(said.value)
    watcher = tiny.Recorder()
    _train(_job(project), tmp_path / "broken", watcher, launcher="local")
    assert any("resuming at step 2" in text for text in watcher.messages)
    adapters = [load_file(tmp_path / name / "adapters/d-opsd.safetensors") for name in ("unbroken", "broken")]
    assert all(torch.equal(adapters[0][key], value) for key, value in adapters[1].items())


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """The Ray that jobs start for themselves is gone afterwards."""
    yield
    ray.shutdown()


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_does_not_try_it_again(own_ray: None, project: Path, tmp_path: Path, workers: int) -> None:
    """A picture that no machine holds: torch's own allocator says so, in the workers."""
    watcher = tiny.Recorder()
    with pytest.raises(TrainError, match=f"out of memory.*{FEWER}"):
        _train(_job(project, height=2**22, width=2**22, latents=None), tmp_path, watcher,
               launcher="ray", workers=workers, cpus_per_worker=1, max_failures=3)  # fmt: skip
    assert sum("began on" in text for text in watcher.messages) == 1


def test_a_refusal_holds_until_the_job_is_started_again(tmp_path: Path) -> None:
    first, other = (JobStorage(str(tmp_path / "storage"), "job") for _ in range(2))
    assert other.refusal() == ""
    first.refuse("out of memory: buy more")
    assert other.refusal() == "out of memory: buy more"
    first.load(tmp_path / "worker")
    assert not list(tmp_path.glob("worker/*")), "it is no file of a run"
    first.offer(tmp_path / "nothing", ["d-opsd"])
    assert other.refusal() == ""


def test_every_stage_says_which_settings_need_less(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.61 GiB.")

    settings = load_settings(project / "params.yaml", ["tracking.enabled=false"])
    (project / ".cache/encodings").rename(project / ".cache/encodings.away")
    monkeypatch.setattr("dopsd.models.z_image.ZImage.encode_prompt", runs_out)
    with pytest.raises(StageError, match=f"^encode: out of memory.*{FEWER}"):
        STAGES["encode"]("blots", settings, project)


def test_other_faults_are_not_taken_for_it() -> None:
    assert device_memory.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB."))
    assert not device_memory.ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not device_memory.ran_out(MemoryError())


class TestAuto:
    """``gradient_checkpointing: auto``."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
        """A card with 30 GiB free; what was counted for it: resolution and bytes."""
        counted: list[tuple[int, float]] = []

        def fits(settings: Any, free: float, root: Path) -> str:
            counted.append((settings.data.resolution, free))
            return "every-second"

        monkeypatch.setattr(device_memory, "device_of", lambda _: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * GIB, 80 * GIB))
        monkeypatch.setattr(device_memory, "checkpointing_that_fits", fits)
        return counted

    def test_it_is_what_fits_the_free_memory_of_the_card_for_the_largest_picture(
        self, project: Path, asked: list[tuple[int, float]]
    ) -> None:
        assert device_memory.checkpointing_for(_job(project, height=96, width=160)) == "every-second"
        assert asked == [(128, 30 * GIB)]

    def test_workers_that_divide_a_base_all_checkpoint_the_same(
        self, project: Path, asked: list[tuple[int, float]]
    ) -> None:
        assert device_memory.checkpointing_for(replace(_job(project), sharded=True)) == "every"
        assert not asked

    def test_a_cpu_recomputes_nothing(self, project: Path) -> None:
        assert device_memory.checkpointing_for(_job(project)) == "none"

    def test_it_is_asked_when_the_transformer_is_loaded_and_not_before(self, folders: dict[str, Path]) -> None:
        asked = []
        model = settings_of("z-image", folders, gradient_checkpointing="auto")

        def fitting() -> Any:
            asked.append("asked")
            return "every"

        family = load_family(model, use="train", fitting=fitting)
        assert not asked
        assert family.transformer.is_gradient_checkpointing
        assert asked
        assert not load_family(model).transformer.is_gradient_checkpointing, "what only draws needs none"
