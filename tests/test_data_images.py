"""Decoding, buckets and near duplicates, against pictures whose pixels are known."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dopsd.data.duplicates import fingerprint, near_duplicates
from dopsd.data.images import ImageError, bucket_size, fit_image, inspect_image, load_image

LIMIT = 100_000
SHEETS = Path(__file__).parents[1] / "data" / "base" / "emoji-turbo" / "world"


def quarters() -> Image.Image:
    """40 x 20: red, green over blue, white."""
    image = Image.new("RGB", (40, 20), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 19, 9), fill="red")
    draw.rectangle((20, 0, 39, 9), fill="lime")
    draw.rectangle((0, 10, 19, 19), fill="blue")
    return image


def test_pixels_come_back(tmp_path):
    quarters().save(tmp_path / "a.png")
    quarters().save(tmp_path / "a.webp", lossless=True)
    for name in ("a.png", "a.webp"):
        assert np.array_equal(load_image(tmp_path / name, LIMIT), quarters())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # The transposition that a viewer undoes, by the EXIF standard's table.
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    image = quarters()
    for step in stored:
        image = image.transpose(step)
    image.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    upright = load_image(tmp_path / "a.jpg", LIMIT)
    assert upright.size == (40, 20)
    centres = np.asarray(upright)[[5, 5, 15, 15], [10, 30, 10, 30]].astype(int)
    truth = np.asarray(quarters())[[5, 5, 15, 15], [10, 30, 10, 30]].astype(int)
    assert np.abs(centres - truth).max() < 12
    facts = inspect_image(tmp_path / "a.jpg", LIMIT)
    assert (facts.width, facts.height) == (40, 20)


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (4, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128), (9, 9, 9, 255)])
    image.save(tmp_path / "a.png")
    assert list(np.asarray(load_image(tmp_path / "a.png", LIMIT))[0].tolist()) == [
        [255, 0, 0],
        [255, 255, 255],
        [127, 127, 127],
        [9, 9, 9],
    ]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(load_image(tmp_path / "p.png", LIMIT))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_deep_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png", LIMIT))[0, :, 0].tolist() == [0, 128, 255]


def test_grey_and_cmyk_become_rgb(tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png", LIMIT))[0, 0].tolist() == [100, 100, 100]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg", LIMIT), dtype=int)[0, 0] - [255, 0, 0]).max() < 8


def test_the_first_picture_of_a_phones_jpeg_counts(tmp_path):
    quarters().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO"
    assert load_image(tmp_path / "a.jpg", LIMIT).size == (40, 20)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    data = zlib.compress(b"\0" * 100)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("limit", "side"), [(LIMIT, 400), (LIMIT, 50_000), (10**12, 65_000)])
def test_bombs_are_refused_by_their_header(tmp_path, limit, side):
    # 65,000 squared is above PIL's own limit for an error.
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a person's own settings may be
        with pytest.raises(ImageError, match="absurdly large"):
            load_image(tmp_path / "a.png", limit)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(ImageError, match="absurdly large"):
        load_image(tmp_path / "a.png", LIMIT)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_every_truncation_that_loses_pixels_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for keep in range(0, len(whole) - 30, max(1, len(whole) // 40)):
        (tmp_path / name).write_bytes(whole[:keep])
        with pytest.raises(ImageError):
            load_image(tmp_path / name, LIMIT)


def test_an_unreadable_name_is_said(tmp_path):
    with pytest.raises(ImageError, match="missing"):
        load_image(tmp_path / "no.png", LIMIT)
    os.symlink("loop.png", tmp_path / "loop.png")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path / "loop.png", LIMIT)


# --- buckets ---------------------------------------------------------------------------------------------------------


@given(
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    resolution=st.integers(16, 2048),
    multiple=st.sampled_from([8, 16, 32]),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_buckets(width, height, resolution, multiple):
    size = bucket_size(width, height, resolution, multiple)
    assert all(side % multiple == 0 and side >= multiple for side in size)
    assert bucket_size(height, width, resolution, multiple) == size[::-1]
    # Each side is within half a multiple of the exact one, which keeps shape and area.
    exact = (resolution * (width / height) ** 0.5, resolution * (height / width) ** 0.5)
    for side, truth in zip(size, exact, strict=True):
        assert abs(side - truth) <= multiple / 2 + 1e-6 or (side == multiple and truth < multiple)


def test_square_pictures_get_the_resolution_itself():
    assert bucket_size(64, 64, 64) == (64, 64)
    assert bucket_size(3000, 3000, 1024) == (1024, 1024)
    assert bucket_size(1920, 1080, 1024) == (1360, 768)


def test_fit_keeps_the_centre():
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    assert (np.asarray(fit_image(wide, (50, 50)))[:, 2:-2] > 250).all()
    assert fit_image(quarters(), (80, 96)).size == (80, 96)
    same = fit_image(quarters(), (40, 20))
    assert np.array_equal(same, quarters())


# --- near duplicates -------------------------------------------------------------------------------------------------


def drawings(style: str, count: int) -> list[Image.Image]:
    """The first ``count`` emoji of a shipped sheet."""
    with Image.open(SHEETS / f"{style}.png") as opened:
        sheet = opened.convert("RGB")
    columns = sheet.width // 64
    corners = [(64 * (i % columns), 64 * (i // columns)) for i in range(count)]
    return [sheet.crop((x, y, x + 64, y + 64)) for x, y in corners]


@pytest.mark.parametrize("style", ["noto", "twemoji", "flat", "3d", "ink"])
def test_different_drawings_are_no_duplicates(style):
    prints = [fingerprint(image) for image in drawings(style, 300)]
    assert near_duplicates(prints, 6) == {}


def encoded(image: Image.Image, fmt: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return Image.open(buffer).convert("RGB")


COPIES = {
    "jpeg 90": lambda image: encoded(image, "JPEG", quality=90),
    "webp": lambda image: encoded(image, "WEBP", quality=80),
    "twice the size": lambda image: image.resize((128, 128), Image.Resampling.BICUBIC),
    "half the size": lambda image: image.resize((32, 32), Image.Resampling.LANCZOS),
    "darker": lambda image: image.point(lambda value: int(value * 0.8)),
    "gamma": lambda image: image.point(lambda value: int(255 * (value / 255) ** 0.8)),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("style", ["noto", "ink"])
def test_copies_are_found(style, copy):
    originals = drawings(style, 60)
    prints = [fingerprint(image) for image in (*originals, *map(COPIES[copy], originals))]
    found = near_duplicates(prints, 4)
    matched = [found[60 + i][0] == i for i in range(60) if 60 + i in found]
    assert all(matched)
    assert len(matched) >= 58


def test_flat_pictures_are_told_apart_by_colour():
    flat = [fingerprint(Image.new("RGB", (40, 40), colour)) for colour in ("red", "blue", "red", "white")]
    assert near_duplicates(flat, 2) == {2: (0, 0)}
    assert near_duplicates([], 2) == {}
