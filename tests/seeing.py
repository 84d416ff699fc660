"""Tiny random models of the classes that the evaluation sees with, in folders as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dopsd.evaluation.backbones.lpips import TENSORS

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIDE = 56
"""Pixels of the square that each of them was made for; a multiple of both patches, 14 and 8."""


def write_dinov2(folder: Path, registers: int = 0) -> Path:
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    processor = {"image_processor_type": "BitImageProcessor", "do_center_crop": True, "do_resize": True,
                 "crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}, "resample": 3,
                 "do_rescale": True, "do_normalize": True, **IMAGENET}  # fmt: skip
    if registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        return _write(folder, Dinov2WithRegistersModel, config, processor)
    return _write(folder, Dinov2Model, Dinov2Config(**sizes), processor)


def write_dinov3(folder: Path) -> Path:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=2, image_size=SIDE, patch_size=8,
                             intermediate_size=64, num_register_tokens=4, use_gated_mlp=True)  # fmt: skip
    processor = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": SIDE, "width": SIDE},
                 "resample": 2, "do_resize": True, "do_rescale": True, "do_normalize": True, **IMAGENET}  # fmt: skip
    return _write(folder, DINOv3ViTModel, config, processor)


def write_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 16}
    text = common | {"num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": 20,
                     "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = common | {"num_hidden_layers": 6, "image_size": SIDE, "patch_size": 8}
    processor = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "do_resize": True,
                 "crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}, "resample": 3,
                 "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, **CLIP}  # fmt: skip
    return _write(folder, CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=16), processor)


def write_siglip(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

    words = ["<pad>", "<eos>", "<unk>", *["a", "fox", "in", "style", "on", "beach", "the", "of", "ink"]]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.save_pretrained(folder)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = common | {"num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": 12,
                     "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    vision = common | {"num_hidden_layers": 6, "image_size": SIDE, "patch_size": 8}
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE},
                 "resample": 3, "do_resize": True, "do_rescale": True, "do_normalize": True, **HALF}  # fmt: skip
    return _write(folder, SiglipModel, SiglipConfig(text_config=text, vision_config=vision), processor)


def write_vgg16(folder: Path) -> Path:
    """Real widths (they are LPIPS's too), random weights of the size that keeps activations alive; no classifier but a
    crumb of it."""
    draw = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=draw) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5 * (len(shape) > 1)
        for name, shape in TENSORS.items()
    }
    folder.mkdir(parents=True)
    save_file(tensors | {"head.fc.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vgg16"}))
    return folder


def _write(folder: Path, cls: Any, config: Any, processor: dict[str, Any]) -> Path:
    from transformers.utils import logging

    torch.manual_seed(11)
    model = cls(config).eval()
    with torch.no_grad():  # the classes begin with weights so small that every picture is nearly the same
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


WRITERS = {
    "dinov2": write_dinov2, "dinov3": write_dinov3, "clip": write_clip, "siglip": write_siglip, "lpips": write_vgg16,
}  # fmt: skip


def write_eyes(root: Path) -> dict[str, Path]:
    """A folder of every kind that has a small one; ``reward`` is the CLIP."""
    folders = {kind: write(root / kind) for kind, write in WRITERS.items()}
    return folders | {"reward": folders["clip"], "registers": write_dinov2(root / "registers", 4)}
