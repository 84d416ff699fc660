"""The embedded base: its world, its parts, and its build at the smallest size that runs through every stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emoji_turbo import build as building
from emoji_turbo import vae as vaes
from emoji_turbo.batches import DEFAULT_STYLE, UNNAMED, WORDS, draw_batch
from emoji_turbo.captions import PLACEHOLDER, random_caption, restyled
from emoji_turbo.loop import train
from emoji_turbo.pictures import BASE_STYLES, NEW_STYLES, STYLES, World
from emoji_turbo.pretrain import AFTER, Readouts
from emoji_turbo.transforms import TECHNIQUES, sample_transform

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world():
    return World.load(ROOT / "data/base/emoji-turbo/world")


def test_the_world_keeps_its_promises(world):
    assert set(world.known).isdisjoint(world.held_out)
    assert world.subject in world.held_out
    assert len(set(world.labels)) == len(world.labels)
    for style in STYLES:
        assert world.pictures[style].shape == (len(world.labels), 3, 64, 64)


def test_a_world_survives_its_sheets(world, tmp_path):
    world.save(tmp_path)
    again = World.load(tmp_path)
    assert (again.labels, again.known, again.held_out) == (world.labels, world.known, world.held_out)
    assert all(torch.equal(again.pictures[s], world.pictures[s]) for s in STYLES)


@pytest.mark.parametrize("style", NEW_STYLES)
def test_shipped_style_concepts_are_true_pictures_and_do_not_leak(world, style):
    folder = ROOT / "data" / "concepts" / f"style-{style}"
    names = {}
    for part, count in ((folder, 16), (folder / "holdout", 100)):
        rows = [json.loads(line) for line in (part / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == count
        names[part.name] = {Path(row["image"]).stem for row in rows}
        label = Path(rows[0]["image"]).stem
        pixels = torch.tensor(list(Image.open(part / rows[0]["image"]).tobytes())).view(64, 64, 3).permute(2, 0, 1)
        assert torch.equal(pixels, world.pictures[style][world.labels.index(label)].long())
    assert names["holdout"].isdisjoint(names[folder.name])
    assert set().union(*names.values()) <= {world.labels[i] for i in world.known}


def test_the_base_is_never_trained_on_new_styles_or_held_out_things(world):
    """Every target of many drawn batches that is not transformed is a base style's picture of a thing that was seen."""
    blind = replace(world, pictures=dict(world.pictures))
    for style in NEW_STYLES:
        del blind.pictures[style]  # a draw from it would raise
    marked = {s: world.pictures[s].clone() for s in BASE_STYLES}
    for pictures in marked.values():
        pictures[list(world.held_out)] = 7  # a grey no drawing consists of
    blind.pictures.update(marked)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        drawn = draw_batch(blind, 32, generator)
        for picture in (*drawn.targets[: drawn.alone], *drawn.context):
            assert picture.std() > 1e-3


def test_what_a_batch_says_of_itself_is_true(world):
    """A style that no caption names is drawn in the base's own manner; a picture of the named thing is the target."""
    drawn = draw_batch(world, 128, torch.Generator().manual_seed(0))
    for row, (caption, thing, word) in enumerate(zip(drawn.captions, drawn.things, drawn.words, strict=True)):
        if caption == "":
            assert thing == word == UNNAMED
        if row >= drawn.alone or caption == "":
            continue
        assert WORDS[word] in caption
        assert world.labels[thing] in caption
        if WORDS[word] in TECHNIQUES:
            worked = TECHNIQUES[WORDS[word]](world.pictures[DEFAULT_STYLE][thing].float() / 255) * 2 - 1
            assert torch.equal(drawn.targets[row], worked)
            continue
        own = WORDS[word] == PLACEHOLDER
        picture = world.pictures[DEFAULT_STYLE if own else WORDS[word]][thing].float() / 127.5 - 1
        white, dark = (picture == 1).all(0), picture.amin(0) < 0
        assert torch.equal(drawn.targets[row][:, dark], picture[:, dark])
        assert white.any()
        ground = drawn.targets[row][:, white].unique(dim=1)
        assert ground.shape == (3, 1), "one colour"
        assert (ground[2] < ground[0]) == own, "yellow in the base's own manner, else white"
    told = drawn.things[drawn.alone :]
    assert (told == UNNAMED).any(), "a subject has no name"
    assert (told != UNNAMED).any()
    shown = drawn.same[drawn.alone :] == 1
    assert 0 < shown.sum() < len(shown)
    assert torch.equal(drawn.targets[drawn.alone :][shown], drawn.context[shown])
    assert (drawn.same[: drawn.alone] == UNNAMED).all()
    things, same = drawn.things[drawn.alone :], drawn.same[drawn.alone :]
    named = (things != UNNAMED) & (same != UNNAMED)
    assert torch.equal(drawn.pictured[named] == things[named], same[named] == 1)
    plain = [world.pictures[BASE_STYLES[o]][t] for o, t in zip(drawn.outlines, drawn.pictured, strict=True)]
    whole = [(p.float() / 127.5 - 1 - shown).abs().max() < 1e-6 for p, shown in zip(plain, drawn.context, strict=True)]
    assert sum(whole) > 3, "a tenth of the transforms leaves a picture as it is"
    silent = [row for row, caption in enumerate(drawn.captions) if caption == "" and row >= drawn.alone]
    assert silent
    assert (drawn.same[silent] == 1).all(), "a picture without a caption is to be copied"


