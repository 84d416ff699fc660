"""A whole model of transformers from a folder that was found: safetensors alone, none of its own code, none of it made
up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .folder import CONFIG, ModelError, quoted

_Beside = TypeVar("_Beside")


def load_whole(
    cls: Any, folder: Path, shown: str, dtype: torch.dtype, advice: str, beside: Callable[[Any], _Beside]
) -> tuple[Any, _Beside]:
    """The model of that class in host memory, and what ``beside`` makes of it and its folder (a processor, a
    tokenizer). ``shown`` names it in messages, ``advice`` says what to do.

    Raises :class:`ModelError` where its files do not fit one another, lack weights, or describe a far larger model.
    """
    try:
        _check_size(cls, folder, shown)
        model, info = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        made = beside(model)
    # a library's way of saying that files do not fit one another: whichever it raises, a person can do one thing
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{shown}: cannot be loaded ({quoted(error)}); {advice}") from None
    if lacking := sorted(info["missing_keys"]):
        raise ModelError(f"{shown}: its weights lack {lacking[0]} and {len(lacking) - 1} more, so it cannot answer; "
                         f"{advice}")  # fmt: skip
    return model, made


def _check_size(cls: Any, folder: Path, shown: str) -> None:
    """A configuration that describes a far larger model than the weights are would fill the memory with random ones."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        wanted = sum(p.numel() for p in getattr(cls, "from_config", cls)(config).parameters())
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # the narrowest types have a byte a parameter; quantised weights are packed, and say so
    if wanted > 1.2 * there and not hasattr(config, "quantization_config"):
        raise ModelError(f"{shown}: its {CONFIG} describes {wanted:,} parameters, its weights are {there:,} "
                         "bytes; copy or fetch it again")  # fmt: skip
