"""The registry's gate: what it refuses whoever else there is, and that no line of champions sinks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dopsd.config.groups import RegistrySettings
from dopsd.evaluation.paired import LARGEST, Paired, PairedError, read_paired, write_paired
from dopsd.registry import gate
from dopsd.registry.gate import LEAST_DELTA, Verdict, described, in_short, measure_deltas, paired_difference
from tests.scored import ABOUT, BASE, paired, values

SETTINGS = RegistrySettings()


def judge(mine: Any, rivals: dict[str, Any] | None = None, **settings: Any) -> Verdict:
    """Beside a base as in :mod:`tests.scored`; the last rival is the anchor."""
    base = values(len(mine["learnt"]["first"]), **BASE)
    deltas = measure_deltas(list(rivals.values())[-1], base) if rivals else {}
    return gate.judge(mine, base, ABOUT, rivals or {}, deltas, RegistrySettings(**settings))


# --- the interval -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 6, 40])
def test_the_interval_is_the_one_of_the_paired_t_test(count: int) -> None:
    a, b = np.random.default_rng(count).normal(0, 1, (2, count))
    found = paired_difference(a, b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx(((a - b).mean(), low, high))
    other = paired_difference(a, b, "lower")
    assert (other.mean, other.low, other.high) == pytest.approx((-found.mean, -high, -low))


@pytest.mark.parametrize("draw", ["normal", "uniform", "laplace"])
def test_over_six_prompts_the_bound_holds_as_often_as_it_says(draw: str) -> None:
    """A bootstrap's does in some 92 of 100 cases (docs/benchmarks.md)."""
    sample = getattr(np.random.default_rng(0), draw)
    held = [paired_difference(sample(size=6), sample(size=6)).low < 0 for _ in range(4000)]
    assert np.mean(held) > 0.97


def test_of_one_prompt_nothing_is_known_and_of_unpaired_ones_nothing_is_said() -> None:
    assert paired_difference([1.0], [0.0]).low == -np.inf
    assert not judge(values(1, learnt=0.9)).passed
    for mine, theirs in (([1.0, 2.0], [1.0]), ([], [])):
        with pytest.raises(ValueError, match="paired scores"):
            paired_difference(mine, theirs)


# --- floors -----------------------------------------------------------------------------------------------------------


def test_the_first_good_one_passes() -> None:
    verdict = judge(values())
    assert verdict.passed
    assert verdict.reason == ("beside the untuned base: better in likeness, worse in own pictures kept, no measurable "
                              "difference in few steps; there was no champion")  # fmt: skip


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ({"kept": 0.14}, "the base's own pictures are lost: own pictures kept 0.140, registry.min_kept is 0.25"),
        ({"learnt": 0.3}, "nothing learnt that could be measured: likeness 0.300, the untuned base's 0.300"),
        ({"learnt": 0.1}, "nothing learnt that could be measured: likeness 0.100"),
        ({"few_step": -0.2}, "few steps may cost too much: few steps -0.200"),
        ({"few_step": -0.08}, "may be lost (registry.max_few_step_loss)"),
        (
            {"diversity": 0.05, "learnt": 0.9},
            "two seeds give nearly the same picture: two seeds apart 0.050, the "
            "untuned base's 0.400, 0.100 is asked for (registry.min_diversity)",
        ),
    ],
)
def test_one_that_broke_something_is_no_first_champion(means: dict[str, float], said: str) -> None:
    """SFT that kept 0.14 of the old pictures; random weights; one that needs its many steps."""
    verdict = judge(values(seed=3, **means))
    assert not verdict.passed
    assert said in verdict.reason


def test_floors_stand_in_one_order_whatever_the_process() -> None:
    """A version's page and reason are the same text again: a set's order goes by the hash seed."""
    about = ABOUT | {"few_step_kept": {"better": "higher", "label": "few steps, general"}}
    mine, base = (its | {"few_step_kept": its["few_step"]} for its in (values(), values(**BASE)))
    table = gate.judge(mine, base, about, {}, {}, SETTINGS).table
    assert [row.score for row in table] == ["learnt", "kept", "few_step", "few_step_kept", "diversity"]


def test_in_diversity_no_rival_sets_a_bar() -> None:
    """A champion that draws what it likes is no measure for one that draws the concept."""
    mine, theirs = values(diversity=0.12), values(seed=2, diversity=0.9)
    verdict = judge(mine, {"the champion": theirs})
    assert verdict.passed
    assert "two seeds apart" not in verdict.reason


def test_it_passes_no_better_for_beating_a_champion_of_no_worth() -> None:
    poor = values(learnt=0.1, kept=0.1, few_step=-0.5)
    assert not judge(values(seed=3, kept=0.14, learnt=0.9), {"the champion": poor}).passed


