"""What decides a result, and what does not; and that the numbers that stand for code are not forgotten."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dopsd import identity, versions
from dopsd.config import Settings, load_settings
from dopsd.config.groups import EvaluationSettings
from dopsd.data.encoded import Encoded
from dopsd.evaluation.backbones import seen_of
from dopsd.evaluation.backbones.judge import rubric_of
from dopsd.models import open_base, resolved
from dopsd.params import Seen
from emoji_turbo import architecture
from tests import tiny
from tests.seeing import write_eyes
from tests.tiny_project import make_project

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "params.yaml"
STORED = Path(__file__).with_name("versions.json")
MODELS = ("models/__init__.py", "models/base.py", "models/flux2_klein.py", "models/krea2.py", "models/loading.py",
          "models/qwen_vl.py", "models/z_image.py")  # fmt: skip
"""What a model answers; finding, fetching and checking its files decides nothing."""
STANDS_FOR = {
    "DATA_VERSION": ("data/colour.py", "data/dialects.py", "data/duplicates.py", "data/folders.py", "data/images.py",
                     "data/manifest.py", "data/needs.py", "data/placeholder.py", "data/records.py", "data/schema.py",
                     "data/tables.py", "data/text.py"),
    "ENCODING_VERSION": (*MODELS, "data/colour.py", "data/encoded.py", "data/images.py", "data/pictures.py",
                         "train/encode.py"),
    "METHOD_VERSION": (*MODELS, "distill/adapters.py", "distill/baselines.py", "distill/flow.py", "distill/kinds.py",
                       "distill/loss.py", "distill/pair.py", "distill/rollout.py", "distill/targets.py",
                       "distill/weights.py", "data/dataset.py", "train/gain.py", "train/job.py", "train/objective.py",
                       "train/parallel.py", "train/resume.py", "train/schedule.py", "train/student.py",
                       "train/trainer.py"),
    "SCORES_VERSION": (*MODELS, "distill/drawing.py", "distill/rollout.py", "data/colour.py", "data/images.py",
                       "data/pictures.py", "evaluation/backbones/__init__.py", "evaluation/backbones/base.py",
                       "evaluation/backbones/efficientnet.py", "evaluation/backbones/judge.py",
                       "evaluation/backbones/lpips.py", "evaluation/backbones/pictures.py",
                       "evaluation/backbones/sources.py", "evaluation/backbones/store.py",
                       "evaluation/backbones/vision.py", "evaluation/compare.py", "evaluation/copies.py",
                       "evaluation/draws.py", "evaluation/grids.py", "evaluation/guarded.py",
                       "evaluation/headline.py", "evaluation/likeness.py", "evaluation/metrics.py",
                       "evaluation/naming.py", "evaluation/paired.py", "evaluation/probe.py", "evaluation/prompts.py",
                       "evaluation/scoring.py", "evaluation/suite.py", "evaluation/summary.py", "evaluation/world.py"),
    "EXPORT_VERSION": ("card.md.j2", "card.py", "evaluation/table.py", "export.py", "models/lora_files.py",
                       "registry/__init__.py", "registry/gate.py", "registry/serving.py"),
}  # fmt: skip
"""The numbers of :mod:`dopsd.versions`, and the code whose results they stand for."""


def plan(settings: Settings, root: Path = ROOT, concept: str = "style-ink") -> identity.Plan:
    own = resolved(settings.of(concept, root))
    return identity.plan_of(own, open_base(own.model, root))


def test_a_rubric_counts_by_its_text_and_only_where_something_grades_by_it(tmp_path: Path) -> None:
    def evaluated(text: str, backbones: str) -> Any:
        (tmp_path / "rubric.txt").write_text(text)
        settings = resolved(load_settings(SHIPPED, (f"evaluation.rubric={tmp_path}/rubric.txt", backbones)))
        seen = Seen(("judge:x#1",) if "judge" in backbones else (), rubric_of(settings.evaluation, ROOT))
        return identity.plan_of(settings, open_base(settings.model, ROOT), seen=seen)["evaluate"]

    judged, unjudged = "evaluation.backbones=[efficientnet-lite0,judge]", "evaluation.backbones=[efficientnet-lite0]"
    assert evaluated("1 2 3 4", judged) == evaluated("1 2 3 4", judged) != evaluated("4 3 2 1", judged)
    assert evaluated("1 2 3 4", unjudged) == evaluated("4 3 2 1", unjudged)


def test_backbones_count_by_their_weights(tmp_path: Path) -> None:
    """Another folder of one name is another evaluation, to DVC and to the registry's gate."""
    settings = resolved(load_settings(SHIPPED))
    plans = [identity.plan_of(settings, open_base(settings.model, ROOT), seen=Seen((name,))) for name in ("a#1", "a#2")]
    assert plans[0]["evaluate"] != plans[1]["evaluate"]
    folders = write_eyes(tmp_path)
    evaluation = EvaluationSettings(backbones=(f"dinov2:{folders['dinov2']}",))
    before = seen_of(evaluation, tmp_path)
    weights = folders["dinov2"] / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    assert seen_of(evaluation, tmp_path) != before
    assert seen_of(EvaluationSettings(), tmp_path) == Seen()


