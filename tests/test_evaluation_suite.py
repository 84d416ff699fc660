"""The evaluation from end to end, on the real classes at a tiny size and the real world's pictures."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dopsd.config import SettingsError, load_settings
from dopsd.config.groups import RegistrySettings, ReplaySettings
from dopsd.data.cache import EncodingCache
from dopsd.data.schema import validate_dataset
from dopsd.evaluation import prompts
from dopsd.evaluation.metrics import laplacian_energy
from dopsd.evaluation.paired import PAIRED, read_paired
from dopsd.evaluation.report import write_report
from dopsd.evaluation.suite import EvaluationError, Subject, evaluate, subjects_in
from dopsd.evaluation.table import headline_tables, table_as_text
from dopsd.evaluation.verdict import verdict
from dopsd.evaluation.world import world_picture
from emoji_turbo.captions import concept_caption
from emoji_turbo.pictures import World
from tests.tiny import tiny_family
from tests.tiny_evaluation import WORLD, small_world, tiny_run_settings, write_adapter, write_concept


@pytest.fixture(scope="module")
def world() -> World:
    return small_world()


@pytest.fixture(scope="module")
def run(tmp_path_factory, world):
    """One evaluation: base, teacher, an adapter that changes much and one that changes nothing."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluation")
    table, holdout = write_concept(root / "concept", world, {"kind": "style", "style": "ink"})
    subjects = [
        Subject("base", None), Subject("teacher", None),
        Subject("d-opsd", write_adapter(root / "d-opsd.safetensors", 0.5)),
        Subject("sft", write_adapter(root / "sft.safetensors", 0.0)),
    ]  # fmt: skip
    family = tiny_family()
    cache = EncodingCache(root / "cache")

    def again(folder: str, **changes):
        return evaluate(
            tiny_family(), table, holdout, world, subjects, tiny_run_settings(**changes), cache, root / folder
        )

    metrics = evaluate(family, table, holdout, world, subjects, tiny_run_settings(), cache, root / "evaluation")
    return root, metrics, again, family


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_written(run):
    root, metrics, _, family = run
    folder = root / "evaluation"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {p.name for p in (folder / "grids").iterdir()} == {"few_step.png", "steps.png", "kept.png", "known.png"}
    assert not folder.with_name("evaluation.partial").exists()
    assert metrics["counts"] == {
        "training_pictures": 4, "concept_prompts": 10, "curve_prompts": 4, "kept_prompts": 6, "near_prompts": 4,
        "known_prompts": 6, "rehearsed_prompts": 0, "candidates": 34,
    }  # fmt: skip
    assert metrics["omitted"].keys() <= {"gap_closed_style", "gap_closed_truth", "learnt"}
    assert not getattr(family.transformer, "peft_config", None)
    assert not {"text_encoder", "vision"} & family.parts.loaded()


def test_the_curves_hold_every_model_at_every_number_of_steps_on_the_same_prompts(run):
    rows = rows_of(run[0] / "evaluation" / "few_step.csv")
    found = {(row["model"], int(row["steps"])) for row in rows if row["metric"] == "style"}
    assert found == {(model, steps) for model in ("base", "teacher", "d-opsd", "sft") for steps in (1, 2)}
    assert {row["prompts"] for row in rows} == {"4"}
    for row in rows:
        assert not row["low"], "four prompts are too few for an interval"
    for row in rows_of(run[0] / "evaluation" / "scores.csv"):
        if row["low"] and row["metric"] != "kid":
            assert float(row["low"]) - 1e-6 <= float(row["value"]) <= float(row["high"]) + 1e-6


def test_an_adapter_that_changes_nothing_has_the_bases_scores_exactly(run):
    """Same prompts, same noise, nothing left behind by the adapter before it."""
    root, metrics, _, _ = run
    rows = rows_of(root / "evaluation" / "scores.csv")
    scores = {(r["model"], r["steps"], r["split"], r["metric"]): r["value"] for r in rows}
    compared = [key for key in scores if key[0] == "sft"]
    assert len(compared) > 20
    assert all(scores[key] == scores["base", *key[1:]] for key in compared)
    head = metrics["headline"]["sft"]
    same = {key: value for key, value in head.items() if key.startswith(("known_", "kept", "sharpness_vs_base"))}
    assert {"kept", "kept_many", "kept_near", "kept_sharpness", "known_lowest"} <= same.keys()
    assert all(value == pytest.approx(1, abs=1e-6) for value in same.values())
    nothing = {key: head[key] for key in ("likeness_gain", "few_step_old", "copied")}
    assert nothing == pytest.approx(dict.fromkeys(nothing, 0), abs=1e-6)
    assert head["diversity"] == pytest.approx(1)
    paired = read_paired(root / "evaluation" / PAIRED)
    assert paired.models["sft"] == paired.models["base"]
    assert paired.models["d-opsd"] != paired.models["base"]
    changed = [key for key in scores if key[0] == "d-opsd" and scores[key] != scores["base", *key[1:]]]
    assert len(changed) > 20


