"""Pixels: every mode, alpha and colour profile comes out as the sRGB picture a viewer shows."""

from __future__ import annotations

import io
import logging
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from kontextd_models.intake import IntakeLimits, normalise, open_image
from PIL import Image, ImageCms

Array = npt.NDArray[np.float64]
BANDED = IntakeLimits(working_area=2500)  # makes a 100×100 picture go through the path of large ones

# Display P3 and Adobe RGB (1998): the primaries adapted to D50, as in Apple's and Adobe's own profiles.
P3_PRIMARIES = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_PRIMARIES = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
# Linear light to linear sRGB: from CSS Color 4 (sample code) for P3, by the same sum for Adobe RGB.
P3_TO_SRGB = np.array([[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09827]])
ADOBE_TO_SRGB = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]])


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in body
    )


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def first_pixel(data: bytes) -> tuple[int, ...]:
    return pixels(open_image(data).image)[0]


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def icc(space: bytes, kind: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile by hand, after ICC.1:2001-04, §6."""
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = struct.pack(">I4sI", offset + len(body), b"", 0x02400000) + kind + space + connection
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + body


def curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + b"\0\0"


def xyz(*numbers: float) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*numbers)


WHITE = {b"wtpt": xyz(0.9642, 1, 0.8249)}


def rgb_profile(primaries: tuple[tuple[float, ...], ...], response: bytes) -> bytes:
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), (xyz(*primary) for primary in primaries), strict=True))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), response)
    return icc(b"RGB ", b"mntr", b"XYZ ", tags | WHITE)


def srgb_curve() -> bytes:
    return b"para" + struct.pack(">IHH", 0, 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": curve(gamma)} | WHITE)


def table_profile(space: bytes, kind: bytes, lightness: bytes) -> bytes:
    """A profile that gives each corner of the device's cube a neutral Lab colour; the last channel runs fastest."""
    channels, identity = len(lightness).bit_length() - 1, bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((channels, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + identity * channels
    table += b"".join(bytes((level, 128, 128)) for level in lightness) + identity * 3
    return icc(space, kind, b"Lab ", {b"A2B0": table, b"A2B1": table} | WHITE)


def cmyk_profile() -> bytes:
    """Every ink but black prints as nothing: no formula without a profile says so."""
    return table_profile(b"CMYK", b"prtr", b"\xff\x00" * 8)


def decoded(values: Array) -> Array:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(values: Array) -> Array:
    values = values.clip(0, 1)
    return 255 * np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_a_white_picture_of_any_colour_mode_comes_out_white(mode: str) -> None:
    white = {"CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128), "HSV": (0, 0, 255), "LAB": (255, 128, 128)}
    image = Image.new(mode, (100, 100), white.get(mode, "white"))
    colours = set(pixels(normalise(image)))
    assert len(colours) == 1
    assert min(colours.pop()) >= 254  # 8-bit LAB has no exact white


@pytest.mark.parametrize("working", [IntakeLimits(), BANDED])
@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("RGB", (200, 100, 50), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("P", 3, (30, 60, 90)),
        ("I;16", 257 * 77, (77, 77, 77)),
        ("I", 257 * 77, (77, 77, 77)),
        ("I", 77, (77, 77, 77)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 77.0, (77, 77, 77)),
    ],
)
def test_tiff_and_png_keep_the_colour_of_every_mode(
    mode: str, value: float, expected: tuple[int, ...], working: IntakeLimits
) -> None:
    image = Image.new(mode, (100, 100), value)
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + list(expected))
    kinds = ["TIFF"] if mode in {"I", "F"} else ["TIFF", "PNG"]
    for kind in kinds:
        assert set(pixels(open_image(saved(image, kind), working).image)) == {expected}


def test_floats_beyond_one_are_read_by_their_brightest_pixel_and_broken_ones_are_black() -> None:
    values = np.array([[0, 100, 255], [-5, np.nan, 51]], np.float32)
    assert [red for red, _, _ in pixels(normalise(Image.fromarray(values)))] == [0, 100, 255, 0, 0, 51]
    bright = np.array([[0, 500, 1000]], np.float32)
    assert [red for red, _, _ in pixels(normalise(Image.fromarray(bright)))] == [0, 2, 4]
    infinite = np.array([[0, 0.5, np.inf]], np.float32)
    assert [red for red, _, _ in pixels(normalise(Image.fromarray(infinite)))] == [0, 128, 255]


def test_a_dark_part_of_a_large_32_bit_picture_is_not_brightened_by_itself() -> None:
    values = np.full((3000, 2000), 257 * 100, np.int32)
    values[1500:] = 200  # alone it would pass for 8 bits
    reduced = open_image(saved(Image.fromarray(values), "TIFF"), IntakeLimits(working_area=60_000)).image
    assert reduced.getpixel((100, 10)) == (100, 100, 100)
    assert reduced.getpixel((100, 290)) == (1, 1, 1)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_16_bit_tiff_is_scaled_and_not_clipped(order: str) -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (16, 16), values.astype(f"{order}u2").tobytes())
    greys = [red for red, _, _ in pixels(open_image(saved(image, "TIFF")).image)]
    assert greys == list(range(256))


def test_a_16_bit_colour_png_keeps_its_upper_8_bits() -> None:
    row = b"\0" + struct.pack(">6H", 0x80FF, 0x8000, 0xFFFF, 0x0100, 0x00FF, 0)
    assert pixels(open_image(png(2, 1, 16, 2, row)).image) == [(0x80, 0x80, 0xFF), (1, 0, 0)]
    row = b"\0" + struct.pack(">4H", 0x4000, 0x4000, 0x4000, 0xFFFF)
    assert first_pixel(png(1, 1, 16, 6, row)) == (0x40, 0x40, 0x40)


def test_a_colour_marked_as_see_through_becomes_white() -> None:
    grey16 = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 300, 257 * 9), (b"tRNS", struct.pack(">H", 300)))
    assert pixels(open_image(grey16).image) == [(255, 255, 255), (9, 9, 9)]
    grey8 = png(2, 1, 8, 0, b"\0\x05\x09", (b"tRNS", b"\0\x05"))
    assert pixels(open_image(grey8).image) == [(255, 255, 255), (9, 9, 9)]
    colour = png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", (b"tRNS", b"\0\1\0\2\0\3"))
    assert pixels(open_image(colour).image) == [(255, 255, 255), (4, 5, 6)]
    bit = png(8, 1, 1, 0, b"\0\x0f", (b"tRNS", b"\0\0"))
    assert set(pixels(open_image(bit).image)) == {(255, 255, 255)}


