"""A VLM that is asked about pictures: found, checked, loaded, and made to answer in words.

Any image-text model that transformers knows will do: safetensors alone, and none of its own code. Answers are greedy,
so that one picture and one question have one answer, and bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from dopsd.config.groups import ModelSettings

from . import device_of, dtype_of, family_class, qwen_vl
from .folder import CONFIG, ModelError, Source, need, quoted, read_json, tensors_of
from .loading import frozen
from .sources import locate
from .whole import load_whole

PUBLISHED = "Qwen/Qwen3-VL-4B-Instruct"
MAX_NEW_TOKENS = 320
"""Of an answer: more than the longest caption needs, and an end for a model that finds none."""
MAX_SIDE = 1024
"""Pixels: a larger picture is shown smaller. A Qwen3-VL reads 1,024 x 1,024 as 1,024 tokens."""
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
_OTHER = f"give another one: --model {PUBLISHED}, or the folder of any instruct model that sees pictures"


class Ask(Protocol):
    """A loaded model that is asked."""

    def __call__(self, images: Image | Sequence[Image], question: str) -> str:
        """The answer to a question about a picture, or about several in their order, as the model gave it."""
        ...


@dataclass(frozen=True)
class Captioner:
    """Checked files of a VLM. ``tokenizer``, ``processor``: the folders of these; no ``processor``: Qwen3-VL's own."""

    source: Source
    folder: Path
    tokenizer: Path
    processor: Path | None

    @property
    def shown(self) -> str:
        """What it is called in messages."""
        return self.source.shown


def find_captioner(
    model: ModelSettings, root: Path, name: str | None = None, key: str = "--model", revision: str | None = None
) -> Captioner:
    """The model of that folder or hub name; else ``model.vlm``, or the VLM that the base has in its folder.

    ``key``: what names it in messages. Nothing is loaded. Raises :class:`ModelError` where there is none that answers
    in words.
    """
    if name is not None:
        return _checked(locate(name, root, revision=revision, patterns=_PATTERNS, key=key), key)
    if model.vlm is not None:
        source = locate(model.vlm, root, revision=model.vlm_revision, patterns=_PATTERNS, key="model.vlm")
        return _checked(source, "model.vlm")
    if not _has_eyes(model):
        inner = root / Path(model.path).expanduser() / "vlm"
        if inner.is_dir():
            return _checked(Source(inner), "model.vlm")
        raise ModelError(f"model.path: {quoted(model.path)}: has no model that sees pictures and answers; {_OTHER}")
    parts = ["text_encoder", "tokenizer"]
    base = locate(model.path, root, revision=model.revision, patterns=[f"{part}/*" for part in parts])
    return _checked(base, "model.path", *parts)


def _has_eyes(model: ModelSettings) -> bool:
    """Whether the family's own text encoder is a whole VLM."""
    heads = _heads().values()
    return any(name in heads for name in family_class(model).components.get("text_encoder", ()))


def _heads() -> dict[str, str]:
    """Type of a model to its class with an image-text head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _checked(source: Source, key: str, part: str = "", tokenizer: str = "") -> Captioner:
    """What is in a folder (its ``part`` and ``tokenizer``), where that can be a captioner."""
    folder = source.folder / part
    shown = f"{key}: {source.shown}" + (f"/{part}" if part else "")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{shown}: no {CONFIG}, so no model there; {_OTHER}")
    config = read_json(folder / CONFIG, f"{shown}: {CONFIG}")
    found = config.get("model_type")
    if not isinstance(found, str) or found not in _heads() or not isinstance(config.get("vision_config"), dict):
        raise ModelError(f"{shown}: a {quoted(found or 'model of no known type')}, which has no image-text head that "
                         f"transformers knows; {_OTHER}")  # fmt: skip
    names = list(tensors_of(source, part, shown))
    if not any("embed_tokens" in name or "wte" in name or "tok_embeddings" in name for name in names):
        raise ModelError(f"{shown}: its weights have no language half, so it cannot answer; {_OTHER}")
    need(source, tokenizer, "tokenizer.json", "vocab.json", "tokenizer.model", shown=shown)
    names_there = [name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).is_file()]
    if not names_there and not found.startswith("qwen3_vl"):
        raise ModelError(f"{shown}: preprocessor_config.json is missing; {source.again(part)}")
    return Captioner(source, folder, source.folder / tokenizer, folder if names_there else None)


def load_captioner(found: Captioner, model: ModelSettings, most_tokens: int | None = None) -> Ask:
    """The model on the settings' device and in their type; an answer has ``most_tokens``, or :data:`MAX_NEW_TOKENS`.
    Raises :class:`ModelError` where it cannot be loaded."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    device = device_of(model)
    vlm, processor = load_whole(
        AutoModelForImageTextToText, found.folder, found.shown, dtype_of(model, device), _OTHER,
        lambda vlm: _processor(found, vlm.config),
    )  # fmt: skip
    tokenizer = processor.tokenizer
    own = vlm.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    # not the model's own: it may sample, with a temperature, and for longer
    vlm.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=most_tokens or MAX_NEW_TOKENS, eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
    )  # fmt: skip
    vlm = frozen(vlm, device)

    def ask(images: Image | Sequence[Image], question: str) -> str:
        return _answer(vlm, processor, [images] if isinstance(images, Image) else images, question)

    return ask


def _answer(vlm: Any, processor: Any, images: Sequence[Image], question: str) -> str:
    shown = [image.copy() for image in images]
    for image in shown:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    content: list[dict[str, str]] = [{"type": "image"} for _ in shown]
    turn = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=shown, text=[text], return_tensors="pt").to(vlm.device, vlm.dtype)
    with torch.inference_mode():
        ids = vlm.generate(**inputs)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0]


def _processor(found: Captioner, config: Any) -> Any:
    """The model's processor for text and pictures; where its part for videos cannot be had (it needs torchvision, and
    Krea-2 brings none), the same class without that part."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    options = {"trust_remote_code": False, "local_files_only": True}
    processor: Any = None
    if found.processor is not None and found.tokenizer == found.folder:
        with suppress(ImportError):
            processor = AutoProcessor.from_pretrained(found.folder, **options)
    if processor is None:
        images: Any = (
            qwen_vl.image_processor_of(config.vision_config)
            if found.processor is None
            else AutoImageProcessor.from_pretrained(found.processor, **options)
        )
        processor = _composed(found, config, AutoTokenizer.from_pretrained(found.tokenizer, **options), images)
    if not processor.chat_template:
        raise ModelError(f"{found.shown}: has no chat template, so it is no instruct model; {_OTHER}")
    return processor


def _composed(found: Captioner, config: Any, tokenizer: Any, images: Any) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    whole = PROCESSOR_MAPPING[type(config)]

    class WithoutVideos(whole):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    template = tokenizer.chat_template
    if (file := found.folder / "chat_template.json").is_file():
        template = read_json(file, f"{found.shown}: {file.name}").get("chat_template") or template
    parts = {"tokenizer": tokenizer, "image_processor": images}
    return WithoutVideos(**{name: parts.get(name) for name in whole.get_attributes()}, chat_template=template)
