"""``dopsd gain``: the numbers are those of a direct computation, and what is said of them follows from them."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from dopsd import cli, gain_report
from dopsd.config import Settings, load_settings
from dopsd.data.cache import EncodingCache
from dopsd.data.manifest import DataError
from dopsd.data.schema import validate_dataset
from dopsd.gain_report import GainReport, Measured, as_json, beyond_chance, gain_table, report_gain, verdict, ways_of
from dopsd.models import load_family
from dopsd.models.base import ENCODERS
from dopsd.train.encode import encode_concept
from dopsd.train.gain import choose, compare, teacher_gain
from tests import tiny
from tests.family_folders import settings_of
from tests.tiny_project import blot, make_project

VISIONS = ("vlm", "encoder")


def settings(name: str, folders: dict[str, Path], **model: Any) -> Settings:
    values = {
        "concepts": ["blots"],
        "model": settings_of(name, folders, **model).model_dump(mode="json"),
        "data": {"resolution": 64},
        "train": tiny.tiny_settings(batch_size=3).model_dump(mode="json") | {"seed": 7},
    }
    return Settings.model_validate(values)


def write_concept(root: Path, *, long: bool = False, references: bool = False) -> Path:
    """Four pictures of two shapes, each with two captions, below ``root``; returns their folder."""
    folder, draw, lines = root / "data" / "concepts" / "blots", np.random.default_rng(0), []
    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text("rollout_steps: 3\n")
    for number in range(4):
        picture = blot(draw)
        picture = picture.resize((128, 64), Image.Resampling.BICUBIC) if number % 2 else picture
        picture.save(folder / f"{number}.png")
        captions = {"short": f"a blot of kind {number}, [V]", "medium": f"one more blot, {number}, in [V] style"}
        row: dict[str, Any] = {"image": f"{number}.png", "captions": captions}
        if long:
            row["captions"] = {
                "long": f"a blot {number} in [V] style with all that there is to be said of it"
            } | captions
        if references:
            blot(draw).resize((80, 96)).save(folder / f"before-{number}.png")
            row["references"] = [f"before-{number}.png"]
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def directly(one: Settings, folder: Path, count: int, seeds: int, drop: str | None, cache: Path) -> list[Any]:
    """What training would measure for these settings, for each of its noise seeds and those after it.

    ``drop``: a caption variant that this data set is taken not to have.
    """
    one = one.of("blots", folder.parents[2])
    table = validate_dataset(folder, "blots", one.data)[0]
    table = replace(table, rows=tuple(
        replace(row, captions=tuple(pair for pair in row.captions if pair[0] != drop)) for row in table.rows
    ))  # fmt: skip
    family = load_family(one.model)
    examples = choose(encode_concept(family, table, one, EncodingCache(cache)), count)
    seed = one.train.seed + 2
    return [teacher_gain(family, examples, 3, 3, seed + number) for number in range(seeds)]


def assert_equal_to(found: Measured, truth: list[Any]) -> None:
    assert len(found.of_seed) == len(truth)
    for ours, theirs in zip(found.of_seed, truth, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_both_positions_of_z_image_have_the_numbers_of_a_direct_computation(folders, tmp_path):
    one = settings("z-image", folders)
    folder = write_concept(tmp_path)
    report, path = report_gain("blots", one, tmp_path, images=6, seeds=2)
    assert [(m.way.context, m.way.positions, m.way.current) for m in report.measured] == [
        ("vlm", "vlm", True),
        ("vlm", "encoder", False),
    ]
    for found in report.measured:
        changed = settings("z-image", folders, vlm_positions=found.way.positions)
        truth = directly(changed, folder, 6, 2, None, tmp_path / str(found.way.positions))
        assert_equal_to(found, truth)
        assert found.mean["gain"] == pytest.approx(np.mean([t["gain"] for t in truth]), rel=1e-4)
        assert found.spread == pytest.approx(np.std([t["gain"] for t in truth], ddof=1), rel=1e-3)
    vlm, encoder = report.measured
    assert vlm.gains != encoder.gains, "the published pair has two thetas"
    assert vlm.mean["student"] == encoder.mean["student"], "there is one student"
    assert report.seeds == (9, 10)
    assert report.pictures == (0, 1, 2, 3, 0, 1)

    wrote = json.loads(path.read_text())
    assert path == tmp_path / "runs" / "blots" / "gain.json"
    assert [way["gain_of_seed"] for way in wrote["ways"]] == [vlm.gains, encoder.gains]
    assert [(way["positions"], way["current"], way["images"]) for way in wrote["ways"]] == [
        ("vlm", True, 6),
        ("encoder", False, 6),
    ]
    assert wrote["ways"][1]["gain_spread"] == encoder.spread
    assert wrote["verdict"] == verdict(report)
    assert wrote["steps"] == 3, "the concept's own settings hold"
    assert (wrote["pictures"], wrote["seeds"]) == (4, [9, 10])
    (left_out,) = wrote["left_out"]
    assert left_out["context"] == "enhanced-prompt"
    assert "row 1, captions: there is no 'long'" in left_out["why"]
    assert not list(tmp_path.rglob("*.partial"))


def test_klein_is_compared_in_what_the_data_is_fit_for(folders, tmp_path):
    """Rows with references and a long caption: two contexts with one student, who reads the long caption in neither."""
    one = settings("flux2-klein", folders, context="edit-reference", context_suffix=" As in the last picture.")
    folder = write_concept(tmp_path, long=True, references=True)
    report, _ = report_gain("blots", one, tmp_path, images=5, seeds=1)
    by_name = {found.way.name: found for found in report.measured}
    assert list(by_name) == ["edit-reference", "enhanced-prompt"]
    assert [way.name for way, _ in report.left_out] == ["edit"]
    assert "row 1, references: this context shows the student none" in report.left_out[0][1]
    cache = tmp_path / "direct"
    assert_equal_to(by_name["edit-reference"], directly(one, folder, 5, 1, "long", cache))
    enhanced = settings("flux2-klein", folders, context="enhanced-prompt")
    assert_equal_to(by_name["enhanced-prompt"], directly(enhanced, folder, 5, 1, None, cache))
    assert by_name["enhanced-prompt"].spread is None


def test_klein_without_references_edits_towards_the_picture_alone(folders, tmp_path):
    one = settings("flux2-klein", folders)
    folder = write_concept(tmp_path)
    report, _ = report_gain("blots", one, tmp_path, seeds=1)
    (edit,) = report.measured
    assert edit.way.current
    assert edit.way.positions is None
    assert edit.mean["images"] == 8, "train.teacher.gain_images is more than there are"
    assert_equal_to(edit, directly(one, folder, 16, 1, None, tmp_path / "direct"))
    assert {way.name for way, _ in report.left_out} == {"edit-reference", "enhanced-prompt"}


def test_encoders_are_gone_while_it_draws_and_only_one_transformer_is_loaded(folders, tmp_path, monkeypatch):
    bases, held = [], []
    load, draw = gain_report.load_base, gain_report.distances

    def load_and_keep(*arguments):
        bases.append(load(*arguments))
        return bases[-1]

    def draw_and_look(family, *arguments):
        held.append(set().union(*(base.parts.loaded() for base in bases)))
        return draw(family, *arguments)

    monkeypatch.setattr(gain_report, "load_base", load_and_keep)
    monkeypatch.setattr(gain_report, "distances", draw_and_look)
    write_concept(tmp_path, long=True)
    one = settings("z-image", folders)
    report, _ = report_gain("blots", one, tmp_path, images=2, seeds=2)
    assert len(bases) == len(VISIONS), "reading alone needs no base of its own"
    assert len(held) == 2 * (1 + len(report.measured)) == 8
    assert not any(parts & {*ENCODERS, "vae_decoder"} for parts in held)
    assert [("transformer" in base.parts.loaded()) for base in bases] == [False, True]
    # all encodings are the ordinary cache's now: nothing is encoded again, here or by the stage
    bases.clear()
    again, _ = report_gain("blots", one, tmp_path, images=2, seeds=2)
    assert [m.gains for m in again.measured] == [m.gains for m in report.measured]
    assert not any({*ENCODERS, "tokenizer"} & base.parts.loaded() for base in bases)


def test_equal_contexts_are_drawn_once(tmp_path, monkeypatch):
    """The embedded base's VLM has the text encoder's theta: there is nothing to choose, and no time is spent on it."""
    project = make_project(tmp_path)
    calls, draw = [], gain_report.distances
    monkeypatch.setattr(gain_report, "distances", lambda *a: calls.append(1) or draw(*a))
    report, _ = report_gain("blots", load_settings(project / "params.yaml"), project, images=2, seeds=1)
    vlm, encoder = report.measured
    assert vlm.gains == encoder.gains
    assert len(calls) == 2
    assert not verdict(report).startswith("Take")


# --- the ways ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("z-image", ["vlm with positions of the vlm", "vlm with positions of the encoder", "enhanced-prompt"]),
        ("flux2-klein", ["edit", "edit-reference", "enhanced-prompt"]),
        ("krea-2", ["vlm", "enhanced-prompt"]),
    ],
)
def test_every_familys_ways(folders, family, names):
    ways = ways_of(settings(family, folders))
    assert [way.name for way in ways] == names
    assert [way.current for way in ways] == [True] + [False] * (len(names) - 1)
    (current,) = [way for way in ways_of(settings(family, folders, context="enhanced-prompt")) if way.current]
    assert current.context == "enhanced-prompt"


def test_a_suffix_of_ones_own_stays_with_the_context_it_was_written_for(folders):
    ways = ways_of(settings("flux2-klein", folders, context="edit", context_suffix=" Alike."))
    assert [way.settings.model.context_suffix for way in ways] == [" Alike.", None, None]


def test_a_way_that_the_base_lacks_the_eyes_for_is_left_out(folders, tmp_path):
    write_concept(tmp_path, long=True)
    one = settings("z-image", folders, vlm=None, context="enhanced-prompt")
    report, _ = report_gain("blots", one, tmp_path, images=1, seeds=1)
    assert [m.way.name for m in report.measured] == ["enhanced-prompt"]
    assert len(report.left_out) == 2
    assert all(why.startswith("model.vlm: the teacher needs a Qwen3-VL") for _, why in report.left_out)


def test_a_context_too_long_for_the_model_is_left_out_unless_it_is_the_one_that_is_set(folders, tmp_path):
    folder = write_concept(tmp_path, long=True)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[1]["captions"]["short"] = "[V]" + " fox" * 480
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reads = settings("flux2-klein", folders, context="enhanced-prompt")
    report, _ = report_gain("blots", reads, tmp_path, images=2, seeds=1)
    assert [m.way.context for m in report.measured] == ["enhanced-prompt"]
    why = {way.context: why for way, why in report.left_out}["edit"]
    assert "tokens long, at most 512 are read: shorten the caption or model.context_suffix" in why
    with pytest.raises(DataError, match=r"row 2, captions: 'short': .* as the teacher reads it with model.context_suf"):
        report_gain("blots", settings("flux2-klein", folders, context="edit"), tmp_path, images=2, seeds=1)


# --- what is said -----------------------------------------------------------------------------------------------------

STUDENT = torch.tensor([[1.0, 1.2, 1.1, 0.9, 1.0, 1.05], [1.1, 1.1, 1.0, 1.0, 0.9, 1.0]])
ALMOST = torch.tensor([[0.01, -0.01, 0.005, 0.0, -0.008, 0.002], [-0.01, 0.01, 0.0, 0.004, 0.002, -0.002]])


def reported(
    folders: dict[str, Path], *shares: torch.Tensor | float, pictures=(0, 1, 2, 3, 4, 5), **model
) -> GainReport:
    """Ways of Z-Image whose teachers are at these shares of the student's distance, the first as it is set."""
    measured = []
    for way, share in zip(ways_of(settings("z-image", folders, **model)), shares, strict=False):
        near = share * STUDENT
        of_seed = tuple(compare(far, one) for far, one in zip(STUDENT, near, strict=True))
        measured.append(Measured(way, of_seed, near))
    return GainReport("blots", 4, (2, 3), pictures, STUDENT, tuple(measured), ())


