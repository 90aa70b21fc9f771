"""What is no image, or one of another format, is refused by its name."""

from __future__ import annotations

import io

import pytest
from kontextd_models.errors import ImageLoadError, UnsupportedImageFormat
from kontextd_models.intake import open_image
from PIL import Image


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, kind)
    return file.getvalue()


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(ImageLoadError, match=r"empty \(0 bytes\)"):
        open_image(b"")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<!DOCTYPE html><html><body>Log in first</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf\n <HTML>", "an HTML page"),
        (b'{"detail": "not found"}', "JSON text"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "text"),
        (bytes(range(256)), "begins with 00 01 02"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, name: str) -> None:
    with pytest.raises(ImageLoadError, match=f"not an image|{name}") as caught:
        open_image(data)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (saved("ICO"), "ICO"),
        (saved("JPEG2000"), "JPEG 2000"),
        (saved("PPM"), "Netpbm"),
        (saved("DDS"), "DDS"),
        (saved("PDF"), "PDF"),
        (saved("EPS"), "PostScript"),
        (saved("QOI"), "QOI"),
        (b"8BPS\0\1" + b"\0" * 40, "PSD"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 20, "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + b"\0" * 20, "video"),
        (b"\xff\x0a" + b"\x80" * 20, "JPEG XL"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "WAVE"),
        (b"II*\0\x10\0\0\0CR\2\0" + b"\0" * 20, "CR2"),
        (b"PK\3\4" + b"\0" * 20, "ZIP"),
    ],
)
def test_another_format_is_refused_by_its_name(data: bytes, name: str) -> None:
    with pytest.raises(UnsupportedImageFormat, match="JPEG, PNG, WEBP, GIF, BMP, TIFF or AVIF") as caught:
        open_image(data)
    assert name in str(caught.value)
