"""What the text encoders take, judged beforehand: against the pipelines' own calls, the encoders and the libraries."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from dopsd import champions
from dopsd.config import Settings
from dopsd.data.manifest import DataError
from dopsd.models import ModelError, load_family, reading, resolved
from dopsd.models.base import Family, Request
from dopsd.models.qwen_vl import picture_tokens
from dopsd.models.reading import Reader, reader_of
from dopsd.project import read_concept
from dopsd.registry.serving import FewStepModel, Row
from dopsd.sampling import check_prompts, draw
from dopsd.stages import STAGES
from tests import tiny
from tests.family_folders import NAMES, picture, settings_of
from tests.published_tokens import ADDED_TOKENS, SPECIAL_TOKENS
from tests.test_families import pipeline_of

BIG = {"context_pixels": (512 * 512, 768 * 768)}
SEEING = ("z-image", "krea-2")
"""The families whose text encoder is shown the teacher's picture."""


def settings_for(name: str, folders: dict[str, Path], resolution: int = 64, **model: Any) -> Settings:
    return Settings.model_validate({
        "concepts": ["blots"], "model": settings_of(name, folders, **model).model_dump(),
        "data": {"resolution": resolution},
        "train": tiny.tiny_settings().model_dump(mode="json", exclude={"teacher"}) | {"teacher": {"decay": 0.9}},
        "evaluation": {"steps": [1, 2, 4, 8, 32]},
    })  # fmt: skip


def read_by(name: str, folders: dict[str, Path], resolution: int = 64, **model: Any) -> Reader:
    return reader_of(settings_for(name, folders, resolution, **model), Path())


@pytest.fixture(scope="module")
def families(folders) -> dict[str, Family]:
    return {name: load_family(settings_of(name, folders)) for name in NAMES}


def words(count: int, last: str = "") -> str:
    return " ".join(["fox"] * (count - bool(last)) + [last] * bool(last))


def taught(reader: Reader, text: str, sizes: set[tuple[int, int]] | None) -> str:
    return reader.as_context(text, reader.picture_tokens(sizes))