def test_the_real_pictures_are_the_ceiling(run):
    real = run[1]["scores"]["concept"]["real"]
    assert real["cosine"] == pytest.approx(1, abs=1e-5)
    assert real["sharpness"] == pytest.approx(1, abs=1e-5)
    assert real["mse"] == 0
    assert real["structure"] == pytest.approx(1, abs=1e-4)
    assert real["concept_top1"] == 1
    assert real["style"] > 0.8
    assert abs(real["kid"]) < run[1]["scores"]["concept"]["base"]["kid"]


def test_the_true_pictures_through_the_autoencoder_stand_beside_them(run, world):
    """What no model in these latents can go beyond, computed here picture by picture."""
    root, metrics, _, _ = run
    asked = json.loads((root / "evaluation/samples/index.json").read_text())["prompts"]["concept"]
    assert len(asked) == metrics["counts"]["concept_prompts"]
    family, errors, energies = tiny_family(), [], []
    for text in asked:
        true = world_picture(world, "ink", next(i for i, x in enumerate(world.labels) if concept_caption(x) == text))
        (decoded,) = family.decode(family.encode_images([true]))
        pair = [np.asarray(picture, dtype=np.float64) / 255 for picture in (decoded, true)]
        errors.append(float(((pair[0] - pair[1]) ** 2).mean()))
        energies.append([float(laplacian_energy(torch.from_numpy(p).permute(2, 0, 1)[None])) for p in pair])
    decoded = metrics["scores"]["concept"]["decoded"]
    assert decoded["mse"] == pytest.approx(np.mean(errors), rel=1e-3)
    share = np.mean([mine for mine, _ in energies]) / np.mean([real for _, real in energies])
    assert decoded["sharpness"] == pytest.approx(share, rel=1e-3)
    tuned = metrics["scores"]["concept"]["d-opsd"]["sharpness"]
    assert metrics["headline"]["d-opsd"]["sharpness_vs_decoded"] == pytest.approx(tuned / share, rel=1e-3)


def test_a_second_run_gives_the_same_file(run):
    root, metrics, again, _ = run
    assert again("second") == metrics
    for name in ("scores.csv", "few_step.csv", "metrics.json"):
        assert (root / "second" / name).read_bytes() == (root / "evaluation" / name).read_bytes()


def test_a_prompts_noise_does_not_depend_on_its_batch(run):
    other = run[2]("batches", batch_size=3)["scores"]["concept"]["d-opsd"]
    for key, value in run[1]["scores"]["concept"]["d-opsd"].items():
        assert other[key] == pytest.approx(value, abs=0.02), key


def test_without_world_and_holdout_what_needs_truth_is_left_out_and_said(tmp_path, world):
    table, holdout = write_concept(tmp_path / "concept", world, None, holdout=False)
    changes = {"prompts": ["a fox in [V] style", "a red boat in [V] style"]}
    subjects = [Subject("base", None), Subject("teacher", None), Subject("sft", write_adapter(tmp_path / "a", 0.5))]
    metrics = evaluate(
        tiny_family(), table, holdout, None, subjects, tiny_run_settings(**changes), EncodingCache(tmp_path / "cache"),
        tmp_path / "out",
    )  # fmt: skip
    assert metrics["scores"].keys() == {"concept", "kept", "near"}
    assert metrics["scores"]["concept"]["sft"].keys() == {"sharpness", "likeness", "copy"}
    assert {"style", "cosine", "concept_top1", "known_lowest", "kid", "mse"} <= metrics["omitted"].keys()
    assert metrics["style_score"] == "likeness"
    assert metrics["counts"]["concept_prompts"] == 2
    page = write_report(tmp_path / "out", tmp_path / "none", {}, tmp_path / "report.html").read_text()
    assert "there are no held-out pictures" in page
    assert "What was lost" in page, "no truth is needed for that"
    assert "true pictures of old styles" not in page


