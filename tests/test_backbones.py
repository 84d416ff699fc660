"""Every backbone is the library's own model on the library's own pixels; shapes are kept; order and batches are not
seen; and every score knows a picture from its blurred copy, and that from noise."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file

from dopsd.evaluation.backbones import BackboneError, Backbones, load_backbone, load_backbones, vision
from dopsd.evaluation.backbones.base import checked
from dopsd.evaluation.backbones.pictures import MOST_PIXELS, area_size, batches
from tests.seeing import SIDE, write_eyes

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FEATURES = ("dinov2", "registers", "dinov3", "clip", "siglip")
TEXTS = ["a fox in style of ink", "A Fox", "on the beach", "the style"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_eyes(tmp_path_factory.mktemp("eyes"))


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Backbones]:
    """By the folder's name; the efficient net too."""
    names = {kind: f"{'dinov2' if kind == 'registers' else kind}:{folder}" for kind, folder in folders.items()}
    names["efficientnet"] = "efficientnet-lite0"
    return {kind: load_backbones([name], CPU, folders["dinov2"].parent) for kind, name in names.items()}


@pytest.fixture(scope="module")
def real() -> list[Image.Image]:
    """Pictures of the repository, 64 x 64."""
    files = sorted((ROOT / "data/concepts/style-ink/images").glob("*.png"))[:8]
    return [Image.open(file).convert("RGB") for file in files]