VALIDATED = dict.fromkeys(("content_hash", "holdout_hash", "kind_hash"), "x")


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ("evaluation.batch_size=3", False), ("evaluation.steps=[4,32]", False), ("evaluation.known_prompts=7", False),
        ("train.replay.prompts=[a fox]", False), ("evaluation.prompts=[a fox]", False),
        ("model.context_suffix=as in the picture", False), ("model.vlm_positions=encoder", False),
        ("evaluation.seed=5", True), ("evaluation.many_steps=8", True), ("evaluation.kept_count=7", True),
        ("evaluation.curve_prompts=7", True), ("data.resolution=128", True), ("model.dtype=bfloat16", True),
        ("train.replay.prompts=['a chicken, flat style']", True),
    ],
)  # fmt: skip
def test_the_anchors_ground_moves_with_what_its_scores_are_of_alone(change: str, moves: bool) -> None:
    before, after = (identity.ground_of(plan(load_settings(SHIPPED, more)), VALIDATED) for more in ((), (change,)))
    assert (before != after) == moves


def test_prompts_of_the_settings_are_ground_where_nothing_is_held_out() -> None:
    plans = [plan(load_settings(SHIPPED, more)) for more in ((), ("evaluation.prompts=[a fox]",))]
    without = VALIDATED | {"holdout_hash": None}
    assert identity.ground_of(plans[0], without) != identity.ground_of(plans[1], without)


@pytest.mark.parametrize("part", ["vlm", "world", "transformer", "vae", "text_encoder", "scheduler"])
def test_of_a_base_its_ground_is_what_draws(part: str) -> None:
    made = plan(load_settings(SHIPPED))
    other = made | {"evaluate": made["evaluate"] | {"base": made["evaluate"]["base"] | {part: "another"}}}
    assert made["evaluate"]["base"][part] != "another"
    moves = identity.ground_of(made, VALIDATED) != identity.ground_of(other, VALIDATED)
    assert moves == (part not in ("vlm", "world"))
    assert moves == (identity.drawing_of(made) != identity.drawing_of(other))


def test_a_version_of_the_training_code_moves_no_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(SHIPPED)
    before = plan(settings)
    monkeypatch.setattr(identity, "METHOD_VERSION", 99)
    assert identity.questions_of(plan(settings), VALIDATED) != identity.questions_of(before, VALIDATED)
    assert identity.ground_of(plan(settings), VALIDATED) == identity.ground_of(before, VALIDATED)
    monkeypatch.setattr(identity, "SCORES_VERSION", 99)
    assert identity.ground_of(plan(settings), VALIDATED) != identity.ground_of(before, VALIDATED)


def _ground(*backbones: str, rubric: str = "") -> str:
    settings = resolved(load_settings(SHIPPED))
    made = identity.plan_of(settings, open_base(settings.model, ROOT), seen=Seen(backbones, rubric))
    return identity.ground_of(made, VALIDATED)


