"""Encoding: once per content, never a caller's caption changed, one example per image and caption."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from dopsd.config import Settings
from dopsd.data.cache import EncodingCache
from dopsd.data.encoded import Encoded, read_encoded, write_encoded
from dopsd.data.manifest import ConceptTable, Row
from dopsd.models.base import Request
from dopsd.train.encode import EncodingRequest, encode_concept, encode_prompts
from tests import tiny


class Counting:
    """The family, counting what it is asked to encode."""

    def __init__(self, family):
        self._family, self.asked = family, []

    def __getattr__(self, name):
        return getattr(self._family, name)

    def encode_prompt(self, requests):
        self.asked += [("prompt", request.caption) for request in requests]
        return self._family.encode_prompt(requests)

    def encode_context(self, requests, targets):
        self.asked += [("context", request.caption) for request in requests]
        return self._family.encode_context(requests, targets)

    def encode_images(self, images):
        self.asked += [("latents", image.size) for image in images]
        return self._family.encode_images(images)


SETTINGS = Settings.model_validate(
    {
        "concepts": ["c"],
        "model": {"path": "base"},
        "data": {"resolution": 64},
        "train": tiny.tiny_settings().model_dump(),
    }
)


@pytest.fixture
def counted(family):
    return Counting(family)


def _table(folder, colours=("red", "blue"), size=(90, 90)):
    rows = []
    for number, colour in enumerate(colours):
        path = folder / f"{number}.png"
        picture = Image.new("RGB", size, colour)
        picture.putpixel((3, number), (0, 0, 0))
        picture.save(path)
        captions = (("short", f"a {colour} thing in [V] style"), ("request", f"draw [V], {colour}"))
        rows.append(Row(image=path, captions=captions, references=(), source="metadata.jsonl", line=number + 1))
    return ConceptTable(name="c", root=folder, rows=tuple(rows), content_hash="x")


def test_captions_are_never_changed_and_encode_as_the_pipeline_does(counted, tmp_path):
    """The templating of a prompt list in place made published code encode doubly templated text."""
    texts = list(tiny.CAPTIONS)
    cache = EncodingCache(tmp_path)
    requests = [EncodingRequest(text) for text in texts]
    encoded = encode_prompts(counted, requests, cache)
    assert [request.caption for request in requests] == list(tiny.CAPTIONS)
    again = encode_prompts(counted, requests, EncodingCache(tmp_path / "other"))
    for first, second, text in zip(encoded, again, texts, strict=True):
        alone = counted.encode_prompt([Request(text)])[0]
        assert torch.equal(first["caption"], second["caption"])
        torch.testing.assert_close(first["caption"], alone["caption"], rtol=1e-4, atol=1e-5)


def test_one_example_per_image_and_caption_in_the_tables_order(counted, tmp_path):
    table = _table(tmp_path)
    before = repr(table)
    examples = encode_concept(counted, table, SETTINGS, EncodingCache(tmp_path / "cache"))
    assert repr(table) == before
    assert [(e.image_index, e.caption) for e in examples] == [
        (number, text) for number, row in enumerate(table.rows) for _, text in row.captions
    ]
    assert {(e.height, e.width) for e in examples} == {(64, 64)}
    assert all(e.latents.shape == (tiny.CHANNELS, 8, 8) for e in examples)
    assert torch.equal(examples[0].latents, examples[1].latents)
    assert not torch.equal(examples[0].latents, examples[2].latents)
    # 16 image tokens stand before the caption's
    assert all(len(e.context["caption"]) > len(e.prompt["caption"]) + 16 for e in examples)


def test_repeats_of_a_row_are_those_of_its_examples_and_are_kept(counted, tmp_path):
    table = _table(tmp_path)
    plain = encode_concept(counted, table, SETTINGS, EncodingCache(tmp_path / "cache"))
    rows = (replace(table.rows[0], repeats=3), *table.rows[1:])
    table = replace(table, rows=rows)
    examples = encode_concept(counted, table, SETTINGS, EncodingCache(tmp_path / "cache"))
    assert [e.repeats for e in examples] == [3, 3, 1, 1]
    write_encoded(tmp_path / "plain", Encoded(tuple(plain), (), (), 2, "x"))
    write_encoded(tmp_path / "encoded", Encoded(tuple(examples), (), (), 2, "x"))
    assert [e.repeats for e in read_encoded(tmp_path / "encoded").examples] == [3, 3, 1, 1]
    assert "repeats" not in (tmp_path / "plain" / "index.json").read_text()  # what was encoded before is still the same


def test_nothing_is_encoded_twice_and_only_what_changed_again(counted, tmp_path):
    cache = EncodingCache(tmp_path / "cache")
    first = encode_concept(counted, _table(tmp_path), SETTINGS, cache)
    assert len(counted.asked) == 4 + 4 + 2
    counted.asked.clear()
    second = encode_concept(counted, _table(tmp_path), SETTINGS, cache)
    assert not counted.asked
    assert all(torch.equal(a.context["caption"], b.context["caption"]) for a, b in zip(first, second, strict=True))
    table = _table(tmp_path, colours=("red", "green"))
    encode_concept(counted, table, SETTINGS, cache)
    assert sorted(kind for kind, _ in counted.asked) == ["context"] * 2 + ["latents"] + ["prompt"] * 2
    counted.asked.clear()
    larger = tiny.tiny_family()
    larger.teaching = replace(larger.teaching, pixels=(4096, 9000))
    counted = Counting(larger)
    encode_concept(counted, table, SETTINGS, cache)
    assert {kind for kind, _ in counted.asked} == {"context"}


def test_an_oblong_image_keeps_its_shape(counted, tmp_path):
    examples = encode_concept(counted, _table(tmp_path, size=(160, 80)), SETTINGS, EncodingCache(tmp_path / "cache"))
    assert {(e.height, e.width) for e in examples} == {(48, 96)}
    assert all(e.latents.shape == (tiny.CHANNELS, 6, 12) for e in examples)
