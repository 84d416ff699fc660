"""The backbone is the published network; real pictures' features are remembered by content; the probe knows styles."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dopsd.evaluation import backbones
from dopsd.evaluation.backbones import FeatureStore, efficientnet, load_backbone, picture_key
from dopsd.evaluation.probe import degrade, train_probe
from dopsd.evaluation.world import world_picture
from emoji_turbo.pictures import World

WORLD = Path(__file__).parent.parent / "data" / "base" / "emoji-turbo" / "world"


@pytest.fixture(scope="module")
def world() -> World:
    return World.load(WORLD)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


class Counting:
    """The real backbone, counting the pictures that go through it."""

    def __init__(self, inner) -> None:
        self.inner, self.seen = inner, 0
        self.name, self.content_dim, self.style_dim = inner.name, inner.content_dim, inner.style_dim

    def __call__(self, images):
        self.seen += len(images)
        return self.inner(images)


def test_it_is_the_published_network(backbone, world):
    """Mean and deviation of the pooled features, largest logit and its class: of ``efficientnet-lite-pytorch`` 0.1.0
    with the same weights, on the same three pictures at 128 px."""
    pooled = backbone([world_picture(world, "3d", i) for i in (0, 16, 100)])[:, : backbone.content_dim]
    logits = backbone.net.classify(pooled)
    ours = torch.stack([pooled.mean(1), pooled.std(1), logits.max(1).values], 1)
    published = [[0.48615, 1.01742, 13.08745], [0.40707, 0.85675, 9.80501], [0.38763, 0.9199, 20.72919]]
    assert torch.allclose(ours, torch.tensor(published), atol=2e-3)
    assert logits.argmax(1).tolist() == [52, 600, 52]


def test_features_do_not_depend_on_the_batch(backbone, world):
    images = [world_picture(world, "noto", i) for i in range(3)]
    together = backbone(images)
    assert together.shape == (3, 1280 + 512)
    assert torch.allclose(together[1:2], backbone(images[1:2]), atol=1e-4)
    assert backbone([]).shape == (0, 1280 + 512)


def test_square_pictures_of_64_px_are_seen_as_they_always_were(backbone, world):
    """At 128 px, 64 at once: bit for bit, so that scores of the embedded world stay comparable."""
    images = [world_picture(world, style, i) for style in ("ink", "3d") for i in range(0, 80, 2)]
    assert {image.size for image in images} == {(64, 64)}
    pixels = np.stack(
        [np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)) for image in images]
    )
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        parts = [backbone.net(part.contiguous(memory_format=torch.channels_last)) for part in x.split(64)]
    assert torch.equal(backbone(images), torch.cat(parts))


def test_same_padding_is_tensorflows():
    """Stride 2, kernel 3, even size: nothing on the left, one pixel on the right."""
    conv = torch.nn.Conv2d(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert efficientnet._same(conv, x).flatten().tolist() == [45, 39, 66, 50]


def test_an_unknown_backbone_is_named():
    with pytest.raises(backbones.BackboneError, match="'inception': unknown; choose one of efficientnet-lite0"):
        load_backbone("inception")


def test_real_pictures_go_through_the_network_once(tmp_path, backbone, world):
    images = [world_picture(world, "flat", i) for i in (0, 1, 1, 2)]
    path = tmp_path / "features.safetensors"
    counting = Counting(backbone)
    store = FeatureStore(counting, path)
    first = store(images)
    store(images)
    assert counting.seen == 3
    store.save()
    again = FeatureStore(counting, path)
    assert torch.equal(again([*images, world_picture(world, "flat", 3)])[:4], first)
    assert counting.seen == 4
    assert torch.allclose(store.content(first), backbone(images)[:, :1280], atol=1e-4)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 200])
def test_a_damaged_store_is_computed_again(tmp_path, backbone, world, content):
    path = tmp_path / "features.safetensors"
    path.write_bytes(content)
    image = world_picture(world, "flat", 0)
    store = FeatureStore(backbone, path)
    assert torch.allclose(store([image]), backbone([image]), atol=1e-4)
    store.save()
    assert len(FeatureStore(backbone, path)([image])) == 1


def test_features_of_pictures_that_were_shown_another_way_are_computed_again(tmp_path, backbone, world):
    """Stores of earlier versions do not say how, and squashed their pictures."""
    path, image = tmp_path / "features.safetensors", world_picture(world, "flat", 0)
    metadata = {"backbone": backbone.name, "keys": json.dumps([picture_key(image)])}
    save_file({"features": torch.zeros(1, 1280 + 512)}, path, metadata=metadata)
    assert float(FeatureStore(backbone, path)([image]).abs().max()) > 0


def test_the_probe_knows_the_styles_of_unseen_concepts_also_degraded(backbone, world):
    pictures = {style: stack[:50] for style, stack in world.pictures.items()}
    few = replace(world, labels=world.labels[:50], codes=world.codes[:50], pictures=pictures, held_out=(5,))
    seen: list[int] = []

    def through(images):
        seen.append(len(images))
        return [image.resize((32, 32)).resize((64, 64)) for image in images]

    store = FeatureStore(backbone)
    probe = train_probe(few, range(0, 50, 3), store, through, seed=0)
    assert probe.accuracy["clean"] > 0.65
    assert probe.accuracy["degraded"] > 0.5
    assert probe.counts["training_pictures"] == 2 * 5 * 33 + seen[0]
    ink = store.style(store([world_picture(few, "ink", i) for i in range(0, 50, 3)]))
    assert float(probe.probability(ink, ["ink"] * 17).mean()) > 0.85
    assert torch.allclose(probe.probabilities(ink).sum(1), torch.ones(17), atol=1e-5)


def test_the_probe_needs_concepts_to_train_on(backbone, world):
    with pytest.raises(ValueError, match="style probe: 0 concepts are left to train it on"):
        train_probe(world, range(len(world.labels)), FeatureStore(backbone), None, seed=0)


def test_degraded_copies_differ_and_are_seeded(world):
    image = world_picture(world, "3d", 4)
    first, second = ([degrade(image, draw) for _ in range(12)] for draw in map(np.random.default_rng, (1, 1)))
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second]
    assert all(isinstance(a, Image.Image) and a.size == image.size for a in first)
    assert len({a.tobytes() for a in first}) == 12