def test_a_palette_with_alpha_is_laid_over_white() -> None:
    data = png(3, 1, 8, 3, b"\0\0\1\2", (b"PLTE", bytes((0, 0, 0, 0, 0, 0, 9, 9, 9))), (b"tRNS", b"\x00\x80"))
    assert pixels(open_image(data).image) == [(255,) * 3, (127,) * 3, (9,) * 3]


def test_alpha_over_white_is_exact_for_every_value_and_every_alpha() -> None:
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([value, value, 255 - value, alpha], -1).astype(np.uint8))
    result = np.asarray(open_image(saved(image, "PNG")).image)
    expected = (value * alpha + 255 * (255 - alpha)) / 255
    assert np.array_equal(result[..., 0], np.floor(expected + 0.5))
    assert np.array_equal(result[..., 2], np.floor(((255 - value) * alpha + 255 * (255 - alpha)) / 255 + 0.5))


def test_what_lies_hidden_under_full_transparency_does_not_bleed_when_a_large_picture_is_reduced() -> None:
    image = Image.new("RGBA", (100, 100), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (50, 0, 100, 100))
    result = np.asarray(open_image(saved(image, "PNG"), BANDED).image).astype(int)
    assert (result[..., 1] >= result[..., 0] - 1).all()  # red without green would be the hidden colour