def test_a_base_that_itself_loses_much_in_few_steps_gets_a_champion() -> None:
    """Once the share of few steps over many was asked for: of this base's 0.1 over 0.5 no adapter could reach 0.9."""
    mine = values(learnt=0.2)
    base = values(**BASE | {"learnt": 0.1})
    assert gate.judge(mine, base, ABOUT, {}, {}, SETTINGS).passed


def test_what_was_not_measured_was_not_passed_and_a_floor_can_be_lifted() -> None:
    floors = {"learnt": "min_learnt", "kept": "min_kept", "few_step": "max_few_step_loss", "diversity": "min_diversity"}
    for score, setting in floors.items():
        mine = {name: seeds for name, seeds in values().items() if name != score}
        base = values(**BASE)
        verdict = gate.judge(mine, base, ABOUT, {}, {}, SETTINGS)
        assert not verdict.passed
        assert f"{ABOUT[score]['label']} was not measured" in verdict.reason
        assert gate.judge(mine, base, ABOUT, {}, {}, RegistrySettings(**{setting: None})).passed


@pytest.mark.parametrize(
    ("mine", "champion", "said"),
    [
        ({}, None, "promoted beside the untuned base: better learnt +0.200 (#); worse kept -0.100 (#); "
                   "no measurable difference in few_step"),
        ({"kept": 0.14}, None, "not promoted beside the untuned base: failed kept -0.860 (#); "
                               "better learnt +0.200 (#); no measurable difference in few_step"),
        ({"kept": 0.14, "learnt": 0.6}, {}, "not promoted beside the champion: failed kept -0.860 (#) beside the "
                                            "untuned base, kept -0.760 (#); better learnt +0.100 (#); "
                                            "no measurable difference in few_step"),
    ],
)  # fmt: skip
def test_in_short_a_verdict_says_why_by_the_scores_own_names(
    mine: dict[str, float], champion: dict[str, float] | None, said: str
) -> None:
    verdict = judge(values(seed=3, **mine), {"the champion": values(**champion)} if champion is not None else None)
    assert re.sub(r"\([+-].*?\)", "(#)", in_short(verdict)) == said
    for row in verdict.table:
        assert row.ok or f"{row.score} {gate.between(row.difference)}" in in_short(verdict)


def test_in_short_a_verdict_without_a_comparison_gives_its_reason() -> None:
    assert in_short(Verdict(False, "the champion: not compared")) == "not promoted: the champion: not compared"
    verdict = gate.judge({"learnt": values()["learnt"]}, values(**BASE), ABOUT, {}, {}, SETTINGS)
    assert in_short(verdict) == f"not promoted: {verdict.reason}"
    assert "was not measured" in verdict.reason


# --- rivals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [score for score in ABOUT if score != "diversity"])
def test_every_score_is_guarded(score: str) -> None:
    theirs = values(seed=1)
    delta = measure_deltas(theirs, values(**BASE))[score]
    mean = np.mean(theirs[score]["first"])
    for by, passes in ((3 * delta, False), (0.0, True), (-delta, True)):
        verdict = judge(values(seed=2, **{score: mean - by}), {"the champion (version 3)": theirs}, min_kept=None)
        assert verdict.passed is passes
        said = f"worse than the champion (version 3), as far as can be told: {ABOUT[score]['label']}"
        assert passes or said in verdict.reason


def test_where_lower_is_better_less_is_more() -> None:
    about = ABOUT | {"error": {"better": "lower", "label": "error"}}
    mine, theirs, base = ({**values(seed=s), "error": values(seed=s, error=e)["error"]}
                          for s, e in ((1, 0.2), (2, 0.5), (0, 0.5)))  # fmt: skip
    base |= values(**BASE)
    assert gate.judge(mine, base, about, {"it": theirs}, {}, RegistrySettings(tolerance=0.1)).passed
    assert not gate.judge(theirs, base, about, {"it": mine}, {}, RegistrySettings(tolerance=0.1)).passed


def test_a_score_that_the_champion_has_and_this_one_lacks_is_no_way_around_it() -> None:
    theirs = {**values(), "prompt": {"first": (0.5,) * 12}}
    verdict = judge(values(seed=2), {"the champion": theirs})
    assert not verdict.passed
    assert "prompt was measured of the champion and not of this version" in verdict.reason


def test_a_persons_tolerance_stands_in_place_of_what_was_measured() -> None:
    theirs, mine = values(seed=1), values(seed=2, learnt=0.45)
    assert not judge(mine, {"it": theirs}).passed
    assert judge(mine, {"it": theirs}, tolerance=0.1).passed
    assert not judge(theirs | values(seed=3), {"it": theirs}, tolerance=0.0).passed
    assert judge(theirs, {"it": theirs}, tolerance=0.0).passed, "the very same once more"


