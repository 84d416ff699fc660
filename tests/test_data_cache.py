"""The encoding cache: what is put comes back bit for bit, damage is noticed, nothing is computed twice."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dopsd.data.cache import EncodingCache


def conditioning(value: float = 0.5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(value * 1000))
    return {
        "caption": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(4),
        "none": torch.zeros(0, 5),
        "scalar": torch.tensor(2.0),
        "strided": torch.randn(4, 6, generator=generator).T,
    }


def equal(one, other) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture
def cache(tmp_path):
    return EncodingCache(tmp_path / "encoded")


def test_what_is_put_comes_back(cache):
    key = cache.key("prompt", "f", "a fox")
    assert cache.get(key) is None
    shared = conditioning()
    shared["same storage"] = shared["caption"]  # safetensors refuses it; a family need not know
    put = cache.put(key, shared)
    assert equal(cache.get(key), shared)
    assert equal(put, shared)
    assert [path.name for path in cache.folder.iterdir()] == [f"{key}.safetensors"]  # no partial file stays


def test_gradients_and_later_changes_do_not_reach_the_cache(cache):
    key = cache.key("prompt", "f", "a fox")
    tensor = torch.ones(3, requires_grad=True)
    put = cache.put(key, {"caption": tensor})
    with torch.no_grad():
        tensor.mul_(2)
    assert put["caption"].tolist() == [1, 1, 1]
    assert not put["caption"].requires_grad


parts = st.lists(st.binary(max_size=4) | st.text(max_size=4), max_size=4)


@given(one=parts, other=parts)
@hypothesis_settings(max_examples=200, deadline=None)
def test_keys_are_equal_only_for_equal_parts(one, other):
    cache = EncodingCache("unused")  # type: ignore[arg-type]
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (cache.key("k", "f", *one) == cache.key("k", "f", *other)) == same


def test_keys_depend_on_kind_fingerprint_and_where_parts_end(cache):
    keys = [
        cache.key("prompt", "f", "ab", "c"),
        cache.key("prompt", "f", "a", "bc"),
        cache.key("prompt", "f", b"ab", "c"),
        cache.key("context", "f", "ab", "c"),
        cache.key("prompt", "g", "ab", "c"),
        cache.key("promptf", "", "ab", "c"),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other key", "header"])
def test_a_damaged_file_is_computed_again_with_a_warning(cache, caplog, damage):
    key, other = cache.key("prompt", "f", "a"), cache.key("prompt", "f", "b")
    cache.put(key, conditioning())
    path = cache.path(key)
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-5])
    elif damage == "flipped":
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "header":
        path.write_bytes(b"\xff" * 8 + whole[8:])
    else:
        path.rename(cache.path(other))
        key = other
    with caplog.at_level(logging.WARNING):
        assert cache.get(key) is None
    assert [record.getMessage().count("is damaged") for record in caplog.records] == [1]
    assert key in caplog.text
    assert equal(cache.get_or_encode([key], lambda indices: [conditioning(0.25)], 4)[0], conditioning(0.25))
    assert equal(cache.get(key), conditioning(0.25))


def test_only_missing_ones_are_encoded_in_batches_and_in_order(cache):
    texts = ["a", "b", "c", "a", "d", "e"]
    keys = [cache.key("prompt", "f", text) for text in texts]
    cache.put(keys[1], {"x": torch.tensor([ord("b")])})
    asked: list[list[int]] = []

    def encode(indices: list[int]) -> list[dict[str, torch.Tensor]]:
        asked.append(indices)
        return [{"x": torch.tensor([ord(texts[index])])} for index in indices]

    found = cache.get_or_encode(keys, encode, 2)
    assert asked == [[0, 2], [4, 5]]
    assert [chr(int(one["x"])) for one in found] == texts
    assert [chr(int(one["x"])) for one in cache.get_or_encode(keys, encode, 2)] == texts
    assert len(asked) == 2


def test_what_was_encoded_before_a_crash_stays(cache):
    keys = [cache.key("prompt", "f", text) for text in "abc"]

    def encode(indices: list[int]) -> list[dict[str, torch.Tensor]]:
        if indices == [2]:
            raise RuntimeError("out of memory")
        return [{"x": torch.zeros(1)} for _ in indices]

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.get_or_encode(keys, encode, 2)
    assert [cache.get(key) is not None for key in keys] == [True, True, False]


def test_a_wrong_number_of_encodings_is_an_error(cache):
    keys = [cache.key("prompt", "f", text) for text in "ab"]
    with pytest.raises(ValueError, match="1 encodings for 2 inputs"):
        cache.get_or_encode(keys, lambda indices: [{"x": torch.zeros(1)}], 2)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        cache.get_or_encode(keys, lambda indices: [], 0)


@pytest.mark.parametrize("key", ["", "../" + "a" * 61, "A" * 64])
def test_only_keys_name_files(cache, key):
    with pytest.raises(ValueError, match="not a key"):
        cache.get(key)