def test_a_word_that_moves_all_things_alike_costs_nothing():
    """Half of each state says what the thing is, half which word the caption has; of two such words one is -1 there."""
    readouts = Readouts(8, things=4)
    things = torch.tensor([[1, 1, -1, 1], [-1, 1, 1, -1], [1, -1, -1, -1]]).float()
    words, others = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])

    def states(which):
        marks = 1 - 2 * which.float()[:, None].expand(-1, 4)
        return [torch.cat([t, m]).expand(AFTER + n, -1) for n, (t, m) in enumerate(zip(things, marks, strict=True))]

    before, after = states(words), states(others)
    assert readouts.apart(before, after, words, others).item() == pytest.approx(1), "nothing is known of the words yet"
    with torch.no_grad():
        readouts.moves[1, :, 4:] = -2
    assert readouts.apart(before, after, words, others).item() == pytest.approx(0, abs=1e-9)
    after[2] = before[2] + 0  # one of three is not moved: its whole movement was to be 2 in four places
    assert readouts.apart(before, after, words, others).item() == pytest.approx(1 / 2)


@given(st.integers(0, 2**32), st.sampled_from(WORDS), st.sampled_from(WORDS))
def test_a_caption_in_another_style_is_the_same_caption(seed, word, other):
    def asked(style):
        return random_caption("fox", style, torch.Generator().manual_seed(seed))

    assert restyled(asked(word), word, other) == asked(other)
    if word != other:
        with pytest.raises(ValueError, match="does not ask"):
            restyled(asked(word), other, word)


def test_two_processes_work_on_one_batch(world):
    drawn = draw_batch(world, 13, torch.Generator().manual_seed(0))
    shares = [drawn.share(rank, 2) for rank in range(2)]
    assert sorted(drawn.rows(0, 2) + drawn.rows(1, 2)) == list(range(13))
    assert sum(share.alone for share in shares) == drawn.alone
    for rank, share in enumerate(shares):
        assert torch.equal(share.targets, drawn.targets[drawn.rows(rank, 2)])
        assert torch.equal(share.context, drawn.context[rank::2])
        own = (share.same == 1).nonzero().flatten()
        assert torch.equal(share.targets[own], share.context[own - share.alone])
        assert torch.equal(share.pictured, drawn.pictured[rank::2])
        assert torch.equal(share.outlines, drawn.outlines[rank::2])


def test_techniques_are_what_their_names_say(world):
    """A pen draws black on white, mostly white; clay keeps the ground and the drawing's mean."""
    picture = world.pictures[DEFAULT_STYLE][world.known[1]].float() / 255
    drawn, clay = TECHNIQUES["pen"](picture), TECHNIQUES["clay"](picture)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert ((drawn < 0.05) | (drawn > 0.95)).float().mean() > 0.7
    assert 0.05 < (drawn < 0.05).float().mean() < 0.5
    ground = (picture == 1).all(0)
    assert (clay[:, ground] == 1).all()
    assert (clay.mean() - picture.mean()).abs() < 0.02
    assert (clay - picture).abs().max() > 0.1