def test_captions_that_were_trained_on_are_not_called_unseen(run, tmp_path, world):
    table, holdout = write_concept(tmp_path / "concept", world, None, holdout=False)
    settings = tiny_run_settings(steps=[1], few_steps=1, many_steps=1, max_prompts=1)
    metrics = evaluate(
        tiny_family(), table, holdout, None, [Subject("base", None)], settings, EncodingCache(tmp_path / "cache"),
        tmp_path / "out",
    )  # fmt: skip
    page = write_report(tmp_path / "out", tmp_path / "none", {}, tmp_path / "report.html").read_text()
    for said in (page, headline_tables(metrics)[0].title):
        assert "1 caption of the training pictures" in said
        assert "not trained on" not in said
    assert "prompts that were not trained on" in headline_tables(run[1])[0].title, "it has a holdout"


def test_a_concept_that_says_what_it_is_wrongly_is_a_clear_error(tmp_path, world):
    table, _ = write_concept(tmp_path / "concept", world, None, holdout=False)
    for text, message in (
        ('{"kind": "mood"}', '"kind" must be "style" or "subject", found \'mood\''),
        ('{"kind": "style", "style": "crayon"}', "unknown \"style\" 'crayon'; the world has noto"),
        ("{", "not readable as JSON"), ("[]", '"kind" must be'),
    ):  # fmt: skip
        (table.root / "concept.json").write_text(text)
        with pytest.raises(EvaluationError, match=re.escape(message)):
            prompts.read_kind(table, world)


def test_the_base_must_be_there_once(tmp_path, world):
    table, _ = write_concept(tmp_path / "concept", world, None, holdout=False)
    with pytest.raises(EvaluationError, match="expected the subject base once"):
        evaluate(
            tiny_family(), table, None, None, [Subject("sft", None)], tiny_run_settings(),
            EncodingCache(tmp_path / "cache"), tmp_path / "out",
        )  # fmt: skip


def test_prompts_know_their_truth_and_their_concept(tmp_path, world):
    settings = tiny_run_settings(known_prompts=90)
    table, holdout = write_concept(tmp_path / "concept", world, {"kind": "style", "style": "ink"})
    kind = prompts.read_kind(table, world)
    asked = prompts.concept_prompts(table, holdout, world, kind, settings)
    assert len(asked) == 10
    assert len({p.concept for p in asked}) == 10
    for p in asked:
        assert p.text == concept_caption(world.labels[p.concept])
        assert p.true_picture().tobytes() == world_picture(world, "ink", p.concept).tobytes()
    kept = prompts.known_prompts(world, asked, settings)
    assert len(kept) == len({(p.concept, p.style) for p in kept}) == 90
    assert {p.concept for p in kept} <= set(world.known)
    assert not {p.number for p in kept} & {p.number for p in asked}
    shown = [ask.target.path for ask in prompts.teacher_requests(table, asked, settings, "vlm")]
    assert len(set(shown)) > 1
    assert shown == [ask.target.path for ask in prompts.teacher_requests(table, asked, settings, "vlm")]
    own = [replace(asked[0], text=table.rows[0].captions[0][1])] * 20
    assert all(ask.target.path != table.rows[0].image for ask in prompts.teacher_requests(table, own, settings, "vlm"))


def test_what_replay_learns_is_not_asked(tmp_path, world):
    settings = tiny_run_settings(known_prompts=90)
    table, holdout = write_concept(tmp_path / "concept", world, {"kind": "style", "style": "ink"})
    asked = prompts.concept_prompts(table, holdout, world, prompts.read_kind(table, world), settings)
    before = [p.text for p in prompts.known_prompts(world, asked, settings)]
    rehearsed = [before[0], before[40].replace(",", "").title(), "A red house."]
    near = [p.text for p in prompts.near_prompts(table, prompts.Kind("style"), settings)]
    for weight in (0.0, 1.0):  # without replay too: both are then asked the same
        replay = ReplaySettings(weight=weight, prompts=(*rehearsed, near[0]))
        train = settings.train.model_copy(update={"replay": replay})
        learning = settings.model_copy(update={"train": train})
        after = [p.text for p in prompts.known_prompts(world, asked, learning)]
        assert len(after) == len(set(after)) == 90
        assert set(before) - set(after) == {before[0], before[40]}
        general = settings.evaluation.kept_texts
        assert {p.text for p in prompts.kept_prompts(learning)} == set(general) - {"a red house"}
        assert prompts.rehearsed_of(learning) == 1
        assert [p.text for p in prompts.near_prompts(table, prompts.Kind("style"), learning)] == near[1:]


