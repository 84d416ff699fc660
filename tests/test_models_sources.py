"""Where a base model comes from and what is checked before it is loaded: each mistake is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dopsd.models.sources import ModelError, Source, check_pipeline, check_vlm, identity, licence_of, locate, read_index
from tests.fake_hub import COMMIT
from tests.model_folders import COMPONENTS, EMOJI, NAME, ROOT, copied, edit, one_line, truncate


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded base to break."""
    return copied(tmp_path / "base")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_found_absolute_relative_and_at_home(tmp_path, monkeypatch):
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(tmp_path / "models" / "base"), "models/base", "models/base/", "~/models/base", "x/../models/base"):
        source = locate(path, tmp_path)
        assert source == Source(tmp_path / "models" / "base", None, None)
        assert source.shown == "base"
    monkeypatch.chdir(tmp_path)
    assert locate("models/base", Path()).folder.is_absolute()
    assert locate(".", Path("models/base")).shown == "base"


def test_what_is_shown_is_never_a_path(tmp_path):
    snapshot = tmp_path / "hub" / "models--Some-Owner--Some-Model" / "snapshots" / COMMIT
    assert Source(snapshot).shown == "Some-Owner/Some-Model"
    assert Source(Path("/")).shown == "model"
    assert Source(tmp_path / "x", NAME, COMMIT).shown == NAME


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("models/a/b", {}, ("model.path: models/a/b", "no such folder", "not a hub name (owner/name)")),
        ("models/missing", {}, ("model.path: models/missing", "models/ is here", "spelling", "revision")),
        ("/nowhere/at-all", {}, ("/nowhere/at-all", "no such folder")),
        ("~nobody-of-that-name/x", {}, ("no such folder",)),
        ("./owner/name", {}, ("not a hub name",)),
        ("owner/name.git/..", {}, ("not a hub name",)),
        ("owner/na--me", {}, ("not a hub name",)),
        ("https:/x/owner/name", {}, ("not a hub name",)),
        ("owner/na\nme", {}, ("not a hub name",)),
        ("x" * 5000, {}, ("not a hub name",)),
        ("", {}, ("model.path: empty",)),
        ("models/base", {"revision": "main"}, ("a folder here", "remove the revision")),
        ("models/file.safetensors", {}, ("single file",)),
        ("nowhere/a/b", {"key": "model.vlm"}, ("model.vlm: nowhere/a/b",)),
    ],
)
def test_a_wrong_path_is_one_line(tmp_path, path, options, words):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "file.safetensors").touch()
    with pytest.raises(ModelError) as caught:
        locate(path, tmp_path, **options)
    one_line(str(caught.value).replace("https:/x", ""), *words)


# --- what a folder must be --------------------------------------------------------------------------------------------


