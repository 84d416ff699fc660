"""`dopsd concept caption` end to end: real VLMs, tiny; what is written, resumed and said, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from concept_folders import picture
from typer.testing import CliRunner

from dopsd import cli
from dopsd.captioning import caption_folder, naming_for
from dopsd.config import load_settings
from dopsd.config.groups import ModelSettings
from dopsd.data.images import ImageError, load_image
from dopsd.data.records import is_text
from dopsd.data.schema import validate_dataset
from dopsd.data.wording import MOST_WORDS, VARIANTS, Naming, clean, unusable
from dopsd.models import ModelError, captioner, qwen_vl
from dopsd.models.captioner import find_captioner, load_captioner
from tests import published
from tests.model_folders import edit, one_line, truncate
from tests.speaking import write_speaking_vlm
from tests.tiny_project import make_project

SIZES = ((96, 64), (64, 64), (64, 96), (80, 80))
TOKENS = 24
"""What an answer may have here: a babbling model goes on for as long as it may."""
SAID = "an owl sits on a forest path"
STYLED = {
    "short": "an owl sits on a forest path in [V] style",
    "medium": "an owl sits on a forest path, in [V] style",
    "detailed": "an owl sits on a forest path, in [V] style",
    "request": "Draw an owl sits on a forest path in [V] style",
}
"""What becomes of :data:`SAID`, put together by hand."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_speaking_vlm(root / "owl", SAID)
    write_speaking_vlm(root / "terse", "an owl sits")
    published.write_qwen3_vl(root / "babble")
    published.write_krea2_turbo(root / "krea")
    published.write_klein(root / "klein", blocks=(1, 1))
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "My Pictures"
    (folder / "holdout").mkdir(parents=True)
    for seed, size in enumerate(SIZES):
        picture(seed, size).save(folder / f"{seed}.png")
    picture(9, (64, 64)).save(folder / "holdout/h.png")
    return folder


@pytest.fixture(autouse=True)
def _inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr(captioner, "MAX_NEW_TOKENS", TOKENS)


