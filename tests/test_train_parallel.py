"""Several processes train as one does: the same gradients, one exchange for each optimizer step."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dopsd.train.parallel import exchange, share
from dopsd.train.trainer import TrainError
from tests import tiny, worker

ROOT = Path(__file__).parent.parent
STEPS = 3
RUNS = {
    "d-opsd": {"batch_size": 4, "replay": {"weight": 0.5, "prompts": ["a fox"]}},
    worker.FULL: {"batch_size": 4, "tune": "full", "learning_rate": 1e-3},
    worker.SHARDED: {"batch_size": 4, "replay": {"weight": 0.5, "prompts": ["a fox"]}},
    "sft": {"batch_size": 1, "accumulation": 3, "replay": {"weight": 0.5, "prompts": ["a fox"]}},
}
"""A batch that two processes share evenly, and one of which the first takes two examples and the second one."""


def _settings(method):
    # plain steps along the gradient: Adam's first ones are signs, which hide how large a difference is
    return tiny.tiny_settings(max_steps=STEPS, checkpoint_steps=STEPS, sft_compute_factor=1.0, **RUNS[method])


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Where two processes train every method; ended."""
    folder = tmp_path_factory.mktemp("together")
    runs = {method: _settings(method).model_dump(mode="json") for method in RUNS}
    for method in RUNS:
        (folder / method).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.worker", str(folder), json.dumps(runs)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said[-2000:]
    return folder


@pytest.fixture(scope="module", params=sorted(RUNS))
def pair(request, together, tmp_path_factory):
    """A method trained by one process, and by two: (method, folder of the one, folder of the two)."""
    alone = tmp_path_factory.mktemp("alone")
    with worker.kept_gradients(alone / "gradients.safetensors"):
        tiny.run_tiny(worker.method_of(request.param), alone, _settings(request.param))
    return request.param, alone, together / request.param


def _log(folder):
    rows = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"]]


def test_two_workers_have_the_gradients_of_one(pair):
    _, alone, together = pair
    one = load_file(alone / "gradients.safetensors")
    assert sum(float(g.square().sum()) for g in one.values()) > 0
    for rank in range(2):
        theirs = load_file(together / f"gradients-{rank}.safetensors")
        assert theirs.keys() == one.keys()
        off = sum(float((theirs[key] - g).square().sum()) for key, g in one.items())
        assert off < 1e-10 * sum(float(g.square().sum()) for g in one.values()), "to float32 rounding"


def test_two_workers_learn_what_one_does(pair):
    method, alone, together = pair
    for mine, theirs in zip(_log(together / "0"), _log(alone), strict=True):
        for key in ("train/loss", "train/grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5), (method, mine["step"], key)
    file = f"{worker.method_of(method)}.safetensors"
    one, two = load_file(alone / "adapters" / file), load_file(together / "0" / "adapters" / file)
    assert one.keys() == two.keys()
    start = dict(tiny.tiny_family().transformer.named_parameters()) if method == worker.FULL else {}
    moved = max(float((value - start.get(key, 0)).abs().max()) for key, value in one.items() if "lora_A" not in key)
    assert moved > 1e-3, "the run learnt something, so that equality means something"
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-4)


def test_gradients_are_exchanged_once_per_step(pair):
    _, _, together = pair
    for rank in range(2):
        counts = json.loads((together / f"counts-{rank}.json").read_text())
        assert counts == {"all_reduce": len(_log(together / "0"))}


def test_the_first_worker_alone_writes(pair):
    _, _, together = pair
    assert (together / "0" / "train" / "checkpoints").is_dir()
    for name in ("checkpoints", "adapters", *(["previews"] if together.name != worker.SHARDED else [])):
        assert not (together / "1" / "train" / name).exists(), name


def test_shares_cover_the_batch_once():
    items = list(range(7))
    parts = [share(items, rank, 3) for rank in range(3)]
    assert sorted(x for part in parts for x in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_exchanges_nothing():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    values, seconds = exchange(Accelerator(cpu=True), [parameter], {"train/loss": torch.tensor(3.0)}, 4.0)
    assert values == {"train/loss": 3.0}
    assert seconds == 4.0
    assert parameter.grad.tolist() == [1.0, 2.0]


def test_gradients_of_a_whole_model_take_several_vectors_and_are_the_same(monkeypatch):
    """As if two processes had the same: everything comes out twice, but for the first one's clock."""
    sent = []

    class Two:
        num_processes, is_main_process = 2, True

        def reduce(self, tensor, reduction):
            sent.append(tensor.numel())
            return 2 * tensor

    def exchanged():
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in ((3, 2), (5,), (1,), (40,), (2,))]
        for parameter in parameters[:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return [*exchange(Two(), parameters, {"train/loss": torch.tensor(3.0)}, 4.0), *(p.grad for p in parameters)]

    whole = exchanged()
    monkeypatch.setattr("dopsd.train.parallel._TOGETHER", 12)
    parts = exchanged()
    assert sent == [54 + 2, 12, 40, 2 + 2], "one vector, then three; a tensor that is larger alone takes one"
    assert parts[:2] == whole[:2] == [{"train/loss": 6.0}, 8.0]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], parts[2:], strict=True))
    assert float(whole[2].abs().sum()) > 0
    assert not whole[-1].any()


def test_a_batch_that_is_not_shared_evenly_is_refused_where_the_base_is_divided(tmp_path, monkeypatch):
    """A process with an example less would not take part in putting the blocks together, and all would wait for it."""
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    family = tiny.tiny_family()
    family.transformer.sharded = True
    monkeypatch.setattr(tiny, "tiny_family", lambda: family)
    with pytest.raises(TrainError, match="a batch of 3 is not shared evenly by 2 workers"):
        tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(batch_size=3))
