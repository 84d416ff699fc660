"""ICC profiles written by hand, and the mathematics of colour in float64: the truth of what a tagged picture shows."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = (0.3127, 0.3290)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def srgb_decoded(values):
    """Linear light of sRGB's numbers, both in [0, 1]."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@dataclass(frozen=True)
class Space:
    """``primaries``: xy of red, green, blue; ``white``: xy. ``gamma``: ``None`` means sRGB's curve."""

    primaries: tuple[tuple[float, float], ...]
    white: tuple[float, float]
    gamma: float | None

    @property
    def matrix(self):
        """[3, 3], linear light to XYZ under D50 (by Bradford)."""
        xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*self.primaries, self.white)])
        white = xyz[3]
        matrix = xyz[:3].T * np.linalg.solve(xyz[:3].T, white)
        scale = np.diag((BRADFORD @ D50) / (BRADFORD @ white))
        return np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ matrix

    def decoded(self, values):
        return srgb_decoded(values) if self.gamma is None else np.asarray(values, dtype=np.float64) ** self.gamma

    def encoded(self, light):
        """Its numbers in [0, 1] of linear light."""
        if self.gamma is not None:
            return np.clip(light, 0, 1) ** (1 / self.gamma)
        light = np.clip(light, 0, 1)
        return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)

    def of_srgb(self, colour) -> tuple[int, int, int]:
        """The numbers (0 to 255) that a colour of sRGB has here."""
        xyz = SRGB.matrix @ srgb_decoded(np.array(colour) / 255)
        numbers = self.encoded(np.linalg.solve(self.matrix, xyz))
        return tuple(int(value) for value in np.rint(numbers * 255))  # type: ignore[return-value]

    def to_srgb(self, numbers):
        """What its numbers (0 to 255) are in sRGB, unrounded."""
        light = np.linalg.solve(SRGB.matrix, self.matrix @ self.decoded(np.asarray(numbers) / 255))
        return SRGB.encoded(light) * 255

    def profile(self) -> bytes:
        """A version 2 profile of a matrix and curves."""
        curve = _curve(self.decoded(np.linspace(0, 1, 4096)))
        columns = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", self.matrix.T, strict=True)}
        return _profile("mntr", "RGB ", "XYZ ", columns | {f"{name}TRC": curve for name in "rgb"})


SRGB = Space(((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), D65, None)
DISPLAY_P3 = Space(((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)), D65, None)
ADOBE_RGB = Space(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), D65, 563 / 256)
PROPHOTO = Space(((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)), (0.3457, 0.3585), 1.8)


def grey_profile(gamma: float) -> bytes:
    return _profile("mntr", "GRAY", "XYZ ", {"kTRC": _curve(np.linspace(0, 1, 4096) ** gamma)})


def cmyk_profile(corners) -> bytes:
    """``corners``: the sRGB colour of each of the 16 mixtures of full inks, black the fastest; between them it is a
    table's business."""
    lab = [_lab(SRGB.matrix @ srgb_decoded(np.array(colour) / 255)) for colour in corners]
    table = b"".join(struct.pack(">3H", *(round(v) for v in (l * 652.8, (a + 128) * 256, (b + 128) * 256)))
                     for l, a, b in lab)  # fmt: skip  # noqa: E741
    straight = struct.pack(">2H", 0, 65535)
    identity = b"".join(_fixed(value) for value in np.eye(3).ravel())
    lut = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + struct.pack(">2H", 2, 2) + straight * 4 + table
    return _profile("prtr", "CMYK", "Lab ", {"A2B0": lut + straight * 3})


def _lab(xyz):
    def f(t):
        return np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)

    x, y, z = f(xyz / D50)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(values) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">I", len(values)) + np.rint(values * 65535).astype(">u2").tobytes()


def _profile(kind: str, space: str, between: str, tags: dict[str, bytes]) -> bytes:
    text = b"made by hand\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {"desc": described, "cprt": b"text\0\0\0\0" + text, "wtpt": _xyz(D50)} | tags
    table, content = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name.encode() + struct.pack(">2I", start + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(content), bytes(4), 0x02400000, kind.encode(), space.encode(),
                         between.encode()) + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)  # fmt: skip
    header += b"".join(map(_fixed, D50))
    return header + bytes(128 - len(header)) + table + content