def test_the_clearly_better_way_is_to_be_taken_with_the_setting_that_makes_it(folders):
    assert verdict(reported(folders, 0.8, 0.6)) == (
        "Take vlm with positions of the encoder: it gains clearly more. In params.yaml: model.vlm_positions: encoder."
    )
    assert verdict(reported(folders, 0.8, 0.9, 0.5)) == (
        "Take enhanced-prompt: it gains clearly more. In params.yaml: model.context: enhanced-prompt."
    )
    suffixed = verdict(reported(folders, 0.8, 0.9, 0.5, context_suffix=" So."))
    assert suffixed.endswith("model.context: enhanced-prompt, model.context_suffix: null.")
    said = verdict(reported(folders, 1.2, 0.7, 0.9))
    assert said.startswith("Take vlm with positions of the encoder: it gains, and what is set does not.")


def test_what_is_set_is_kept_where_nothing_is_clearly_better(folders):
    assert verdict(reported(folders, 0.6, 0.8)) == (
        "Keep vlm with positions of the vlm: it gains clearly more than the others."
    )
    said = "Keep vlm with positions of the vlm: nothing gains clearly more on 6 pictures."
    assert verdict(reported(folders, 0.6, 0.6 + ALMOST)) == said
    assert verdict(reported(folders, 0.6 + ALMOST, 0.6)) == said
    assert verdict(reported(folders, 0.6)) == (
        "vlm with positions of the vlm gains: there is something to learn from this teacher."
    )


