"""The recipes: complete, as published, and each runs from a folder to the registry on a stand-in of its base."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.models import get_model_info
from PIL import Image

from dopsd.config import Settings, load_settings
from dopsd.evaluation.draws import Key
from dopsd.evaluation.grids import opened_tile, read_tiles
from dopsd.evaluation.headline import MIN_PROMPTS
from dopsd.evaluation.verdict import verdict
from dopsd.models import family_class, references_rule, resolved, teaching_of
from dopsd.stages import STAGES
from tests.fake_hub import COMMIT, FakeHub, Repository
from tests.published_project import CONCEPT, RECIPES, REFERENCES, SMALL, overrides_of, write_concept, write_stand_in
from tests.test_config import check_every_key


@dataclass(frozen=True)
class Facts:
    """What is said of a recipe elsewhere: docs/method.md (the authors' table), the publishers' cards."""

    context: str
    rate: float
    steps: int
    few: int
    base: str
    licence: str
    card: str
    """The licence in the front matter of a model card."""


VLM = "Qwen/Qwen3-VL-4B-Instruct"
FROM_HUB = "z-image-turbo"
"""The recipe that goes the whole way with the hub's names, as it stands."""
COMMITS = {"model.revision": "b" * 40, "model.vlm_revision": "c" * 40}
"""What that one is pinned to."""
_APACHE = 'license: "apache-2.0"'
FACTS = {
    FROM_HUB: Facts("vlm", 1e-4, 2000, 8, "Tongyi-MAI/Z-Image-Turbo", "apache-2.0", _APACHE),
    "flux2-klein-4b": Facts("edit", 2e-5, 3000, 4, "black-forest-labs/FLUX.2-klein-4B", "apache-2.0", _APACHE),
    "flux2-klein-9b": Facts(
        "edit", 2e-5, 3000, 4, "black-forest-labs/FLUX.2-klein-9B", "flux-non-commercial-license",
        'license: other\nlicense_name: "flux-non-commercial-license"',
    ),
    "flux2-klein-edit": Facts(
        "edit-reference", 2e-5, 3000, 4, "black-forest-labs/FLUX.2-klein-4B", "apache-2.0", _APACHE
    ),
    "krea-2-turbo": Facts(  # in no table of the authors': the rate of a public port, the rest as Z-Image-Turbo
        "vlm", 1e-5, 2000, 8, "krea/Krea-2-Turbo", "krea-2-community-license",
        'license: other\nlicense_name: "krea-2-community-license"',
    ),
}  # fmt: skip


def _file(recipe: str) -> Path:
    return RECIPES / f"{recipe}.yaml"


# --- what they say ----------------------------------------------------------------------------------------------------


def test_these_are_all_recipes() -> None:
    assert {path.name for path in RECIPES.iterdir()} == {f"{name}.yaml" for name in FACTS}


@pytest.mark.parametrize("recipe", FACTS)
def test_a_recipe_names_every_key_and_is_as_published(recipe: str) -> None:
    facts, settings = FACTS[recipe], resolved(load_settings(_file(recipe)))
    check_every_key(_file(recipe))
    train, model = settings.train, settings.model
    assert (teaching_of(model).context, train.learning_rate, train.max_steps) == (
        facts.context,
        facts.rate,
        facts.steps,
    )
    assert (model.path, model.name, model.licence) == (facts.base, facts.base, facts.licence)
    assert settings.evaluation.few_steps == family_class(model).few_steps == facts.few
    assert max(settings.evaluation.steps) > facts.few, "else the registry's gate has nothing to compare with"
    # of all of them, docs/method.md says:
    assert (train.lora.rank, train.lora.alpha, train.lora.init, train.lora.targets) == (64, 128, "gaussian", None)
    assert (train.loss, train.schedule, train.weight_decay, train.betas) == ("x0", "constant", 0, (0.9, 0.999))
    assert (train.clip_norm, train.warmup_steps, train.rollout_steps) == (1, 0, 4)
    assert (train.teacher.kind, train.teacher.decay, train.teacher.guidance) == ("ema", 0.9999, 1)
    assert train.batch_size * train.accumulation == 4
    assert train.replay.weight == 0, "an option of ours"
    assert train.methods == ("d-opsd",), "the comparison doubles the bill"


@pytest.mark.parametrize("recipe", FACTS)
def test_a_recipe_does_not_ask_a_large_model_for_too_much_at_once(recipe: str) -> None:
    settings = load_settings(_file(recipe))
    assert settings.model.gradient_checkpointing == "auto"
    assert settings.train.batch_size == settings.evaluation.batch_size == 1
    assert settings.data.resolution == 1024
    assert settings.train.preview_steps >= 100
    texts = settings.train.preview_prompts
    assert len(texts) <= 2
    assert not (texts and references_rule(settings.model) == "required"), "they have no pictures to edit"


@pytest.mark.parametrize("recipe", FACTS)
def test_a_recipe_says_at_the_top_what_it_is_and_where_its_values_are_from(recipe: str) -> None:
    lines = _file(recipe).read_text().splitlines()
    assert all(len(line) <= 120 for line in lines)
    head = "\n".join(line for line in lines[:12] if line.startswith("#"))
    for word in ("Licence of the base: ", f"cp recipes/{recipe}.yaml params.yaml", "dvc repro", "GB", "not measured"):
        assert word in head
    for key in (
        "learning_rate", "max_steps", "rollout_steps", "loss", "rank", "alpha", "init", "targets", "decay", "betas",
        "schedule", "weight_decay", "clip_norm", "batch_size", "context", "licence", "few_steps",
    ):  # fmt: skip
        line = next(line for line in lines if line.strip().startswith(f"{key}:"))
        assert re.search(r"\[(paper|authors|maker|ours|port|second-hand)\]", line), line


def test_a_recipes_names_are_fetched_from_the_hub_as_they_stand(tmp_path: Path) -> None:
    """Nothing in the file is changed: base and VLM are found under these names, and only what is needed is fetched."""
    repositories: dict[str, Repository] = {}
    for recipe, facts in FACTS.items():
        stand_in = write_stand_in(recipe, tmp_path / "models")
        repositories[facts.base] = _repository(Path(stand_in["model.path"]))
        if "model.vlm" in stand_in:
            repositories[VLM] = _repository(Path(stand_in["model.vlm"]))
    script = (
        "import sys\nfrom pathlib import Path\nfrom dopsd.config import load_settings\n"
        "from dopsd.models import open_base\n"
        "for file in sys.argv[1:]:\n"
        "    base = open_base(load_settings(Path(file)).model, Path())\n"
        "    print(Path(file).stem, base.source.name, base.vlm and base.vlm.name)\n"
    )
    with FakeHub(repositories) as hub:
        done = subprocess.run(
            [sys.executable, "-c", script, *(str(_file(recipe)) for recipe in FACTS)], cwd=tmp_path, text=True,
            capture_output=True, check=True, env=hub.environment(tmp_path / "home", PYTHONPATH=str(RECIPES.parent)),
        )  # fmt: skip
    vlms = dict.fromkeys(FACTS, "None") | {FROM_HUB: VLM}
    assert done.stdout.splitlines() == [f"{recipe} {facts.base} {vlms[recipe]}" for recipe, facts in FACTS.items()]
    needless = {"flux-2-klein-4b.safetensors", "flux-2-klein-9b.safetensors", "turbo.safetensors"}
    assert needless <= {name for repository in repositories.values() for name in repository.files}
    assert not needless & hub.fetched()


def _repository(folder: Path, commit: str = COMMIT) -> Repository:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return Repository(files, commit)


# --- that they run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A recipe that went the whole way."""

    recipe: str
    root: Path
    base: Path
    settings: Settings

    @property
    def run(self) -> Path:
        return self.root / "runs" / CONCEPT

    @property
    def card(self) -> str:
        return (self.run / "export" / "README.md").read_text()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mlflow.db``, a tracker's database with nothing in it: MLflow takes seconds to make one."""
    file = tmp_path_factory.mktemp("tracker") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="module", params=list(FACTS))
