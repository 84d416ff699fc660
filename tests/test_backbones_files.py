"""What a person names as a backbone, wrongly: one line that says what to do, before a weight is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dopsd.config import Settings, SettingsError, load_settings
from dopsd.evaluation.backbones import BackboneError, check_backbones, load_backbones
from dopsd.evaluation.backbones.sources import KINDS, NAMES
from dopsd.models import ModelError
from dopsd.params import BACKBONES, FEATURES
from tests.fake_hub import COMMIT, FakeHub, Repository
from tests.model_folders import edit, one_line, truncate
from tests.seeing import write_eyes

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_eyes(tmp_path_factory.mktemp("eyes"))


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded meanwhile: a check loads nothing."""
    loaded: list[str] = []
    real = torch.nn.Module.__init__

    def noted(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        loaded.append(type(self).__name__)
        real(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__init__", noted)
    return loaded


def refused(name: str, root: Path) -> str:
    with pytest.raises((BackboneError, ModelError)) as caught:
        check_backbones([name], root)
    return one_line(caught.value)


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_settings_know_the_same_names() -> None:
    assert set(BACKBONES) == set(NAMES)
    assert NAMES[0] == BACKBONES[0] == "efficientnet-lite0"
    assert {kind for kind in FEATURES if kind != NAMES[0]} <= set(KINDS)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[dinvo2]", "unknown backbone 'dinvo2'; choose of efficientnet-lite0, dinov2"),
        ("[lpips, 'judge:x/y']", "none gives features"),
        ("[]", "empty; name at least one"),
        ("[dinov2, dinov2]", "dinov2 is there twice"),
    ],
)
def test_a_misspelt_setting_is_found_before_any_stage(value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=r"evaluation\.backbones") as caught:
        load_settings(ROOT / "params.yaml", (f"evaluation.backbones={value}",))
    assert words in one_line(caught.value)


def test_a_name_may_have_a_place_and_a_revision() -> None:
    names = ["dinov3:some/model@v1", "clip:~/models/clip", "judge"]
    settings = load_settings(ROOT / "params.yaml", (f"evaluation.backbones={json.dumps(names)}",))
    assert Settings.model_validate(settings.model_dump()).evaluation.backbones == tuple(names)


def test_one_model_under_two_names_is_named_once(folders, tmp_path) -> None:
    (tmp_path / "models").symlink_to(folders["dinov2"].parent)
    with pytest.raises(BackboneError, match=r"dinov2:dinov2#\w+ is there twice"):
        check_backbones([f"dinov2:{folders['dinov2']}", "dinov2:models/dinov2"], tmp_path)
    assert "one set of weights" in refused("efficientnet-lite0:x/y", tmp_path)
    assert "unknown; choose one of" in refused("inception", tmp_path)


