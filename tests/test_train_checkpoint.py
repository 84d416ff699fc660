"""Checkpoints: whole or not there, the last two kept, and exact."""

import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from dopsd.train import checkpoint as ckpt
from tests import tiny


def _checkpoint(step):
    return ckpt.Checkpoint(step, {"a": torch.full((3,), float(step))}, {"fingerprint": "x", "seconds": 1.5})


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path):
    assert ckpt.load_checkpoint(tmp_path) is None
    for step in (5, 100, 20_000):
        ckpt.save_checkpoint(tmp_path, _checkpoint(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-00020000"]
    loaded = ckpt.load_checkpoint(tmp_path)
    assert loaded.step == 20_000
    assert loaded.state == {"fingerprint": "x", "seconds": 1.5}
    assert torch.equal(loaded.tensors["a"], torch.full((3,), 20_000.0))


def test_what_a_kill_left_half_written_is_never_loaded_and_cleaned_away(tmp_path):
    whole = ckpt.save_checkpoint(tmp_path, _checkpoint(5))
    half = tmp_path / "step-00000010.partial"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes((whole / "tensors.safetensors").read_bytes()[:20])
    assert ckpt.load_checkpoint(tmp_path).step == 5
    ckpt.remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    half.mkdir()
    ckpt.save_checkpoint(tmp_path, _checkpoint(10))
    assert ckpt.load_checkpoint(tmp_path).step == 10


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_taken(tmp_path, file):
    for step in (5, 10):
        ckpt.save_checkpoint(tmp_path, _checkpoint(step))
    (tmp_path / "step-00000010" / file).write_bytes(b"{")
    messages = []
    assert ckpt.load_checkpoint(tmp_path, messages.append).step == 5
    assert len(messages) == 1
    assert "step-00000010" in messages[0]


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_goes_on_exactly_from_its_tensors(fused):
    def make():
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((3, 5), (7,))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=fused), generator

    def step(parameters, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    parameters, optimizer, _ = make()
    for seed in range(3):
        step(parameters, optimizer, seed)
    tensors = ckpt.optimizer_tensors(optimizer)
    assert {key.split("/")[2] for key in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    resumed, other, _ = make()
    with torch.no_grad():
        for mine, theirs in zip(resumed, parameters, strict=True):
            mine.copy_(theirs)
    ckpt.load_optimizer_tensors(other, tensors)
    for seed in range(3, 6):
        step(parameters, optimizer, seed)
        step(resumed, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))


@pytest.mark.parametrize(("method", "kind", "times"), [
    ("d-opsd", "ema", 4), ("d-opsd", "frozen", 3), ("d-opsd", "copy", 3), ("sft", "ema", 3),
])  # fmt: skip
def test_a_checkpoint_holds_each_thing_once_and_in_float32(tmp_path, method, kind, times):
    """The student and AdamW's two moments, and a teacher where it has weights of its own; steps and generator aside."""
    settings = tiny.tiny_settings(max_steps=1, teacher={"kind": kind}, sft_compute_factor=1)
    result = tiny.run_tiny(method, tmp_path, settings)
    adapter = load_file(next(iter(result.adapters.values())))
    tensors = load_file(sorted((tmp_path / "train/checkpoints").iterdir())[-1] / "tensors.safetensors")
    large = {key: value for key, value in tensors.items() if value.ndim == 2}
    assert sum(value.nbytes for value in large.values()) == times * sum(value.nbytes for value in adapter.values())
    assert {value.dtype for value in large.values()} == {torch.float32}
    assert {key.partition("/")[0] for key in tensors} == {
        "student", "optimizer", "random", *(["teacher"] if times == 4 else [])
    }  # fmt: skip


def test_a_run_that_did_all_its_steps_is_known_by_its_state_alone(tmp_path):
    """Its tensors, gigabytes at true size, are neither read nor needed; one that the clock ended goes on from them."""
    settings = tiny.tiny_settings(max_steps=3, max_minutes=1e-9)
    assert tiny.run_tiny("d-opsd", tmp_path, settings).stopped == "max_minutes"
    longer = settings.model_copy(update={"max_minutes": None})
    seen = tiny.Recorder()
    first = tiny.run_tiny("d-opsd", tmp_path, longer, seen)
    assert seen.steps == [2, 3]
    for path in (tmp_path / "train/checkpoints").glob("*/tensors.safetensors"):
        path.unlink()
    again = tiny.Recorder()
    assert tiny.run_tiny("d-opsd", tmp_path, longer, again) == first
    assert (again.steps, again.messages) == ([], [])


def test_setting_aside_counts_on_and_replaces_nothing(tmp_path):
    run, places = tmp_path / "d-opsd", []
    (tmp_path / "d-opsd.previous").mkdir()
    for number in range(11):
        run.mkdir()
        (run / "log.jsonl").write_text(str(number))
        places.append(ckpt.set_aside(run))
        assert not run.exists()
    assert [place.name for place in places] == [f"d-opsd.previous-{number}" for number in range(1, 12)]
    assert [(place / "log.jsonl").read_text() for place in places] == [str(number) for number in range(11)]
    assert all(ckpt.was_set_aside(place) for place in (*places, tmp_path / "d-opsd.previous"))
    assert not ckpt.was_set_aside(run)
    shutil.rmtree(places[4])
    run.mkdir()
    assert ckpt.set_aside(run).name == "d-opsd.previous-12", "a number is not given again"


def test_a_run_holds_no_checkpoint_while_it_trains(tmp_path, monkeypatch):
    """Neither the one that it wrote nor the one that it began with; and nothing is copied where it lies."""
    held, clones = [], []
    original = {name: getattr(ckpt, name) for name in ("save_checkpoint", "load_checkpoint", "optimizer_tensors")}

    def saving(folder, checkpoint):
        assert {tensor.device.type for tensor in checkpoint.tensors.values()} == {"cpu"}
        held.extend(weakref.ref(tensor) for tensor in checkpoint.tensors.values())
        return original["save_checkpoint"](folder, checkpoint)

    def loading(*arguments):
        found = original["load_checkpoint"](*arguments)
        held.extend(weakref.ref(tensor) for tensor in (found.tensors.values() if found else ()))
        return found

    def cloning(self, **how):
        clones.append(self.shape)
        return torch.empty_like(self).copy_(self)

    class Looks(tiny.Recorder):
        def metrics(self, step, values):
            super().metrics(step, values)
            assert not [tensor for tensor in held if tensor() is not None]
            if step == 5 and len(self.steps) > 4:
                raise KeyboardInterrupt

    def copying(optimizer):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "clone", cloning)
            return original["optimizer_tensors"](optimizer)

    monkeypatch.setattr(ckpt, "save_checkpoint", saving)
    monkeypatch.setattr(ckpt, "load_checkpoint", loading)
    monkeypatch.setattr(ckpt, "optimizer_tensors", copying)
    settings = tiny.tiny_settings(max_steps=8, checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path, settings, Looks())
    written = len(held)
    seen = Looks()
    tiny.run_tiny("d-opsd", tmp_path, settings, seen)
    assert seen.steps == [5, 6, 7, 8]
    assert len(held) > written > 100, "some were written, one was read"
    assert not clones
