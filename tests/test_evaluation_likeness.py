"""What is said of pictures without a truth: each score at its ceiling, at its floor and in between."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from sklearn.metrics.pairwise import cosine_similarity

from dopsd.data.pictures import Picture
from dopsd.evaluation.backbones import load_backbone
from dopsd.evaluation.compare import compared, looks_of
from dopsd.evaluation.copies import Copies
from dopsd.evaluation.draws import Key
from dopsd.evaluation.headline import Asked, few_step_values, headline, kept_values
from dopsd.evaluation.likeness import Scale, as_independent, kept
from dopsd.evaluation.scoring import Bootstrap, Cell
from dopsd.evaluation.world import world_picture
from tests.tiny_evaluation import small_world

KNOWN = [("noto", i) for i in range(12)]


@cache
def pictures(style: str, first: int = 0, count: int = 12) -> tuple[Image.Image, ...]:
    return tuple(world_picture(small_world(), style, first + i) for i in range(count))


def features(images) -> torch.Tensor:
    return load_backbone()(list(images))


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def scale() -> Scale:
    return Scale.of(features([*pictures("noto"), *pictures("twemoji")]), load_backbone().content_dim)


def test_kept_is_one_for_the_same_picture_less_for_every_damage_and_lowest_for_noise(scale):
    own, other = features(pictures("noto")), features(pictures("twemoji"))
    far = scale.distance(own, other)
    blurred = [[p.filter(ImageFilter.GaussianBlur(radius)) for p in pictures("noto")] for radius in (0.6, 1.5, 4)]
    drawn = (pictures("noto"), *blurred, noise(12))
    values = [kept(scale.distance(features(images), own), far).mean() for images in drawn]
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert values[1] > 0.5 > values[3] > values[4]
    assert values[4] < 0, "noise is further than another drawing of the same thing"
    assert kept(far, far)[far > far.mean()].abs().max() < 1e-5, "another seed's picture is none of the base's"


def test_a_prompt_drawn_nearly_alike_from_every_noise_does_not_decide():
    far, apart = torch.tensor([0.2, 0.2, 0.001]), torch.tensor([0.02, 0.02, 0.02])
    by_hand = [1 - 0.02 / 0.2, 1 - 0.02 / 0.2, 1 - 0.02 / (0.401 / 3)]
    assert kept(apart, far).tolist() == pytest.approx(by_hand, rel=1e-5)
    assert kept(torch.zeros(2), torch.zeros(2)).tolist() == [1, 1], "a base without any noise's difference"


@pytest.mark.parametrize("half", ["content", "style", "both"])
def test_likeness_is_highest_for_real_pictures_falls_with_damage_and_is_lowest_for_noise(scale, half):
    training, held_out = features(pictures("ink", 20, 8)), features(pictures("ink"))
    blurred = features([p.filter(ImageFilter.GaussianBlur(2)) for p in pictures("ink")])
    drawn = (held_out, blurred, features(pictures("flat")), features(noise(12)))
    values = [float(scale.likeness(found, training, half).mean()) for found in drawn]
    assert values == sorted(values, reverse=True)
    assert abs(float(scale.likeness_among(training, half).mean()) - values[0]) < 0.15
    pairs = [
        [torch.cosine_similarity(*(scale.unit(x[None], half) for x in (a, b))) for b in training] for a in held_out
    ]
    by_hand = torch.tensor(pairs).mean(1)
    assert torch.allclose(scale.likeness(held_out, training, half), by_hand, atol=1e-5)
    one = training[:1]
    assert scale.likeness(one, one, half).item() == pytest.approx(1, abs=1e-5)
    assert len(scale.likeness_among(one, half)) == 0


def test_likeness_is_the_mean_cosine_to_the_set():
    a, reference = (torch.randn(count, 9, generator=torch.Generator().manual_seed(count)) for count in (4, 6))
    expected = cosine_similarity(a.numpy(), reference.numpy()).mean(1)
    found = Scale(torch.ones(9), torch.ones(9), 9).likeness(a, reference, "content")
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_a_copy_is_one_however_it_is_shifted_and_another_picture_is_none(tmp_path):
    training = []
    for number, picture in enumerate(pictures("ink", 0, 6)):
        picture.save(tmp_path / f"{number}.png")
        training.append(Picture(tmp_path / f"{number}.png", 10**6))
    copies = Copies(training, features(pictures("ink", 0, 6)))
    shifted = [Image.fromarray(np.roll(np.asarray(p), 1, axis=1)) for p in pictures("ink", 0, 6)]
    for images, least in ((pictures("ink", 0, 6), 0.999), (shifted, 0.95)):
        found = copies.of(images, features(images))
        assert found["nearest"].tolist() == list(range(6))
        assert found["copy"].min() > least
        assert (found["copy"] > found["copy_bar"]).all()
    wide = [p.resize((128, 64)) for p in pictures("ink", 0, 6)]
    assert copies.of(wide, features(pictures("ink", 0, 6)))["copy"].min() > 0.9, "of another shape it is a copy too"
    others = pictures("ink", 12, 12)
    assert copies.of(others, features(others))["copy"].max() < 0.9
    assert copies.of(noise(3), features(noise(3)))["copy"].max() < 0.2


def test_things_on_a_plain_ground_are_no_copies_of_each_other(tmp_path):
    """Where all is white, all is alike: that is true of the training pictures among each other too."""

    def icon(seed: int) -> Image.Image:
        small = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        ground = Image.new("RGB", (256, 256), "white")
        ground.paste(Image.fromarray(small).resize((80, 80), Image.Resampling.NEAREST), (88, 88))
        return ground

    training = []
    for number in range(8):
        icon(number).save(tmp_path / f"{number}.png")
        training.append(Picture(tmp_path / f"{number}.png", 10**6))
    their = torch.eye(8)
    copies, others = Copies(training, their), [icon(100 + number) for number in range(8)]
    twice = Copies([*training, training[0]], torch.cat([their, their[:1]]))
    again = twice.of([icon(0)], their[:1])
    assert (again["copy"] > again["copy_bar"]).all(), "a picture that is there twice is a copy all the same"
    strange = copies.of(others, their)
    assert strange["copy"].min() > 0.6, "structure alone would call every one of them a copy"
    assert not (strange["copy"] > strange["copy_bar"]).any()
    own = copies.of([icon(number) for number in range(8)], their)
    assert (own["copy"] > own["copy_bar"]).all()


@pytest.mark.parametrize("count", [3, 4, 12])
def test_intervals_know_that_leave_one_out_values_share_their_pictures(count):
    """The spread of their mean over many sets of pictures, against what independent values would have: the same where
    a pair's likeness is the sum of two pictures' own, and no less where pairs have a chance of their own."""
    draw = torch.Generator().manual_seed(0)
    own = torch.randn(2000, count, generator=draw)
    summed = own + (own.sum(1, keepdim=True) - own) / (count - 1)
    told = torch.stack([as_independent(among).var() / count for among in summed]).mean()
    assert float(told) == pytest.approx(float(summed.mean(1).var()), rel=0.15)
    scale = Scale(torch.zeros(6), torch.ones(6), 6)
    sets = [scale.likeness_among(1 + torch.randn(count, 6, generator=draw), "content") for _ in range(600)]
    told = torch.stack([as_independent(among).var() / count for among in sets]).mean()
    assert float(told) > 0.9 * float(torch.stack([among.mean() for among in sets]).var())


def test_a_scale_of_few_general_prompts_is_of_all_that_the_base_drew():
    """Else all is alike that one base drew, and a model that kept nothing seems to have kept it all."""
    draw = torch.Generator().manual_seed(0)
    general, concept = 5 + torch.randn(3, 4, generator=draw), 5 + torch.randn(9, 4, generator=draw)
    cells = {
        Key("kept", "base", 4): cell(features=general),
        Key("concept", "base", 4): cell(features=concept),
        Key("concept", "base", 8): cell(features=100 * concept),
        Key("concept", "sft", 4): cell(features=-concept),
    }
    looks = looks_of(cells, {"eye": concept}, {"eye": 2}, None, 4)  # fmt: skip
    assert torch.allclose(looks[0].scale.center, torch.cat([general, concept]).mean(0))
    cells[Key("kept", "base", 4)] = cell(features=concept[:6])
    looks = looks_of(cells, {"eye": concept}, {"eye": 2}, None, 4)
    assert torch.allclose(looks[0].scale.center, concept[:6].mean(0)), "six are enough"


def cell(values=None, **features_of) -> Cell:
    return Cell({key: np.array(value) for key, value in (values or {}).items()}, {"eye": features_of["features"]})


def test_kept_compares_the_same_noise_and_measures_by_the_bases_own_two():
    """By hand: the base's two noises at a right angle, the tuned model's picture half a right angle off."""
    e = torch.eye(3)
    one, two = torch.stack([e[0], e[1]]), torch.stack([e[1], e[0]])
    tuned = (one + two) / 2**0.5
    cells = {
        Key("kept", "base", 4): cell(features=one), Key("kept", "base", 4, 1): cell(features=two),
        Key("kept", "d-opsd", 4): cell(features=tuned), Key("kept", "d-opsd", 4, 1): cell(features=two),
        Key("concept", "base", 4): cell(features=one), Key("near", "d-opsd", 4): cell(features=one),
    }  # fmt: skip
    looks = looks_of(cells, {"eye": one}, {"eye": 3}, None, 4)
    looks[0] = looks[0].__class__("eye", Scale(torch.zeros(3), torch.ones(3), 3), one, "both", "")
    found = compared(cells, looks)
    expected = 1 - (1 - 0.5**0.5) / 1
    assert found[Key("kept", "d-opsd", 4)].values["kept"].tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert found[Key("kept", "d-opsd", 4, 1)].values["kept"].tolist() == pytest.approx([1, 1])
    assert kept_values(found, "kept", "d-opsd", 4).tolist() == pytest.approx([(1 + expected) / 2] * 2, rel=1e-5)
    assert "kept" not in found[Key("near", "d-opsd", 4)].values, "the base was not drawn there"
    assert found[Key("kept", "d-opsd", 4, 1)].values["diversity"].tolist() == pytest.approx(
        [1 - 0.5**0.5] * 2, rel=1e-5
    )


def test_few_step_takes_off_what_the_base_loses_itself():
    empty, about = torch.zeros(6, 1), {"copy": [0.0] * 6, "copy_bar": [1.0] * 6, "sharpness": [1.0] * 6}
    values = {("base", 4): 0.2, ("base", 32): 0.3, ("sft", 4): 0.5, ("sft", 32): 0.8}
    cells = {
        Key("concept", model, steps): cell(about | {"likeness": [value] * 6}, features=empty)
        for (model, steps), value in values.items()
    }  # fmt: skip
    asked = Asked(4, 32, 4)
    assert few_step_values(cells, "sft", asked)["new"].tolist() == pytest.approx([-0.2] * 4)
    assert few_step_values(cells, "sft", Asked(4, 4, 4)) == {}
    real = np.full(6, 1.0)
    numbers = headline(cells, ["base", "sft"], real, asked, Bootstrap(0), {})["sft"]
    assert numbers.values["learnt"] == pytest.approx(0.3 / 0.8)
    assert numbers.values["few_step_new"] == pytest.approx(-0.2 / 0.8)
    assert numbers.values["likeness_gain"] == pytest.approx(0.3)


def test_what_the_base_can_do_already_is_nothing_to_learn():
    """Real pictures no liker to the training pictures than the base's: the way between them is chance."""
    draw, empty = np.random.default_rng(0), torch.zeros(12, 1)
    about = {"copy": [0.0] * 12, "copy_bar": [1.0] * 12, "sharpness": [1.0] * 12}
    cells = {
        Key("concept", model, 4): cell(about | {"likeness": 0.5 + 0.1 * draw.standard_normal(12)}, features=empty)
        for model in ("base", "sft")
    }
    omitted: dict[str, str] = {}
    real = 0.5 + 0.1 * draw.standard_normal(12)
    numbers = headline(cells, ["base", "sft"], real, Asked(4, 4, 4), Bootstrap(0), omitted)
    assert "learnt" not in numbers["sft"].values
    assert "may be as like the training pictures as real ones" in omitted["learnt"]
    few: dict[str, str] = {}
    headline({key: value.first(2) for key, value in cells.items()}, ["base", "sft"], np.ones(12), Asked(4, 4, 4),
             Bootstrap(0), few)  # fmt: skip
    assert few["learnt"].startswith("2 prompts are too few")
