"""The trainer's promises: batching does not matter, limits, labels, previews, log, refusals."""

import dataclasses
import json
from itertools import pairwise
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dopsd.config.groups import Method, TrainSettings
from dopsd.distill.adapters import adapter_applied, add_adapters
from dopsd.train import checkpoint as ckpt
from dopsd.train.objective import Objective
from dopsd.train.observer import save_strip
from dopsd.train.trainer import Place, TrainError, Training, learning_rate, milestones, train
from tests import tiny

METHODS = get_args(Method)

REPLAY = {"weight": 0.5, "prompts": ["a fox"]}


def _adapter(folder, label):
    return load_file(folder / "adapters" / f"{label}.safetensors")


def _log(folder):
    return [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]


def _steps(folder):
    return [row for row in _log(folder) if row["step"]]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_4_examples_one_by_one_are_those_of_the_batch(method):
    """Each example has its own draws, whatever it is batched with; prompts of other lengths do not matter either."""
    family, examples, settings = tiny.tiny_family(), tiny.tiny_examples(4), tiny.tiny_settings(replay=REPLAY)
    pair = tiny.trained_pair(family, settings.lora)
    targets = [example.latents for example in examples]
    objective = Objective(
        method, settings, family, family.predict_velocity, pair, examples, targets, tiny.tiny_prompts()
    )  # fmt: skip
    gradients, losses = [], []
    for size in (4, 1):
        generator = torch.Generator().manual_seed(0)
        sums = {}
        for start in range(0, 4, size):
            draws = [objective.draw(index, generator) for index in range(start, start + size)]
            for key, value in objective.backward(draws, size / 4, torch.Tensor.backward).items():
                sums[key] = sums.get(key, 0) + size / 4 * value
        gradients.append([parameter.grad for parameter in pair.student_parameters()])
        losses.append(sums)
        for parameter in pair.student_parameters():
            parameter.grad = None
    assert losses[0].keys() == {"train/loss", "train/replay_loss"}
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)
    scale = max(float(g.abs().max()) for g in gradients[0])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("method", ["d-opsd", "sft"])
def test_batch_1_with_accumulation_4_trains_as_batch_4(tmp_path, method):
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        settings = tiny.tiny_settings(max_steps=2, batch_size=batch, accumulation=accumulation, learning_rate=1e-3)
        result = tiny.run_tiny(method, tmp_path / str(batch), settings)
        assert result.images == 4 * result.steps
        runs.append([(row["train/loss"], row["train/grad_norm"]) for row in _steps(tmp_path / str(batch))])
    for whole, parts in zip(*runs, strict=True):
        assert whole == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("method", ["d-opsd", "off-policy"])
def test_the_student_comes_closer_to_its_teacher(tmp_path, method):
    settings = tiny.tiny_settings(max_steps=20, learning_rate=6e-3, teacher={"kind": "frozen"}, preview_steps=1000)
    tiny.run_tiny(method, tmp_path, settings, examples=tiny.tiny_examples(2))
    losses = [row["train/loss"] for row in _steps(tmp_path)]
    assert sum(losses[-4:]) < 0.4 * sum(losses[:4])


def test_the_family_comes_back_as_it_was_and_the_adapter_changes_it(tmp_path):
    family = tiny.tiny_family()
    before = {name: value.clone() for name, value in family.transformer.state_dict().items()}
    noise = family.initial_latents(1, 64, 64, torch.Generator().manual_seed(0))
    base = family.predict_velocity(noise, torch.tensor(1.0), tiny.tiny_prompts(1))
    training = Training("d-opsd", tiny.tiny_settings(), tiny.tiny_examples(), "identity")
    result = train(family, training, Place(tmp_path / "t", tmp_path / "a", tiny.Recorder()))
    after = family.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(family.predict_velocity(noise, torch.tensor(1.0), tiny.tiny_prompts(1)), base)
    with adapter_applied(family.transformer, result.adapters["d-opsd"]):
        assert not torch.equal(family.predict_velocity(noise, torch.tensor(1.0), tiny.tiny_prompts(1)), base)


@pytest.mark.parametrize("method", ["d-opsd", "sft"])
def test_an_example_that_repeats_is_trained_on_as_its_copies_are(tmp_path, method):
    first, second = tiny.tiny_examples(2)
    listed = {
        "once": (first, second),
        "twice": (dataclasses.replace(first, repeats=2), second),
        "copied": (first, first, second),
    }
    settings = tiny.tiny_settings(max_steps=4)
    for name, examples in listed.items():
        tiny.run_tiny(method, tmp_path / name, settings, examples=examples)
    once, twice, copied = (_adapter(tmp_path / name, method) for name in listed)
    assert all(torch.equal(twice[key], copied[key]) for key in copied)
    assert not all(torch.equal(twice[key], once[key]) for key in once)