def test_a_gain_within_chance_is_said_to_be_one(folders):
    chance = " That it gains may be chance, on 6 pictures: more of them, or more --seeds, would tell."
    little = 1 - torch.tensor([0.05, 0.04, -0.05, 0.03, -0.02, 0.01])
    assert verdict(reported(folders, little)).endswith(chance)
    assert verdict(reported(folders, 1.2, little)).endswith(chance)
    written = json.loads(json.dumps(as_json(reported(folders, little, 0.5))))
    assert [way["beyond_chance"] for way in written["ways"]] == [False, True]
    assert "chance, on 1 picture:" in verdict(reported(folders, 0.5, pictures=(0,) * 6))


def test_where_none_gains_that_is_said(folders):
    for shares in ((1.1, 1.3), (1.0, 1.0), (1.0,)):
        assert verdict(reported(folders, *shares)).startswith("No way gains: ")


def test_captions_of_one_picture_do_not_count_as_pictures():
    """Six captions of two pictures, which disagree: by examples the mean would be beyond chance."""
    near = STUDENT - torch.tensor([0.30, 0.31, 0.29, 0.12, 0.13, 0.11])
    assert beyond_chance(near, STUDENT, (0, 1, 2, 3, 4, 5))
    assert not beyond_chance(near, STUDENT, (0, 0, 0, 1, 1, 1))
    assert not beyond_chance(STUDENT, near, (0, 1, 2, 3, 4, 5))
    one_seed_against = torch.stack([STUDENT[0] - 0.5, STUDENT[1] + 0.01])
    assert not beyond_chance(one_seed_against, STUDENT, (0, 1, 2, 3, 4, 5))