COLOURS = [(200, 100, 50), (30, 160, 90), (128, 128, 128), (90, 60, 170), (255, 255, 255), (0, 0, 0), (180, 170, 40)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("colour", COLOURS)
def test_display_p3_is_converted_to_srgb(kind: str, colour: tuple[int, int, int]) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    profile = rgb_profile(P3_PRIMARIES, srgb_curve())
    data = saved(Image.new("RGB", (16, 16), colour), kind, icc_profile=profile, **options)
    expected = encoded(P3_TO_SRGB @ decoded(np.array(colour) / 255))
    assert first_pixel(data) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("colour", COLOURS)
def test_adobe_rgb_is_converted_to_srgb_and_alpha_is_kept(colour: tuple[int, int, int]) -> None:
    profile = rgb_profile(ADOBE_PRIMARIES, curve(563 / 256))
    data = saved(Image.new("RGB", (16, 16), colour), "PNG", icc_profile=profile)
    expected = encoded(ADOBE_TO_SRGB @ (np.array(colour) / 255) ** (563 / 256))
    assert first_pixel(data) == pytest.approx(expected, abs=1)
    half = saved(Image.new("RGBA", (16, 16), (*colour, 51)), "PNG", icc_profile=profile)
    assert first_pixel(half) == pytest.approx(0.2 * expected + 0.8 * 255, abs=1)


def test_the_profiles_of_the_tests_change_the_colours_they_are_tested_with() -> None:
    for matrix in (P3_TO_SRGB, ADOBE_TO_SRGB):
        converted = encoded(matrix @ decoded(np.array((200, 100, 50)) / 255))
        assert np.abs(converted - (200, 100, 50)).max() > 8


def test_an_srgb_profile_changes_no_pixel() -> None:
    cube = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3), -1).reshape(52, -1, 3).astype(np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(Image.fromarray(cube), "PNG", icc_profile=profile)
    assert np.array_equal(np.asarray(open_image(data).image), cube)


def test_a_grey_profile_is_converted_to_srgb() -> None:
    linear = saved(Image.new("L", (16, 16), 128), "PNG", icc_profile=grey_profile(1.0))
    assert first_pixel(linear) == pytest.approx(encoded(np.full(3, 128 / 255)), abs=1)
    assert first_pixel(linear)[0] > 180


def test_a_grey_picture_with_the_rgb_profile_of_its_editor_is_converted() -> None:
    profile = rgb_profile(P3_PRIMARIES, curve(1.0))
    data = saved(Image.new("L", (16, 16), 128), "PNG", icc_profile=profile)
    assert first_pixel(data) == pytest.approx(encoded(np.full(3, 128 / 255)), abs=1)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_converted_by_its_profile(kind: str) -> None:
    profile = cmyk_profile()
    for inks, expected in (((255, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((90, 90, 90, 0), 255)):
        data = saved(Image.new("CMYK", (16, 16), inks), kind, icc_profile=profile)
        assert first_pixel(data) == pytest.approx((expected,) * 3, abs=2)


def test_the_darkest_colour_of_a_faded_profile_is_black_and_its_grey_keeps_its_place() -> None:
    faded = table_profile(b"RGB ", b"scnr", b"\x33" + b"\x80" * 6 + b"\xff")  # black at L* 20, corners at L* 50
    # From linear light Y(20) … 1 to 0 … 1, the definition of black point compensation (ISO 18619); Y(50) = 0.184.
    grey = encoded(np.full(3, (0.18419 - 0.02989) / (1 - 0.02989)))
    for colour, expected in (("black", (0, 0, 0)), ("white", (255, 255, 255)), ("red", grey)):
        data = saved(Image.new("RGB", (16, 16), colour), "PNG", icc_profile=faded)
        assert first_pixel(data) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_without_a_profile_is_converted_by_formula(kind: str) -> None:
    data = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), kind)
    assert first_pixel(data) == pytest.approx((0, 255, 255), abs=2)


@pytest.mark.parametrize(
    "profile",
    [b"junk", b"\0" * 200, cmyk_profile(), rgb_profile(P3_PRIMARIES, srgb_curve())[:200], grey_profile(2.2)],
)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_warning(
    profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    data = saved(Image.new("RGB", (16, 16), (200, 100, 50)), "PNG", icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        assert first_pixel(data) == (200, 100, 50)
    assert "colour profile is ignored" in caplog.text


@pytest.mark.parametrize("colour", COLOURS)
def test_a_large_picture_is_converted_like_a_small_one(colour: tuple[int, int, int]) -> None:
    profile = rgb_profile(P3_PRIMARIES, srgb_curve())
    data = saved(Image.new("RGB", (100, 100), colour), "PNG", icc_profile=profile)
    assert set(pixels(open_image(data, BANDED).image)) == {first_pixel(data)}
