"""What was given away comes back as it was trained: every form of every family, and one line for what cannot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dopsd.config.groups import AdapterKind, LoraSettings
from dopsd.distill.adapters import adapter_applied, adapter_parameters, add_adapters, read_adapter, save_adapter
from dopsd.distill.targets import AdapterError
from dopsd.export import COMFYUI_FILE, DIFFUSERS_FILE, WEIGHTS, export_adapter
from dopsd.given import as_trained, find_given
from dopsd.models import Family, family_class, load_family
from dopsd.models.sizes import configurations, skeleton
from tests import tiny
from tests.fake_hub import FakeHub, Repository
from tests.family_folders import NAMES, settings_of

ROOT = Path(__file__).parent.parent


def bare(name: str, folders: dict[str, Path]) -> tuple[Any, type[Family]]:
    """The base's transformer without values, and the family."""
    settings = settings_of(name, folders)
    configs = configurations(settings, Path())
    assert configs is not None
    return skeleton("transformer", configs, family_class(settings)), family_class(settings)


def trained(path: Path, family: Family, kind: AdapterKind = "lora", targets: tuple[str, ...] | None = None) -> Path:
    """An adapter file with an alpha that is not its rank, every value random."""
    lora = LoraSettings(rank=2, alpha=3.0, kind=kind, targets=targets)
    pair = add_adapters(family.transformer, lora, family.lora_targets, seed=0, kind="frozen")
    generator = torch.Generator().manual_seed(1)
    for value in adapter_parameters(family.transformer, "student").values():
        value.data.copy_(torch.rand(value.shape, generator=generator))
    save_adapter(path, family.transformer, "student", lora)
    pair.remove()
    return path


def changes(path: Path) -> dict[str, Tensor]:
    """What a plain adapter in training's form adds to each layer."""
    tensors, rank, alpha = read_adapter(path)
    modules = {key.rsplit(".", 2)[0] for key in tensors}
    a, b = ({m: tensors[f"{m}.lora_{half}.weight"].double() for m in modules} for half in "AB")
    return {module: alpha / rank * b[module] @ a[module] for module in modules}


def applied(family: Family, path: Path) -> dict[str, Tensor]:
    """What each layer of the transformer answers to the same rows, with the adapter of a file on it."""
    with adapter_applied(family.transformer, path), torch.no_grad():
        layers = {n: m for n, m in family.transformer.named_modules() if hasattr(m, "lora_A") or hasattr(m, "lokr_w1")}
        return {name: layer(torch.eye(layer.in_features)) for name, layer in layers.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["the family's own", "not all of a fused layer", "every layer"])
def test_every_export_is_the_adapter_that_was_trained(name: str, which: str, folders: Any, tmp_path: Path) -> None:
    family = load_family(settings_of(name, folders))
    some = tuple(target for target in family.lora_targets if not re.search("to_k|add_k", target))
    targets = {"not all of a fused layer": some, "every layer": (".*",)}.get(which)
    adapter = trained(tmp_path / "a.safetensors", family, targets=targets)
    out = export_adapter(adapter, tmp_path / "export", tiny.CARD, type(family), torch.float32)
    transformer, cls = bare(name, folders)
    for number, given in enumerate([adapter, out, out / DIFFUSERS_FILE, out / COMFYUI_FILE]):
        again = as_trained(find_given(given), tmp_path / f"{number}.safetensors", transformer, cls)
        torch.testing.assert_close(changes(again), changes(adapter))
        assert (again == adapter) == (given == adapter), "ours is read where it lies"
    answers = applied(family, adapter)
    assert answers.keys() == changes(adapter).keys()
    for number in (1, 3):
        torch.testing.assert_close(applied(family, tmp_path / f"{number}.safetensors"), answers)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_other_kinds_come_back_from_diffusers_file(kind: AdapterKind, folders: Any, tmp_path: Path) -> None:
    family = load_family(settings_of("z-image", folders))
    adapter = trained(tmp_path / "a.safetensors", family, kind)
    out = export_adapter(adapter, tmp_path / "export", tiny.CARD, type(family), torch.float32)
    again = as_trained(find_given(out), tmp_path / "b.safetensors", *bare("z-image", folders))
    torch.testing.assert_close(applied(family, again), applied(family, adapter))


def test_a_trained_transformer_comes_back_from_its_folder(folders: Any, tmp_path: Path) -> None:
    family = load_family(settings_of("z-image", folders))
    for parameter in family.transformer.parameters():
        parameter.data += 1
    family.transformer.save_pretrained(tmp_path / "export" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "export" / "transformer").glob("*.safetensors"))) > 1
    for given in (tmp_path / "export", tmp_path / "export" / "transformer"):
        again = as_trained(find_given(given), tmp_path / "a.safetensors", *bare("z-image", folders))
        plain = load_family(settings_of("z-image", folders)).transformer
        with adapter_applied(plain, again):
            torch.testing.assert_close(plain.state_dict(), family.transformer.state_dict(), rtol=0, atol=0)
    with pytest.raises(AdapterError, match="it was made for another base"):
        as_trained(find_given(given), tmp_path / "b.safetensors", *bare("krea-2", folders))