def test_sft_is_kept_at_equal_images_and_goes_on_to_equal_compute(tmp_path):
    settings = tiny.tiny_settings(max_steps=3, sft_compute_factor=5 / 3)
    assert milestones(settings, "sft") == {3: "sft", 5: "sft-compute"}
    result = tiny.run_tiny("sft", tmp_path, settings)
    assert set(result.adapters) == {"sft", "sft-compute"}
    assert result.steps == 5
    early = json.loads((tmp_path / "adapters" / "sft.json").read_text())
    assert (early["steps"], early["images"]) == (3, 6)
    assert any(not torch.equal(v, _adapter(tmp_path, "sft-compute")[k]) for k, v in _adapter(tmp_path, "sft").items())
    shorter = tiny.run_tiny("sft", tmp_path / "x", tiny.tiny_settings(max_steps=3, sft_compute_factor=1))
    assert all(
        torch.equal(value, _adapter(tmp_path / "x", "sft")[key]) for key, value in _adapter(tmp_path, "sft").items()
    )
    assert shorter.steps == 4


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 16 / 3),  # 4 x (1 teacher forward + 3 for the student's forward and backward) against 3
        ({"rollout_steps": 2}, 8 / 3),
        ({"teacher": {"guidance": 1.5}}, 20 / 3),  # the teacher without its picture, too
        ({"replay": {"weight": 1.0, "prompts": ["a fox"]}}, 32 / 19),  # 4 x (1 + 3) more for either of the two
        ({"teacher": {"guidance": 1.5}, "replay": {"weight": 1.0, "prompts": ["a fox"]}}, 36 / 19),
        ({"rollout_steps": 2, "replay": {"weight": 1.0, "prompts": ["a fox"]}}, 16 / 11),
        ({"sft_compute_factor": 2.0}, 2),
        ({"sft_compute_factor": 1.0}, 61 / 60),  # always one step more: it is an adapter of its own
    ],
)
def test_equal_compute_counts_every_pass_through_the_model(changes, factor):
    settings = TrainSettings.model_validate(
        {"max_steps": 60, "batch_size": 1, "learning_rate": 1.0, "rollout_steps": 4, **changes}
    )
    assert milestones(settings, "sft") == {60: "sft", round(60 * factor): "sft-compute"}


def test_what_is_going_to_be_trained_is_said_with_its_replay():
    plain, replayed = tiny.tiny_settings(methods=["sft"]), tiny.tiny_settings(methods=["sft"], replay=REPLAY)
    assert plain.work().startswith("sft, 6 steps, then on to 9 for equal compute")
    assert replayed.work() == f"{plain.work()}, each with a replayed prompt beside it"


@pytest.mark.parametrize("method", METHODS)
def test_no_method_replays_prompts_that_are_not_there(tmp_path, method):
    training = Training(method, tiny.tiny_settings(replay=REPLAY), tiny.tiny_examples(), "identity")
    with pytest.raises(TrainError, match=r"no replay prompts were encoded"):
        train(tiny.tiny_family(), training, Place(tmp_path / "t", tmp_path / "a", tiny.Recorder()))


@pytest.mark.parametrize("method", METHODS)
def test_replay_draws_nothing_where_it_is_off(method):
    """Switched off it costs nothing, and the same example comes with the same noise as ever."""
    family, examples, prompts = tiny.tiny_family(), tiny.tiny_examples(1), tiny.tiny_prompts()
    drawn, after = [], []
    for settings in (tiny.tiny_settings(), tiny.tiny_settings(replay=REPLAY)):
        pair = add_adapters(family.transformer, settings.lora, family.lora_targets, 0)
        objective = Objective(method, settings, family, family.predict_velocity, pair, examples, [None], prompts)
        generator = torch.Generator().manual_seed(0)
        drawn.append(objective.draw(0, generator))
        after.append(float(torch.rand(1, generator=generator)))
        pair.remove()
    off, on = drawn
    assert torch.equal(off.noise, on.noise)
    assert off.level == on.level
    assert (off.replay, off.replay_noise) == (None, None)
    assert on.replay is not None
    assert on.replay_noise is not None
    assert after[0] != after[1]