def test_what_the_gate_could_never_let_in_is_refused_before_training(tmp_path, world):
    table, holdout = write_concept(tmp_path / "concept", world, None)
    few, _ = write_concept(tmp_path / "few", world, None, holdout=False)
    general = tiny_run_settings().evaluation.kept_texts
    gate = {"registry": RegistrySettings()}

    def rehearsing(texts, **changes):
        settings = tiny_run_settings(**changes)
        train = settings.train.model_copy(update={"replay": ReplaySettings(prompts=texts)})
        return settings.model_copy(update=gate | {"train": train})

    prompts.check_questions(table, holdout, None, rehearsing(general[:4]))
    for texts, said in ((general, "no general prompts left"), (general[1:], "1 general prompt left")):
        with pytest.raises(EvaluationError, match=said):
            prompts.check_questions(table, holdout, None, rehearsing(texts))
    with pytest.raises(EvaluationError, match="1 general prompt left"):
        prompts.check_questions(table, holdout, None, rehearsing((), kept_count=1))
    gone = tiny_run_settings(kept_prompts="gone.txt")
    assert not gone.registry.enabled
    with pytest.raises(SettingsError, match=r"gone\.txt is no file"):
        prompts.check_questions(table, holdout, None, gone)
    with pytest.raises(EvaluationError, match="curve_prompts: of one prompt"):
        prompts.check_questions(table, holdout, None, rehearsing((), curve_prompts=1))
    prompts.check_questions(table, holdout, None, rehearsing((), curve_prompts=1, many_steps=1))
    for data, changes in (((table, holdout), {"max_prompts": 1}), ((few, None), {"prompts": ["a fox in [V] style"]})):
        with pytest.raises(EvaluationError, match="one prompt of the concept is too few"):
            prompts.check_questions(*data, None, rehearsing((), **changes))
        prompts.check_questions(*data, None, tiny_run_settings(**changes))  # without the gate it may


@pytest.mark.parametrize("concept", ["style-3d", "style-ink"])
def test_the_shipped_evaluation_asks_nothing_that_replay_would_learn(concept):
    """So that the numbers with and without replay are about the same prompts."""
    root = Path(__file__).parent.parent
    settings = load_settings(root / "params.yaml")
    table, holdout = validate_dataset(root / "data/concepts" / concept, concept, settings.data)
    whole = World.load(WORLD)
    asked = prompts.concept_prompts(table, holdout, whole, prompts.read_kind(table, whole), settings)
    kept = {p.text for p in prompts.known_prompts(whole, asked, settings)}
    assert len(kept) == settings.evaluation.known_prompts
    assert not kept & set(settings.train.replay.prompts)
    for name in ("general", "emoji-turbo"):
        change = f"evaluation.kept_prompts=data/prompts/{name}.txt"
        own = load_settings(root / "params.yaml", (change,)).of(concept, root)
        assert len(prompts.kept_prompts(own)) == 60
        assert prompts.rehearsed_of(own) == 0
        assert not {p.text for p in prompts.kept_prompts(own)} & {
            text for row in table.rows for _, text in row.captions
        }