def first_refused(answers: Any) -> int:
    """The fewest words that are refused; ``answers`` says what is wrong with so many."""
    low, high = 1, 1200
    assert not answers(low)
    assert answers(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if answers(middle) else (middle, high)
    return high


# --- how much is read -------------------------------------------------------------------------------------------------


class _Cut(Exception):
    """How many tokens a pipeline's text has, and how many it takes."""


class _Watched:
    """A tokenizer that says what it is asked for, as a pipeline asks, and makes nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        assert options["truncation"], "so it is cut without a word"
        (ids,) = self._tokenizer([text] if isinstance(text, str) else text).input_ids
        raise _Cut(len(ids), options["max_length"])


def cut_by(pipeline: Any, text: str) -> int:
    """How many tokens of a prompt the pipeline drops."""
    with pytest.raises(_Cut) as caught:
        pipeline.encode_prompt(text)
    found, taken = caught.value.args
    return max(0, found - taken)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("word", [" fox", " unheard", "狐", " 7", "é"])
def test_a_prompt_is_refused_where_the_pipeline_would_begin_to_cut_it(name, word, families, folders):
    reader, pipeline = read_by(name, folders), pipeline_of(families[name])
    pipeline.__dict__["tokenizer"] = _Watched(pipeline.tokenizer)
    fewest = first_refused(lambda count: reader.as_prompt(word * count))
    assert cut_by(pipeline, word * (fewest - 1)) == 0
    cut = cut_by(pipeline, word * fewest)
    assert cut > 0
    assert reader.as_prompt(word * fewest) == f"{512 + cut} tokens, and 512 are read; shorten it"


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_just_the_length_is_encoded_to_its_end(name, families, folders):
    reader, family = read_by(name, folders), families[name]
    most = first_refused(lambda count: reader.as_prompt(words(count))) - 1
    one, other = family.encode_prompt([Request(words(most)), Request(words(most, "boat"))])
    assert any((one[key] != other[key]).any() for key in one)
    with pytest.raises(ModelError, match="is 513 tokens long, at most 512"):
        family.encode_prompt([Request(words(most + 1))])


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("size", [(640, 640), (1024, 448), (400, 900)])
def test_a_teachers_turn_is_refused_where_encoding_refuses_it(name, size, folders):
    """Its picture counts too, by its own shape; the encoder counts the ids that it is given."""
    reader = read_by(name, folders, resolution=640, **BIG, context_suffix=" as shown")
    family = load_family(settings_of(name, folders, **BIG, context_suffix=" as shown"))
    shown = picture(*reading.bucket_size(*size, 640))
    fewest = first_refused(lambda count: taught(reader, words(count), {size}))
    family.encode_context([Request(words(fewest - 1))], [shown])
    with pytest.raises(ModelError, match=r"the teacher's context of .* is ([0-9]+) tokens long") as caught:
        family.encode_context([Request(words(fewest + 2))], [shown])
    said = taught(reader, words(fewest + 2), {size})
    limit = family.longest_context(family.parts.configs)
    assert f"is {limit + 3} tokens long, at most {limit} are read" in str(caught.value)
    assert said.startswith(f"{limit + 3:,} tokens as the teacher reads it with model.context_suffix, ")
    assert said.endswith(f" of them its picture, and {limit:,} are read; shorten it or model.context_suffix or lower "
                         "model.context_pixels")  # fmt: skip


@pytest.mark.parametrize("context", ["edit", "edit-reference"])
def test_kleins_teacher_has_less_room_by_its_suffix(context, folders):
    reader, family = read_by("flux2-klein", folders, context=context), load_family(
        settings_of("flux2-klein", folders, context=context))  # fmt: skip
    fewest = first_refused(lambda count: taught(reader, words(count), {(64, 64)}))
    assert not reader.as_prompt(words(fewest)), "the student has the room"
    family.encode_context([Request(words(fewest - 1))], [picture(64, 64)])
    with pytest.raises(ModelError, match=r"the teacher's prompt of .* is 513 tokens"):
        family.encode_context([Request(words(fewest))], [picture(64, 64)])
    assert taught(reader, words(fewest), {(64, 64)}) == (
        "513 tokens as the teacher reads it with model.context_suffix, and 512 are read; shorten it or "
        "model.context_suffix"
    )


def test_of_several_pictures_the_one_with_most_tokens_counts(folders):
    reader = read_by("z-image", folders, resolution=640, **BIG)
    square, wide = (first_refused(lambda count, size=size: taught(reader, words(count), {size}))
                    for size in ((640, 640), (900, 450)))  # fmt: skip
    assert square != wide
    assert first_refused(lambda count: taught(reader, words(count), {(640, 640), (900, 450)})) == min(square, wide)
    assert first_refused(lambda count: taught(reader, words(count), None)) <= min(square, wide)


@pytest.mark.parametrize("limits", [(64 * 64, 64 * 64), (512 * 512, 768 * 768), (3136, 1024 * 1024), (90_000, 90_001)])
def test_a_pictures_tokens_are_those_of_the_library(limits):
    vision = {"patch_size": 16, "spatial_merge_size": 2}
    for width, height in product((32, 48, 80, 512, 528, 1000, 1216, 2016), repeat=2):
        tall, wide = smart_resize(height, width, 32, *limits)
        assert picture_tokens(vision, limits, (width, height)) == tall // 32 * (wide // 32) + 2


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_is_not_counted_fits(name, folders):
    """What is far below the limit costs no tokenizer; the turn around it is what that leaves room for."""
    reader = read_by(name, folders)
    assert not reader.as_prompt("é" * ((512 - reading._TURN) // 2))
    assert "tokenizer" not in reader.__dict__
    tokenizer = reader.tokenizer
    assert reader.family.prompt_lengths(tokenizer, [""])[0] <= reading._TURN
    assert reader.room == 512 - reader.family.prompt_lengths(tokenizer, [""])[0]


# --- words that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_token_that_is_no_word_is_refused(name, folders):
    reader = read_by(name, folders)
    tokenizer = AutoTokenizer.from_pretrained(folders[name] / "tokenizer")
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
    assert tokens == {*SPECIAL_TOKENS, *ADDED_TOKENS}
    for token in tokens:
        said = reader.as_prompt(f"a fox{token} in [V] style")
        assert said.startswith(f"{token} is "), token
        assert "control token" in said
    for text in ("a < b > c", "<3 [V]", "x<y", "<|", "a <b>bold</b> fox", "a |fox| in [V] style", "<| im_end |>"):
        assert not reader.as_prompt(text)
        assert not {*tokenizer(text).input_ids} & {*tokenizer.added_tokens_decoder}


def test_a_word_that_a_base_adds_is_a_word():
    settings = settings_for("z-image", {"z-image": Path("data/base/emoji-turbo"), "vlm": Path("data/base/x")}, vlm=None)
    reader = reader_of(settings, Path(__file__).parent.parent)
    assert "[V]" in {token.content for token in reader.tokenizer.added_tokens_decoder.values()}
    assert not reader.as_prompt("a fox in [V] style")
    assert reader.as_prompt("a fox <think>")


# --- without the tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused_without_the_tokenizer_is_refused_with_it(name, folders):
    exact = read_by(name, folders, **BIG)
    bound = replace(exact, source=None)
    assert bound.tokenizer is None
    assert bound.room is None
    for text in (words(513), "<|anything|> at all", words(400), words(505), "unheard " * 300, "狐" * 600, "<think>"):
        assert exact.as_prompt(text) or not bound.as_prompt(text)
        assert taught(exact, text, {(64, 64)}) or not taught(bound, text, {(64, 64)})
    assert bound.as_prompt(words(900)) == "at least 900 tokens, and 512 are read; shorten it"
    assert bound.as_prompt("a <|im_end|>").startswith("<|im_end|> is ")
    assert not bound.as_prompt("<think>")
    assert bound.as_prompt("x" * 70_000) == "70,000 characters, and 512 tokens are read; shorten it"


def test_a_tokenizer_in_the_hubs_cache_is_used_and_nothing_is_asked(folders, tmp_path, monkeypatch):
    def asked(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = settings_for("flux2-klein", folders)
    named = settings.model_copy(update={"model": settings.model.model_copy(update={"path": "some/klein"})})
    assert reader_of(named, tmp_path).source is None
    kept = tmp_path / "hub" / "models--some--klein"
    place = kept / "snapshots" / ("a" * 40)
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    (place / "tokenizer").mkdir(parents=True)
    shutil.copy(folders["flux2-klein"] / "tokenizer" / "tokenizer.json", place / "tokenizer")
    alone = reader_of(named, tmp_path)
    assert alone.tokenizer is None, "single files in the cache are no tokenizer: no fault of the data's, nor the base's"
    shutil.copytree(folders["flux2-klein"] / "tokenizer", place / "tokenizer", dirs_exist_ok=True)
    assert reader_of(named, tmp_path).as_prompt(words(505)).endswith(" tokens, and 512 are read; shorten it")
    remembered = named.model_copy(update={"model": named.model.model_copy(update={"revision": "b" * 40})})
    assert reader_of(remembered, tmp_path).source is None, "another commit than the cache's"


def test_a_damaged_tokenizer_is_one_line(folders, tmp_path):
    shutil.copytree(folders["krea-2"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "base" / "tokenizer" / "tokenizer.json").write_text("{")
    reader = read_by("krea-2", {"krea-2": tmp_path / "base"})
    with pytest.raises(ModelError, match=r"^base: its tokenizer cannot be loaded .*; copy the folder again$") as caught:
        reader.as_prompt(words(500))
    assert "\n" not in str(caught.value)


# --- where it is said -------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path) -> Path:
    for part, count in (("", 4), ("holdout", 1)):
        folder = tmp_path / "data" / "concepts" / "blots" / part
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(64, 64, 10 * len(part) + number).save(folder / f"{number}.png")
        write(tmp_path, part, [{"short": f"blot {number} in [V] style"} for number in range(count)])
    return tmp_path


def write(root: Path, part: str, captions: list[dict[str, str]]) -> None:
    rows = [json.dumps({"image": f"{number}.png", "captions": each}) + "\n" for number, each in enumerate(captions)]
    (root / "data" / "concepts" / "blots" / part / "metadata.jsonl").write_text("".join(rows))


def without_weights(folders: dict[str, Path], root: Path) -> dict[str, Path]:
    ignore = shutil.ignore_patterns("*.safetensors")
    return {name: Path(shutil.copytree(folder, root / "bases" / name, ignore=ignore))
            for name, folder in folders.items()}  # fmt: skip


def said_of(root: Path, settings: Settings, stage: str = "validate") -> list[str]:
    with pytest.raises(DataError) as caught:
        STAGES[stage]("blots", settings, root)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(caught.value.faults)
    return [line.removeprefix(f"{root / 'data' / 'concepts' / 'blots'}/") for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_validate_names_row_and_variant_held_out_ones_too_and_needs_no_weights(name, folders, project):
    settings = settings_for(name, without_weights(folders, project))
    sound = {"short": "a blot in [V] style"}
    write(project, "", [sound, sound | {"long": words(900, "[V]")}, {"short": "[V]<|image_pad|> blot"}, sound])
    write(project, "holdout", [{"asked": words(600)}])
    lines = said_of(project, settings)
    control = "<|image_pad|> is how tokenizers write their control tokens, not text; remove it or say it in words"
    assert [line.partition(": '")[0] for line in lines] == [
        "metadata.jsonl, row 2, captions", "metadata.jsonl, row 3, captions", "holdout/metadata.jsonl, row 1, captions",
    ]  # fmt: skip
    assert "'long': 9" in lines[0]
    assert lines[0].endswith(" tokens, and 512 are read; shorten it")
    assert lines[1].endswith(f"'short': {control}")
    assert "'asked': 6" in lines[2]


def test_of_a_teacher_that_reads_more_both_captions_are_counted_alone(folders, project):
    settings = settings_for("flux2-klein", folders, context="enhanced-prompt", context_variant="long")
    for part, count in (("", 4), ("holdout", 1)):
        write(project, part, [{"short": f"blot {n} in [V] style", "long": words(505)} for n in range(count)])
    assert [line.split(": '")[1].split(":")[0] for line in said_of(project, settings)] == ["long'"] * 5
    for part, count in (("", 4), ("holdout", 1)):
        write(project, part, [{"short": f"blot {n} in [V] style", "long": words(490)} for n in range(count)])
    STAGES["validate"]("blots", settings, project)


def test_a_held_out_caption_has_the_room_that_a_picture_of_training_leaves(folders, project, capsys):
    """The evaluation's teacher reads it beside one of those."""
    settings = settings_for("z-image", folders, resolution=800, context_pixels=(512 * 512, 800 * 800))
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"allow": ("small-pictures",)})})
    picture(128, 64, 77).save(project / "data" / "concepts" / "blots" / "holdout" / "0.png")
    reader = reader_of(settings, project)
    by_training, by_own = (first_refused(lambda count, size=size: taught(reader, words(count), {size}))
                           for size in ((64, 64), (128, 64)))  # fmt: skip
    assert by_training < by_own
    write(project, "holdout", [{"asked": words(by_training - 1)}])
    STAGES["validate"]("blots", settings, project)
    assert "counted by words" not in capsys.readouterr().out
    write(project, "holdout", [{"asked": words(by_own - 1)}])
    (line,) = said_of(project, settings)
    assert line.startswith("holdout/metadata.jsonl, row 1, captions: 'asked': ")
    assert "as the teacher reads it" in line