def test_names_and_alphas_of_others_are_read_too(folders: Any, tmp_path: Path) -> None:
    """A plain LoRA of another tool, and our own file of Z-Image from before: separate q, k and v, and an alpha each."""
    family = load_family(settings_of("z-image", folders))
    tensors, rank, alpha = read_adapter(trained(tmp_path / "a.safetensors", family))
    modules = {key.rsplit(".", 2)[0] for key in tensors}
    alphas = {f"diffusion_model.{module}.alpha": torch.tensor(alpha) for module in modules}
    for ends in ({}, {"lora_A": "lora_down", "lora_B": "lora_up"}):
        file = {f"diffusion_model.{key}": value for key, value in tensors.items()}
        for ours, theirs in ends.items():
            file = {key.replace(ours, theirs): value for key, value in file.items()}
        save_file(file | alphas, tmp_path / "given.safetensors")
        again = as_trained(tmp_path / "given.safetensors", tmp_path / "b.safetensors", *bare("z-image", folders))
        torch.testing.assert_close(changes(again), changes(tmp_path / "a.safetensors"))
    assert rank == 2


# --- what cannot be taken ---------------------------------------------------------------------------------------------


LAYER = "layers.0.attention.to_q"


def _file(tensors: Mapping[str, tuple[int, ...]], **metadata: str) -> Any:
    return {key: torch.ones(shape) for key, shape in tensors.items()}, {"format": "pt", **metadata}


FOREIGN = {
    "a LoKr of another tool": _file({f"lycoris_{LAYER.replace('.', '_')}.lokr_w1": (2, 2)}),
    "a LoKr of another tool (diffusion_model": _file({f"diffusion_model.{LAYER}.lokr_w1": (2, 2)}),
    "a LoHa of another tool": _file({f"diffusion_model.{LAYER}.hada_w1_a": (2, 2)}),
    "is no name of diffusers' or ComfyUI's": _file({"lora_unet_layers_0_attention_to_q.lora_down.weight": (2, 8)}),
    "is 7 x 9, and the base has": _file(
        {f"transformer.{LAYER}.lora_A.weight": (2, 9), f"transformer.{LAYER}.lora_B.weight": (7, 2)}
    ),
    "is 6 x 9, and the base has": _file(
        {f"diffusion_model.{LAYER}.lora_A.weight": (2, 9), f"diffusion_model.{LAYER}.lora_B.weight": (6, 2)}
    ),
    "is 8 x 9, and the base has no such layer; it was made for another base": _file(
        {"x.lora_A.weight": (2, 9), "x.lora_B.weight": (8, 2)}, format="dopsd-lora", rank="2", alpha="2.0"
    ),
    "is 5, and the base has no such layer; it was made for another base": _file({"x.bias": (5,)}, format="dopsd-full"),
    "the base has no layer blocks.0.wq": _file(
        {"diffusion_model.blocks.0.wq.lora_A.weight": (2, 9), "diffusion_model.blocks.0.wq.lora_B.weight": (8, 2)}
    ),
    "has one half of a LoRA alone": _file({f"transformer.{LAYER}.lora_A.weight": (2, 9)}),
    "1.norm.weight is no part of a plain LoRA": _file(
        {f"transformer.{LAYER}.lora_A.weight": (2, 8), f"transformer.{LAYER}.lora_B.weight": (8, 2),
         "transformer.1.norm.weight": (8,)}
    ),
    "its layers differ in scale": _file(
        {f"transformer.{LAYER}.lora_A.weight": (2, 9)},
        lora_adapter_metadata=json.dumps(
            {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"x": 1}}
        ),
    ),
    "there is no tensor in it": _file({}),
    "lora_adapter_metadata cannot be read": _file({"transformer.x.lora_A.weight": (2, 9)}, lora_adapter_metadata="["),
    "no rank and alpha (transformer.r": _file({"transformer.x.lora_A.weight": (2, 9)}, lora_adapter_metadata="{}"),
    "no rank and alpha (rank, alpha)": _file(
        {"x.lora_A.weight": (2, 9)}, format="dopsd-lora", rank="0", alpha="2.0"
    ),
    "no rank and alpha (rank, alpha); ": _file(
        {"x.lora_A.weight": (2, 9)}, format="dopsd-lora", rank="2", alpha="nan"
    ),
    "its header says rank 2, and x.lora_A.weight is 4 x 9": _file(
        {"x.lora_A.weight": (4, 9)}, format="dopsd-lora", rank="2", alpha="2.0"
    ),
    "is 8 x 3 and 2 x 8, which are no two halves of a LoRA": _file(
        {f"transformer.{LAYER}.lora_A.weight": (2, 8), f"transformer.{LAYER}.lora_B.weight": (8, 3)}
    ),
    "which are no two halves of a LoRA of a linear layer": _file(
        {f"transformer.{LAYER}.lora_A.weight": (2, 8, 1, 1), f"transformer.{LAYER}.lora_B.weight": (8, 2, 1, 1)}
    ),
    f"{LAYER}.alpha is no single number": _file(
        {f"transformer.{LAYER}.lora_A.weight": (2, 8), f"transformer.{LAYER}.lora_B.weight": (8, 2),
         f"transformer.{LAYER}.alpha": (2,)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", FOREIGN)
def test_what_cannot_be_taken_is_one_line(said: str, folders: Any, tmp_path: Path) -> None:
    tensors, metadata = FOREIGN[said]
    save_file(tensors, tmp_path / "given.safetensors", metadata)
    with pytest.raises(AdapterError, match=re.escape(said)) as error:
        as_trained(tmp_path / "given.safetensors", tmp_path / "b.safetensors", *bare("z-image", folders))
    assert str(error.value).startswith(f"{tmp_path}/given.safetensors: ")
    assert "\n" not in str(error.value)


def test_every_cut_of_a_file_is_one_line(folders: Any, tmp_path: Path) -> None:
    family = load_family(settings_of("z-image", folders))
    whole = trained(tmp_path / "a.safetensors", family).read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"cut\.safetensors: not a whole safetensors file"):
            as_trained(tmp_path / "cut.safetensors", tmp_path / "b.safetensors", *bare("z-image", folders))


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.pth", "a"])
def test_a_pickle_is_not_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(AdapterError, match=r"only \.safetensors is read"):
        find_given(tmp_path / name)


def test_folders_that_are_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="neither an export nor a transformer"):
        find_given(tmp_path)
    with pytest.raises(AdapterError, match="no such adapter"):
        find_given(tmp_path / "nothing.safetensors")


