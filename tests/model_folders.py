"""Folders of base models to break, and what every message about one must be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "data" / "base" / "emoji-turbo"
COMPONENTS = {
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "tokenizer": (),
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
}
NAME = "some-owner/Some-Turbo"


def copied(folder: Path) -> Path:
    """A copy of the embedded base in ``folder``."""
    return Path(shutil.copytree(EMOJI, folder))


def one_line(error: BaseException | str, *words: str) -> str:
    """The message, which must be a line with these words, without a traceback or a place on the net in it."""
    text = str(error)
    assert not [word for word in ("\n", "Traceback", "http") if word in text], text
    assert len(text) < 500, text
    for word in words:
        assert word in text, (word, text)
    return text


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key)
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def truncate(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