def test_what_only_the_tokenizer_knows_is_said_before_anything_is_encoded(folders, project, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(project / "hub"))
    here = settings_for("flux2-klein", folders)
    elsewhere = here.model_copy(update={"model": here.model.model_copy(update={"path": "some/klein"})})
    captions = [{"short": f"blot {number} in [V] style"} for number in range(4)]
    write(project, "", [*captions[:3], {"short": words(490, "[V]"), "other": "a <think> [V]"}])
    STAGES["validate"]("blots", elsewhere, project)
    assert "captions were counted by words, and encode will count them" in capsys.readouterr().out
    monkeypatch.setattr("dopsd.stages.load_base", lambda *_: pytest.fail("the base was loaded"))
    lines = said_of(project, here, "encode")
    assert [line.split(": '")[0] for line in lines] == ["metadata.jsonl, row 4, captions"] * 2
    assert lines[1].endswith("'other': <think> is a control token of the base's tokenizer, not text; remove it or say "
                             "it in words")  # fmt: skip


def test_the_settings_own_texts_are_judged_where_they_are_used(folders, project):
    long, token = words(600), "a <think> fox"
    settings = resolved(settings_for("z-image", folders, context_suffix=" <|im_end|>"))
    replay = settings.train.replay.model_copy(update={"prompts": ("a fox", long), "weight": 1.0})
    train = settings.train.model_copy(update={"replay": replay, "preview_prompts": (token,)})
    evaluation = settings.evaluation.model_copy(update={"prompts": ("a fox", "a boat", long)})
    data = settings.data.model_copy(update={"placeholder": "<|V|>"})
    settings = settings.model_copy(update={"train": train, "evaluation": evaluation, "data": data})
    said = ["settings, data.placeholder: ", "settings, model.context_suffix: ",
            "settings, train.replay.prompts, number 2: ", "settings, train.preview_prompts, number 1: "]  # fmt: skip

    def starts() -> list[str]:
        with pytest.raises(DataError) as caught:
            read_concept("blots", settings, project)
        return [line.partition(": ")[0] + ": " for line in str(caught.value).split("\n")]

    assert starts() == said, "held-out rows are all that is asked"
    shutil.rmtree(project / "data" / "concepts" / "blots" / "holdout")
    assert starts() == [*said, "settings, evaluation.prompts, number 3: "]
    off = train.model_copy(update={"replay": replay.model_copy(update={"weight": 0.0})})
    settings = settings.model_copy(update={"train": off})
    assert said[2] not in starts(), "a setting that decides nothing"


