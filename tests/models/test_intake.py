"""Image intake through its front door: real files of every format, broken ones, and the largest allowed."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from kontextd_models.errors import (
    ImageLoadError,
    ImageTooLarge,
    ImageTooSmall,
    InputError,
    UnsupportedImageFormat,
)
from kontextd_models.intake import Intake, IntakeLimits, normalise, open_image, prepare
from kontextd_models.limits import ModelLimits
from PIL import Image, ImageSequence

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ORIENTABLE = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
CORNERS = ((220, 30, 30), (30, 180, 30), (40, 40, 220), (230, 220, 40))
# What stored pixels of EXIF orientation n are made of the upright picture by (EXIF 2.32, tag 0x0112).
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def quarters(width: int = 160, height: int = 96) -> Image.Image:
    """A picture whose four quarters differ, so that no turn or flip leaves it as it is."""
    image = Image.new("RGB", (width, height))
    for index, colour in enumerate(CORNERS):
        left, top = index % 2 * width // 2, index // 2 * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The named colour nearest to the middle of each quarter."""
    found: list[tuple[int, ...]] = []
    for index in range(4):
        x, y = image.width * (1 + 2 * (index % 2)) // 4, image.height * (1 + 2 * (index // 2)) // 4
        pixel = np.array(image.getpixel((x, y)))
        nearest = min(CORNERS, key=lambda colour: float(np.abs(pixel - colour).sum()))
        assert np.abs(pixel - nearest).max() < 25
        found.append(nearest)
    return found


def turned(kind: str, orientation: int) -> bytes:
    method = STORED[orientation]
    stored = quarters() if method is None else quarters().transpose(method)
    if kind == "TIFF":
        return saved(stored, kind, tiffinfo={274: orientation})
    exif = Image.Exif()
    exif[274] = orientation
    return saved(stored, kind, exif=exif)


def png_claiming(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in body
    )