def test_backbones_of_no_guarded_score_move_no_anchor() -> None:
    """Features give likeness and kept, the first that reads text the prompt's; by their weights."""
    alone, first = _ground(), "efficientnet-lite0"
    assert _ground(first, "lpips:a#1") == _ground(first, "reward:a#1", "dinov2:a#1") == alone
    assert _ground(first, "judge:a#1", rubric="1 2 3 4") == _ground("judge:a#1", first, rubric="4 3 2 1") == alone
    others = [("dinov2:a#1",), ("dinov2:a#2",), (first, "clip:a#1"), (first, "clip:a#2"), ("clip:a#1", first)]
    assert len({alone, *(_ground(*names) for names in others)}) == 6
    assert _ground(first, "reward:b#1", "clip:a#1", "siglip:a#1") == _ground(first, "clip:a#1")
    assert _ground(first, "siglip:a#1", "clip:a#1") != _ground(first, "clip:a#1")


def test_the_first_backbone_alone_is_what_was_before_there_were_others() -> None:
    evaluated = plan(load_settings(SHIPPED))["evaluate"]["evaluation"]
    assert not {"backbones", "rubric"} & set(evaluated)


def changed(*overrides: str) -> set[str]:
    """Which stages' plans another setting changes."""
    before, after = plan(load_settings(SHIPPED)), plan(load_settings(SHIPPED, overrides))
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("model.device=cpu", set()),
        ("model.gradient_checkpointing=true", set()),
        ("model.compile=true", set()),
        ("train.preview_steps=7", set()),
        ("train.checkpoint_steps=7", set()),
        ("train.teacher.on_no_gain=refuse", set()),
        ("train.teacher.gain_images=3", set()),
        ("compute.workers=2", set()),
        ("tracking.experiment=other", set()),
        ("tracking.enabled=false", {"register"}),
        ("train.preview_count=2", {"encode"}),
        ("data.min_images=5", {"validate"}),
        ("evaluation.backbones=[efficientnet-lite0]", set()),
        ("evaluation.rubric=some.txt", set()),
        ("data.max_pixels=5000000", {"validate"}),
        ("data.allow=[copies]", {"validate"}),
        ("data.resolution=128", {"validate", "encode", "evaluate", "register"}),
        ("model.context_pixels=[4096,8192]", {"encode", "evaluate"}),
        ("model.vlm_positions=encoder", {"encode", "evaluate"}),
        ("model.dtype=bfloat16", {"encode", "train", "evaluate"}),
        ("model.quantization=int8", {"encode", "train", "evaluate"}),
        ("model.offload=model", set()),
        ("train.optimizer=adamw-8bit", {"train"}),
        ("train.tune=full", {"train"}),
        ("train.teacher.every=2", {"train"}),
        ("model.name=mine", {"register"}),
        ("model.licence=mit", {"register"}),
        ("train.max_steps=7", {"train"}),
        ("train.max_minutes=7", {"train"}),
        ("train.methods=[d-opsd]", {"train"}),
        ("evaluation.max_prompts=7", {"evaluate"}),
        ("evaluation.seed=7", {"evaluate", "register"}),
        ("registry.tolerance=0.1", {"register"}),
        ("export.dtype=float32", {"register"}),
    ],
)
def test_a_setting_changes_the_stages_that_it_decides_and_no_other(override: str, stages: set[str]) -> None:
    assert changed(override) == stages


def test_replay_prompts_count_where_they_are_replayed() -> None:
    off = ("train.replay.weight=0",)
    before, after = (plan(load_settings(SHIPPED, (*off, *more))) for more in ((), ("train.replay.prompts=[a fox]",)))
    assert [stage for stage in before if before[stage] != after[stage]] == ["evaluate"], "they are not asked either way"
    assert changed("train.replay.prompts=[a fox]") == {"encode", "evaluate"}, "what is replayed is not asked"
    examples, (fox, owl) = tuple(tiny.tiny_examples(2)), tiny.tiny_prompts(2)

    def learnt_from(replay: Any, counts: bool) -> str:
        return Encoded(examples, (), (("x", replay),), 1, "").identity(counts)

    assert learnt_from(fox, False) == learnt_from(owl, False)
    assert learnt_from(fox, True) != learnt_from(owl, True)