def made(request: pytest.FixtureRequest, database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Each recipe, all six stages one after another, small."""
    recipe, root = request.param, tmp_path_factory.mktemp(request.param)
    stand_in = write_stand_in(recipe, root / "models")
    # this one has enough held-out rows for the report to say something
    rows = MIN_PROMPTS if recipe == FROM_HUB else 2
    values = SMALL | {"evaluation.max_prompts": rows} | (COMMITS if recipe == FROM_HUB else stand_in)
    settings = load_settings(_file(recipe), overrides_of(values))
    edits = references_rule(settings.model) == "required"
    write_concept(root / "data" / "concepts" / CONCEPT, edits=edits, held_out=rows)
    base = Path(stand_in["model.path"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        patch.chdir(root)
        if recipe == FROM_HUB:
            _fetch_and_go_on_alone(base, Path(stand_in["model.vlm"]), overrides_of(values), root)
        else:
            shutil.copy(database, root)
            for stage in STAGES.values():
                stage(CONCEPT, settings, root)
        yield Made(recipe, root, base, settings)


_STAGES_OF = """
import sys
from pathlib import Path
from dopsd.config import load_settings
from dopsd.stages import STAGES, identify_base
concept, file, stages, *overrides = sys.argv[1:]
settings = load_settings(Path(file), tuple(overrides))
for stage in stages.split():
    identify_base(settings, Path()) if stage == "base" else STAGES[stage](concept, settings, Path())
"""
_DRAWN = """
import sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
model.predict(["a blot in [V] style"], params={"height": 96, "width": 64, "steps": 2})[0].save("served.png")
"""


def _fetch_and_go_on_alone(base: Path, vlm: Path, overrides: tuple[str, ...], root: Path) -> None:
    """The hub is there until everything is encoded, and gone afterwards: also for who draws with the version."""
    repositories = {
        FACTS[FROM_HUB].base: _repository(base, COMMITS["model.revision"]),
        VLM: _repository(vlm, COMMITS["model.vlm_revision"]),
    }

    def python(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", *arguments], cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=hub.environment(root / "home", PYTHONPATH=str(RECIPES.parent)), timeout=600,
        )  # fmt: skip
        assert not done.returncode, done.stdout

    with FakeHub(repositories) as hub:
        python(_STAGES_OF, CONCEPT, str(_file(FROM_HUB)), "base validate encode", *overrides)
        assert {"transformer/config.json", "video_preprocessor_config.json"} <= hub.fetched()
        fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
        assert len(fetched) == len(set(fetched)), "each once"
    python(_STAGES_OF, CONCEPT, str(_file(FROM_HUB)), "train evaluate report register", *overrides)
    python(_DRAWN, f"models:/dopsd-{CONCEPT}/1")


def test_a_recipe_goes_from_folder_to_registry(made: Made) -> None:
    for file in ("evaluation/metrics.json", "report.html", "export/comfyui_lora.safetensors", "registered.json"):
        assert (made.run / file).is_file()
    client = MlflowClient(f"sqlite:///{made.root}/mlflow.db")
    (version,) = client.search_model_versions(f"name='dopsd-{CONCEPT}'")
    registered = json.loads((made.run / "registered.json").read_text())
    assert int(registered["version"]) == int(version.version) == 1
    assert version.tags["dopsd.gate"] == ("passed" if registered["promoted"] else "failed")
    metrics = json.loads((made.run / "evaluation" / "metrics.json").read_text())
    assert metrics["few_steps"] == FACTS[made.recipe].few
    assert metrics["most_steps"] > metrics["few_steps"]
    assert metrics["models"] == ["base", "teacher", "d-opsd"]
    assert {"dopsd.score.learnt", "dopsd.score.few_step"} <= version.tags.keys()
    assert not registered["promoted"], "nothing was learnt from random weights"


def test_the_card_names_base_and_licence_and_nothing_of_this_machine(made: Made) -> None:
    facts, card = FACTS[made.recipe], made.card
    front = card.split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == facts.base
    assert facts.card in front
    assert f"still draws in {facts.few} steps" in card
    assert f"num_inference_steps={facts.few}," in card
    assert f'from_pretrained("{facts.base}"' in card
    assert "roll-out | 4 steps, x0 loss" in card
    assert "alpha / rank = 2" in card
    for place in (made.root, made.base, made.base.parent, Path.home(), Path.cwd()):
        assert str(place) not in card
    assert not re.search(r"(?<![\w:/.-])/(?!/)[\w.-]+/[\w.-]+", card), "no absolute path"


@pytest.mark.parametrize("made", [FROM_HUB], indirect=True)
def test_names_on_the_hub_are_enough_and_are_what_is_kept(made: Made) -> None:
    facts, model = FACTS[FROM_HUB], load_settings(_file(FROM_HUB)).model
    assert (made.settings.model.path, made.settings.model.vlm) == (model.path, model.vlm) == (facts.base, VLM)
    assert f'from_pretrained("{facts.base}"' in made.card
    config = get_model_info(f"models:/dopsd-{CONCEPT}/1").flavors["python_function"]["config"]
    assert (config["base"], config["revision"]) == (facts.base, COMMITS["model.revision"])
    with Image.open(made.root / "served.png") as picture:
        assert picture.size == (64, 96)


@pytest.mark.parametrize("made", [FROM_HUB], indirect=True)
def test_noise_is_not_called_a_success(made: Made) -> None:
    metrics = json.loads((made.run / "evaluation" / "metrics.json").read_text())
    assert metrics["counts"]["concept_prompts"] >= MIN_PROMPTS, "else nothing is ever claimed"
    said, _ = verdict(metrics)
    assert re.match(r"Nothing can be said of .* there is no gap to close\.|D-OPSD hardly learnt", said), said
    page = (made.run / "report.html").read_text()
    assert re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)[1].startswith(said.split(":")[0])  # type: ignore[index]


def test_pictures_keep_their_shapes(made: Made) -> None:
    """The trained buckets, and what the models draw of the held-out rows."""
    samples = made.run / "evaluation" / "samples"
    sizes: dict[Any, Any] = {}
    for key, files in read_tiles(samples, json.loads((samples / "index.json").read_text())).items():
        sizes[key] = [opened_tile(files[row]).size for row in sorted(files)]
    assert len(set(sizes[Key("training", "real", 0)])) > 2
    few = FACTS[made.recipe].few
    asked = sizes[Key("concept", "real", 0)]
    assert asked[0] != asked[1]
    for model in ("base", "teacher", "d-opsd"):
        assert sizes[Key("concept", model, few)] == asked


def test_an_edit_is_shown_beside_what_it_starts_from(made: Made) -> None:
    grids, page = made.run / "evaluation" / "grids", (made.run / "report.html").read_text()
    rows = re.findall(r'<th scope="row"><span><i[^>]*></i>([^<]*)</span></th>', page.split("Three answers")[1])
    edits = made.recipe == "flux2-klein-edit"
    told = "shown the finished edit; all others have the text and the pictures to edit." if edits else (
        "shown another training picture; all others have the text alone."
    )  # fmt: skip
    assert f"The teacher is the untuned base that is {told}" in page
    expected = [*(["reference"] if edits else []), "truth", "base, untuned", "teacher", "D-OPSD"]
    assert rows[: len(expected)] == expected
    card = made.card
    assert ("pipeline_tag: image-to-image" in card) == edits
    assert ("image=[Image.open(" in card) == edits
    with Image.open(grids / "few_step.png") as grid:
        pixels = grid.convert("RGB")
    if not edits:
        return
    # the first row of the grid has the references of each prompt, as they are on disk, at one height
    samples = made.run / "evaluation" / "samples"
    index = json.loads((samples / "index.json").read_text())
    references = read_tiles(samples, index)[Key("concept", "reference", 0)]
    for number, text in enumerate(index["prompts"]["concept"]):
        held_out = int(re.search(r"blot (\d)", text)[1])  # type: ignore[index]
        shown, left, height = opened_tile(references[number]), 0, min(height for _, height in REFERENCES[held_out])
        for place, size in enumerate(REFERENCES[held_out]):
            path = made.root / "data" / "concepts" / CONCEPT / "holdout" / f"before-{held_out}-{place}.png"
            with Image.open(path) as reference:
                assert reference.size == size
                width = round(reference.width * height / reference.height)
                truth = reference.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            assert shown.crop((left, 0, left + width, height)).tobytes() == truth.tobytes()
            left += width
    assert pixels.height > 5 * 128, "five rows"
