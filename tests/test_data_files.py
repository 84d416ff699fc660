"""What people really bring: pictures of any size, phones' ones, and files that are not what their names say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from concept_folders import SETTINGS, allowing, faults_of, make, picture, rows, texts, write_rows
from PIL import Image, features
from profiles import DISPLAY_P3

from dopsd.config import load_settings
from dopsd.config.groups import DataSettings
from dopsd.data.images import ImageError, bucket_size, fit_image, load_image
from dopsd.data.schema import validate_dataset

LIMIT = DataSettings(resolution=32).max_pixels


# --- sizes ------------------------------------------------------------------------------------------------------------

SHAPES = [(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (1248, 832)]
LARGE = DataSettings(resolution=1024)


def test_the_usual_shapes_of_one_megapixel_are_taken_as_they_are(tmp_path):
    sizes = list(dict.fromkeys([*SHAPES, *(size[::-1] for size in SHAPES)]))
    folder = make(tmp_path, count=len(sizes))
    for i, size in enumerate(sizes):
        image = picture(i, size)
        image.save(folder / f"{i}.png")
        assert bucket_size(*size, 1024) == size
        assert np.array_equal(fit_image(image, bucket_size(*size, 1024)), image), size
    assert validate_dataset(folder, "test", LARGE)[0].warnings == ()


@pytest.mark.parametrize(
    ("size", "outcome"),
    [
        ((31, 31), ""),
        ((31, 30), ""),
        ((30, 29), "enlarged"),
        ((16, 16), "enlarged"),
        ((32, 8), "enlarged"),
        ((16, 15), "small"),
    ],
)
def test_a_smaller_picture_is_enlarged_with_a_warning_down_to_half_the_side(tmp_path, size, outcome):
    folder = make(tmp_path)
    picture(2, size).save(folder / "2.png")
    settings = SETTINGS
    if outcome == "small":
        ((*_, problem),) = faults_of(folder)
        assert "16 x 15 pixels, less than half the side of 32 x 32" in problem
        assert "data.allow: [small-pictures]" in problem
        settings = allowing("small-pictures")
    warnings = validate_dataset(folder, "test", settings)[0].warnings
    assert [warning.row for warning in warnings] == ([3] if outcome else [])
    assert all(f"2.png is {size[0]} x {size[1]} pixels, and is enlarged" in warning.problem for warning in warnings)


def test_phones_pictures_are_not_absurdly_large(tmp_path):
    from test_data_images import png_header

    for width, height in ((8160, 6144), (9248, 6936), (12000, 9000)):
        (tmp_path / "a.png").write_bytes(png_header(width, height))  # the header is sound, the pixels are not there
        with pytest.raises(ImageError, match="truncated"):
            load_image(tmp_path / "a.png", LIMIT)
    (tmp_path / "a.png").write_bytes(png_header(12000, 10001))
    with pytest.raises(ImageError, match=r"absurdly large: 12000 x 10001 .* \(data.max_pixels\)"):
        load_image(tmp_path / "a.png", LIMIT)


def test_the_settings_that_are_shipped_take_them_too():
    root = Path(__file__).parents[1]
    for params in (root / "params.yaml", *root.glob("recipes/*.yaml")):
        data = load_settings(params).data
        assert data.max_pixels == LIMIT
        assert data.allow == ()


# --- what a file is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_the_content_decides_what_a_file_is(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow reads no AVIF")
    names = ["a.png", "b.JPG", "c.webp", "d.heic", "e.gif", "f.jfif", "g.tiff"]
    for seed, name in enumerate(names):
        with (tmp_path / name).open("wb") as file:
            picture(seed).save(file, kind)
        (tmp_path / name).with_suffix(".txt").write_text("a fox in [V] style")
    table = validate_dataset(tmp_path, "test", SETTINGS)[0]
    assert [row.image for row in table.rows] == [tmp_path / name for name in names]
    for seed, name in enumerate(names):
        read = np.asarray(load_image(tmp_path / name, LIMIT), int)
        assert np.abs(read - np.asarray(picture(seed))).mean() < 12, name


HEIC = (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100))
UNREAD = {
    "heic": (HEIC[0], "is a HEIC picture: `pip install -e '.[heic]'`"),
    "heif": (HEIC[1], "is a HEIC picture: `pip install -e '.[heic]'`"),
    "gif": (b"GIF89a" + bytes(100), "is a GIF picture, which is not read; convert it to PNG"),
    "tif": (b"II*\0" + bytes(100), "is a TIFF or raw picture"),
    "bmp": (b"BM" + bytes(100), "is a BMP picture"),
    "png": (b"8BPS" + bytes(100), "is a Photoshop picture"),
    "jpg": (b"hello", "is not a readable picture"),
    "avif": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100), ""),
    "psd": (b"8BPS" + bytes(100), "not part of the data set"),
    "cr2": (b"II*\0" + bytes(100), "not part of the data set"),
}


@pytest.mark.parametrize("kind", ["jsonl", "texts"])
def test_each_picture_that_cannot_be_read_is_one_fault(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where the extra is not installed
    folder, caption = (texts if kind == "texts" else make)(tmp_path), "a fox in [V] style"
    for suffix, (content, _) in UNREAD.items():
        (folder / f"{suffix}.{suffix}").write_bytes(content)
        if kind == "texts":
            (folder / f"{suffix}.txt").write_text(caption)
    if kind == "jsonl":
        write_rows(folder, [*rows(), *({"image": f"{suffix}.{suffix}", "caption": caption} for suffix in UNREAD)])
    faults = faults_of(folder)
    assert len(faults) == len(UNREAD)
    for suffix, (_, words) in UNREAD.items():
        name = f"{suffix}.{suffix}"
        (problem,) = [problem for file, *_, problem in faults if file == name or problem.startswith(f"{name}: ")]
        said = "picture, which is not read" if kind == "jsonl" and "not part" in words else words
        assert said in problem, name
        assert ("HEIC" in problem) == (suffix in ("heic", "heif") or "not part" in said), name


def test_heic_is_read_where_the_extra_is(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    stored = Image.new("RGB", (64, 64), DISPLAY_P3.of_srgb((200, 60, 40)))
    file = pillow_heif.from_pillow(stored)
    file.save(tmp_path / "a.jpg", quality=-1, chroma=444, icc_profile=DISPLAY_P3.profile())
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg", LIMIT), int)[9, 9] - (200, 60, 40)).max() <= 4
