"""The headline numbers by hand, and what is said where chance alone made them."""

import numpy as np
import pytest
import torch
from scipy import stats

from dopsd.evaluation import headline
from dopsd.evaluation.draws import Key
from dopsd.evaluation.guarded import against, differences, paired_of
from dopsd.evaluation.headline import Asked
from dopsd.evaluation.paired import Paired
from dopsd.evaluation.published import published
from dopsd.evaluation.scoring import Bootstrap, Cell
from dopsd.evaluation.verdict import verdict


def cell(**values: list[float]) -> Cell:
    """Two prompts' scores, three times over: six are the fewest on which a gap is measured."""
    count = 3 * len(next(iter(values.values())))
    repeated = {key: np.tile(np.array(value), 3) for key, value in values.items()}
    never = {key: np.zeros(count) for key in ("likeness", "copy", "copy_bar") if key not in values}
    return Cell(never | repeated, {"eye": torch.zeros(count, 1)})


def test_headline_numbers_are_the_ratios_they_claim():
    cells = {
        Key("concept", "base", 4): cell(style=[0.0, 0.2], cosine=[0.3, 0.3], sharpness=[0.4, 0.4]),
        Key("concept", "teacher", 4): cell(style=[0.8, 1.0], cosine=[0.3, 0.3], sharpness=[0.5, 0.5]),
        Key("concept", "d-opsd", 4): cell(style=[0.6, 0.8], cosine=[0.4, 0.4], sharpness=[0.5, 0.5]),
        Key("concept", "d-opsd", 32): cell(style=[1.0, 0.75], sharpness=[0.5, 0.5]),
        Key("known", "base", 4): cell(style=[0.5, 0.5], cosine=[0.5, 0.3], mse=[0.1, 0.1]),
        Key("known", "d-opsd", 4): cell(style=[0.5, 0.4], cosine=[0.4, 0.4], mse=[0.1, 0.3]),
    }
    omitted: dict[str, str] = {}
    asked = Asked(4, 32, 1)
    found = headline.headline(cells, ["base", "teacher", "d-opsd"], np.ones(6), asked, Bootstrap(0), omitted)
    numbers = found["d-opsd"]
    assert numbers.values["gap_closed_style"] == pytest.approx((0.7 - 0.1) / (0.9 - 0.1))
    assert "gap_closed_truth" not in numbers.values
    assert "not measurably better than the base" in omitted["gap_closed_truth"]
    assert numbers.values["sharpness_vs_base"] == pytest.approx(1.25)
    assert numbers.values["known_style"] == pytest.approx(0.9)
    assert numbers.values["known_cosine"] == pytest.approx(1)
    assert numbers.values["known_mse"] == pytest.approx(2)
    assert numbers.values["known_lowest"] == pytest.approx(0.9)
    assert numbers.values["retention_style"] == pytest.approx(0.6 / 1.0, rel=1e-4), "both on the curve's one prompt"
    low, high = numbers.intervals["gap_closed_style"]
    assert low == pytest.approx(0.75)
    assert high == pytest.approx(0.75)


def test_the_published_means_have_intervals_over_pictures() -> None:
    """Five grades of one picture are no five pictures: of grades that are all alike the interval is the pictures'."""
    of_picture = np.array([0.1, 0.4, 0.2, 0.7, 0.3, 0.9, 0.5])
    eye = torch.zeros(7, 1)
    cells = {
        Key("rewrite", "base", 4): Cell({"prompt": of_picture, "target@dinov3": of_picture}, {"eye": eye}),
        Key("concept", "base", 4): Cell({"prompt": np.repeat(of_picture, 4)}, {"eye": eye.repeat(4, 1)}),
    }
    numbers = published(cells, ["base"], 4, Bootstrap(0))["base"]
    assert numbers.values["clip_s"] == numbers.values["dino_d"] == pytest.approx(of_picture.mean(), abs=1e-5)
    assert numbers.intervals["clip_s"] == numbers.intervals["dino_d"]
    few = {key: value.first(5 if key.split == "rewrite" else 20) for key, value in cells.items()}
    assert not published(few, ["base"], 4, Bootstrap(0))["base"].intervals, "of five pictures there is none"


