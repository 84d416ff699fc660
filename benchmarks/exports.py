"""Whether every version of diffusers loads what is exported, whole: ``python -m benchmarks.exports [VERSION ...]``.

Each version is installed alone, without what it depends on, into ``.cache/exports/`` and stands before the project's
own environment on the path: torch and all else are shared. A tiny base of each family (random weights of the real
classes) gets a random adapter on all of the family's own targets; its exported files, in float32 and in bfloat16, are
loaded by the family's pipeline. What a file adds to each layer is compared with the adapter's product in float64:
as loaded, with a second adapter at half strength beside it, and fused into the weights. Tried are the file for
diffusers, and the one for ComfyUI where it is for both. Adds to ``docs/benchmarks/exports.json``, and prints a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks" / "exports.json"
PLACE = ROOT / ".cache" / "exports"
VERSIONS = ("0.36.0", "0.37.1", "0.38.0", "0.39.0", "0.40.0", "0.41.0", "0.42.0", "0.42.1")
BOTH = ("flux2-klein", "krea-2")
"""Families whose file for ComfyUI diffusers reads, too."""
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest difference, as a share of the largest value, that is rounding."""


def main() -> None:
    """Install, make the files once, ask each version, and write down what it says."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("versions", nargs="*", default=VERSIONS)
    arguments.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child is not None:
        print(json.dumps(_ask(given.child)))
        return
    found = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    with tempfile.TemporaryDirectory(prefix="dopsd-exports-") as place:
        make_files(Path(place))
        for version in given.versions:
            found[version] = ask(version, Path(place))
            OUT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")
    print(table(found))


def make_files(place: Path) -> None:
    """Bases, exports, and what each adapter adds to each layer."""
    import torch
    from safetensors.torch import save_file

    from dopsd.config.groups import LoraSettings
    from dopsd.distill.adapters import adapter_parameters, add_adapters, read_adapter, save_adapter
    from dopsd.export import Card, export_adapter
    from dopsd.models import load_family
    from tests.family_folders import NAMES, settings_of, write_families

    card = Card("c", "b", "d-opsd", 4, "[V]", "p", {}, 1, "", {})
    folders = write_families(place / "bases")
    for name in NAMES:
        family, lora = load_family(settings_of(name, folders)), LoraSettings(rank=4, alpha=8.0)
        family.transformer.save_pretrained(place / name / "transformer")
        pair = add_adapters(family.transformer, lora, family.lora_targets, seed=0, kind="frozen")
        generator = torch.Generator().manual_seed(1)
        for value in adapter_parameters(family.transformer, "student").values():
            value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))
        adapter = save_adapter(place / name / "a.safetensors", family.transformer, "student", lora)
        pair.remove()
        tensors, rank, alpha = read_adapter(adapter)
        modules = {key.rsplit(".", 2)[0] for key in tensors}
        b, a = ({m: tensors[f"{m}.lora_{half}.weight"].double() for m in modules} for half in "BA")
        save_file({m: alpha / rank * b[m] @ a[m] for m in modules}, place / name / "added.safetensors")
        for dtype in (torch.float32, torch.bfloat16):
            export_adapter(adapter, place / name / str(dtype).removeprefix("torch."), card, type(family), dtype)


def ask(version: str, files: Path) -> dict[str, Any]:
    """What one version makes of all files."""
    folder = PLACE / version
    if not (folder / "diffusers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"diffusers=={version}"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "DIFFUSERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__)), "--child", str(files)], env=environment,
                          capture_output=True, encoding="utf-8")  # fmt: skip
    if done.returncode:
        return {"cannot be imported here": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> str:
    """Every version and file, and the worst of what was asked of it; 80 characters wide."""
    lines = [f"{'diffusers':<10} {'family':<12} {'file':<10} {'type':<9} answer"]
    for version, answers in found.items():
        if "families" not in answers:
            lines.append(f"{version:<10} {next(iter(answers))}")
            continue
        for family, said in answers["families"].items():
            if isinstance(said, str):
                lines.append(f"{version:<10} {family:<12} {said}")
                continue
            for which, result in said.items():
                file, dtype = which.split(", ")
                lines.append(f"{version:<10} {family:<12} {file:<10} {dtype:<9} {result['answer'][:36]}")
    return "\n".join(lines)


# --- the process with another diffusers: knows nothing of dopsd -------------------------------------------------------


def _ask(files: Path) -> dict[str, Any]:
    look = importlib.util.find_spec
    # 0.36 fails over a torchao of today, which is nothing to a plain pipeline
    importlib.util.find_spec = lambda name, package=None: None if name == "torchao" else look(name, package)
    import diffusers
    import peft
    import torch
    import transformers

    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__, "peft": peft.__version__}
    names = {"z-image": "ZImage", "flux2-klein": "Flux2Klein", "krea-2": "Krea2"}
    families: dict[str, Any] = {}
    for family, name in names.items():
        if not hasattr(diffusers, f"{name}Pipeline"):
            families[family] = "is not known to it"
            continue
        families[family] = {
            f"{'diffusers' if file.startswith('pytorch') else 'ComfyUI'}, {dtype}": _tried(
                files / family, name, file, dtype
            )
            for file in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors")
            for dtype in ("float32", "bfloat16")
            if file.startswith("pytorch") or family in BOTH
        }
    return {"with": versions | {"transformers": transformers.__version__}, "families": families}


def _tried(folder: Path, name: str, file: str, dtype: str) -> dict[str, Any]:
    try:
        shares = _shares(folder, name, file, dtype)
    except Exception as error:  # whatever an old version says is what is to be written down
        return {"answer": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    worst = max(shares.values())
    return {"answer": "whole" if worst < ROUNDING[dtype] else f"differs by {worst:.1e} of the change", "shares": shares}


def _shares(folder: Path, name: str, file: str, dtype: str) -> dict[str, float]:
    """The largest differences, as shares of the largest value: as loaded, two at once, and fused."""
    import diffusers
    import torch
    from safetensors.torch import load_file

    kind, added = getattr(diffusers, f"{name}Pipeline"), load_file(folder / "added.safetensors")
    model_class = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))["_class_name"]

    def pipeline() -> Any:
        transformer = getattr(diffusers, model_class).from_pretrained(
            folder / "transformer", torch_dtype=getattr(torch, dtype)
        )
        parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
        return kind(**parts, transformer=transformer)

    def load(pipe: Any, adapter: str) -> None:
        pipe.load_lora_weights(folder / dtype, weight_name=file, adapter_name=adapter, use_safetensors=True)

    def share(values: dict[str, Any], wanted: dict[str, Any]) -> float:
        if values.keys() != wanted.keys():
            raise ValueError(f"{len(wanted)} layers are wanted, and {len(values)} have one")
        largest = max(float(value.abs().max()) for value in wanted.values())
        return max(float((values[key].double() - wanted[key]).abs().max()) for key in wanted) / largest

    one, two = pipeline(), pipeline()
    load(one, "first")
    load(two, "first")
    load(two, "second")
    two.set_adapters(["first", "second"], [1.0, 0.5])
    before = {key: two.transformer.get_submodule(key).get_base_layer().weight.detach().double() for key in added}
    layers = {key: m for key, m in one.transformer.named_modules() if hasattr(m, "lora_A")}
    shares = {"loaded": share({key: m.get_delta_weight("first").detach() for key, m in layers.items()}, added)}
    half = {key: m for key, m in two.transformer.named_modules() if hasattr(m, "lora_A")}
    sums = {key: sum(m.get_delta_weight(a).detach().double() for a in m.active_adapters) for key, m in half.items()}
    shares["two at once"] = share(sums, {key: 1.5 * value for key, value in added.items()})
    two.fuse_lora(adapter_names=["first", "second"])
    fused = {key: two.transformer.get_submodule(key).get_base_layer().weight.detach() for key in added}
    shares["fused"] = share(fused, {key: before[key] + 1.5 * value for key, value in added.items()})
    return shares


if __name__ == "__main__":
    main()
