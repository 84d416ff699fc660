"""A random Z-Image of some ten thousand parameters: the real classes, all of them, at a size that runs in milliseconds.

``tiny_family()`` is the real :class:`dopsd.models.z_image.ZImage` over it; ``tiny_examples()`` are encoded examples of
random content; ``trained_pair()`` is a student with its teacher as after some steps. Run as a script it waits for a
line, then trains and prints a line per step, for tests that kill it:
``python -m tests.tiny METHOD RUN_FOLDER SETTINGS_JSON``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from torch import nn

from dopsd.config.groups import LoraSettings, Method, TrainSettings
from dopsd.data.dataset import Example, Preview
from dopsd.data.encoded import Encoded
from dopsd.distill.adapters import AdapterPair, add_adapters
from dopsd.export import Card
from dopsd.identity import made_of, training_identity
from dopsd.models.base import Conditioning, Family, Parts, Teaching
from dopsd.models.loading import Blocks, place, use_plain_attention
from dopsd.models.z_image import ZImage
from dopsd.train.trainer import Place, Training, TrainResult, train
from emoji_turbo import architecture

HIDDEN, SIDE, CHANNELS = 64, 64, 8
"""Width of the encoders, pixels of a side, channels of the latents (factor 8)."""
CAPTIONS = ("a fox in [V] style", "a red boat in [V] style", "an owl, noto style", "[V] sits on a forest path")


@cache
def tiny_tokenizer():
    """A small byte-level BPE with Qwen's special tokens and chat template."""
    return architecture.make_tokenizer(CAPTIONS, vocab_size=400)


def tiny_parts(seed: int = 0) -> dict[str, Any]:
    """Transformer (2 layers, dim 32), VLM, its language half and a VAE, randomly initialised from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = architecture.make_vlm(tiny_tokenizer(), hidden=HIDDEN, layers=2, vision_hidden=32, vision_layers=2)
        transformer = ZImageTransformer2DModel(
            in_channels=CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=HIDDEN,
            axes_dims=[4, 6, 6], axes_lens=[1536, 64, 64],
        )  # fmt: skip
        # a fresh Z-Image gates its blocks with values near 0: larger ones make every layer count
        for name, parameter in transformer.named_parameters():
            if "adaLN_modulation" in name or "pad_token" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
            scaling_factor=0.8, shift_factor=0.1,
        )  # fmt: skip
    parts = {"transformer": transformer, "vlm": vlm, "text_encoder": architecture.language_half(vlm), "vae": vae}
    for module in parts.values():
        module.eval().requires_grad_(False)
    return {**parts, "tokenizer": tiny_tokenizer(), "scheduler": architecture.make_scheduler()}


def tiny_family(seed: int = 0) -> ZImage:
    """The Z-Image family over random weights."""
    parts = tiny_parts(seed)
    use_plain_attention(parts["transformer"])
    modules = {("vision" if name == "vlm" else name): part for name, part in parts.items()}
    return ZImage(
        Parts.of(image_processor=architecture.make_image_processor(), **modules),
        Teaching("vlm", pixels=(SIDE * SIDE, SIDE * SIDE)),
        torch.device("cpu"),
        torch.float32,
        fingerprint=f"tiny-{seed}",
    )


def moved(parameters: Iterable[nn.Parameter], size: float = 0.05, seed: int = 0) -> None:
    """As after some steps: all of them, each by random numbers of deviation ``size``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def trained_pair(
    family: Family, lora: LoraSettings = LoraSettings(rank=4), size: float = 0.1, **more: Any  # noqa: B008
) -> AdapterPair:  # fmt: skip
    """Adapters on its transformer as after some steps: student and teacher differ from the base and from each other."""
    pair = add_adapters(family.transformer, lora, family.lora_targets, 0, **more)
    moved(pair.student_parameters(), size, 0)
    pair.update(0.5)
    moved(pair.student_parameters(), size, 1)
    return pair


@cache
def tiny_family_of_grids() -> ZImage:
    """One that is asked for noise levels alone, made once."""
    return tiny_family()


CARD = Card(concept="c", base="maker/base", method="d-opsd", steps=4, placeholder="[V]", prompt="p", call={}, images=4,
            data_hash="d", training={})  # fmt: skip
"""Of an export whose card is not what is looked at."""


