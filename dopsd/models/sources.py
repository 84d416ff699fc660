"""Where a base model's files come from, whether they are what is needed, and what they are: before anything is loaded.

A source is a folder, or a name on the hub whose files are fetched into the hub library's own cache. Nothing here loads
weights or imports a library that does: a mistake in the settings is a line within a second, not a traceback in minutes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .folder import CONFIG, INDEX, ModelError, Source, need, quoted, read_json, tensors_of
from .hashes import identity

__all__ = [
    "ModelError", "Source", "at_hand", "check_pipeline", "check_vlm", "identity", "licence_of", "locate", "read_index",
]  # fmt: skip

VLM_CLASSES = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_DEFAULTS = {"head_dim": 128, "rms_norm_eps": 1e-6}
"""What configs of Qwen3 and Qwen3-VL may leave out, and mean."""
_MUST_AGREE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)


def locate(
    path: str,
    root: Path,
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    key: str = "model.path",
) -> Source:
    """The folder that ``path`` means, relative to ``root``; else the hub's model of that name (``owner/name``).

    Of a hub model only files that match ``patterns`` are fetched (and its README.md, for the licence), none of them
    pickles or code. With a commit as ``revision`` and all files in the cache the network is not asked; without network
    what the cache has is used. ``key`` names the setting in messages.
    Raises :class:`ModelError` where there is no such folder, or the hub does not give it.
    """
    folder = Path(os.path.abspath(root / os.path.expanduser(path)))
    if path and os.path.isdir(folder):
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ModelError(f"{key}: {path}: this folder may not be read; give yourself the right to")
        if revision:
            raise ModelError(f"{key}: {path}: a folder here, and only hub names have a revision; remove the revision")
        return Source(folder)
    if os.path.isfile(folder):
        raise ModelError(f"{key}: {path}: a single file; a whole folder is needed, or a hub name (owner/name)")
    if not _HUB_NAME.fullmatch(path) or ".." in path or "--" in path:
        raise ModelError(
            f"{key}: {quoted(path) or 'empty'}: no such folder, and not a hub name (owner/name); "
            "check the path, or give the model's name on the hub"
        )
    if folder.parent.is_dir() and not revision:
        # a misspelt folder must not become a question to the hub, where anyone may own the name "data" or "models"
        raise ModelError(
            f"{key}: {path}: no such folder, though {path.partition('/')[0]}/ is here; check the spelling, or, "
            "if the hub's model of that name is meant, give a revision too (main, for example)"
        )
    from .hub import from_hub

    return from_hub(path, revision, patterns, key)


def at_hand(path: str, root: Path, *, revision: str | None = None, patterns: Sequence[str]) -> Source | None:
    """What is here already of what ``path`` means, whole or not: a folder, or what the hub's cache has of the files
    that match ``patterns``. The network is not asked, and nothing is checked; ``None`` where there is nothing."""
    folder = Path(os.path.abspath(root / os.path.expanduser(path)))
    if folder.is_dir():
        return Source(folder)
    if not _HUB_NAME.fullmatch(path):
        return None
    from .hub import cached

    return cached(path, revision, patterns)


def read_index(folder: Path, key: str = "model.path") -> dict[str, Any]:
    """The pipeline's model_index.json. Raises :class:`ModelError` where there is none, or nothing that can be read."""
    if (folder / INDEX).is_file():
        return read_json(folder / INDEX, f"{key}: {folder / INDEX}")
    if not folder.is_dir():
        raise ModelError(f"{key}: {folder}: no such folder; check {key} in the settings")
    inner = next(folder.glob(f"*/{INDEX}"), None)
    if inner:
        raise ModelError(f"{key}: {folder}: no base model there, but in {inner.parent.name}/ below; set {key} to that")
    found = "an empty folder" if not any(folder.iterdir()) else f"no base model there (no {INDEX})"
    raise ModelError(f"{key}: {folder}: {found}; a whole folder in the diffusers layout is needed, check {key}")


def check_class(index: Mapping[str, Any], shown: str, class_name: str, advice: Mapping[str, str]) -> None:
    """Raise :class:`ModelError` unless the index names that pipeline; ``advice`` as for :func:`check_pipeline`."""
    found = quoted(index.get("_class_name") or "unnamed")
    if found != class_name:
        note = advice.get(found, "check model.path and model.family")
        raise ModelError(f"{shown}: its pipeline is {found}, and {class_name} is needed; {note}")


