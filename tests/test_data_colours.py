"""What colours a picture's numbers mean: profiles and transparent colours by hand, the truth in float64."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from concept_folders import SETTINGS, make, picture, rows
from PIL import Image, ImageCms
from profiles import ADOBE_RGB, DISPLAY_P3, PROPHOTO, SRGB, cmyk_profile, grey_profile, srgb_decoded

from dopsd.data.images import content_identity, load_image
from dopsd.data.pictures import Picture
from dopsd.data.schema import validate_dataset

LIMIT = 100_000
P3_PLAIN = replace(DISPLAY_P3, gamma=2.2)
"""Display P3 as many tools approximate it: no curve of sRGB's, a plain power."""
SPACES = {"display-p3": DISPLAY_P3, "p3-gamma": P3_PLAIN, "adobe-rgb": ADOBE_RGB, "prophoto": PROPHOTO}
COLOURS = [(200, 60, 40), (40, 120, 200), (90, 160, 30), (128, 128, 128), (12, 10, 14), (255, 255, 255), (240, 230, 90)]
READ_AS = {"p3-gamma": (183, 72, 54), "adobe-rgb": (173, 62, 45), "prophoto": (136, 70, 38)}
"""What (200, 60, 40) was read as by a version that ignored profiles, seen with other tools' profiles."""


def read(path: Path, column: int = 0) -> np.ndarray:
    return np.asarray(load_image(path, LIMIT), dtype=int)[0, column]


@pytest.mark.parametrize("name", READ_AS)
def test_the_truth_agrees_with_the_numbers_that_were_seen(name):
    assert np.abs(np.array(SPACES[name].of_srgb((200, 60, 40))) - READ_AS[name]).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("name", SPACES)
def test_a_profile_is_applied(tmp_path, name, suffix):
    space = SPACES[name]
    options = {"png": {}, "jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}[suffix]
    for colour in COLOURS:
        file = tmp_path / f"a.{suffix}"
        Image.new("RGB", (8, 8), space.of_srgb(colour)).save(file, icc_profile=space.profile(), **options)
        truth = colour
        if suffix == "jpg":  # it rounds the numbers, and what they mean is what they mean
            with Image.open(file) as stored:
                truth = space.to_srgb(np.asarray(stored)[0, 0])
        assert np.abs(truth - np.array(colour)).max() <= 5
        assert np.abs(read(file) - truth).max() <= 2, colour


@pytest.mark.parametrize("name", SPACES)
def test_transparency_palettes_and_grey_have_profiles_too(tmp_path, name):
    space, colour = SPACES[name], np.array((200, 60, 40))
    stored, profile = space.of_srgb(colour), space.profile()
    Image.new("RGBA", (2, 1), (*stored, 128)).save(tmp_path / "a.png", icc_profile=profile)
    laid = colour * 128 / 255 + 255 * 127 / 255
    assert np.abs(read(tmp_path / "a.png") - laid).max() <= 2
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, *stored])
    palette.save(tmp_path / "p.png", icc_profile=profile)
    assert np.abs(read(tmp_path / "p.png") - colour).max() <= 2
    Image.new("L", (2, 1), space.of_srgb((90, 90, 90))[0]).save(tmp_path / "l.png", icc_profile=profile)
    assert np.abs(read(tmp_path / "l.png") - 90).max() <= 2


@pytest.mark.parametrize("deep", [False, True])
def test_grey_profiles(tmp_path, deep):
    numbers = np.arange(0, 256, 17)
    stored = (numbers * 257).astype(np.uint16) if deep else numbers.astype(np.uint8)
    Image.fromarray(stored[None]).save(tmp_path / "a.png", icc_profile=grey_profile(1.8))
    truth = SRGB.encoded((numbers / 255) ** 1.8) * 255
    found = np.asarray(load_image(tmp_path / "a.png", LIMIT), dtype=int)[0]
    assert np.abs(found - truth[:, None]).max() <= 2


def test_cmyk_by_its_profile(tmp_path):
    draw = np.random.default_rng(0)
    corners = np.vstack([[(255, 255, 255)], draw.integers(20, 236, (15, 3))])  # paper is white
    for number, truth in enumerate(corners):
        inks = tuple(255 * (number >> place & 1) for place in (3, 2, 1, 0))
        image = Image.new("CMYK", (16, 16), inks)
        image.save(tmp_path / "a.jpg", quality=100, icc_profile=cmyk_profile(corners))
        assert np.abs(read(tmp_path / "a.jpg") - truth).max() <= 2, inks


def test_the_truth_of_srgb_is_srgb():
    assert SRGB.of_srgb((200, 60, 40)) == (200, 60, 40)
    assert srgb_decoded(1.0) == 1


