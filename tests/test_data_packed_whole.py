"""Packed data sets that are not whole are refused: no row is left out without a word."""

from __future__ import annotations

import tarfile
from collections.abc import Callable

import pytest
from packed_sets import is_as_packed, refused, samples, shard, unpacked

BLOCK = tarfile.BLOCKSIZE


def flipped(whole: bytes, header: int) -> bytes:
    return whole[: header + 150] + bytes([whole[header + 150] ^ 1]) + whole[header + 151 :]


DAMAGES: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "cut at a member's header": (lambda whole, header: whole[:header], "ends too early, at byte {:,}; fetch it again"),
    "cut in a header": (lambda whole, header: whole[: header + 200], "is damaged at byte {:,}, or another"),
    "cut in a member": (lambda whole, header: whole[: header + BLOCK + 20], "unexpected end of data"),
    "a bit of a header": (flipped, "is damaged at byte {:,}, or another"),
    "zeros": (lambda whole, header: whole[:header] + bytes(2 * BLOCK) + whole[header + 2 * BLOCK :], "byte {:,}, or"),
    "one block of zeros at the end": (lambda whole, header: whole[:header] + bytes(BLOCK), "too early, at byte {:,}"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("member", range(1, 9))
def test_a_shard_that_is_cut_or_damaged_is_refused(tmp_path, name, member):
    path = shard(tmp_path / "a.tar", samples())
    with tarfile.open(path) as file:
        header = file.getmembers()[member].offset
    damaged, words = DAMAGES[name]
    path.write_bytes(damaged(path.read_bytes(), header))
    said = refused(path)
    assert said.startswith(f"{path}: ")
    assert words.format(header) in said


def test_two_shards_in_one_file_are_refused(tmp_path):
    one, two = (shard(tmp_path / f"{i}.tar", samples(2, first=3 * i, key=f"{i}/{{}}")) for i in range(2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    assert "another .tar was added to it there" in refused(one)


@pytest.mark.parametrize("zeros", [0, 512, 1 << 21])
def test_a_shard_ends_with_two_blocks_of_zeros_and_any_number_more(tmp_path, zeros):
    path = shard(tmp_path / "a.tar", samples())
    with tarfile.open(path) as file:
        file.getmembers()
        end = file.offset
    path.write_bytes(path.read_bytes()[:end] + bytes(2 * BLOCK + zeros))
    found, *_ = unpacked(path)
    assert is_as_packed(found, range(5))