def test_names_say_which_weights_they_are(folders, tmp_path) -> None:
    copy = shutil.copytree(folders["dinov2"], tmp_path / "dinov2")
    (same,) = check_backbones([f"dinov2:{copy}"], tmp_path)
    assert same.name == check_backbones([f"dinov2:{folders['dinov2']}"], tmp_path)[0].name
    tensors = load_file(copy / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    assert check_backbones([f"dinov2:{copy}"], tmp_path)[0].name != same.name


# --- folders ----------------------------------------------------------------------------------------------------------


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _vast(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=32 * 64)


def _renamed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["x"] = tensors.pop(max(name for name in tensors if "layer" in name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _renamed_vgg(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier"] = tensors.pop("features.28.bias")
    save_file(tensors, folder / "model.safetensors")


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "pickle": ("dinov2", _pickled, "pickled weights are never read"),
    "lpips pickle": ("lpips", _pickled, "pickled weights are never read"),
    "no config": ("dinov2", _without("config.json"), "config.json is missing"),
    "no processor": ("clip", _without("preprocessor_config.json"), "preprocessor_config.json is missing"),
    "cut": ("dinov3", lambda folder: truncate(folder / "model.safetensors"), "damaged or cut short"),
    "other type": ("dinov2", lambda folder: edit(folder / "config.json", model_type="vit"), "a vit, and dinov2 is"),
    "no type": ("dinov2", lambda folder: edit(folder / "config.json", model_type=None), "a model of no known type"),
    "no tensor": ("lpips", _renamed_vgg, "no VGG16 with torchvision's names (features.28.bias is missing"),
    "json": ("siglip", lambda folder: (folder / "config.json").write_text("[]") and None, "not a valid JSON object"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_one_line_before_anything_is_loaded(fault, folders, tmp_path, loading) -> None:
    kind, broken, words = BROKEN[fault]
    folder = Path(shutil.copytree(folders[kind], tmp_path / "broken"))
    broken(folder)
    line = refused(f"{kind}:{folder}", tmp_path)
    assert words in line
    assert kind in line
    assert not loading


def test_a_tokenizer_that_is_missing_is_named(folders, tmp_path) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").unlink(missing_ok=True)
    assert "tokenizer.json or vocab.json is missing" in refused(f"clip:{folder}", tmp_path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_vast, "its config.json describes"),
        (_renamed, "its weights lack"),
        (lambda folder: edit(folder / "preprocessor_config.json", image_std=[0, 0, 0]), "no usable size, image_mean"),
        (lambda folder: edit(folder / "preprocessor_config.json", image_mean=None), "no usable size, image_mean"),
        (lambda folder: edit(folder / "preprocessor_config.json", crop_size=10**9), "no usable size, image_mean"),
    ],
)
def test_what_does_not_fit_together_is_one_line_when_it_is_loaded(fault, words, folders, tmp_path) -> None:
    folder = Path(shutil.copytree(folders["dinov2"], tmp_path / "dinov2"))
    fault(folder)
    with pytest.raises((BackboneError, ModelError)) as caught:
        load_backbones([f"dinov2:{folder}"], CPU, tmp_path)
    assert words in one_line(caught.value)


def test_a_folders_own_code_is_never_run(folders, tmp_path) -> None:
    folder = Path(shutil.copytree(folders["dinov2"], tmp_path / "dinov2"))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(folder / "config.json", auto_map={"AutoModel": "code.Dinov2Model", "AutoConfig": "code.Dinov2Config"})
    load_backbones([f"dinov2:{folder}"], CPU, tmp_path)
    assert not (tmp_path / "ran").exists()


# --- the hub ----------------------------------------------------------------------------------------------------------

_CHECK = """
import sys
from pathlib import Path
from dopsd.evaluation.backbones import check_backbones
for names in sys.argv[1:]:
    try:
        print([found.name for found in check_backbones(names.split(), Path())])
    except ValueError as error:
        print(type(error).__name__, error)
"""


def test_only_what_is_needed_is_fetched_and_where_nothing_is_there_it_is_one_line(folders, tmp_path) -> None:
    more = {"pytorch_model.bin": b"x", "open_clip_model.safetensors": b"x", "code.py": b"x", "tf_model.h5": b"x"}
    hub_files = {
        KINDS[kind].default: Repository({p.name: p.read_bytes() for p in folders[kind].iterdir()} | more)
        for kind in ("dinov2", "clip", "lpips")
    }

    def asked(hub: FakeHub, *names: str, **environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", _CHECK, *names], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT), **environment),
        )  # fmt: skip
        return [one_line(line) for line in done.stdout.splitlines()]

    with FakeHub(hub_files) as hub:
        names = [f"{kind}:{KINDS[kind].default}@{COMMIT}" for kind in ("dinov2", "clip", "lpips")]
        said = f"dinov2 clip:{KINDS['clip'].default}@v1 lpips"
        found, unknown = asked(hub, said, f"dinov2:{KINDS['dinov2'].default}@v9")
        assert found == str(names)
        assert "no revision 'v9' there" in unknown
        assert not set(more) & hub.fetched()
        absent, here = asked(hub, "dinov3", " ".join(names), HF_HUB_OFFLINE="1")
        assert absent.startswith("ModelError evaluation.backbones, dinov3: facebook/dinov3-vits16plus")
        assert "HF_HUB_OFFLINE forbids to fetch it" in absent
        assert here == str(names), "what is here needs no network"