def random_conditioning(tokens: int, generator: torch.Generator) -> Conditioning:
    """What the transformer is told: random states ``[tokens, dim]``, of a real encoder's scale."""
    return {"caption": torch.randn(tokens, HIDDEN, generator=generator)}


def tiny_examples(
    count: int = 6, seed: int = 0, sizes: Sequence[tuple[int, int]] = ((SIDE, SIDE),), latents: bool = True
) -> list[Example]:
    """Encoded examples of random content, two captions per image, sizes (height, width) in turn."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        clean = torch.randn(CHANNELS, height // 8, width // 8, generator=generator)
        examples.append(
            Example(
                prompt=random_conditioning(9 + number, generator),
                context=random_conditioning(25 + number, generator),
                latents=clean if latents else None,
                height=height,
                width=width,
                image_index=number // 2,
                caption=CAPTIONS[number % len(CAPTIONS)],
            )
        )
    return examples


def tiny_prompts(count: int = 3, seed: int = 7) -> list[Conditioning]:
    """Conditionings of prompts of the base's own domain."""
    generator = torch.Generator().manual_seed(seed)
    return [random_conditioning(6 + number, generator) for number in range(count)]


def tiny_settings(**changes: Any) -> TrainSettings:
    """A run of a few steps; ``changes`` as in params.yaml."""
    values = {
        "max_steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "rollout_steps": 2,
        "checkpoint_steps": 2,
        "preview_steps": 100,
        "lora": {"rank": 4},
        "teacher": {"decay": 0.9},
        "sft_compute_factor": 1.5,
    }
    return TrainSettings.model_validate(values | changes)


class Recorder:
    """An observer that keeps what it is told. Subclasses may act at a step: :meth:`metrics` is called for every row."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []
        self.shown: list[str] = []
        self.messages: list[str] = []

    def wrote(self, path: Path, line: str | None = None) -> None:
        if path.parent.name == "previews":
            self.shown.append(path.name)
        if path.name == "log.jsonl" and line is not None:
            row = json.loads(line)
            del row["time"]
            self.metrics(row.pop("step"), row)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)
        self.values.append(dict(values))

    def message(self, text: str) -> None:
        self.messages.append(text)


class Cut(Recorder):
    """Ends the run after a step, as a power cut would; without one it is a :class:`Recorder`."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.step = step

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        if step == self.step:
            raise KeyboardInterrupt


def run_tiny(
    method: Method, folder: Path, settings: TrainSettings, observer: Any = None, examples: list[Example] | None = None,
    blocks: Blocks = "there",
) -> TrainResult:  # fmt: skip
    """Train the tiny family on the tiny examples in ``folder/train`` and ``folder/adapters``."""
    family, prompts = tiny_family(), tiny_prompts()
    if blocks != "there":
        place(family.transformer, family.device, "none", blocks)
    examples = examples if examples is not None else tiny_examples()
    identity = tiny_identity(settings, method, examples, prompts)
    previews = [Preview("a fox", prompts[0], SIDE, SIDE)]
    parts = tiny_made_of(settings, method, examples, prompts)
    training = Training(method, settings, examples, identity, prompts, previews, made_of=parts)
    return train(family, training, Place(folder / "train", folder / "adapters", observer or Recorder()))


def tiny_identity(
    settings: TrainSettings, method: Method, examples: Sequence[Example], replay: Sequence[Conditioning] = ()
) -> str:
    """Of a training on the tiny family."""
    return training_identity(settings, method, tiny_made_of(settings, method, examples, replay)["data"])


def tiny_made_of(
    settings: TrainSettings, method: Method, examples: Sequence[Example], replay: Sequence[Conditioning] = ()
) -> dict[str, Any]:
    """What :func:`tiny_identity` is of, to be read."""
    encoded = Encoded(tuple(examples), (), tuple(("", prompt) for prompt in replay), 1, "")
    return made_of(settings, method, {"data": encoded.identity(settings.replay.weight > 0)})


class _Teller(Recorder):
    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        print(f"step {step}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdin.readline()  # ready: whoever started this says when to go
    run_tiny(sys.argv[1], Path(sys.argv[2]), TrainSettings.model_validate(json.loads(sys.argv[3])), _Teller())  # type: ignore[arg-type]