def test_another_familys_export_is_one_line(folders: Any, tmp_path: Path) -> None:
    family = load_family(settings_of("krea-2", folders))
    out = export_adapter(trained(tmp_path / "a.safetensors", family), tmp_path / "export", tiny.CARD, type(family))
    for file in (DIFFUSERS_FILE, COMFYUI_FILE):
        with pytest.raises(AdapterError, match="it was made for another base"):
            as_trained(out / file, tmp_path / "b.safetensors", *bare("z-image", folders))
    assert load_file(out / COMFYUI_FILE)


def test_a_transformer_that_is_not_whole_is_one_line(folders: Any, tmp_path: Path) -> None:
    """Else what is missing would be the base's."""
    out, own = tmp_path / "export" / WEIGHTS, folders["z-image"] / "transformer"
    out.mkdir(parents=True)
    shutil.copy(own / "config.json", out)
    (out / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(AdapterError, match=r"has only diffusion_pytorch_model\.bin"):
        as_trained(find_given(out.parent), tmp_path / "b.safetensors", *bare("z-image", folders))
    model = AutoModel.from_pretrained(str(own), use_safetensors=True)
    model.save_pretrained(out, max_shard_size="20KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    as_trained(find_given(out.parent), tmp_path / "b.safetensors", *bare("z-image", folders))
    next(out.glob("*.safetensors")).unlink()
    with pytest.raises(AdapterError, match="is missing"):
        as_trained(find_given(out.parent), tmp_path / "b.safetensors", *bare("z-image", folders))


# --- a base that only the hub has, under a name that nobody wrote down ------------------------------------------------

_DRAW = """
import json, sys
from pathlib import Path
from dopsd import sampling
from dopsd.config import load_settings
from dopsd.distill.targets import AdapterError
from dopsd.models import resolved
settings = resolved(load_settings(Path("params.yaml"), tuple(sys.argv[1].split())))
for adapter in map(Path, sys.argv[2:]):
    try:
        (image,) = sampling.draw(["a fox"], (), settings, Path(), adapter, 64, 64, 2, [0])
        image.save(adapter.with_suffix(".png"))
    except AdapterError as error:
        print(error)
"""


def test_an_export_is_taken_by_a_fine_tune_on_the_hub_too(folders: Any, tmp_path: Path) -> None:
    family = load_family(settings_of("z-image", folders))
    own = trained(tmp_path / "own.safetensors", family)
    out = export_adapter(own, tmp_path / "export", tiny.CARD, type(family), torch.float32)
    strange = export_adapter(
        trained(tmp_path / "k.safetensors", load_family(settings_of("krea-2", folders))), tmp_path / "strange",
        tiny.CARD, family_class(settings_of("krea-2", folders)),
    )  # fmt: skip
    given = [own, out / DIFFUSERS_FILE, out / COMFYUI_FILE, strange / DIFFUSERS_FILE]
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    base = folders["z-image"]
    files = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    with FakeHub({"somebody/z-image-finetune": Repository(files)}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", _DRAW, "model.path=somebody/z-image-finetune model.device=cpu", *map(str, given)],
            cwd=tmp_path, env=hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        )  # fmt: skip
    assert not done.returncode, done.stderr
    first, *others = (np.asarray(Image.open(path.with_suffix(".png")), int) for path in given[:3])
    assert [int(np.abs(other - first).max()) <= 1 for other in others] == [True, True], "but for rounding"
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith(f"{given[3]}: ")
    assert "it was made for another base" in done.stdout