# --- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({}, "D-OPSD learnt the new style. It stays good in 1 step and keeps what the base drew."),
        ({"learnt": (0.3, 0.2, 0.4)}, "D-OPSD learnt the new style in part. It stays good"),
        ({"learnt": (0.8, -0.1, 1.7)}, "Whether D-OPSD learnt the new style cannot be told. It stays good"),
        ({"learnt": (0.05, -0.1, 0.15)}, "D-OPSD hardly learnt the new style. It stays good"),
        ({"learnt": (0.03, 0.01, 0.05)}, "D-OPSD hardly learnt the new style. It stays good"),
        ({"learnt": None}, "Whether D-OPSD learnt the new style cannot be told. It stays good"),
        ({"few_step_old": (-0.4, -0.5, -0.3)}, "D-OPSD learnt the new style. It lost its 1 step, but keeps what"),
        ({"few_step_old": (-0.4, -0.9, 0.1)}, "D-OPSD learnt the new style. It keeps what the base drew."),
        ({"few_step_old": (-0.1, -0.13, -0.07)}, "D-OPSD learnt the new style. It needs a few more steps than"),
        ({"few_step_new": (-0.2, -0.45, 0.02), "few_step_sharpness": (0.95, 0.92, 0.98)},
         "D-OPSD learnt the new style. It keeps what the base drew."),
        ({"kept": (0.2, -0.4, 0.8)}, "D-OPSD learnt the new style. It stays good in 1 step."),
        ({"kept": (0.5, 0.3, 0.8)}, "D-OPSD learnt the new style. It stays good in 1 step, but changed much of"),
        ({"few_step_sharpness": (0.5, 0.4, 0.6)}, "D-OPSD learnt the new style. It lost its 1 step, but keeps"),
        ({"few_step_new": (-0.2, -0.3, -0.1), "kept": (0.1, 0.0, 0.2)},
         "D-OPSD learnt the new style. It lost its 1 step and lost most of what the base drew."),
        ({"few_step_old": (-0.01, -0.4, 0.4)}, "D-OPSD learnt the new style. It keeps what the base drew."),
        ({"kept": (0.7, 0.1, 0.9)}, "D-OPSD learnt the new style. It stays good in 1 step."),
        ({"kept": (0.4, 0.3, 0.5)}, "D-OPSD learnt the new style. It stays good in 1 step, but changed much of what"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_numbers(run, numbers, said):
    metrics = json.loads(json.dumps(run[1]))
    good = {"learnt": (0.9, 0.8, 1.0), "few_step_new": (0.0, -0.1, 0.1), "few_step_old": (0.01, 0.0, 0.02),
            "few_step_sharpness": (1.0, 0.9, 1.1), "kept": (0.9, 0.8, 1.0)}  # fmt: skip
    found = {key: value for key, value in (good | numbers).items() if value}
    metrics["headline"]["d-opsd"] = {key: value[0] for key, value in found.items()}
    metrics["intervals"]["headline"]["d-opsd"] = {key: list(value[1:]) for key, value in found.items()}
    assert verdict(metrics)[0].startswith(said)


def test_what_has_no_interval_is_not_told(run):
    """Of fewer than six prompts there is none: a bootstrap of one prompt has no width at all."""
    metrics = json.loads(json.dumps(run[1]))
    found = {"learnt": 0.9, "few_step_new": -0.5, "few_step_old": 0.0, "kept": 0.9, "kept_near": -1.0, "diversity": 0.4}
    metrics["headline"]["d-opsd"], metrics["intervals"]["headline"]["d-opsd"] = found, {"learnt": [0.8, 1.0]}
    assert verdict(metrics)[0] == "D-OPSD learnt the new style."
    assert not [text for text in verdict(metrics)[1] if "leaked" in text or "less diverse" in text]


def test_where_few_steps_blur_the_page_says_so(run):
    metrics = json.loads(json.dumps(run[1]))
    found = {"learnt": [0.9, 0.8, 1.0], "few_step_new": [0.03, 0.02, 0.04], "few_step_sharpness": [0.5, 0.4, 0.6]}
    metrics["headline"]["d-opsd"] = {key: value[0] for key, value in found.items()}
    metrics["intervals"]["headline"]["d-opsd"] = {key: value[1:] for key, value in found.items()}
    head, sentences = verdict(metrics)
    assert "lost its 1 step" in head
    assert any("0.50 times the sharpness of many" in text for text in sentences)
    assert not any("loses most" in text for text in sentences)


@pytest.mark.parametrize("name", ["d-opsd 2", "SFT", "my.lora", "real"])
def test_an_adapter_that_no_table_can_name_is_refused_before_anything_is_drawn(tmp_path, name):
    (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(EvaluationError, match=re.escape(f"{name}.safetensors: an adapter's name is of a-z")):
        subjects_in(tmp_path)


def test_the_registered_method_is_the_one_that_the_page_is_about(tmp_path):
    for name in ("d-opsd", "off-policy", "sft"):
        (tmp_path / f"{name}.safetensors").touch()
    assert [s.name for s in subjects_in(tmp_path, "sft")] == ["base", "teacher", "sft", "d-opsd", "off-policy"]


def test_the_table_is_the_same_everywhere(run):
    head, table = headline_tables(run[1])
    titles, rows = table_as_text(run[1])
    assert [*table.columns[0].cells, *head.columns[0].cells] == titles[1:]
    assert [column.header for column in table.columns[1:]] == [row[0] for row in rows]
    assert [column.header for column in head.columns[1:]] == ["D-OPSD", "SFT"]
    assert [row[0] for row in rows] == ["base, untuned", "teacher", "D-OPSD", "SFT", "truth, decoded", "truth"]
    style = next(place for place, title in enumerate(titles) if title.startswith("style ↑ (probe right in "))
    assert rows[0][style].startswith(f"{run[1]['scores']['concept']['base']['style']:.3f} (")


def test_the_largest_seed_is_one_too(run):
    """The networks' libraries take 64 bits of a seed, or 32, and here it is multiplied."""
    _, metrics, again, _ = run
    assert again("largest", seed=2**63 - 1)["seed"] == 2**63 - 1
    assert metrics["seed"] == 1234