def test_the_table_is_readable_at_80_columns_and_marks_what_is_set(folders):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(gain_table(reported(folders, 0.695 + ALMOST, -9.5, 1.2, vlm_positions="encoder")))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.startswith("│")]
    assert [row.split() for row in rows] == [
        ["│", "│", "vlm", "│", "vlm", "│", *rows[0].split("│")[4].split(), "│", "100%", "│", "6", "│"],
        ["│", "→", "│", "vlm", "│", "encoder", "│", "1050.0", "±", "0.0", "%", "│", "100%", "│", "6", "│"],
        ["│", "│", "enhanced-prompt", "│", "–", "│", "-20.0", "±", "0.0", "%", "│", "0%", "│", "6", "│"],
    ]
    assert rows[0].split("│")[4].strip().startswith("30.")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def inside(folders, tmp_path, monkeypatch) -> Path:
    write_concept(tmp_path)
    values = settings("z-image", folders).model_dump(mode="json")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_shows_the_table_and_what_to_do(inside):
    arguments = ["gain", "--concept", "blots", "--images", "3", "--seeds", "2"]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    said = result.stdout
    wrote = json.loads((inside / "runs/blots/gain.json").read_text())
    assert max(len(line) for line in said.splitlines()) <= 80
    assert said.count("│") == 7 * 2
    for way in wrote["ways"]:
        assert f"{100 * way['gain']:.1f} ± {100 * way['gain_spread']:.1f} %" in said
        assert way["images"] == 3
    assert wrote["verdict"] in " ".join(said.split())
    assert "left out, enhanced-prompt: metadata.jsonl, row 1" in said
    assert said.rstrip().endswith("gain: runs/blots/gain.json")
    assert sorted(path.name for path in inside.iterdir()) == [".cache", "data", "params.yaml", "runs"]
    assert [path.name for path in (inside / "runs/blots").iterdir()] == ["gain.json"], "nothing was trained"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concept", "nope"], "data/concepts/nope: concept 'nope': no such folder; check the path"),
        (["--concept", "blots", "--set", "model.context=edit"],
         "model.context: z-image cannot be taught by edit; it can by vlm, enhanced-prompt"),
        (["--concept", "blots", "--set", "model.family=nope"], "model.family: 'nope' is unknown"),
        (["--concept", "blots", "--set", "model.vlm=nowhere"], "model.vlm"),
        (["--concept", "blots", "--params", "none.yaml"], "none.yaml: no such file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(inside, arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dopsd", "gain", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not (inside / "runs").exists()


def test_data_that_is_not_fit_for_what_is_set_is_an_error_with_every_fault(inside, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dopsd", "gain", "-c", "blots", "--set", "model.context=enhanced-prompt"])
    with pytest.raises(SystemExit):
        cli.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4
    assert all("there is no 'long'" in line for line in lines)