def check_pipeline(
    source: Source, class_name: str, components: Mapping[str, Collection[str]], *, distilled: bool = False,
    advice: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The index of a pipeline whose class, components and files are what is needed; nothing is loaded.

    ``components``: by name the classes that will do (none: any). ``distilled``: the index must say that it is.
    ``advice``: by class of a wrong pipeline, what to say of it. Raises :class:`ModelError` for the first fault.
    """
    shown = source.shown
    try:
        index = read_index(source.folder)
    except ModelError as error:
        raise ModelError(f"{error}; {source.again()}" if source.name else str(error)) from None
    check_class(index, shown, class_name, advice or {})
    if distilled and index.get("is_distilled") is not True:
        raise ModelError(
            f"{shown}: this is the undistilled base ({INDEX} does not say is_distilled: true); "
            "few-step tuning needs the distilled model"
        )
    for name, classes in components.items():
        entry = index.get(name)
        listed = quoted(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None
        if listed is None:
            raise ModelError(f"{shown}: {INDEX} lists no {name}; {source.again()}")
        if classes and listed not in classes:
            raise ModelError(f"{shown}: its {name} is {listed}, and {' or '.join(sorted(classes))} is needed")
        if not (source.folder / name).is_dir():
            raise ModelError(f"{shown}: the folder {name}/ is missing; {source.again(name)}")
        if name.startswith("tokenizer"):
            need(source, name, "tokenizer.json", "vocab.json")
        elif name.startswith("scheduler"):
            need(source, name, "scheduler_config.json")
        elif name.endswith(("processor", "extractor")):
            need(source, name, "preprocessor_config.json", "processor_config.json")
        else:
            need(source, name, CONFIG)
            tensors_of(source, name)
    return index


def check_vlm(source: Source, text_config: Mapping[str, Any], key: str = "model.vlm") -> dict[str, float | None]:
    """Whether a folder is a Qwen3-VL whose language half has the text encoder's sizes; nothing is loaded.

    ``text_config``: the text encoder's config. Returns the rope's theta of both, which may differ (``None``: not said).
    Raises :class:`ModelError` where it is another model, incomplete, or does not fit.
    """
    shown = f"{key}: {source.shown}"
    if not (source.folder / CONFIG).is_file():
        advice = source.again() if source.name else f"check {key}"
        raise ModelError(f"{shown}: no {CONFIG}, so no VLM there; a whole Qwen3-VL folder is needed; {advice}")
    config = read_json(source.folder / CONFIG, f"{shown}: {CONFIG}")
    classes = config.get("architectures") or []
    name = quoted(classes[0] if isinstance(classes, list) and classes else config.get("model_type"))
    if name not in (*VLM_CLASSES, "qwen3_vl"):
        blind = ", which sees no pictures" if "vision_config" not in config else ""
        raise ModelError(f"{shown}: a {name}{blind}; a Qwen3-VL ({VLM_CLASSES[0]}) is needed")
    text = config.get("text_config")
    if not isinstance(text, dict) or not isinstance(config.get("vision_config"), dict):
        raise ModelError(f"{shown}: its {CONFIG} lacks text_config or vision_config; {source.again()}")
    pairs = [(size, *(c.get(size, _DEFAULTS.get(size)) for c in (text, text_config))) for size in _MUST_AGREE]
    wrong = [f"{size} {quoted(ours)} instead of {quoted(theirs)}" for size, ours, theirs in pairs if ours != theirs]
    if wrong:
        raise ModelError(f"{shown}: does not fit the text encoder ({', '.join(wrong)}); take the Qwen3-VL of its size")
    need(source, "", "preprocessor_config.json", "processor_config.json", shown=shown)
    if not any("visual." in tensor for tensor in tensors_of(source, "", shown)):
        raise ModelError(f"{shown}: its weights have no vision half; {source.again()}")
    return {"vlm_theta": _theta(text), "encoder_theta": _theta(text_config)}


def _theta(config: Mapping[str, Any]) -> float | None:
    """The rope's base: at the top in older configs, in a dictionary (by kind of layer, even) in newer ones."""
    groups = [config.get("rope_parameters"), config.get("rope_scaling"), config]
    nested = [inner for group in groups[:2] if isinstance(group, dict) for inner in group.values()]
    for group in (*groups, *nested):
        theta = group.get("rope_theta") if isinstance(group, Mapping) else None
        if isinstance(theta, int | float):
            return float(theta)
    return None


def licence_of(source: Source) -> str | None:
    """The licence that the folder's README.md names at its top; ``None`` where none is said."""
    import yaml

    try:
        with (source.folder / "README.md").open("rb") as handle:
            text = handle.read(1 << 16).decode("utf-8", "replace")
        front = re.match(r"\s*---\s*\n(.*?)\n---", text.lstrip("\ufeff"), re.DOTALL)
        facts = yaml.safe_load(front[1]) if front else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict):
        return None
    licence = facts.get("license")
    if isinstance(licence, list) and licence:
        licence = licence[0]
    if licence == "other" and facts.get("license_name"):
        licence = facts["license_name"]
    return quoted(licence) if isinstance(licence, str) and licence.strip() else None