def test_evaluation_prompts_need_the_teachers_room(folders, project):
    shutil.rmtree(project / "data" / "concepts" / "blots" / "holdout")
    settings = settings_for("krea-2", folders, **BIG)
    fewest = first_refused(lambda count: taught(reader_of(settings, project), words(count), None))
    assert not reader_of(settings, project).as_prompt(words(fewest))
    asked = settings.evaluation.model_copy(update={"prompts": (words(fewest),)})
    (line,) = said_of(project, settings.model_copy(update={"evaluation": asked}))
    assert line.startswith("settings, evaluation.prompts, number 1: 1,025 tokens as the teacher reads it")


@pytest.mark.parametrize("name", NAMES)
def test_a_served_version_refuses_what_its_pipeline_would_cut(name, families, folders, project):
    served, pipeline = FewStepModel(), pipeline_of(families[name])
    served.pipeline = SimpleNamespace(tokenizer=pipeline.tokenizer)
    served.prompt_tokens = champions._serving("blots", resolved(settings_for(name, folders)), project)["prompt_tokens"]

    def refused(text: str) -> bool:
        try:
            served._check_prompt(Row(0, text, ()))
        except ValueError:
            return True
        return False

    fewest = first_refused(lambda count: refused(words(count)))
    pipeline.__dict__["tokenizer"] = _Watched(pipeline.tokenizer)
    assert [cut_by(pipeline, words(count)) for count in (fewest - 1, fewest)] == [0, 1]
    assert refused("a fox <|im_end|>")


@pytest.mark.parametrize("name", NAMES)
def test_a_typed_prompt_is_refused_before_the_base_is_opened(name, folders, tmp_path):
    settings = resolved(settings_for(name, without_weights(folders, tmp_path)))
    for wrong, said in ((words(900), "9.. tokens, and 512 are read; shorten it"), ("<|im_end|>", "<.im_end.> is"),
                        ("a \udcff fox", "it holds bytes that are no text")):  # fmt: skip
        with pytest.raises(ModelError, match=f"^--prompt, number 2: {said}"):
            next(draw(["a fox", wrong], (), settings, tmp_path, None, 64, 64, 1, [0, 1]))
    check_prompts(["a fox in [V] style", words(400)], settings, tmp_path)