def tiff_claiming(width: int, height: int, pixels: bytes, **more: int) -> bytes:
    """A little-endian RGB TIFF by hand (TIFF 6.0), one strip or tile, `more` by tag number."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 277: 3, 278: height, 279: len(pixels)}
    tags |= {int(tag.removeprefix("tag")): value for tag, value in more.items()}
    tags[324 if 322 in tags else 273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags)) + b"\0" * 4
    return b"II*\0" + struct.pack("<I", 8) + directory + pixels


def headers_claiming(width: int, height: int) -> dict[str, bytes]:
    """Real files of each format whose header was then changed to claim another size."""
    small = {kind: bytearray(saved(quarters(), kind)) for kind in ("JPEG", "GIF", "BMP")}
    frame = small["JPEG"].index(b"\xff\xc0")
    small["JPEG"][frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    small["GIF"][6:10] = struct.pack("<HH", width, height)
    small["BMP"][18:26] = struct.pack("<ii", width, height)
    bits = (width - 1) | (height - 1) << 14
    lossless = b"WEBPVP8L" + struct.pack("<IBI", 6, 0x2F, bits) + b"\0"
    files = {kind: bytes(data) for kind, data in small.items()}
    files["WEBP"] = b"RIFF" + struct.pack("<I", len(lossless)) + lossless
    files["PNG"] = png_claiming(width, height)
    files["TIFF"] = tiff_claiming(width, height, b"\0" * 12)
    avif = bytearray(saved(quarters(), "AVIF"))
    extents = avif.index(b"ispe") + 8
    avif[extents : extents + 8] = struct.pack(">II", width, height)
    return files | {"AVIF": bytes(avif)}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_accepted_format_opens_as_rgb_at_its_own_size(kind: str) -> None:
    taken = open_image(saved(quarters(), kind))
    assert taken.image.mode == "RGB"
    assert (taken.width, taken.height) == taken.image.size == (160, 96)
    assert corners(taken.image) == list(CORNERS)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_content_and_not_the_name_decides_the_format(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.txt"
    path.write_bytes(saved(quarters(), kind))
    assert corners(open_image(path).image) == list(CORNERS)


@pytest.mark.parametrize("working_area", [8 * 2**20, 2000])
@pytest.mark.parametrize("orientation", sorted(STORED))
@pytest.mark.parametrize("kind", ORIENTABLE)
def test_a_photo_turned_by_exif_comes_out_upright(kind: str, orientation: int, working_area: int) -> None:
    taken = open_image(turned(kind, orientation), IntakeLimits(working_area=working_area))
    assert corners(taken.image) == list(CORNERS)
    assert (taken.width, taken.height) == (160, 96)
    assert taken.image.width > taken.image.height


def test_an_upright_result_carries_no_tag_that_would_turn_it_again() -> None:
    for kind in ORIENTABLE:
        once = open_image(turned(kind, 6)).image
        assert once.info == {}
        assert 274 not in once.getexif()
        assert normalise(once) is once


def test_broken_exif_data_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert corners(open_image(saved(quarters(), kind, exif=b"Exif\0\0XX broken")).image) == list(CORNERS)
    assert "EXIF data is ignored" in caplog.text


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    others = [Image.new("RGB", (160, 96), colour) for colour in ("black", "white")]
    data = saved(quarters(), kind, save_all=True, append_images=others)
    with Image.open(io.BytesIO(data)) as animation:
        assert len(list(ImageSequence.Iterator(animation))) == 3
    assert corners(open_image(data).image) == list(CORNERS)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (64, 1), (1, 300)])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_tiny_image_opens_and_is_left_to_resolution_planning(kind: str, size: tuple[int, int]) -> None:
    taken = open_image(saved(Image.new("RGB", size, "red"), kind))
    assert (taken.width, taken.height) == taken.image.size == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_photo_is_reduced_to_the_working_area_in_place(kind: str) -> None:
    # A smooth picture with odd sides, several bands high: a shift against a direct scaling shows along its slopes.
    y, x = np.mgrid[0:2003, 0:3001]
    waves = np.stack([128 + 100 * np.sin(x / 90), 128 + 100 * np.sin(y / 70), (x + y) / 20], -1)
    photo = Image.fromarray(waves.astype(np.uint8))
    data = saved(photo, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    for working_area in (100_000, 300_000, 3_000_000):
        taken = open_image(data, IntakeLimits(working_area=working_area))
        width, height = taken.image.size
        assert (taken.width, taken.height) == (3001, 2003)
        assert 0.98 * working_area <= width * height <= working_area
        assert abs(width - height * 3001 / 2003) <= 2
        direct = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS)).astype(float)
        difference = np.asarray(taken.image) - direct
        right, bottom = np.s_[:, -width // 4 :, 0], np.s_[-height // 4 :, :, 1]  # where a wrong scale shows most
        assert abs(shift(difference[right], direct[right], axis=1)) < 0.1
        assert abs(shift(difference[bottom], direct[bottom], axis=0)) < 0.1


def shift(difference: npt.NDArray[np.float64], picture: npt.NDArray[np.float64], axis: int) -> float:
    """By how many pixels a picture is displaced, from its difference and its slope (least squares)."""
    slope = np.gradient(picture, axis=axis)
    return float((difference * slope).sum() / (slope * slope).sum())


def test_the_working_area_of_a_model_is_four_times_its_ceiling() -> None:
    assert IntakeLimits.for_model(ModelLimits()) == IntakeLimits()
    assert IntakeLimits.for_model(ModelLimits(max_area=2**18, min_area=2**14)).working_area == 2**20


@pytest.mark.parametrize("kind", FORMATS)
def test_a_side_of_14143_is_refused_before_anything_is_decoded(kind: str) -> None:
    for size in ((14143, 96), (160, 14143), (14143, 14143)):
        with pytest.raises(ImageTooLarge, match=rf"{size[0]}x{size[1]}.*14142 px"):
            open_image(headers_claiming(*size)[kind])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP"])
def test_a_decompression_bomb_is_refused_by_its_header(kind: str) -> None:
    with pytest.raises(ImageTooLarge):
        open_image(headers_claiming(60000, 60000)[kind])


def test_a_tiff_that_lies_about_its_size_is_refused() -> None:
    assert open_image(tiff_claiming(2, 2, b"\x10" * 12)).image.getpixel((0, 0)) == (16, 16, 16)
    with pytest.raises(ImageLoadError, match="TIFF is broken or truncated"):
        open_image(tiff_claiming(9000, 9000, b"\x10" * 12))
    with pytest.raises(ImageTooLarge, match="tiles of 60000 px"):
        open_image(tiff_claiming(64, 64, b"\x10" * 12, tag322=60000, tag323=60000, tag325=12))


def test_a_kind_of_tiff_that_is_not_read_is_not_only_called_broken() -> None:
    floats = tiff_claiming(2, 2, b"\0" * 48, tag258=32, tag339=3)  # three channels of 32-bit floats
    with pytest.raises(ImageLoadError, match=r"of a kind that is not read: .* save it as an ordinary JPEG or PNG"):
        open_image(floats)


def test_a_camera_raw_file_is_not_taken_for_its_thumbnail() -> None:
    with pytest.raises(UnsupportedImageFormat, match="only a preview"):
        open_image(tiff_claiming(2, 2, b"\x10" * 12, tag254=1))


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_a_png_that_hides_a_bomb_in_a_text_or_profile_is_refused(name: bytes) -> None:
    bomb = b"key\0\0" + zlib.compress(b"\0" * 50 * 2**20, 9)
    assert len(bomb) < 2**16
    with pytest.raises(ImageLoadError, match="PNG is broken or truncated"):
        open_image(png_claiming(2, 1, (name, bomb), rows=b"\0" * 7))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_image_is_refused(kind: str, part: float) -> None:
    noise = Image.effect_noise((160, 96), 80).convert("RGB")
    data = saved(noise, kind)
    assert open_image(data).image.size == (160, 96)
    with pytest.raises(ImageLoadError, match=f"{kind} is broken or truncated"):
        open_image(data[: int(len(data) * part)])


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageLoadError, match=r"missing\.png cannot be read: No such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageLoadError, match="cannot be read: Is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_damaged_file_raises_anything_but_our_errors(kind: str) -> None:
    chance = random.Random(kind)
    whole = saved(quarters(), kind)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            data[chance.randrange(min(len(data), chance.choice((64, 10**6))))] = chance.randrange(256)
        try:
            assert open_image(bytes(data)).image.mode == "RGB"
        except InputError:
            refused += 1
    assert 0 < refused < 150


def test_importing_the_intake_changes_no_limit_of_pillow_and_opening_never_lowers_it() -> None:
    code = """