def own_size(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    return [picture.resize((SIDE, SIDE)) for picture in pictures]


# --- the library's own ------------------------------------------------------------------------------------------------


def by_the_library(kind: str, folder: Path, pictures: Sequence[Image.Image]) -> Any:
    """Model and output: pixels by the library's image processor, where it has one that needs no torchvision."""
    if kind == "dinov3":
        config = json.loads((folder / "preprocessor_config.json").read_text())
        sized = [picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for picture in pictures]
        pixels = np.stack([np.asarray(picture) / 255 for picture in sized])
        pixels = ((pixels - config["image_mean"]) / config["image_std"]).transpose(0, 3, 1, 2)
        inputs = torch.tensor(pixels, dtype=torch.float32)
    else:
        inputs = transformers.AutoImageProcessor.from_pretrained(folder)(list(pictures), return_tensors="pt")
        inputs = inputs["pixel_values"]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        part = model.vision_model if kind in ("clip", "siglip") else model
        return model, part(pixel_values=inputs, output_hidden_states=True)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", FEATURES)
def test_features_are_the_librarys_on_squares_of_a_models_own_size_or_larger(kind, times, folders, loaded, real):
    (backbone,) = loaded[kind].features
    pictures = [picture.resize((SIDE * times, SIDE * times)) for picture in real[:3]]
    ours = backbone(pictures)
    model, out = by_the_library(kind, folders[kind], pictures)
    skip = {"dinov2": 1, "registers": 5, "dinov3": 5, "clip": 1, "siglip": 0}[kind]
    if kind == "clip":
        content = model.visual_projection(out.pooler_output)
    else:
        content = out.pooler_output if kind == "siglip" else out.last_hidden_state[:, skip:].mean(1)
    style = [part for layer in (1, 2, 3, 4) for part in torch.std_mean(out.hidden_states[layer][:, skip:], 1)[::-1]]
    assert len(out.hidden_states) == 7
    assert ours.dtype == torch.float32
    assert ours.shape == (3, backbone.content_dim + backbone.style_dim)
    torch.testing.assert_close(ours, torch.cat([content, *style], 1).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip", "reward"])
def test_text_scores_are_the_librarys_logits(kind, folders, loaded, real) -> None:
    """``logits_per_image`` is the cosine by the model's scale (and shift, of SigLIP); a reward keeps the scale."""
    (score,) = loaded[kind].texts
    pictures, folder = own_size(real[:4]), folders[kind]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")
    if kind == "siglip":
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        ids = tokenizer([text.lower() for text in TEXTS], padding="max_length", max_length=12, return_tensors="pt")
        tokens = {"input_ids": ids["input_ids"]}
    else:
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(
            TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt"
        )
    with torch.no_grad():
        logits = model(pixel_values=pixels["pixel_values"], **tokens).logits_per_image.diagonal()
    if kind != "reward":
        logits = (logits - (model.logit_bias.item() if kind == "siglip" else 0)) / model.logit_scale.exp().item()
    torch.testing.assert_close(score(pictures, TEXTS), logits, rtol=1e-4, atol=1e-5)


def test_a_text_that_is_longer_than_a_model_reads_is_cut(loaded, real) -> None:
    (score,) = loaded["clip"].texts
    long = "abcdefghijklmnopqrst" * 20
    assert torch.equal(score(real[:1], [long]), score(real[:1], [long + "uvw"]))
    with pytest.raises(ValueError, match="2 pictures and 1 texts"):
        score(real[:2], ["a"])


def plain_lpips(first: Image.Image, second: Image.Image, folder: Path) -> float:
    """As the paper has it, in float64, stage by stage; pictures between -1 and 1."""
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    stored = json.loads((ROOT / "dopsd/evaluation/backbones/lpips_vgg.json").read_text())["layers"]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    stages = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's features
    total, states = 0.0, []
    for picture in (first, second):
        x = torch.tensor(np.asarray(picture)).double() / 127.5 - 1
        states.append(((x - shift) / scale).permute(2, 0, 1)[None])
    for number, (places, channels) in enumerate(zip(stages, stored, strict=True)):
        for place in places:
            name = f"features.{place}"
            states = [F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu() for x in states]
        a, b = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in states)
        total += float((((a - b) ** 2) * torch.tensor(channels).double()[None, :, None, None]).sum(1).mean())
        if number < 4:
            states = [F.max_pool2d(x, 2, 2) for x in states]
    return total


def test_lpips_is_the_papers(folders, loaded, real) -> None:
    (lpips,) = loaded["lpips"].distances
    first, second = [real[0], real[1].resize((48, 80))], [real[2], real[3].resize((48, 80))]
    expected = [plain_lpips(a, b, folders["lpips"]) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(lpips(first, second), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert min(expected) > 0.01
    with pytest.raises(ValueError, match=r"pair 2: pictures of \(64, 64\) and \(48, 80\)"):
        lpips([real[0], real[0]], [real[1], second[1]])


def test_lpips_published_weights_are_whole() -> None:
    """Plain sums, and sums by place, of the five layers in the file of lpips 0.1.4 on PyPI."""
    layers = json.loads((ROOT / "dopsd/evaluation/backbones/lpips_vgg.json").read_text())["layers"]
    assert [len(layer) for layer in layers] == [64, 128, 256, 512, 512]
    plain = [6.925992, 8.858334, 17.515006, 51.521323, 47.034854]
    assert [sum(layer) for layer in layers] == pytest.approx(plain, abs=1e-6)
    placed = [197.8404, 530.9149, 2230.9234, 13249.7447, 11854.1809]
    assert [sum(n * x for n, x in enumerate(layer)) for layer in layers] == pytest.approx(placed, abs=1e-4)


# --- shapes -----------------------------------------------------------------------------------------------------------

SHOWN = ("efficientnet", "dinov2", "registers", "dinov3", "clip", "siglip", "lpips")


def use(backbones: Backbones, pictures: Sequence[Image.Image]) -> torch.Tensor:
    if backbones.distances:
        return backbones.distances[0](pictures, [picture.transpose(Image.Transpose.ROTATE_180) for picture in pictures])
    return backbones.features[0](pictures)


def seen_by(backbones: Backbones, picture: Image.Image) -> torch.Tensor:
    """What reaches the network, ``[3, H, W]``."""
    caught: list[torch.Tensor] = []
    net = backbones.held[0].net
    part = getattr(net, "vision_model", net)
    hook = part.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    use(backbones, [picture])
    hook.remove()
    return caught[0][0]


def disc(size: tuple[int, int]) -> Image.Image:
    """A white disc on black, of two thirds of the shorter side."""
    image, radius = Image.new("RGB", size), min(size) / 3
    x, y = size[0] / 2, size[1] / 2
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill="white")
    return image


def roundness(pixels: torch.Tensor) -> float:
    """Width by height of the disc in what a network sees."""
    white = pixels[0] > (pixels[0].max() + pixels[0].min()) / 2
    return float(white.any(0).sum() / white.any(1).sum())


@pytest.mark.parametrize("size", [(240, 120), (120, 240), (100, 300)])
@pytest.mark.parametrize("kind", SHOWN)
def test_a_disc_stays_round_whatever_the_pictures_shape(kind, size, loaded) -> None:
    assert roundness(seen_by(loaded[kind], disc(size))) == pytest.approx(1, abs=0.2)


def test_squashing_would_be_noticed(loaded, monkeypatch) -> None:
    monkeypatch.setattr(vision, "area_size", lambda size, area, **options: (SIDE, SIDE))
    monkeypatch.setattr(vision, "letterboxed", lambda image, side, *options: image.resize((side, side)))
    for kind in ("dinov2", "dinov3", "clip", "siglip"):
        assert abs(roundness(seen_by(loaded[kind], disc((240, 120)))) - 1) > 0.4


@pytest.mark.parametrize(("kind", "patch"), [("dinov2", 14), ("registers", 14), ("dinov3", 8)])
def test_what_has_patches_sees_whole_ones(kind, patch, loaded) -> None:
    """The library leaves the rest of a side out, without a word."""
    for size in ((200, 130), (90, 211), (33, 30)):
        shape = seen_by(loaded[kind], disc(size)).shape[1:]
        assert [side % patch for side in shape] == [0, 0]
        assert max(shape) <= 2 * max(size) + patch


@pytest.mark.parametrize(
    ("processor", "side"),
    [({"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}, "do_center_crop": True}, 224),
     ({"crop_size": 224, "size": 224, "do_center_crop": True, "do_resize": True}, 224),
     ({"size": {"height": 384, "width": 384}}, 384),
     ({"crop_size": 224, "size": {"height": 256, "width": 256}, "do_center_crop": False}, 256)],
)  # fmt: skip
def test_the_side_is_what_a_model_sees_after_cropping(processor, side) -> None:
    """As DINOv2, older and newer CLIP and SigLIP, and DINOv3 write it."""
    pixels = vision.Pixels.of(processor | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, "x")
    assert pixels == vision.Pixels(side, (0.5,) * 3, (0.25,) * 3, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_fixed_square_holds_the_whole_picture_on_its_mean_colour(kind, loaded) -> None:
    """Nothing is cropped, and beside the picture there is nothing: zeros, to a level's half."""
    seen = seen_by(loaded[kind], Image.new("RGB", (200, 100), "white"))
    assert seen.shape == (3, SIDE, SIDE)
    assert bool((seen[:, SIDE // 4 : -SIDE // 4] > 0.9).all())
    edges = torch.cat([seen[:, : SIDE // 4], seen[:, -SIDE // 4 :]], 1)
    assert float(edges.abs().max()) < 0.5 / 255 / 0.2


def test_the_area_is_the_models_own_and_a_small_picture_is_doubled_at_most() -> None:
    assert area_size((64, 64), 224**2) == (128, 128)
    assert area_size((1024, 1024), 224**2) == (224, 224)
    assert area_size((1216, 832), 224**2, multiple=14) == (19 * 14, 13 * 14)
    assert area_size((40, 4), 224**2, multiple=14) == (6 * 14, 14)
    assert area_size((300, 200), 512**2, least=16, enlarged=1.0) == (300, 200)
    assert area_size((2048, 512), 512**2, least=16, enlarged=1.0) == (1024, 256)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHOWN)
def test_a_batch_of_mixed_shapes_is_its_pictures_one_by_one(kind, loaded, real) -> None:
    sizes = [(64, 64), (96, 48), (64, 64), (48, 96), (96, 48), (64, 64), (80, 64), (64, 64)]
    pictures = [picture.resize(size) for picture, size in zip(real, sizes, strict=True)]
    together = use(loaded[kind], pictures)
    alone = torch.cat([use(loaded[kind], [picture]) for picture in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert len(use(loaded[kind], [])) == 0


def test_no_more_pictures_at_once_than_have_so_many_pixels_together() -> None:
    sizes = [(128, 128)] * 130 + [(224, 224)] * 41 + [(2048, 2048)] * 2
    made = list(batches(sizes))
    assert sorted(n for numbers in made for n in numbers) == list(range(len(sizes)))
    assert [len(numbers) for numbers in made] == [64, 64, 2, 20, 20, 1, 1, 1]
    assert all(len(n) == 1 or len(n) * sizes[n[0]][0] ** 2 <= MOST_PIXELS for n in made)


# --- what the scores are worth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHOWN)
def test_a_picture_is_nearest_to_itself_then_to_a_blurred_copy_then_to_noise(kind, loaded, real) -> None:
    draw = np.random.default_rng(0)
    blurred = [picture.filter(ImageFilter.GaussianBlur(1.5)) for picture in real]
    noise = [Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in real]
    if loaded[kind].distances:
        same, near, far = (loaded[kind].distances[0](real, others) for others in (real, blurred, noise))
        assert float(same.abs().max()) == 0
    else:
        backbone = loaded[kind].features[0]
        content = [backbone(some)[:, : backbone.content_dim] for some in (real, blurred, noise)]
        same, near, far = (1 - torch.cosine_similarity(content[0], other) for other in [content[0], *content[1:]])
        assert float(same.abs().max()) < 1e-5
    assert bool((near > same).all())
    assert float(near.mean()) < float(far.mean())


# --- memory and half precision ----------------------------------------------------------------------------------------


def test_what_is_released_is_gone(folders) -> None:
    names = [f"{kind}:{folders[kind]}" for kind in ("dinov2", "clip", "lpips")]
    backbones = load_backbones([*names, "efficientnet-lite0"], CPU, folders["dinov2"].parent)
    assert len(backbones.held) == 4, "a CLIP is loaded once for both of its groups"
    assert [len(group) for group in (backbones.features, backbones.distances, backbones.texts)] == [3, 1, 1]
    nets = [weakref.ref(held.net) for held in backbones.held]
    backbones.release()
    gc.collect()
    assert not any(net() is not None for net in nets)


def test_what_is_no_number_is_no_score() -> None:
    with pytest.raises(BackboneError, match="backbone clip:x: gives values that are no numbers"):
        checked(torch.tensor([1.0, float("inf")]).half(), "clip:x")


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "clip", "siglip"])
def test_half_precision_is_the_same_but_for_rounding(kind, folders, loaded, real) -> None:
    """As on a GPU, whose types these are; on it nothing was tried."""
    held = load_backbones([f"{kind}:{folders[kind]}"], CPU, folders["dinov2"].parent).held[0]
    held.net = held.net.to(torch.bfloat16 if kind == "dinov3" else torch.float16)
    features = held.images if kind in ("clip", "siglip") else held
    backbone = loaded[kind].features[0]
    cosine = torch.cosine_similarity(features(real), backbone(real))
    assert float(cosine.min()) > 0.995


def test_the_first_features_are_what_load_backbone_gives(folders) -> None:
    root = folders["dinov2"].parent
    assert load_backbone(f"clip:{folders['clip']}", root=root).content_dim == 16
    with pytest.raises(BackboneError, match="gives no features"):
        load_backbone(f"lpips:{folders['lpips']}", root=root)