def test_what_is_learnt_from_counts_to_the_last_bit_and_what_is_shown_does_not() -> None:
    examples = tiny.tiny_examples(2)
    same = Encoded(tuple(examples), (), (), 1, "").identity(False)
    previews = (tiny.Preview("a fox", tiny.tiny_prompts(1)[0], 64, 64),)
    assert Encoded(tuple(tiny.tiny_examples(2)), previews, (), 5, "other").identity(False) == same
    for change in (
        {"latents": examples[0].latents + 1e-6},
        {"context": {"caption": examples[0].context["caption"].to(torch.bfloat16)}},
        {"prompt": {"words": examples[0].prompt["caption"]}},
        {"prompt": examples[0].context, "context": examples[0].prompt},
        {"caption": "another"},
        {"height": 32},
        {"repeats": 2},
    ):
        other = type(examples[0])(**(examples[0].__dict__ | change))
        assert Encoded((other, examples[1]), (), (), 1, "").identity(False) != same, change


def test_a_method_more_is_the_same_training_and_another_seed_is_not() -> None:
    def identities(*overrides: str) -> tuple[str, str]:
        train = load_settings(SHIPPED, overrides).train
        return identity.training_name(train, "x"), identity.training_identity(train, "d-opsd", "x")

    same = identities()
    assert identities("train.methods=[d-opsd]") == same
    assert identities("train.preview_prompts=[a]", "train.max_minutes=3") == same
    assert identities("train.sft_compute_factor=2")[1] == same[1], "of SFT alone"
    assert not set(identities("train.seed=1")) & set(same)


def test_what_a_training_is_made_of_is_readable_and_its_hash_is_what_it_always_was() -> None:
    settings, encoded = load_settings(SHIPPED), Encoded(tuple(tiny.tiny_examples(2)), (), (), 1, "")
    parts = identity.common_parts(plan(settings), encoded, replayed=False)
    own = {key: value for key, value in plan(settings)["train"].items() if key not in ("methods", "max_minutes")}
    assert identity.common_identity(parts) == identity.hash_of([own, encoded.identity(False)])
    made = identity.made_of(settings.train, "d-opsd", parts)
    assert made["settings"]["learning_rate"] == settings.train.learning_rate
    assert json.loads(json.dumps(made)) == made
    assert identity.changes(made, made) == []
    others = load_settings(SHIPPED, ("train.lora.rank=3", "train.optimizer=adamw-8bit", "train.lora.targets=null"))
    model = {**parts["model"], "dtype": "float32"}
    other = identity.made_of(
        others.train, "d-opsd", {**parts, "data": "other", "version": 99, "base": {}, "model": model}
    )
    said = identity.changes(made, other)
    assert said[:1] + said[2:] == [
        "lora.rank 64 -> 3", "optimizer as by default -> adamw-8bit", "model.dtype auto -> float32",
        "the encoded data changed", "the base changed", "the version of the training code changed",
    ]  # fmt: skip
    assert said[1].startswith("lora.targets ['context_refiner")
    assert said[1].endswith("... -> null")
    assert len(said[1]) < 100