@pytest.mark.parametrize(
    "profile", [SRGB.profile(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_an_srgb_profile_changes_no_pixel_and_no_identity(tmp_path, profile):
    plain = picture(0, (64, 64))
    plain.save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(load_image(tmp_path / "a.png", LIMIT), plain)
    content = (tmp_path / "a.png").read_bytes()
    assert content_identity(content) == hashlib.sha256(content).hexdigest()


def test_only_what_is_read_otherwise_than_before_is_encoded_again(tmp_path):
    """Encodings are kept by a picture's identity; earlier versions made it of the bytes alone."""
    files = {"plain.png": {}, "tagged.png": {"icc_profile": DISPLAY_P3.profile()}}
    for name, options in files.items():
        picture(0).save(tmp_path / name, **options)
        earlier = f"own:{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}"
        assert (Picture(tmp_path / name, LIMIT).identity == earlier) == (name == "plain.png")
    nothing = tmp_path / "nothing.png"
    nothing.write_bytes(b"x")
    assert Picture(nothing, LIMIT).identity == f"own:{hashlib.sha256(b'x').hexdigest()}"


def test_the_hash_of_a_data_set_says_how_it_is_read(tmp_path):
    """DVC encodes again what has another hash than before: with a profile it must, without it must not."""
    hashes = {}
    for name, options in {"plain": {}, "tagged": {"icc_profile": ADOBE_RGB.profile()}}.items():
        folder = make(tmp_path / name)
        picture(2).save(folder / "2.png", **options)
        listed = [[hashlib.sha256((folder / row["image"]).read_bytes()).hexdigest(),
                   [list(pair) for pair in row["captions"].items()], []] for row in rows()]  # fmt: skip
        earlier = hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()
        hashes[name] = validate_dataset(folder, "test", SETTINGS)[0].content_hash == earlier
    assert hashes == {"plain": True, "tagged": False}


BROKEN = {
    "no profile": (b"nonsense" * 40, "damaged"),
    "cut off": (DISPLAY_P3.profile()[:300], "damaged"),
    "of another space": (grey_profile(1.8), "is for L and the picture is RGB"),
    "cmyk": (cmyk_profile([(9, 9, 9)] * 16), "is for CMYK and the picture is RGB"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_profile_that_cannot_be_applied_is_left_aside_and_said(tmp_path, name):
    profile, words = BROKEN[name]
    folder = make(tmp_path)
    picture(2).save(folder / "2.png", icc_profile=profile)
    assert np.array_equal(load_image(folder / "2.png", LIMIT), picture(2))
    (warning,) = validate_dataset(folder, "test", SETTINGS)[0].warnings
    assert str(warning).startswith(f"{folder}/metadata.jsonl, row 3, image: 2.png: its colour profile ")
    assert words in warning.problem


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_other_ways_to_name_a_space_are_said_where_they_are_not_followed(tmp_path):
    said = {}
    for name in ("cmyk.jpg", "gamma.png", "exif.jpg", "broken.png", "plain.png"):
        remarks: list[str] = []
        if name == "cmyk.jpg":
            Image.new("CMYK", (8, 8)).save(tmp_path / name)
        elif name == "exif.jpg":
            exif = Image.Exif()
            exif[0x8769] = {0xA001: 65535, 0xA005: {1: "R03"}}
            picture(0).save(tmp_path / name, exif=exif)
        else:
            picture(0).save(tmp_path / name)
            content = (tmp_path / name).read_bytes()
            added = {"gamma.png": _chunk(b"gAMA", struct.pack(">I", 100_000)),
                     "broken.png": _chunk(b"iCCP", b"x\0\0not deflated")}.get(name, b"")  # fmt: skip
            (tmp_path / name).write_bytes(content[:33] + added + content[33:])
        load_image(tmp_path / name, LIMIT, remarks.append)
        said[name] = " ".join(remarks)
    assert "CMYK without a colour profile" in said["cmyk.jpg"]
    assert "gamma of 1 is not followed" in said["gamma.png"]
    assert "Adobe RGB" in said["exif.jpg"]
    assert "profile is damaged" in said["broken.png"]
    assert said["plain.png"] == ""


# --- the transparent colour of a PNG ----------------------------------------------------------------------------------


def keyed(depth: int, colour: bool, pixels: list[tuple[int, ...]], key: tuple[int, ...]) -> bytes:
    """A PNG of one row, by the standard: samples of ``depth`` bits, and a tRNS chunk in the same."""
    bits = "".join(f"{sample:0{depth}b}" for pixel in pixels for sample in pixel)
    bits += "0" * (-len(bits) % 8)
    row = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", len(pixels), 1, depth, 2 if colour else 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", struct.pack(f">{len(key)}H", *key)), (b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks) + _chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "colour"), [(1, False), (2, False), (4, False), (8, False), (16, False), (8, True), (16, True)]
)  # all that PNG has
def test_the_transparent_colour_of_a_png_is_white_at_every_depth(tmp_path, depth, colour):
    most = 2**depth - 1
    for key in {0, 1 << 8 if depth == 16 else 1, most, most // 3}:  # of three times 16 bits PIL knows the upper 8
        samples = sorted({0, most // 2, key, most})
        pixels = [(value, 0, most) if colour else (value,) for value in samples]
        (tmp_path / "a.png").write_bytes(content := keyed(depth, colour, pixels, pixels[samples.index(key)]))
        found = np.asarray(load_image(tmp_path / "a.png", LIMIT), dtype=int)[0]
        for pixel, value in zip(found, pixels, strict=True):
            opaque = [round(255 * v / most) for v in (value if colour else value * 3)]
            truth = [255] * 3 if value[0] == key else opaque
            assert np.abs(pixel - truth).max() <= 1, (depth, key, value)
        as_before = content_identity(content) == hashlib.sha256(content).hexdigest()
        assert as_before == (depth in (1, 8)), depth