def test_nothing_is_above_all_of_the_way_and_what_is_beyond_is_said() -> None:
    draw, eye = np.random.default_rng(0), torch.zeros(12, 1)

    def drawn(level: float) -> Cell:
        values = {"likeness": level + draw.normal(0, 0.01, 12), "sharpness": np.ones(12), "copy": np.zeros(12)}
        return Cell(values | {"copy_bar": np.ones(12)}, {"eye": eye})

    levels = {"base": 0.1, "teacher": 0.2, "d-opsd": 0.5, "sft": 0.3}
    cells = {Key("concept", model, 4): drawn(level) for model, level in levels.items()}
    real = draw.normal(0.3, 0.01, 8)
    found = headline.headline(cells, list(levels), real, Asked(4, 4, 12), Bootstrap(0), {})
    beyond, just = found["d-opsd"], found["sft"]
    for name in ("learnt", "gap_closed_style"):
        assert beyond.values[name] == 1
        assert name == "learnt" or beyond.values[f"{name}_raw"] > 3, "benchmarks see how far it went"
        assert beyond.intervals[name] == [1, 1]
    assert beyond.values["beyond_real"] == pytest.approx(2, rel=0.1)
    assert just.values["learnt"] == pytest.approx(1, abs=0.05)
    assert "beyond_real" not in just.values, "that may be chance"


def test_no_interval_leaves_what_a_score_can_be() -> None:
    """Resamples are widened, and a share is no less than 0."""
    values = {"style": np.array([1.0] * 11 + [0.6]), "style_hit": np.array([0.0] * 5 + [1.0] + [0.0] * 6),
              "kept@clip": np.array([1.0] * 10 + [0.98, 0.8]), "sharpness": np.array([1.0] * 11 + [5.0])}  # fmt: skip
    found = headline.scores_of(Cell(values, {"eye": torch.zeros(12, 1)}), None, Bootstrap(0)).intervals
    assert found["style"][1] == found["kept@clip"][1] == 1
    assert found["style_hit"][0] == 0
    assert found["sharpness"][1] > 1


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_of_few_prompts_no_interval_and_no_mark_is_given(count: int) -> None:
    """By chance alone two equal models were marked half the time on two prompts, and always on one."""
    draw, eye = np.random.default_rng(0), torch.zeros(count, 1)

    def drawn() -> Cell:
        values = {key: draw.normal(0.5, 0.1, count) for key in ("likeness", "sharpness", "style")}
        return Cell(values | {"copy": np.zeros(count), "copy_bar": np.ones(count)}, {"eye": eye})

    models = ["base", "d-opsd", "sft"]
    cells = {Key("concept", model, steps): drawn() for model in models for steps in (4, 8)}
    asked, bootstrap, real = Asked(4, 8, count), Bootstrap(0), draw.normal(0.9, 0.01, 6)
    found = headline.headline(cells, models, real, asked, bootstrap, {})
    scores = [headline.scores_of(cell, None, bootstrap) for cell in cells.values()]
    intervals = [numbers.intervals for numbers in (*found.values(), *scores)]
    paired = paired_of(cells, models, real, asked)
    told = differences(cells, models, 4, bootstrap), against(paired, "d-opsd", bootstrap)
    assert any(intervals) == any(told) == (count >= 6)
    assert found["d-opsd"].values


