"""Drawing: how many pictures at once, in which precision, and what happens where memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dopsd.config.groups import LoraSettings
from dopsd.data.cache import EncodingCache
from dopsd.distill import drawing
from dopsd.distill.adapters import adapted_layers, add_adapters
from dopsd.distill.drawing import batch_of, draw, pictures
from dopsd.distill.rollout import rollout, sample
from dopsd.evaluation.suite import EvaluationError, Subject, evaluate
from dopsd.models.z_image import ZImage
from dopsd.train.observer import Previews
from dopsd.train.trainer import Place, Training, train
from tests import tiny
from tests.tiny_evaluation import small_world, tiny_run_settings, write_concept

SIDE = tiny.SIDE


class Cramped(ZImage):
    """A real family on a device with room for ``room`` pictures in the transformer or in the decoder."""

    room = 0
    where: tuple[str, ...] = ()

    @classmethod
    def of(cls, where: str, room: int) -> Cramped:
        base = tiny.tiny_family()
        family = cls(base.parts, base.teaching, base.device, base.dtype, base.fingerprint)
        family.where, family.room, family.seen = (where,), room, []
        return family

    def predict_velocity(self, latents, sigma, conditioning):
        if torch.is_grad_enabled():  # the training step itself fits
            return super().predict_velocity(latents, sigma, conditioning)
        self._need("transformer", len(latents))
        return super().predict_velocity(latents, sigma, conditioning)

    def decode(self, latents):
        self._need("decoder", len(latents))
        return super().decode(latents)

    def _need(self, where, count):
        self.seen.append((where, count))
        if where in self.where and count > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.61 GiB.\nmore")


def _noise(family, count):
    return family.initial_latents(count, SIDE, SIDE, torch.Generator().manual_seed(0))


def _pixels(images):
    return np.stack([np.asarray(image, np.int16) for image in images])


# --- how many at once


@pytest.mark.parametrize(
    ("height", "width", "most", "count"),
    [(1024, 1024, 32, 1), (832, 1216, 32, 1), (1536, 1536, 8, 1), (512, 512, 32, 4), (512, 512, 3, 3),
     (128, 128, 32, 32), (64, 64, 32, 32), (64, 64, 1, 1)],
)  # fmt: skip
def test_a_megapixel_is_drawn_at_once_and_small_pictures_keep_their_batch(height, width, most, count):
    assert batch_of(height, width, most) == count


def test_drawing_is_sampling_and_decoding_to_the_bit(family):
    told, noise = tiny.tiny_prompts(4), _noise(family, 4)
    drawn = draw(family, told, 2, noise, SIDE, SIDE, most=3)
    by_hand = [
        image
        for rows in (slice(0, 3), slice(3, 4))
        for image in family.decode(sample(family, told[rows], 2, SIDE, SIDE, noise[rows]))
    ]
    assert np.array_equal(_pixels(drawn), _pixels(by_hand))


def test_no_more_pixels_than_fit_are_sampled_or_decoded_at_once(monkeypatch):
    monkeypatch.setattr(drawing, "PIXELS", 3 * SIDE * SIDE + 1)
    family = Cramped.of("nowhere", 0)
    draw(family, tiny.tiny_prompts(4), 1, _noise(family, 4), SIDE, SIDE, most=32)
    assert family.seen == [("transformer", 3), ("decoder", 3), ("transformer", 1), ("decoder", 1)]
    family.seen.clear()
    assert len(pictures(family, _noise(family, 7), SIDE, SIDE)) == 7
    assert family.seen == [("decoder", 3), ("decoder", 3), ("decoder", 1)]


def test_a_huge_picture_is_decoded_in_tiles_and_the_next_one_is_whole_again(family, monkeypatch):
    latents, vae = _noise(family, 1), family.parts["vae_decoder"]
    whole = _pixels(family.decode(latents))
    vae.enable_tiling()
    tiled = _pixels(family.decode(latents))
    vae.disable_tiling()
    assert not np.array_equal(whole, tiled)
    assert np.array_equal(_pixels(pictures(family, latents, SIDE, SIDE)), whole)
    monkeypatch.setattr(drawing, "WHOLE", SIDE * SIDE - 1)
    assert np.array_equal(_pixels(pictures(family, latents, SIDE, SIDE)), tiled)
    assert not vae.use_tiling


# --- where memory runs out


@pytest.mark.parametrize("where", ["transformer", "decoder"])
@pytest.mark.parametrize(("room", "tried"), [(4, [4, 1]), (2, [4, 2, 2, 1]), (1, [4, 2, 1, 1, 1, 1, 1])])
def test_half_as_many_are_tried_until_they_fit(where, room, tried):
    family = Cramped.of(where, room)
    drawn = draw(family, tiny.tiny_prompts(5), 1, _noise(family, 5), SIDE, SIDE, most=4)
    assert [count for at, count in family.seen if at == where] == tried
    free = Cramped.of("nowhere", 0)
    whole = draw(free, tiny.tiny_prompts(5), 1, _noise(free, 5), SIDE, SIDE, most=4)
    assert np.abs(_pixels(drawn) - _pixels(whole)).max() <= 1  # batches round differently


def test_one_that_does_not_fit_is_the_callers_to_answer_for_and_leaves_no_tiling(monkeypatch):
    family = Cramped.of("decoder", 0)
    monkeypatch.setattr(drawing, "WHOLE", 1)
    with pytest.raises(torch.OutOfMemoryError):
        draw(family, tiny.tiny_prompts(2), 1, _noise(family, 2), SIDE, SIDE, most=2)
    assert not family.parts["vae_decoder"].use_tiling


def test_a_preview_that_does_not_fit_is_skipped_and_training_goes_on_as_ever(tmp_path):
    prompts = tiny.tiny_prompts(2)
    shown = [tiny.Preview("a fox", prompt, SIDE, SIDE) for prompt in prompts]
    settings = tiny.tiny_settings(max_steps=2, preview_steps=1)
    losses, strips, said = {}, {}, {}
    for name, family in (("free", tiny.tiny_family()), ("tight", Cramped.of("decoder", 1)),
                         ("none", Cramped.of("decoder", 0))):  # fmt: skip
        seen, place = tiny.Recorder(), tmp_path / name
        training = Training("d-opsd", settings, tiny.tiny_examples(), "identity", previews=shown)
        train(family, training, Place(place / "train", place / "adapters", seen))
        losses[name] = [row.get("train/loss") for row in seen.values]
        strips[name] = {path.name: _pixels([Image.open(path)]) for path in (place / "train/previews").glob("*.webp")}
        said[name] = [text for text in seen.messages if "memory" in text]
    assert losses["free"] == losses["tight"] == losses["none"]
    assert sorted(strips["free"]) == [f"{who}-{step:06}.webp" for who in ("student", "teacher") for step in (0, 1, 2)]
    assert strips["tight"].keys() == strips["free"].keys()
    assert all(np.abs(strips["tight"][key] - strips["free"][key]).max() <= 1 for key in strips["free"])
    assert (strips["none"], said["free"], said["tight"]) == ({}, [], [])
    assert said["none"] == [
        f"step {step}: no memory to preview a picture of the student; skipped" for step in (0, 1, 2)
    ]


# --- the evaluation where memory is short


def test_a_batch_that_does_not_fit_is_drawn_in_halves_and_one_picture_is_one_clear_line(tmp_path):
    """Without a world, so that nothing but the sampling asks for memory."""
    table, _ = write_concept(tmp_path / "concept", small_world(), {"kind": "style"}, holdout=False)

    def evaluated(family, **changes):
        settings = tiny_run_settings(prompts=["a [V] fox", "a [V] owl", "a [V] cat", "a [V] ox"], **changes)
        subjects, cache = [Subject("base", None)], EncodingCache(tmp_path / "cache")
        return evaluate(family, table, None, None, subjects, settings, cache, tmp_path / "out")

    tight = Cramped.of("transformer", 2)
    numbers = evaluated(tight)["scores"]
    assert {4, 2} <= {count for _, count in tight.seen}
    for key, value in evaluated(tiny.tiny_family())["scores"]["concept"]["base"].items():
        assert numbers["concept"]["base"][key] == pytest.approx(value, rel=1e-2, abs=1e-3)
    with pytest.raises(EvaluationError, match="64 x 64 pixels") as error:
        evaluated(Cramped.of("transformer", 0))
    assert "\n" not in str(error.value)
    assert "1.61 GiB" in str(error.value)


def test_the_batch_size_is_a_bound_and_the_pictures_pixels_choose(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "PIXELS", 2 * 64 * 64)
    table, _ = write_concept(tmp_path / "concept", small_world(), {"kind": "style"}, holdout=False)
    for bound, most in ((32, 2), (1, 1)):
        family = Cramped.of("nowhere", 0)
        settings = tiny_run_settings(prompts=["a [V] fox", "a [V] owl", "a [V] cat"], batch_size=bound)
        cache = EncodingCache(tmp_path / "cache")
        evaluate(family, table, None, None, [Subject("base", None)], settings, cache, tmp_path / "out")
        assert max(count for _, count in family.seen) == most


# --- in which precision


def _half(family, lora=LoraSettings(rank=4)):  # noqa: B008 - it cannot change
    """A family whose transformer is bfloat16, with a student and a teacher in float32 that are not the base."""
    family.transformer.to(torch.bfloat16)
    family.dtype = torch.bfloat16
    return tiny.trained_pair(family, lora)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_sampling_ends_where_the_rollout_of_training_ends(family, half):
    pair = _half(family) if half else add_adapters(family.transformer, LoraSettings(rank=4), family.lora_targets, 0)
    examples = tiny.tiny_examples(2)
    prompts, contexts = [e.prompt for e in examples], [e.context for e in examples]
    noise, sigmas = _noise(family, 2), family.sigmas(2, SIDE, SIDE)
    end, _ = rollout(family.velocity, pair, noise, sigmas, prompts, contexts, teacher="teacher")
    assert torch.equal(sample(family, prompts, 2, SIDE, SIDE, noise), end)
    if not half:
        assert torch.equal(
            family.velocity(noise, sigmas[0], prompts), family.predict_velocity(noise, sigmas[0], prompts)
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_leaving_out_pefts_casts_changes_no_bit_of_loss_or_gradient(family, checkpointing):
    """peft's own way casts each input to float32 for the adapter, and autocast casts it back to bfloat16."""
    pair, examples = _half(family), tiny.tiny_examples(2)
    if checkpointing:
        family.transformer.enable_gradient_checkpointing()
    layers = list(adapted_layers(family.transformer, "student").values())
    assert {layer.cast_input_dtype_enabled for layer in layers} == {False}
    found = []
    for cast in (False, True):
        dtypes = set()
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
            layer.lora_A["student"].register_forward_pre_hook(lambda _, x, dtypes=dtypes: dtypes.add(x[0].dtype))
        rollout_of = (_noise(family, 2), family.sigmas(2, SIDE, SIDE), [e.prompt for e in examples])
        end, loss = rollout(family.velocity, pair, *rollout_of, [e.context for e in examples], teacher="teacher")
        found.append([end, loss, *[parameter.grad for parameter in pair.student_parameters()]])
        assert (torch.bfloat16 in dtypes) == (not cast)
        for parameter in pair.student_parameters():
            parameter.grad = None
    assert all(float(gradient.abs().max()) > 0 for gradient in found[0][2:])
    assert all(torch.equal(without, by_peft) for without, by_peft in zip(*found, strict=True))