def _run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["concept", "caption", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def _refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["dopsd", "concept", "caption", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert "loading" not in out, "said before anything is loaded"
    return one_line(err.strip().splitlines()[-1])


def _captions(part: Path) -> dict[str, dict[str, str]]:
    rows = [json.loads(line) for line in (part / "metadata.jsonl").read_text().splitlines()]
    return {row["image"]: row.get("captions", {}) for row in rows}


# --- a model that says something --------------------------------------------------------------------------------------


def test_a_folder_of_pictures_becomes_a_concept(models: Path, pictures: Path) -> None:
    said, _ = _run(pictures, "--model", models / "owl")
    assert _captions(pictures) == {f"{n}.png": STYLED for n in range(4)}
    assert _captions(pictures / "holdout") == {"h.png": STYLED}
    lines = said.splitlines()
    assert "5 of 5 pictures captioned" in lines
    assert lines[-5:-2] == [
        f"  0.png, short: {STYLED['short']}", f"  1.png, medium: {STYLED['medium']}",
        f"  2.png, detailed: {STYLED['detailed']}",
    ]  # fmt: skip
    assert lines[-2] == f"review and edit: {pictures / 'holdout/metadata.jsonl'}, {pictures / 'metadata.jsonl'}"
    command = lines[-1].partition("`")[2].rstrip("`")
    assert command == f"dopsd concept add '{pictures}' --name my-pictures"

    settings = load_settings(Path("params.yaml"))
    table, held_out = validate_dataset(pictures, "my-pictures", settings.data)
    assert held_out is not None
    assert dict(table.rows[0].captions) == STYLED


def test_a_subject_is_called_by_its_class_word(models: Path, pictures: Path) -> None:
    _run(pictures, "--model", models / "owl", "--subject", "an owl")
    assert _captions(pictures)["0.png"]["medium"] == "an [V] owl sits on a forest path"
    assert _captions(pictures)["0.png"]["request"] == "Draw an [V] owl sits on a forest path"
    said, _ = _run(pictures, "--model", models / "owl", "--kind", "subject", "--subject", "a wolf", "--redo")
    assert _captions(pictures)["0.png"]["short"] == "[V] wolf, an owl sits on a forest path"
    assert f"look at {pictures / '0.png'}, short: it does not mention the wolf" in said.splitlines()
    assert "an [V] owl" in (pictures / ".metadata.jsonl.before").read_text()


def test_concept_json_says_what_the_concept_is(models: Path, pictures: Path) -> None:
    (pictures / "concept.json").write_text('{"kind": "subject", "label": "owl"}')
    assert naming_for(pictures, None, None, "[V]") == Naming("subject", "[V]", "owl")
    assert naming_for(pictures, "style", None, "[V]") == Naming("style", "[V]")
    (pictures / "concept.json").write_text("[" * 100_000)
    assert naming_for(pictures, None, None, "[V]") == Naming("style", "[V]")


def test_a_concept_of_the_project_is_captioned_by_its_name(models: Path, project: Path) -> None:
    concept = project / "data/concepts/named"
    concept.mkdir()
    picture(3, (64, 64)).save(concept / "0.png")
    said, _ = _run("named", "--model", models / "owl")
    assert _captions(concept) == {"0.png": STYLED}
    assert said.splitlines()[-1] == "next: `dopsd concept add data/concepts/named --name named`"


def test_pictures_with_captions_stay_and_a_second_run_does_the_rest(models: Path, pictures: Path) -> None:
    """Broken off in the middle: what was made is there, a person's edit of it stays, and nothing is made twice."""
    settings = load_settings(Path("params.yaml"))

    def spoil(message: str) -> None:
        if message.startswith("loading"):  # after the pictures were looked at
            shutil.move(pictures / "2.png", pictures.parent / "2.png")

    with pytest.raises(ImageError, match=r"2\.png"):
        caption_folder(pictures, Naming("style", "[V]"), settings, Path(), str(models / "owl"), message=spoil)
    assert list(_captions(pictures)) == ["0.png", "1.png"]
    shutil.move(pictures.parent / "2.png", pictures / "2.png")

    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    lines[1] = '{"image":  "1.png", "caption": "edited [V]"}'
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    said, _ = _run(pictures, "--model", models / "owl")
    assert "3 of 5 pictures captioned; 2 had captions" in said
    after = (pictures / "metadata.jsonl").read_text().splitlines()
    assert after[:2] == lines
    assert list(_captions(pictures)) == [f"{n}.png" for n in range(4)]

    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pictures.rglob("*") if path.is_file()}
    said, _ = _run(pictures, "--model", models / "nothing", "--params", Path("params.yaml"))
    assert "0 of 5 pictures captioned; 5 had captions" in said, "and no model is looked for"
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in pictures.rglob("*") if p.is_file()} == before


def test_texts_beside_pictures_get_one_caption(models: Path, pictures: Path) -> None:
    (pictures / "0.txt").write_text("mine [V]")
    _run(pictures, "--model", models / "owl")
    assert [(pictures / f"{n}.txt").read_text().strip() for n in range(4)] == ["mine [V]", *[STYLED["medium"]] * 3]
    assert _captions(pictures / "holdout") == {"h.png": STYLED}
    validate_dataset(pictures, "x", load_settings(Path("params.yaml")).data)


def test_a_teacher_that_reads_a_caption_of_its_own_gets_the_detailed_one(models: Path, pictures: Path) -> None:
    from dopsd.project import needs_of

    override = ("model.context=enhanced-prompt", "model.context_variant=prose")
    _run(pictures, "--model", models / "owl", "--set", override[0], "--set", override[1])
    assert list(_captions(pictures)["0.png"]) == ["short", "medium", "prose", "request"]
    settings = load_settings(Path("params.yaml"), override)
    validate_dataset(pictures, "x", settings.data, needs_of(settings, Path()))