def test_what_is_liker_than_real_pictures_is_no_bar_for_others() -> None:
    """One average picture for every prompt is liker to the training pictures than real ones are."""
    draw, eye = np.random.default_rng(0), torch.zeros(12, 1)
    likeness = {"base": 0.1, "d-opsd": 0.28, "average": 0.588}
    values = {model: level + draw.normal(0, 0.02, 12) for model, level in likeness.items()}
    cells = {Key("concept", model, 4): Cell({"likeness": its}, {"eye": eye}) for model, its in values.items()}
    cells |= {
        Key("concept", model, 4, 1): Cell({"likeness": its + 0.01}, {"eye": eye}) for model, its in values.items()
    }
    real = np.array([0.28, 0.3, 0.32, 0.3])
    found = paired_of(cells, list(likeness), real, Asked(4, 4, 12)).models
    means = {model: np.mean(its["learnt"]["first"]) for model, its in found.items()}
    most = stats.t.interval(0.95, 3, real.mean(), stats.sem(real))[1]
    assert means["average"] == pytest.approx(most, abs=1e-4)
    for model in ("base", "d-opsd"):
        assert found[model]["learnt"]["first"] == pytest.approx(values[model], rel=1e-4), "below it nothing is changed"
    apart = np.subtract(found["average"]["learnt"]["first"], values["average"])
    assert np.allclose(apart, apart[0], atol=1e-4), "prompt by prompt it is the same model"
    again = np.subtract(found["average"]["learnt"]["second"], found["average"]["learnt"]["first"])
    assert np.allclose(again, 0.01, atol=1e-4)
    for unknown in (real[:2], real - 0.3):  # two say nothing, and none may be liker than such ones
        whole = paired_of(cells, list(likeness), unknown, Asked(4, 4, 12)).models["average"]["learnt"]["first"]
        assert whole == pytest.approx(values["average"], rel=1e-4)


def test_marks_between_models_are_of_the_numbers_that_are_shown() -> None:
    """Kept is the mean of both noises, so its difference is; of what is shown from the first alone it is of that."""
    mine = {score: {"first": (0.8,) * 6, "second": (0.2,) * 6} for score in ("kept", "learnt")}
    other = {score: {"first": (0.7,) * 6, "second": (0.6,) * 6} for score in ("kept", "learnt")}
    about = {score: {"better": "higher", "label": score} for score in mine}
    found = against(Paired(about, {"base": mine, "d-opsd": mine, "sft": other}, 4), "d-opsd", Bootstrap(0))["sft"]
    assert found["kept"] == pytest.approx([0.15] * 3)
    assert found["learnt"] == pytest.approx([-0.1] * 3)


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_no_success(seed):
    """Random weights: base, teacher and student differ by chance alone, and nothing may come of it."""
    draw = np.random.default_rng(seed)

    def chance(count: int) -> Cell:
        values = {"likeness": 0.25 + 0.01 * draw.standard_normal(count), "copy": np.zeros(count),
                  "copy_bar": np.ones(count), "sharpness": np.ones(count)}  # fmt: skip
        return Cell(values, {"eye": torch.zeros(count, 1)})

    for count in (2, 5, 40):
        cells = {Key("concept", model, 4): chance(count) for model in ("base", "teacher", "d-opsd")}
        cells[Key("concept", "teacher", 4)].values["likeness"] -= 0.004  # a little behind, as often as not
        real = chance(count).values["likeness"] - 0.004
        omitted: dict[str, str] = {}
        asked = Asked(4, 4, count)
        numbers = headline.headline(cells, ["base", "teacher", "d-opsd"], real, asked, Bootstrap(0), omitted)["d-opsd"]
        assert not {"gap_closed_style", "learnt", "few_step_new"} & numbers.values.keys(), (seed, count)
        metrics = {
            "models": ["base", "teacher", "d-opsd"], "few_steps": 4, "most_steps": 4, "omitted": omitted,
            "style_score": "likeness", "intervals": {"headline": {"d-opsd": numbers.intervals}}, "kind": "style",
            "headline": {"d-opsd": numbers.values}, "counts": {"kept_prompts": 0},
        }  # fmt: skip
        assert verdict(metrics)[0] == "Whether D-OPSD learnt the new style cannot be told."
