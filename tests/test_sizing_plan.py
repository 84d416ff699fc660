"""Memory and time said in advance: what fits a card, what is proposed, and what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks import memory
from dopsd.sizing.cards import CARDS, CardError, card_of
from dopsd.sizing.plan import Choice, Plan, Stage, advice, checkpointing_that_fits
from dopsd.sizing.show import Evaluation, needs, proposals
from tests.published_configs import PARAMETERS
from tests.sized import GIB, ROOT, plan, settings, small


def test_the_ladder_goes_down_and_each_card_gets_what_fits_it() -> None:
    made, start = plan("z-image-turbo"), Choice("every")
    ladder = list(made.ladder(start))
    assert [choice.resolution for choice in ladder] == [1024] * 7 + [768, 512]
    peaks = [made.train(choice).peak for choice in ladder[:7]]
    assert all(a >= b for a, b in pairwise(peaks))
    for gib in (8, 12, 16, 24, 48, 80):
        found = made.proposal(start, gib * GIB)
        assert found is not None
        assert made.fits(found, gib * GIB)
        assert not any(made.fits(choice, gib * GIB) for choice in ladder[: ladder.index(found)])
    assert made.proposal(start, 1 * GIB) is None


def test_the_teachers_peak_is_told_from_the_students() -> None:
    """klein's teacher reads the picture too: with few blocks its answer is the most, with all of them the student's
    gradients are."""
    work = plan("klein-4b").work
    taught, learnt = work.train_shortened("every", {"transformer_blocks": 1, "single_transformer_blocks": 1})
    assert taught.peak > learnt.peak
    assert 0 < taught.operations < learnt.operations
    assert work.train("every").peak > taught.peak


def test_an_adapter_has_as_many_parameters_as_it_really_gets() -> None:
    assert plan("z-image-turbo").work.adapter == 158_760_960
    assert small().adapter * 8 == plan("klein-4b").work.adapter == 96_337_920


def test_some_of_the_card_is_kept_free() -> None:
    stage = Stage("train", {"weights": 10e9, "activations": 2e9})
    assert stage.peak == 12e9
    assert stage.fits(13.5e9)
    assert not stage.fits(13.4e9)


def test_auto_is_the_least_checkpointing_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan("z-image-turbo")
    assert [made.checkpointing(Choice(), gib * GIB) for gib in (16, 24, 48, 80)] == [
        "every", "every", "every-second", "none",
    ]  # fmt: skip
    assert made.checkpointing(Choice(offload="group"), 80 * GIB) == "every"
    state = torch.get_rng_state()
    monkeypatch.setattr("dopsd.sizing.plan.plan_for", lambda *_: Plan(small()))
    assert checkpointing_that_fits(settings("klein-4b", "data.resolution=256"), 80 * GIB) == "none"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_a_smaller_batch_is_tried_before_anything_else() -> None:
    first = next(plan("z-image-turbo").ladder(Choice(batch=4, accumulation=2)))
    assert (first.batch, first.accumulation) == (1, 8)


def test_quantised_and_offloaded_weights_are_what_arithmetic_says() -> None:
    made = plan("z-image-turbo")
    size = made.sizes["transformer"]
    plain, int8, nf4, group = (
        made.weights("transformer", Choice("every", **change))  # type: ignore[arg-type]
        for change in ({}, {"quantization": "int8"}, {"quantization": "nf4"}, {"offload": "group"})
    )
    assert plain == 2 * PARAMETERS["z-image-turbo", "transformer"]
    assert plain - int8 == pytest.approx(size.linear * (2 - 8.02 / 8))
    assert plain - nf4 == pytest.approx(size.linear * (2 - 4.127 / 8))
    encoder = 2 * made.sizes["text_encoder"].parameters
    assert made.host(Choice()) == 2e9 + plain, "the largest component comes in through it"
    assert made.host(Choice(offload="model")) == 2e9 + plain + encoder
    assert group < 4.1 * max(size.blocks) + 2 * (size.parameters - sum(size.blocks))


def test_settings_become_a_choice_and_back() -> None:
    made = settings("z-image-turbo", "model.gradient_checkpointing=every")
    before = Choice.of(made)
    assert before == Choice("every", accumulation=4)
    after = replace(before, checkpointing="none", quantization="nf4", resolution=512)
    assert after.lines(before) == {
        "model": {"gradient_checkpointing": "none", "quantization": "nf4"}, "data": {"resolution": 512},
    }  # fmt: skip


def test_an_out_of_memory_becomes_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dopsd.sizing.plan.plan_for", lambda *_: plan("z-image-turbo"))
    said = advice(settings("z-image-turbo"), 16 * GIB)
    assert "\n" not in said
    assert "model.quantization=int8" in said
    assert "something else" in advice(settings("z-image-turbo"), 24 * GIB)
    assert "no settings" in advice(settings("z-image-turbo"), 1 * GIB)
    monkeypatch.setattr("dopsd.sizing.plan.plan_for", lambda *_: None)
    assert "train.batch_size" in advice(settings("z-image-turbo"), GIB)


def test_cards_are_found_by_name_or_size() -> None:
    assert card_of("RTX 4090").gib == card_of("24").gib == 24
    assert card_of("NVIDIA GeForce RTX 4060 Ti").name == "RTX 4060 Ti"
    assert card_of("NVIDIA H100 80GB HBM3").name == "H100"
    assert card_of("20 GB").teraflops == card_of("RTX 4090").teraflops
    assert card_of("500").gib == 500
    with pytest.raises(CardError, match="--card Voodoo: give its memory"):
        card_of("Voodoo")
    assert len({card.name for card in CARDS}) == len(CARDS)


def test_hours_follow_the_card_and_the_work() -> None:
    made, choice = plan("z-image-turbo"), Choice("every", accumulation=4)
    assert made.hours(choice, card_of("RTX 4090")) == pytest.approx(62 * 1000 / 3600, rel=0.3)  # docs: 62 s a step
    assert made.hours(choice, card_of("H100")) == pytest.approx(15 * 1000 / 3600, rel=0.3)
    fast = made.hours(replace(choice, checkpointing="none"), card_of("H100"))
    assert fast < made.hours(choice, card_of("H100")) < made.hours(replace(choice, quantization="nf4"), card_of("H100"))


def test_what_is_said_fits_80_columns_and_can_be_pasted() -> None:
    made, choice, card = plan("z-image-turbo"), Choice("every", accumulation=4), card_of("16")
    evaluation = Evaluation(468, 3288, 0.9e9, 17.5e9)
    lines = [*needs(made, choice, card, evaluation), *proposals(made, choice, card)]
    assert [part for line in lines for part in line.splitlines() if len(part) > 80] == []
    text = "\n".join(lines)
    assert re.search(r"^train {41,}1\d\.\d GB   of 17\.2: too much$", text, re.MULTILINE)
    assert "  transformer                                   12.3 GB" in text
    assert "    model:\n      quantization: int8\n" in text
    assert re.search(r"^the backbones beside evaluate +0\.9 GB$", text, re.MULTILINE)
    assert re.search(r"^evaluate's judge, when all else is gone +17\.5 GB   of 17\.2: too much$", text, re.MULTILINE)
    assert re.search(r"^an evaluation, 468 pictures at most +\d\.\d h$", text, re.MULTILINE)
    roomy = "\n".join(proposals(made, choice, card_of("H100")))
    assert "Faster" in roomy
    assert "gradient_checkpointing: none" in roomy
    assert "They fit (24 GB" in "\n".join(proposals(made, choice, card_of("24")))


def test_the_page_is_made_of_its_numbers_and_they_are_todays() -> None:
    """``python benchmarks/memory.py`` writes both anew."""
    numbers = json.loads(memory.NUMBERS.read_text())
    assert memory.PAGE.read_text() == memory.page(numbers)
    assert max(map(len, memory.PAGE.read_text().splitlines())) <= 120
    written = numbers["bases"]["z-image-turbo"]
    for stage in plan("z-image-turbo").stages(Choice("every")):
        assert written["stages"][stage.name]["peak"] == pytest.approx(stage.peak / 1e9, rel=0.02)
    for recipe, base in numbers["bases"].items():
        said = re.search(
            r"([\d.]+) GB\s+to train \(([\d.]+) without", (ROOT / "recipes" / f"{recipe}.yaml").read_text()
        )
        assert said is not None
        assert float(said[1]) == pytest.approx(base["stages"]["train"]["peak"], rel=0.02)
        assert float(said[2]) == pytest.approx(base["cards"][-1]["gb"]["train"], rel=0.02)