from PIL import Image
before = Image.MAX_IMAGE_PIXELS
from kontextd_models.intake import IntakeLimits, open_image
imported = Image.MAX_IMAGE_PIXELS
import io
file = io.BytesIO()
Image.new("RGB", (64, 64)).save(file, "PNG")
seen = []
for limits in (IntakeLimits(max_side=100), IntakeLimits(), IntakeLimits(max_side=100)):
    open_image(file.getvalue(), limits)
    seen.append(Image.MAX_IMAGE_PIXELS)
Image.MAX_IMAGE_PIXELS = None
open_image(file.getvalue())
print([before == imported, seen == [before, 14142**2, 14142**2], Image.MAX_IMAGE_PIXELS is None])
"""
    assert run(code).strip() == "[True, True, True]"


def test_many_threads_open_images_over_pillows_own_limit_at_once() -> None:
    code = """
import io, warnings
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from kontextd_models.intake import IntakeLimits, open_image
warnings.simplefilter("error")
file = io.BytesIO()
Image.new("L", (400, 300), 77).save(file, "PNG")
Image.MAX_IMAGE_PIXELS = 10_000
with ThreadPoolExecutor(8) as pool:
    taken = list(pool.map(lambda _: open_image(file.getvalue(), IntakeLimits(max_side=400)), range(64)))
print({(item.width, item.height, item.image.getpixel((0, 0))) for item in taken})
"""
    assert run(code).strip() == "{(400, 300, (77, 77, 77))}"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_engine_takes_what_the_intake_gave_as_it_is() -> None:
    taken = open_image(saved(quarters(), "PNG"))
    assert prepare(taken) is taken


def test_the_engine_takes_a_pil_image_of_any_mode() -> None:
    for mode in ("RGB", "RGBA", "L", "P", "CMYK", "1", "LA", "I", "F", "YCbCr"):
        taken = prepare(quarters().convert("L").convert(mode) if mode in {"LA", "I", "F"} else quarters().convert(mode))
        assert taken.image.mode == "RGB"
        assert (taken.width, taken.height) == taken.image.size == (160, 96)
    image = quarters()
    assert prepare(image) == Intake(image, 160, 96)
    assert prepare(image).image is image


def test_a_pil_image_that_still_is_a_turned_file_comes_out_upright() -> None:
    for kind in ORIENTABLE:
        with Image.open(io.BytesIO(turned(kind, 8))) as image:
            taken = prepare(image)
        assert corners(taken.image) == list(CORNERS)
        assert (taken.width, taken.height) == (160, 96)


def test_a_large_pil_image_is_reduced_and_its_size_kept() -> None:
    taken = prepare(quarters(1600, 960), IntakeLimits(working_area=10_000))
    assert (taken.width, taken.height) == (1600, 960)
    assert 9_000 <= taken.image.width * taken.image.height <= 10_000
    assert corners(taken.image) == list(CORNERS)


@pytest.mark.parametrize("orientation", [1, 3])
def test_preparing_a_pil_image_leaves_the_callers_image_as_it_was(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    with Image.open(io.BytesIO(saved(quarters(), "PNG", exif=exif, dpi=(72, 72)))) as image:
        before = dict(image.info)
        assert before
        first = prepare(image).image
        assert first.info == {}
        assert image.info == before
        assert np.array_equal(np.asarray(prepare(image).image), np.asarray(first))


def test_a_pil_image_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ImageTooSmall, match="0x5"):
        prepare(Image.new("RGB", (0, 5)))
    with pytest.raises(ImageTooLarge, match="14143x1"):
        prepare(Image.new("RGB", (14143, 1)))
    data = saved(quarters(), "PNG")
    with Image.open(io.BytesIO(data[: len(data) // 2])) as image, pytest.raises(ImageLoadError, match="truncated"):
        prepare(image)


def test_opening_is_safe_from_several_threads() -> None:
    files = [saved(quarters(), kind) for kind in FORMATS] * 4
    with ThreadPoolExecutor(4) as pool:
        for taken in pool.map(open_image, files):
            assert corners(taken.image) == list(CORNERS)