def test_the_embedded_base_passes():
    source = locate("data/base/emoji-turbo", ROOT)
    index = check_pipeline(source, "ZImagePipeline", COMPONENTS)
    assert index == read_index(EMOJI)
    text = json.loads((EMOJI / "text_encoder" / "config.json").read_text())
    assert check_vlm(Source(EMOJI / "vlm"), text) == {"vlm_theta": 10000.0, "encoder_theta": 10000.0}


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"
SHARDS = "transformer/diffusion_pytorch_model.safetensors.index.json"
VAE = "vae/diffusion_pytorch_model.safetensors"
BROKEN = {
    "no index": (lambda b: (b / "model_index.json").unlink(), ("no base model there", "model_index.json")),
    "empty": (lambda b: [shutil.rmtree(b), b.mkdir()], ("an empty folder", "check model.path")),
    "gone": (lambda b: shutil.rmtree(b), ("no such folder", "check model.path")),
    "below": (lambda b: [shutil.copytree(EMOJI, b / "sub"), (b / "model_index.json").unlink()], ("in sub/ below",)),
    "not JSON": (lambda b: (b / "model_index.json").write_text("{"), ("model_index.json", "not a valid JSON object")),
    "not UTF-8": (lambda b: (b / "model_index.json").write_bytes(b"\xff\xfe"), ("not a valid JSON object",)),
    "a list": (lambda b: (b / "model_index.json").write_text("[]"), ("not a valid JSON object",)),
    "deep": (lambda b: (b / "model_index.json").write_text("[" * 99999), ("not a valid JSON object",)),
    "klein": (lambda b: edit(b / "model_index.json", _class_name="Flux2KleinPipeline"),
        ("its pipeline is Flux2KleinPipeline, and ZImagePipeline is needed", "model.family")),
    "KV": (lambda b: edit(b / "model_index.json", _class_name="Flux2KleinKVPipeline"), ("conditions differently",)),
    "unnamed": (lambda b: edit(b / "model_index.json", _class_name=None), ("its pipeline is unnamed",)),
    "no vae": (lambda b: edit(b / "model_index.json", vae=None), ("lists no vae",)),
    "null vae": (lambda b: edit(b / "model_index.json", vae=[None, None]), ("lists no vae",)),
    "other vae": (lambda b: edit(b / "model_index.json", vae=["diffusers", "AutoencoderKLFlux2"]),
        ("its vae is AutoencoderKLFlux2, and AutoencoderKL is needed",)),
    "no folder": (lambda b: shutil.rmtree(b / "vae"), ("folder vae/ is missing", "copy the folder again")),
    "no config": (lambda b: (b / "vae" / "config.json").unlink(), ("vae/config.json is missing",)),
    "no scheduler": (lambda b: (b / "scheduler" / "scheduler_config.json").unlink(),
        ("scheduler_config.json is missing",)),
    "no tokenizer": (lambda b: (b / "tokenizer" / "tokenizer.json").unlink(),
        ("tokenizer.json or vocab.json is missing",)),
    "no weights": (lambda b: (b / "text_encoder" / "model.safetensors").unlink(), ("text_encoder/ has no weights",)),
    "pickles": (lambda b: _only_pickles(b / "text_encoder"), ("has only pytorch_model.bin", "safetensors are needed")),
    "other name": (lambda b: (b / "text_encoder" / "model.safetensors").rename(b / "text_encoder" / "q.safetensors"),
        ("has q.safetensors, but none of model.safetensors",)),
    "no shard": (lambda b: (b / "transformer" / SHARD).unlink(), (f"transformer/{SHARD} is missing",)),
    "no list": (lambda b: (b / SHARDS).unlink(), ("but none of",)),
    "bad list": (lambda b: (b / SHARDS).write_text("{"), (SHARDS, "not a valid JSON object")),
    "empty list": (lambda b: (b / SHARDS).write_text("{}"), ("lists no files",)),
    "cut shard": (lambda b: truncate(b / "transformer" / SHARD), (f"transformer/{SHARD}: damaged or cut short",)),
    "empty file": (lambda b: (b / VAE).write_bytes(b""), (f"{VAE}: damaged or cut short",)),
    "noise": (lambda b: (b / VAE).write_bytes(b"x" * 999), ("damaged",)),
    "odd head": (lambda b: (b / VAE).write_bytes(b"\x04" + b"\0" * 7 + b"[[]]"), ("damaged",)),
    "git-lfs": (lambda b: (b / VAE).write_bytes(b"version x\noid sha256:0\n"), ("pointer of git-lfs",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_base_that_cannot_be_used_is_one_line(base, case):
    break_it, words = BROKEN[case]
    break_it(base)
    advice = {"Flux2KleinKVPipeline": "it conditions differently (cached references)"}
    with pytest.raises(ModelError) as caught:
        check_pipeline(Source(base), "ZImagePipeline", COMPONENTS, advice=advice)
    one_line(caught.value, "base", *words)


def test_of_a_hub_model_the_command_is_named_that_fetches_it_anew(base):
    (base / "transformer" / SHARD).unlink()
    with pytest.raises(ModelError) as caught:
        check_pipeline(Source(base, NAME, COMMIT), "ZImagePipeline", COMPONENTS)
    command = f'`hf download {NAME} --revision {COMMIT} --include "transformer/*" --force-download`'
    assert str(tmp := base) not in one_line(caught.value, f"{NAME}: transformer/{SHARD} is missing", command), tmp
    (base / "model_index.json").unlink()
    with pytest.raises(ModelError) as caught:
        check_pipeline(Source(base, NAME, COMMIT), "ZImagePipeline", COMPONENTS)
    one_line(caught.value, f"`hf download {NAME} --revision {COMMIT} --force-download`")


def test_the_undistilled_base_is_refused(base):
    for flag in (None, False, "true"):
        if flag is not None:
            edit(base / "model_index.json", is_distilled=flag)
        with pytest.raises(ModelError) as caught:
            check_pipeline(Source(base), "ZImagePipeline", COMPONENTS, distilled=True)
        one_line(caught.value, "undistilled", "few-step tuning needs the distilled")
    edit(base / "model_index.json", is_distilled=True)
    assert check_pipeline(Source(base), "ZImagePipeline", COMPONENTS, distilled=True)["is_distilled"] is True


def test_a_snapshot_of_links_passes(tmp_path):
    folder = tmp_path / "snapshot"
    for file in EMOJI.rglob("*"):
        if file.is_file():
            link = folder / file.relative_to(EMOJI)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    assert check_pipeline(Source(folder), "ZImagePipeline", COMPONENTS)
    assert identity(Source(folder), tmp_path / "a.json") == identity(Source(EMOJI), tmp_path / "b.json")


# --- the VLM ----------------------------------------------------------------------------------------------------------

TEXT = json.loads((EMOJI / "text_encoder" / "config.json").read_text())


def _text_only(vlm: Path) -> None:
    (vlm / "config.json").write_text(json.dumps({**TEXT, "architectures": ["Qwen3ForCausalLM"]}))


def _blind(vlm: Path) -> None:
    save_file({"language_model.norm.weight": np.zeros(3, np.float32)}, vlm / "model.safetensors")


def _text_size(vlm: Path, **changes: object) -> None:
    config = json.loads((vlm / "config.json").read_text())
    edit(vlm / "config.json", text_config={**config["text_config"], **changes})


WRONG_VLM = {
    "empty": (lambda v: [shutil.rmtree(v), v.mkdir()], ("no config.json", "check model.vlm")),
    "text only": (_text_only, ("a Qwen3ForCausalLM, which sees no pictures", "a Qwen3-VL")),
    "older": (lambda v: edit(v / "config.json", architectures=["Qwen2_5_VLForConditionalGeneration"]),
        ("a Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")),
    "experts": (lambda v: edit(v / "config.json", architectures=None, model_type="qwen3_vl_moe"), ("a qwen3_vl_moe",)),
    "nothing said": (lambda v: (v / "config.json").write_text("{}"), ("Qwen3-VL",)),
    "no text": (lambda v: edit(v / "config.json", text_config=None), ("lacks text_config",)),
    "no eyes": (lambda v: edit(v / "config.json", vision_config=None), ("lacks text_config or vision_config",)),
    "wider": (lambda v: _text_size(v, hidden_size=4096, num_hidden_layers=36, rms_norm_eps=1e-5),
        ("hidden_size 4096 instead of 192", "num_hidden_layers 36 instead of 5", "rms_norm_eps 1e-05 instead of 1e-0")),
    "half said": (lambda v: _text_size(v, vocab_size=None), ("vocab_size None instead of 1263",)),
    "no processor": (lambda v: (v / "preprocessor_config.json").unlink(), ("preprocessor_config.json", "missing")),
    "no weights": (lambda v: (v / "model.safetensors").unlink(), ("has no weights",)),
    "cut": (lambda v: truncate(v / "model.safetensors"), ("model.safetensors: damaged or cut short",)),
    "blind": (_blind, ("no vision half",)),
    "bad JSON": (lambda v: (v / "config.json").write_text("nope"), ("config.json", "not a valid JSON object")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_VLM)
def test_a_vlm_that_cannot_be_used_is_one_line(base, case):
    break_it, words = WRONG_VLM[case]
    break_it(base / "vlm")
    with pytest.raises(ModelError) as caught:
        check_vlm(Source(base / "vlm"), TEXT)
    one_line(caught.value, "model.vlm: vlm", *words)


def test_both_ways_of_saying_the_ropes_base_are_read(base):
    vlm, config = Source(base / "vlm"), json.loads((base / "vlm" / "config.json").read_text())
    ropes = [
        {"rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}},
        {"rope_scaling": {"rope_theta": 5000000}},
        {"rope_parameters": {"rope_theta": 5e6}},
        {"rope_parameters": {"full_attention": {"rope_theta": 5e6}}, "rope_scaling": None},
    ]
    plain = {k: v for k, v in config["text_config"].items() if k != "rope_parameters"}
    for rope in ropes:
        edit(base / "vlm" / "config.json", text_config={**plain, **rope})
        assert check_vlm(vlm, {**TEXT, "rope_parameters": None, "rope_theta": 1000000}) == {
            "vlm_theta": 5e6, "encoder_theta": 1e6,
        }  # fmt: skip
    edit(base / "vlm" / "config.json", text_config=plain)
    assert check_vlm(vlm, TEXT)["vlm_theta"] is None
    edit(base / "vlm" / "config.json", text_config={k: v for k, v in plain.items() if k != "rms_norm_eps"})
    check_vlm(vlm, TEXT)  # left out is the classes' own default
    edit(base / "vlm" / "config.json", architectures=["Qwen3VLForConditionalGeneration"])
    check_vlm(vlm, TEXT)
    (base / "vlm" / "preprocessor_config.json").rename(base / "vlm" / "processor_config.json")
    check_vlm(vlm, TEXT)


# --- licence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# hi", "apache-2.0"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: flux-non-commercial\nlicense_link: x\n---\n", "flux-non-commercial"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n---\n", "mit"),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\n- license: mit\n---\n", None),
        ("---\ntags: [x]\n---\nlicense: mit", None),
        ("# hi\nlicense: mit\n", None),
        ("---\nlicense: mit\n" + "x" * 100_000, None),
        ("---\na: " + "[" * 5000 + "\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_readme(tmp_path, readme, licence):
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert licence_of(Source(tmp_path)) == licence


def test_without_a_readme_no_licence_is_said(tmp_path):
    assert licence_of(Source(tmp_path)) is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---")
    licence_of(Source(tmp_path))