# --- models that babble -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["babble", "krea"])
def test_of_babble_captions_are_made_that_can_be_trained_on_or_it_is_said_that_there_is_none(
    models: Path, pictures: Path, model: str
) -> None:
    own = ["--model", models / model]
    if model == "krea":  # the base's own text encoder is a whole VLM
        own = ["--set", "model.family=krea-2", "--set", f"model.path={models / model}"]
    result = CliRunner().invoke(cli.app, ["concept", "caption", str(pictures), *map(str, own)])
    assert result.exit_code in (0, 1), result.output
    made = {name: texts for part in (pictures, pictures / "holdout") if (part / "metadata.jsonl").exists()
            for name, texts in _captions(part).items()}  # fmt: skip
    for texts in made.values():
        for variant, text in texts.items():
            assert text.count("[V]") == 1
            assert is_text(text)
            assert "<|" not in text
            assert len(text) < 12 * MOST_WORDS[variant] + 30  # type: ignore[index]
    said = result.stderr.splitlines()
    for name in ("0.png", "1.png", "2.png", "3.png", "holdout/h.png"):
        for variant in VARIANTS:
            failed = any(f"no caption for {pictures / name}, {variant}: it " in line for line in said)
            assert failed != (variant in made.get(Path(name).name, {})), (name, variant)
    assert (result.exit_code == 1) == any("no caption for" in line for line in said)


def test_the_answer_is_the_greedy_one_to_this_picture_and_question(models: Path) -> None:
    """Against a loop without a cache, on inputs that are put together from the parts."""
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    settings = ModelSettings(path="unused", device="cpu", dtype="float32")
    ask = load_captioner(find_captioner(settings, Path(), str(models / "babble")), settings)
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(models / "babble", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models / "babble")
    processor = qwen_vl.load_image_processor(models / "babble")
    ends = set(vlm.generation_config.eos_token_id)
    answers = []
    for seed, question in ((2, "what is it?"), (3, "what is it?"), (2, "a red boat on the water")):
        shown = picture(seed, (300, 260))
        pixels = processor(images=[shown], return_tensors="pt")
        (block,) = qwen_vl.image_blocks(pixels["image_grid_thw"], processor.merge_size)
        text = f"<|im_start|>user\n{block}{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer([text], return_tensors="pt").input_ids
        start = ids.shape[1]
        while ids.shape[1] < start + TOKENS and ids[0, -1].item() not in ends:
            vlm.model.rope_deltas = None
            with torch.no_grad():
                types = qwen_vl.token_types(tokenizer, ids)
                logits = vlm(input_ids=ids, mm_token_type_ids=types, use_cache=False, **pixels).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        answers.append(ask(shown, question))
        assert answers[-1] == expected
    assert len(set(answers)) == 3, "picture and question both matter"


def test_an_answer_ends_and_is_greedy_whatever_the_models_own_settings_are(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "babble", tmp_path / "vlm")
    edit(folder / "generation_config.json", max_new_tokens=100_000, do_sample=True, num_beams=4, temperature=9.0)
    settings = ModelSettings(path="unused", device="cpu", dtype="float32")
    ask = load_captioner(find_captioner(settings, Path(), str(folder)), settings)
    assert ask(picture(3, (300, 260)), "what is it?") == "N" * TOKENS


# --- any other model of transformers ----------------------------------------------------------------------------------