class _Products(TorchDispatchMode):
    """How often something is multiplied by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mul.Tensor and not isinstance(args[1], torch.Tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("scale", "dora"), [(1.0, False), (2.0, False), (1.0, True)])
def test_leaving_out_a_scale_of_one_changes_no_bit_of_loss_or_gradient(family, half, scale, dora):
    """Against peft's own forward, which is still there for every other scale and kind."""
    lora = LoraSettings(rank=4, alpha=4 * scale, kind="dora" if dora else "lora")
    pair, examples = _half(family, lora) if half else tiny.trained_pair(family, lora), tiny.tiny_examples(2)
    layers, found, products = list(adapted_layers(family.transformer, "student").values()), [], []
    family.velocity(_noise(family, 2), torch.tensor(0.5), [e.context for e in examples])  # tables are made once
    for own in (True, False):
        if not own:
            for layer in layers:
                del layer.forward
        with _Products() as counted:
            rollout_of = (_noise(family, 2), family.sigmas(2, SIDE, SIDE), [e.prompt for e in examples])
            end, loss = rollout(family.velocity, pair, *rollout_of, [e.context for e in examples], teacher="teacher")
        products.append(counted.count)
        found.append([end, loss, *[parameter.grad for parameter in pair.student_parameters()]])
        for parameter in pair.student_parameters():
            parameter.grad = None
    assert all(float(gradient.abs().max()) > 0 for gradient in found[0][2:])
    assert all(torch.equal(without, by_peft) for without, by_peft in zip(*found, strict=True))
    # of each layer: student and backward in two states, and the teacher where it is not merged into the weights
    fewer = len(layers) * (6 if half else 4) if scale == 1 and not dora else 0
    assert products[1] - products[0] == fewer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_no_autocast_is_active_pefts_casts_stay(family, dtype):
    """A float32 base, whatever its adapter: a bfloat16 one needs its input cast."""
    pair = add_adapters(family.transformer, LoraSettings(rank=4), family.lora_targets, 0, dtype=dtype)
    assert {layer.cast_input_dtype_enabled for layer in adapted_layers(family.transformer, "student").values()} == {
        True
    }
    with pair.select("student"):
        assert torch.isfinite(sample(family, tiny.tiny_prompts(1), 1, SIDE, SIDE, _noise(family, 1))).all()


def test_where_processes_draw_in_step_nothing_is_tried_again_and_no_preview_is_skipped(tmp_path):
    """The others would wait for this one: the error ends the training, as any out of memory."""
    family = Cramped.of("transformer", 1)
    family.transformer.sharded = True
    with pytest.raises(torch.OutOfMemoryError):
        draw(family, tiny.tiny_prompts(2), 1, _noise(family, 2), SIDE, SIDE, most=2)
    assert [count for _, count in family.seen] == [2]
    family = Cramped.of("decoder", 0)
    family.transformer.sharded = True
    shown = [tiny.Preview("a fox", tiny.tiny_prompts(1)[0], SIDE, SIDE)]
    pair = add_adapters(family.transformer, LoraSettings(rank=4), family.lora_targets, 0)
    with pytest.raises(torch.OutOfMemoryError):
        Previews(family, shown, tiny.tiny_examples(), 1, 1, 0).show(0, pair, False, tmp_path, tiny.Recorder())