def test_the_untuned_base_itself_learnt_nothing() -> None:
    """Its difference from itself is 0 without any chance."""
    base = values(**BASE)
    verdict = gate.judge(base, base, ABOUT, {}, {}, SETTINGS)
    assert "nothing learnt that could be measured" in verdict.reason


def _chain(rivals: Callable[[Any, Any], dict[str, Any]], nights: int = 50) -> tuple[float, float]:
    """True likeness of the last of ``nights`` champions, each challenger a little worse than the champion; the anchor's
    delta."""
    anchor = champion = values(seed=1)
    delta, quality = measure_deltas(anchor, values(**BASE))["learnt"], 0.5
    for night in range(nights):
        mine = values(seed=100 + night, learnt=quality - delta / 10)
        if judge(mine, rivals(champion, anchor)).passed:
            champion, quality = mine, quality - delta / 10
    return quality, delta


def test_a_chain_of_slightly_worse_ones_never_sinks_below_the_anchor_by_more_than_delta() -> None:
    quality, delta = _chain(lambda champion, anchor: {"the champion": champion, "the anchor": anchor})
    assert 0.5 - delta <= quality < 0.5
    alone, _ = _chain(lambda champion, _: {"the champion": champion})
    assert alone < 0.5 - 1.5 * delta, "without the anchor it sinks on"


def _width(a: Any, b: Any, prompts: int = 0) -> float:
    """Of the t-test's interval, over so many prompts."""
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    count, n = len(a), prompts or len(a)
    return (high - low) * np.sqrt(count / n) * stats.t.ppf(0.975, n - 1) / stats.t.ppf(0.975, count - 1)


def test_deltas_are_twice_what_chance_does_to_the_anchor() -> None:
    mine, base = values(seed=1), values(**BASE)
    found = measure_deltas(mine, base)
    for score in ("learnt", "kept"):
        assert found[score] == pytest.approx(_width(mine[score]["first"], mine[score]["second"]))
    once = {score: {"first": seeds["first"]} for score, seeds in mine.items()}
    over_prompts = _width(mine["learnt"]["first"], base["learnt"]["first"])
    assert measure_deltas(once, base)["learnt"] == pytest.approx(over_prompts)
    same = {"learnt": {"first": mine["learnt"]["first"], "second": mine["learnt"]["first"]}}
    assert measure_deltas(same, base) == {"learnt": LEAST_DELTA}
    guarded = [score for score in ABOUT if score != "diversity"]
    assert measure_deltas(values(3), values(3, **BASE)) == dict.fromkeys(guarded, LEAST_DELTA), "of three, too little"


def test_a_second_noise_of_fewer_prompts_counts_for_as_many_as_are_compared() -> None:
    """The interval that it stands beside is of all of them."""
    mine = values(seed=1)["kept"]
    shorter = {"kept": {"first": mine["first"], "second": mine["second"][:5]}}
    delta = measure_deltas(shorter, values(**BASE))["kept"]
    assert delta == pytest.approx(_width(mine["first"][:5], mine["second"][:5], 12))
    assert delta < _width(mine["first"][:5], mine["second"][:5]) / 1.5


@pytest.mark.parametrize(("score", "kin"), [("few_step", "learnt"), ("few_step_kept", "kept")])
def test_a_loss_of_few_steps_has_the_delta_of_what_is_lost(score: str, kin: str) -> None:
    """It is drawn from one noise, and of the base it is 0: by itself it spreads as prompts do."""
    mine, base = values(seed=1), values(**BASE)
    prompts = np.random.default_rng(0).normal(0, 0.3, 12)
    loss = {score: {"first": tuple(prompts)}}, {score: {"first": (0.0,) * 12}}
    assert measure_deltas(mine | loss[0], base | loss[1])[score] == measure_deltas(mine, base)[kin]
    few = {score: {"first": tuple(prompts[:6])}}, {score: {"first": (0.0,) * 6}}
    as_many = _width(mine[kin]["first"], mine[kin]["second"], 6)
    assert measure_deltas(mine | few[0], base | few[1])[score] == pytest.approx(as_many), "over its own prompts"
    steady = {score: {"first": tuple(prompts / 30)}}, loss[1]
    own = 2**0.5 * _width(prompts / 30, np.zeros(12))
    assert LEAST_DELTA < own < measure_deltas(mine, base)[kin]
    assert measure_deltas(mine | steady[0], base | steady[1])[score] == pytest.approx(own)