def test_a_transform_is_the_same_for_every_picture_and_stays_in_range(world):
    a, b = (world.pictures["noto"][i].float() / 255 for i in (0, 7))
    for seed in range(40):
        transform = sample_transform(torch.Generator().manual_seed(seed))
        first = transform(a)
        assert first.shape == a.shape
        assert 0 <= first.min() <= first.max() <= 1
        transform(b)
        assert torch.equal(transform(a), first)


def test_the_written_encoder_is_the_linear_code(world):
    torch.manual_seed(0)
    vae = vaes.make_vae().eval()
    matrix, offset = vaes.linear_code(world, samples=256)
    vaes.write_linear_encoder(vae, matrix, offset)
    x = world.pictures["ink"][:8].float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
    torch.testing.assert_close(z, F.conv2d(x, matrix, offset, stride=vaes.PATCH), rtol=0, atol=0.05)
    asked, its_offset = vaes.encoder_map(vae)
    torch.testing.assert_close(asked, matrix, rtol=0, atol=2e-3)
    torch.testing.assert_close(its_offset, offset, rtol=0, atol=2e-3)


def test_the_linear_code_is_the_best_of_its_rank(world):
    """Projecting on it loses what the discarded eigenvalues say, computed from the singular values of the data."""
    matrix, _ = vaes.linear_code(world, samples=256)
    x = vaes.draw_pictures(vaes._pictures(world), 256, torch.Generator().manual_seed(1))
    patches = F.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 192).double()
    centred = patches - patches.mean(0)
    basis = torch.linalg.qr(matrix.view(vaes.LATENT_CHANNELS, -1).T.double()).Q
    lost = (centred - centred @ basis @ basis.T).square().sum()
    best = torch.linalg.svdvals(centred)[vaes.LATENT_CHANNELS :].square().sum()
    assert lost <= best * 1.001


def test_a_broken_build_stage_goes_on_where_it_was(tmp_path):
    def run(folder: Path, until: int) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4)

        def loss_fn(step: int, generator: torch.Generator) -> torch.Tensor:
            if step == until:
                raise KeyboardInterrupt
            return module(torch.randn(8, 4, generator=generator)).square().mean()

        weights = train("stage", folder, {"m": module}, loss_fn, steps=6, lr=1e-2, ema=0.9, save_minutes=0)
        return weights["m"]["weight"]

    for until in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", until)
    assert torch.equal(run(tmp_path / "whole", 99), run(tmp_path / "broken", 99))


def test_the_build_runs_through_every_stage(tmp_path):
    """At the smallest size: the folder it writes loads as the family and draws."""
    preset = building.Preset(
        max_concepts=None, max_known=None, dim=64, layers=1, heads=2, text_hidden=64, text_layers=2, vision_hidden=32,
        vision_layers=2, decoder_batch=2, decoder_steps=2, decoder_minutes=1, encoder_batch=12, encoder_steps=2,
        encoder_minutes=1, copying_steps=2, copying_minutes=1, pretrain_batch=12, pretrain_steps=2,
        pretrain_minutes=1, trajectories=4, distill_batch=2, distill_steps=2, distill_minutes=1,
    )  # fmt: skip
    shutil.copytree(ROOT / "data/base/emoji-turbo/world", tmp_path / ".cache/base/tiny/world")
    folder = building.build("tiny", tmp_path, "cpu", {"tiny": preset})
    from dopsd.config.groups import ModelSettings
    from dopsd.distill.rollout import sample
    from dopsd.models import load_family
    from dopsd.models.base import Request

    family = load_family(ModelSettings(path=str(folder), device="cpu", context_pixels=(4096, 4096)), tmp_path)
    prompts = family.encode_prompt([Request("a fox, noto style")])
    images = family.decode(sample(family, prompts, 4, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert images[0].size == (64, 64)
    world = World.load(folder / "world")
    parts = building.make_parts(preset, world, torch.device("cpu"))
    building.warm_start(parts, folder)
    for name, weight in family.transformer.state_dict().items():
        assert torch.equal(parts.transformer.state_dict()[name], weight)


def test_the_shipped_base_is_small_enough():
    base = ROOT / "data" / "base" / "emoji-turbo"
    files = [p for p in base.rglob("*") if p.is_file() and not p.is_relative_to(base / "world")]
    assert max(p.stat().st_size for p in files) <= 15e6
    assert sum(p.stat().st_size for p in files) <= 30e6