def test_max_minutes_stops_between_steps_and_a_longer_limit_goes_on(tmp_path):
    seen = tiny.Recorder()
    settings = tiny.tiny_settings(max_steps=4, max_minutes=1e-9)
    result = tiny.run_tiny("d-opsd", tmp_path, settings, seen)
    assert (result.stopped, result.steps) == ("max_minutes", 1)
    assert result.adapters["d-opsd"].exists()
    again = tiny.run_tiny("d-opsd", tmp_path, settings, seen)
    assert again.steps == 1
    assert seen.steps == [0, 1]
    longer = tiny.run_tiny("d-opsd", tmp_path, settings.model_copy(update={"max_minutes": None}), seen)
    assert (longer.stopped, longer.steps) == ("max_steps", 4)
    assert seen.steps == [0, 1, 2, 3, 4]


def test_by_itself_a_checkpoint_is_written_every_ten_minutes_of_steps_and_goes_on_from_there(tmp_path, monkeypatch):
    """A look at the clock takes 125 s, and a step has three of them: 250 s at its first one, 625, 1000, 1375, ..."""
    saved = []

    class Clock(tiny.Recorder):
        now = 0.0

        def monotonic(self):
            Clock.now += 125
            return Clock.now

    def save(folder, checkpoint):
        saved.append(checkpoint.step)
        return ckpt.save_checkpoint(folder, checkpoint)

    monkeypatch.setattr("dopsd.train.trainer.time", Clock())
    monkeypatch.setattr("dopsd.train.trainer.ckpt", SimpleNamespace(**{**vars(ckpt), "save_checkpoint": save}))
    settings = tiny.tiny_settings(max_steps=9, checkpoint_steps=None)
    with pytest.raises(KeyboardInterrupt):
        tiny.run_tiny("d-opsd", tmp_path / "killed", settings, tiny.Cut(5))
    before = list(saved)
    tiny.run_tiny("d-opsd", tmp_path / "killed", settings)
    after = saved[len(before) :]
    saved.clear()
    tiny.run_tiny("d-opsd", tmp_path / "whole", settings)
    assert (before, after) == ([2, 4], [6, 8, 9]), "ten minutes after one another, and at the end"
    assert saved == before + after
    whole, again = (_adapter(tmp_path / name, "d-opsd") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


class _SlowPreviews(tiny.Recorder):
    """A clock that ticks at every look, and a minute that passes with every preview."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now

    def wrote(self, path, line=None):
        super().wrote(path, line)
        self.now += 60 * (path.parent.name == "previews")


def test_the_clock_of_training_counts_its_steps_and_not_its_previews(tmp_path, monkeypatch):
    """Here a preview takes a minute, and half a minute is the limit. Ended after a step, the run goes on from there."""
    times = {}
    for name, preview_steps in (("often", 1), ("never", 100)):
        clock = _SlowPreviews()
        monkeypatch.setattr("dopsd.train.trainer.time", clock)
        settings = tiny.tiny_settings(max_steps=4, max_minutes=1e-9, preview_steps=preview_steps, checkpoint_steps=1)
        assert tiny.run_tiny("d-opsd", tmp_path / name, settings, clock).stopped == "max_minutes"
        longer = settings.model_copy(update={"max_minutes": 0.5})
        assert tiny.run_tiny("d-opsd", tmp_path / name, longer, clock).stopped == "max_steps"
        times[name] = [row["train/seconds"] for row in _steps(tmp_path / name)]
    # looks at the clock: at a step's start, in it, at its end, and when what follows it is done
    assert times == {"often": [2, 4, 7, 10], "never": [2, 4, 7, 10]}


def test_observer_and_log_get_every_step_and_the_previews_their_pictures(tmp_path):
    seen = tiny.Recorder()
    tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=5, preview_steps=2, replay=REPLAY), seen)
    assert seen.steps == [0, 1, 2, 3, 4, 5]
    assert set(seen.values[0]) == {"train/teacher_gain", "train/teacher_improved"}
    assert set(seen.values[1]) == {
        "train/loss", "train/replay_loss", "train/grad_norm", "train/learning_rate", "train/images_per_second",
        "train/seconds",
    }  # fmt: skip
    rows = _log(tmp_path)
    times = [row.pop("time") for row in rows]
    assert times == sorted(times)
    assert rows == [{"step": s, **v} for s, v in zip(seen.steps, seen.values, strict=True)]
    pictures = [f"{who}-{s:06d}.webp" for s in (0, 2, 4, 5) for who in ("student", "teacher")]
    captions = {f"{who}.captions.txt" for who in ("student", "teacher")}
    assert [name for name in seen.shown if name not in captions] == pictures
    assert {path.name for path in (tmp_path / "train" / "previews").iterdir()} == {*pictures, *captions}
    assert (tmp_path / "train" / "previews" / "student.captions.txt").read_text() == "a fox\n"
    assert any("attention\\.to_q x 4" in text for text in seen.messages)


def _noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def test_a_strip_of_small_pictures_is_kept_to_the_bit_and_large_ones_are_reduced(tmp_path):
    small, large = [_noise(64, 64), _noise(48, 80, 1)], [_noise(1024, 768, seed) for seed in range(2)]
    save_strip(small, tmp_path / "small.webp")
    save_strip(large, tmp_path / "large.webp")
    save_strip([small[0]] * 300, tmp_path / "many.webp")
    with Image.open(tmp_path / "small.webp") as strip:
        assert np.array_equal(strip.crop((0, 0, 64, 64)), small[0])
        assert np.array_equal(strip.crop((64, 0, 112, 80)), small[1])
    with Image.open(tmp_path / "large.webp") as strip:
        assert strip.size == (2 * 512, 384)
        wanted = large[1].resize((512, 384), Image.Resampling.LANCZOS)
        difference = np.asarray(strip.crop((512, 0, 1024, 384)), float) - np.asarray(wanted, float)
        assert np.abs(difference).mean() < 10, "its own picture, to what a JPEG-like file keeps of noise"
    with Image.open(tmp_path / "many.webp") as strip:
        assert strip.width <= 16383, "what a WebP can be"
    assert large[0].size == (1024, 768), "what was given is as it was"
    assert (tmp_path / "large.webp").stat().st_size < 200_000


def test_previews_draw_nothing_from_the_run(tmp_path):
    for name, every in (("often", 1), ("never", 1000)):
        tiny.run_tiny("d-opsd", tmp_path / name, tiny.tiny_settings(max_steps=3, preview_steps=every))
    often, never = (_adapter(tmp_path / name, "d-opsd") for name in ("often", "never"))
    assert all(torch.equal(often[key], never[key]) for key in often)


@pytest.mark.parametrize("method", ["d-opsd", "sft"])
def test_images_of_several_sizes_train_together(tmp_path, method):
    examples = tiny.tiny_examples(5, sizes=((64, 64), (48, 80)))
    result = tiny.run_tiny(method, tmp_path, tiny.tiny_settings(), examples=examples)
    assert result.stopped == "max_steps"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_warm_up_and_end_low_at_every_milestone(schedule):
    settings = tiny.tiny_settings(schedule=schedule, warmup_steps=4, max_steps=20, learning_rate=1.0)
    rates = [learning_rate(settings, step, [20, 60]) for step in range(60)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    if schedule == "constant":
        assert rates[5:] == [1.0] * 55
    else:
        assert rates[19] < 0.1
        assert rates[20] == 1.0
        assert rates[59] < 0.05
        assert rates[12] == pytest.approx(0.5)
        assert all(a > b for a, b in pairwise(rates[4:20]))


def test_schedules_by_hand():
    """Two steps of warm-up, three down to the first milestone, one whole schedule of one step, and one of two."""
    rates = {"linear": [2, 4, 4, 8 / 3, 4 / 3, 4, 4, 2], "cosine": [2, 4, 4, 3, 1, 4, 4, 2]}
    for schedule, expected in rates.items():
        settings = tiny.tiny_settings(schedule=schedule, warmup_steps=2, max_steps=5, learning_rate=4.0)
        assert [learning_rate(settings, step, [5, 6, 8]) for step in range(8)] == pytest.approx(expected)


def test_teacher_samples_are_drawn_once_from_the_contexts(tmp_path):
    examples = tiny.tiny_examples(3, latents=False)
    tiny.run_tiny("sft-teacher", tmp_path, tiny.tiny_settings(max_steps=2), examples=examples)
    path = tmp_path / "train" / "teacher_samples.safetensors"
    drawn, written = load_file(path), path.stat().st_mtime_ns
    assert {tuple(v.shape) for v in drawn.values()} == {(tiny.CHANNELS, 8, 8)}
    assert len(drawn) == 3
    same_prompt = [dataclasses.replace(e, context=e.prompt) for e in examples]
    tiny.run_tiny("sft-teacher", tmp_path / "x", tiny.tiny_settings(max_steps=2), examples=same_prompt)
    other = load_file(tmp_path / "x" / "train" / "teacher_samples.safetensors")
    assert not any(torch.equal(drawn[key], other[key]) for key in drawn)
    longer = tiny.tiny_settings(max_steps=2, checkpoint_steps=1)
    tiny.run_tiny("sft-teacher", tmp_path, longer, examples=examples)
    assert path.stat().st_mtime_ns == written


def test_a_teacher_that_is_no_better_is_warned_of_or_refused(tmp_path):
    """Here the teacher is shown nothing that the student is not: the gain is exactly nought."""
    examples = [dataclasses.replace(e, context=e.prompt) for e in tiny.tiny_examples()]
    seen = tiny.Recorder()
    result = tiny.run_tiny("d-opsd", tmp_path / "warn", tiny.tiny_settings(max_steps=1), seen, examples)
    assert result.teacher_gain["gain"] == 0
    assert result.teacher_gain["improved"] == 0
    assert any(text.startswith("warning: the teacher is no better") for text in seen.messages)
    settings = tiny.tiny_settings(teacher={"on_no_gain": "refuse"})
    with pytest.raises(TrainError, match="on_no_gain"):
        tiny.run_tiny("d-opsd", tmp_path / "refuse", settings, examples=examples)


def test_teacher_gain_is_measured_against_the_targets_and_not_without_them(tmp_path):
    """Targets that are the teacher's own samples: it must be found nearer on every one."""
    from dopsd.distill.rollout import sample
    from dopsd.train.gain import choose, teacher_gain

    family, examples = tiny.tiny_family(), tiny.tiny_examples()
    generator = torch.Generator().manual_seed(3)
    noises = [family.initial_latents(1, 64, 64, generator) for _ in examples]
    drawn = [sample(family, [e.context], 2, 64, 64, noise)[0] for e, noise in zip(examples, noises, strict=True)]
    known = [dataclasses.replace(e, latents=x) for e, x in zip(examples, drawn, strict=True)]
    gain = teacher_gain(family, known, 2, 4, seed=3)
    assert gain["gain"] > 0.99
    assert gain["improved"] == 1
    assert gain["images"] == 6
    assert [e.image_index for e in choose(examples, 4)] == [0, 1, 2, 0]
    seen = tiny.Recorder()
    none = tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(max_steps=1), seen, tiny.tiny_examples(latents=False))
    assert none.teacher_gain is None
    assert any("not measured" in text for text in seen.messages)