def test_of_losses_of_few_steps_that_chance_alone_made_an_equal_one_passes() -> None:
    """Beside the base's 0 there is half of the variance that a difference of two models has."""
    draw, passed = np.random.default_rng(0), []
    equal, base = values(seed=1, spread=0.05), values(**BASE) | {"few_step": {"first": (0.0,) * 12}}
    for _ in range(300):
        theirs, mine = (equal | {"few_step": {"first": draw.normal(0, 0.02, 12)}} for _ in range(2))
        deltas = measure_deltas(theirs, base)
        passed.append(gate.judge(mine, base, ABOUT, {"it": theirs}, deltas, SETTINGS).passed)
    assert np.mean(passed) > 0.9


def test_chance_may_take_a_quarter_of_what_there_is_to_lose() -> None:
    mine, base = values(4, spread=0.5, learnt=0.4, kept=0.6), values(4, 5, **BASE)
    found = measure_deltas(mine | {"few_step_kept": mine["few_step"]}, base | {"few_step_kept": base["few_step"]})
    learnt, kept = 0.25 * 0.1, 0.25 * 0.6
    assert found == pytest.approx({"learnt": learnt, "few_step": learnt, "kept": kept, "few_step_kept": kept})


def test_the_page_says_better_or_worse_and_why() -> None:
    verdict = judge(values(seed=2, learnt=0.6, kept=0.2), {"the champion (version 3)": values(seed=1)})
    text = described(verdict, ABOUT)
    assert text.startswith("Not promoted: the base's own pictures are lost: own pictures kept 0.200")
    assert "beside the champion (version 3): better in likeness, worse in own pictures kept, no measurable" in text
    assert "| the champion (version 3) | likeness | 0.600 | 0.500 | +0.100 (+0." in text
    assert text.count("**no**") == 2
    assert len(verdict.reason.splitlines()) == 1


# --- the file ---------------------------------------------------------------------------------------------------------


def test_scores_come_back_as_they_were_written(tmp_path: Path) -> None:
    one = paired()
    write_paired(tmp_path / "paired.json", one)
    assert read_paired(tmp_path / "paired.json") == one
    assert one.of("version", "mine").models.keys() == {"base", "mine"}


def _without_base(value: dict[str, Any]) -> None:
    del value["models"]["base"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update(version=2), "version 1"),
        (_without_base, "no model base"),
        (lambda v: v["models"].update({"../x": {}}), "names of"),
        (lambda v: v["models"]["version"].update(more={"first": [1.0]}), "scores that the base has not"),
        (lambda v: v["models"]["version"]["learnt"].update(first=[1.0]), "number for each of the base's prompts"),
        (lambda v: v["models"]["version"]["learnt"].update(first=[]), "number for each of the base's prompts"),
        (lambda v: v["models"]["version"]["learnt"].update(second=[0.0] * 13), "more prompts with the second"),
        (lambda v: v["models"]["version"]["learnt"].update(third=[0.0]), "other than first and second"),
        (lambda v: v["models"]["version"]["learnt"].update(second=["1"]), "lists of numbers"),
        (lambda v: v["models"]["version"]["learnt"].update(second=[True]), "lists of numbers"),
        (lambda v: v["models"]["version"]["learnt"].update(second=[float("nan")]), "NaN is no finite number"),
        (lambda v: v["models"]["version"]["learnt"].update(second=[10**400]), "too large"),
        (lambda v: v["models"]["version"].update(learnt=[1]), "must be an object"),
        (lambda v: v.update(models=[]), "must be an object"),
        (lambda v: v["scores"]["learnt"].update(better="more"), "better must be"),
        (lambda v: v["scores"].update({f"s{i}": v["scores"]["learnt"] for i in range(200)}), "at most"),
        (lambda v: v.update(few_steps="4"), "whole number"),
    ],
)
def test_a_file_that_is_no_scores_is_one_line(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    path = tmp_path / "paired.json"
    write_paired(path, paired())
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(PairedError, match=said) as caught:
        read_paired(path)
    assert "\n" not in str(caught.value)


def test_neither_size_nor_depth_of_a_file_does_harm(tmp_path: Path) -> None:
    path = tmp_path / "paired.json"
    for content in (b"[" * 100_000, b" " * (LARGEST + 1), b"\xff", b"1e999", b""):
        path.write_bytes(content)
        with pytest.raises(PairedError):
            read_paired(path)
    infinite = {"version": 1, "few_steps": 4, "scores": {"a": {"better": "higher", "label": "a"}}}
    path.write_text(json.dumps(infinite)[:-1] + ', "models": {"base": {"a": {"first": [1e999]}}}}')
    with pytest.raises(PairedError, match="finite"):
        read_paired(path)
    with pytest.raises(PairedError):
        Paired({}, {})