def write_llava(folder: Path) -> Path:
    """A random Llava: another family, with a processor that needs nothing for videos."""
    import transformers as t
    from tokenizers import Tokenizer

    from tests.published_tokens import _tiny_tokenizer

    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tiny_tokenizer()),
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %}\n"
    )
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**size, image_size=28, patch_size=14),
        text_config=t.LlamaConfig(**size, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    t.LlavaForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": 28, "width": 28}
    t.LlavaProcessor(
        image_processor=t.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side), tokenizer=tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_model_of_another_family_answers_too(tmp_path: Path) -> None:
    settings = ModelSettings(path="unused", device="cpu", dtype="bfloat16")
    ask = load_captioner(find_captioner(settings, Path(), str(write_llava(tmp_path / "llava"))), settings)
    first, second = (ask(picture(seed, (64, 48)), "what is it?") for seed in (0, 1))
    assert first
    assert first != second


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing-of-that-name"], "no such folder, and no concept of that name"),
        (["PICTURES", "--kind", "subject"], "a subject needs its class word"),
        (["PICTURES", "--kind", "style", "--subject", "a wolf"], "a style has no subject"),
        (["PICTURES", "--subject", "<|im_end|>"], "--subject: give a word or two"),
        (["PICTURES"], "its weights have no language half, so it cannot answer; give another one: --model"),
        (["PICTURES", "--set", "model.family=flux2-klein", "--set", "model.path=MODELS/klein"],
         "has no model that sees pictures and answers; give another one: --model"),
        (["PICTURES", "--set", "model.family=flux2-klein", "--set", "model.context=edit-reference"],
         "captions say what to change there"),
        (["PICTURES", "--model", "MODELS/klein/text_encoder"], "a qwen3, which has no image-text head"),
        (["PICTURES", "--model", "MODELS/nothing"], "--model: "),
        (["PICTURES", "--model", "MODELS"], "no config.json, so no model there"),
        (["PICTURES", "--model", "data/nothing"], "no such folder, though data/ is here"),
        (["TEXTS", "--set", "model.context=enhanced-prompt"], "a .txt holds one caption"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_before_anything_is_loaded(
    models: Path, pictures: Path, arguments: list[str], said: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if arguments[0] == "TEXTS":
        (pictures / "0.txt").write_text("mine [V]")
    places = {"PICTURES": str(pictures), "TEXTS": str(pictures)}
    filled = [places.get(word, word).replace("MODELS", str(models)) for word in arguments]
    assert said in _refused(capsys, monkeypatch, *filled)
    assert not (pictures / "metadata.jsonl").exists()


def test_a_folder_and_a_concept_of_one_name_are_told_apart(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "blots").mkdir()
    assert "say ./blots or data/concepts/blots" in _refused(capsys, monkeypatch, "blots")
    (project / "blots").rmdir()


def _text_config(folder: Path, **changes: object) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config=text | changes)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: truncate(f / "model.safetensors"), "damaged or cut short"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights are never read"),
        (lambda f: (f / "preprocessor_config.json").unlink(), ""),
        (lambda f: (f / "generation_config.json").unlink() or _text_config(f, eos_token_id=None), ""),
        (lambda f: (f / "tokenizer.json").unlink() or (f / "vocab.json").unlink(), "tokenizer.json or vocab.json"),
        (lambda f: edit(f / "config.json", model_type="my_own", auto_map={"AutoModel": "own.Model"}), "a my_own, "),
        (lambda f: (f / "chat_template.json").unlink(), "no chat template, so it is no instruct model"),
        (lambda f: edit(f / "config.json", text_config={}), "parameters, its weights are"),
        (lambda f: _text_config(f, intermediate_size=96), "cannot be loaded"),
    ],
)  # fmt: skip
def test_a_model_folder_that_is_not_whole_is_one_line(models: Path, tmp_path: Path, spoil: object, said: str) -> None:
    folder = tmp_path / "vlm"
    shutil.copytree(models / "owl", folder)
    spoil(folder)  # type: ignore[operator]
    settings = ModelSettings(path="unused", device="cpu")
    if not said:  # Qwen3-VL's own image processor is known, and so is the end of a turn
        assert load_captioner(find_captioner(settings, Path(), str(folder)), settings)(picture(0), "x") == SAID
        return
    with pytest.raises(ModelError) as caught:
        load_captioner(find_captioner(settings, Path(), str(folder)), settings)
    one_line(caught.value, said, "vlm")