@pytest.mark.parametrize(
    ("method", "examples", "says"),
    [("d-opsd", [], "no training examples"), ("sft", tiny.tiny_examples(latents=False), "clean latents")],
)
def test_what_cannot_be_trained_is_refused_before_any_work(tmp_path, method, examples, says):
    with pytest.raises(TrainError, match=says):
        tiny.run_tiny(method, tmp_path, tiny.tiny_settings(), examples=examples)
    assert not list(tmp_path.iterdir())


def test_a_run_that_blows_up_says_so_and_gives_the_family_back(tmp_path):
    examples = tiny.tiny_examples()
    broken = [dataclasses.replace(e, prompt={"caption": e.prompt["caption"] * float("nan")}) for e in examples]
    with pytest.raises(TrainError, match=r"not finite at step 1.*learning_rate"):
        tiny.run_tiny("d-opsd", tmp_path, tiny.tiny_settings(), examples=broken)


def test_gradient_checkpointing_trains_the_same_adapter(tmp_path):
    results = []
    for name in ("plain", "checkpointed"):
        family = tiny.tiny_family()
        if name == "checkpointed":
            family.transformer.enable_gradient_checkpointing()
        training = Training("d-opsd", tiny.tiny_settings(max_steps=3), tiny.tiny_examples(), "identity")
        train(family, training, Place(tmp_path / name / "train", tmp_path / name / "adapters", tiny.Recorder()))
        results.append(_adapter(tmp_path / name, "d-opsd"))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["ema", "copy"])
def test_a_bfloat16_base_trains_float32_adapters(tmp_path, kind, checkpointing):
    """The path that a GPU takes: two live adapters (in float32 the teacher is merged), autocast, checkpointing."""
    family = tiny.tiny_family()
    family.transformer.to(torch.bfloat16)
    family.dtype = torch.bfloat16
    if checkpointing:
        family.transformer.enable_gradient_checkpointing()
    settings = tiny.tiny_settings(
        max_steps=2, teacher={"kind": kind, "gain_images": 1}, learning_rate=1e-4, batch_size=1
    )
    training = Training("d-opsd", settings, tiny.tiny_examples(), "identity")
    train(family, training, Place(tmp_path / "train", tmp_path / "adapters", tiny.Recorder()))
    assert all(row["train/grad_norm"] > 0 for row in _steps(tmp_path))
    trained = _adapter(tmp_path, "d-opsd")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    moved = [value for key, value in trained.items() if key.endswith("lora_B.weight")]
    assert all(0 < float(value.abs().max()) < 3e-4 for value in moved)
    assert {value.dtype for value in family.transformer.state_dict().values()} == {torch.bfloat16}