@pytest.mark.parametrize(
    ("part", "stages"),
    [
        ("scheduler", {"train", "evaluate", "register"}),
        ("transformer", {"train", "evaluate", "register"}),
        ("text_encoder", {"encode", "evaluate", "register"}),
        ("vae", {"encode", "evaluate", "register"}),
        ("vlm", {"encode", "evaluate", "register"}),
    ],
)
def test_a_part_of_the_base_changes_what_it_is_used_for(tmp_path: Path, part: str, stages: set[str]) -> None:
    """The grid is in the scheduler's file: another ``shift`` there once left the old adapter "finished"."""
    root = make_project(tmp_path)
    settings = load_settings(root / "params.yaml")
    before = plan(settings, root, "blots")
    if part == "scheduler":
        file = root / "data/base/tiny/scheduler/scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 2.5}))
    else:
        parts, others = tiny.tiny_parts(), tiny.tiny_parts(seed=1)
        names = {"vae", "tokenizer", "vlm", "transformer"}
        if part == "text_encoder":
            _replace_weights(root / "data/base/tiny/text_encoder")
        else:
            architecture.save_folder(
                root / "data/base/tiny", **{key: (others if key == part else parts)[key] for key in names}
            )
            if part == "vlm":  # its language half is the text encoder
                stages = {"encode", "evaluate", "register"}
    after = plan(settings, root, "blots")
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def _replace_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    save_file({key: value + 1e-3 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


def test_the_ground_is_what_is_asked_but_for_the_pictures_that_were_trained_on() -> None:
    def both(*overrides: str, **validated: str) -> tuple[str, str]:
        made, seen = (
            plan(load_settings(SHIPPED, overrides)),
            {"content_hash": "c", "holdout_hash": "h", "kind_hash": "k"},
        )
        return identity.questions_of(made, seen | validated), identity.ground_of(made, seen | validated)

    asked, ground = both()
    assert both("train.learning_rate=1", "registry.tolerance=0.1") == (asked, ground)
    assert both(content_hash="other")[0] != asked
    assert both(content_hash="other")[1] == ground
    for other in (both("evaluation.seed=7"), both(holdout_hash="other"), both(kind_hash="other")):
        assert other[0] != asked
        assert other[1] != ground


def test_a_plan_is_the_same_in_every_process_and_plain_json() -> None:
    values = plan(load_settings(SHIPPED))
    assert json.loads(json.dumps(values)) == values
    assert identity.hash_of({"a": 1, "b": (2,)}) == identity.hash_of({"b": [2], "a": 1})


def test_a_version_says_what_changed_since() -> None:
    settings = resolved(load_settings(SHIPPED).of("style-ink", ROOT))
    base = open_base(settings.model, ROOT)
    made = identity.version_identity("d" * 64, settings, base)
    assert made.differences(identity.version_identity("e" * 64, settings, base)) == ["data"]
    assert made == identity.version_identity("d" * 64, settings, base, start="")
    begun = [identity.version_identity("d" * 64, settings, base, start) for start in ("a" * 64, "b" * 64)]
    assert [made.differences(one) for one in begun] == [["settings"], ["settings"]]
    assert begun[0] != begun[1]
    other = load_settings(SHIPPED, ("train.seed=5", "train.preview_steps=3")).of("style-ink", ROOT)
    assert made.differences(identity.version_identity("d" * 64, resolved(other), base)) == ["settings"]
    for override in ("train.replay.prompts=[a fox]", "train.max_minutes=3"):
        other = load_settings(SHIPPED, (override,)).of("style-ink", ROOT)
        assert made.differences(identity.version_identity("d" * 64, resolved(other), base)) == ["settings"], override


# --- the numbers that stand for code ----------------------------------------------------------------------------------


def _digest(file: Path) -> str:
    """Of what the code does: neither comments nor docstrings nor its layout."""
    if file.suffix != ".py":
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _today() -> dict[str, Any]:
    return {
        name: {
            "version": getattr(versions, name),
            "code": {file: _digest(ROOT / "dopsd" / file) for file in sorted(files)},
        }
        for name, files in STANDS_FOR.items()
    }


def test_whoever_changes_code_that_a_version_stands_for_is_reminded() -> None:
    stored = json.loads(STORED.read_text())
    for name, now in _today().items():
        files = [file for file, digest in now["code"].items() if stored[name]["code"].get(file) != digest]
        assert stored[name] == now, (
            f"{', '.join(files) or name} changed, and {name} stands for what it makes. Do the same inputs give another "
            f"result now? Then raise {name} in dopsd/versions.py. Either way: python -m tests.test_identity"
        )


if __name__ == "__main__":
    STORED.write_text(json.dumps(_today(), indent=1) + "\n")
    sys.stdout.write(f"{STORED.name}: written\n")