def test_weights_without_a_head_are_no_captioner(models: Path, tmp_path: Path) -> None:
    """Untied, and stored without the head: the library would draw a random one."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "vlm"
    shutil.copytree(models / "owl", folder)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("lm_head")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = ModelSettings(path="unused", device="cpu")
    found = find_captioner(settings, Path(), str(folder))
    with pytest.raises(ValueError, match=r"lack lm_head\.weight") as caught:
        load_captioner(found, settings)
    one_line(caught.value, "--model")


def test_a_broken_picture_is_named_before_anything_is_loaded(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "1.png").write_bytes(b"GIF89a")
    assert "1.png: is a GIF picture, which is not read" in _refused(
        capsys, monkeypatch, pictures, "--model", models / "owl"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written_to_is_said(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.chmod(0o500)
    assert "may not be written to" in _refused(capsys, monkeypatch, pictures, "--model", models / "owl")
    pictures.chmod(0o700)


def test_the_settings_vlm_is_the_one_that_is_asked(models: Path, pictures: Path) -> None:
    _run(pictures, "--set", f"model.vlm={models / 'owl'}")
    assert _captions(pictures)["0.png"] == STYLED
    assert unusable(clean(SAID, "short"), "short") == ""
    image = load_image(pictures / "0.png", 50_000_000)
    settings = ModelSettings(path="unused", vlm=str(models / "owl"), device="cpu")
    assert load_captioner(find_captioner(settings, Path()), settings)(image, "anything") == SAID


# --- pictures that got only some --------------------------------------------------------------------------------------


def test_a_second_run_makes_the_captions_that_the_first_could_not(models: Path, pictures: Path) -> None:
    """Nobody's own row gets more than it has, though it has as few."""
    own = '{"image": "0.png", "captions": {"short": "mine [V]"}}'
    (pictures / "metadata.jsonl").write_text(own + "\n")
    shutil.rmtree(pictures / "holdout")
    _, failed = _run(pictures, "--model", models / "terse", code=1)
    lines = [line for line in failed.splitlines() if line.startswith("no caption")]
    assert lines == [f"no caption for {pictures / f'{n}.png'}, detailed: it is too short" for n in (1, 2, 3)]
    terse = _captions(pictures)["1.png"]
    assert list(terse) == ["short", "medium", "request"]

    rows = (pictures / "metadata.jsonl").read_text().splitlines()
    rows[1] = '{"image": "1.png", "captions": {"medium": "edited [V]"}}'
    rows[2] = '{"image": "2.png", "captions": {"detailed": "also mine [V]"}}'
    (pictures / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    said, failed = _run(pictures, "--model", models / "terse", code=1)
    assert said.splitlines()[-2:-1] == [
        "0 of 4 pictures captioned; 2 had captions, which stay (--redo makes them anew)"
    ]
    assert failed.count("no caption for") == 2
    said, _ = _run(pictures, "--model", models / "owl")
    assert "2 of 4 pictures captioned; 2 had captions" in said
    assert (pictures / "metadata.jsonl").read_text().splitlines()[:3] == [
        own, rows[1].replace("}}", f', "detailed": {json.dumps(STYLED["detailed"])}}}}}'), rows[2],
    ]  # fmt: skip
    assert _captions(pictures)["3.png"] == terse | {"detailed": STYLED["detailed"]}
    validate_dataset(pictures, "x", load_settings(Path("params.yaml")).data)

    edited = (pictures / "metadata.jsonl").read_text().replace(', "detailed": ' + json.dumps(STYLED["detailed"]), "")
    (pictures / "metadata.jsonl").write_text(edited)
    said, _ = _run(pictures, "--model", models / "owl")
    assert "4 had captions" in said, "what a person took out is not made again"


def test_references_are_no_pictures_and_who_captioned_meanwhile_is_counted(models: Path, pictures: Path) -> None:
    (pictures / "metadata.jsonl").write_text('{"image": "0.png", "caption": "[V] of it", "references": ["1.png"]}\n')
    settings = load_settings(Path("params.yaml"))

    def meanwhile(message: str) -> None:
        if message.startswith("loading"):
            with (pictures / "metadata.jsonl").open("a") as file:
                file.write('{"image": "2.png", "caption": "mine [V]"}\n')

    report = caption_folder(
        pictures, Naming("style", "[V]"), settings, Path(), str(models / "owl"), message=meanwhile
    )  # fmt: skip
    assert (report.total, report.made, report.had) == (4, 2, 2)
    assert "1.png" not in _captions(pictures)
