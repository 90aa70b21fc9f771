"""Which format a file is, by its first bytes. Knows signatures; knows nothing of names, pixels or Pillow."""

from __future__ import annotations

from kontextd_models.errors import ImageLoadError, UnsupportedImageFormat

ACCEPTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
HEAD_BYTES = 1024  # enough for every signature here, an ftyp box and the prologue of a text

# (offset, bytes, name). Source: each format's own specification, where it states how a file begins.
_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"CR\x02\x00", "Canon raw (CR2)"),  # a TIFF too, so before it
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (0, b"II+\x00", "TIFF"),  # BigTIFF
    (0, b"MM\x00+", "TIFF"),
    (0, b"8BPS", "Photoshop (PSD)"),
    (0, b"\x00\x00\x01\x00", "Windows icon (ICO)"),
    (0, b"\x00\x00\x02\x00", "Windows cursor (CUR)"),
    (0, b"icns", "Apple icon (ICNS)"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"%PDF-", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"gimp xcf", "GIMP (XCF)"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance (HDR)"),
    (0, b"DDS ", "DirectDraw (DDS)"),
    (0, b"qoif", "QOI"),
    (0, b"FUJIFILM", "Fujifilm raw (RAF)"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (0, b"PK\x03\x04", "ZIP archive"),
    (0, b"\x1f\x8b", "gzip"),
    *((0, b"P%d" % kind + space, "Netpbm (PNM)") for kind in range(1, 8) for space in (b"\n", b" ", b"\r", b"\t")),
    (0, b"BM", "BMP"),  # the weakest signatures last
)

# Brands of the ISO base media file format. AVIF: AV1 Image File Format 1.1, §6; HEIC: ISO/IEC 23008-12, annex B.
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def identify(head: bytes) -> str:
    """The accepted format whose file begins with `head` (its first `HEAD_BYTES`, or all of it).

    Raises `UnsupportedImageFormat` naming another format, `ImageLoadError` where it is no image at all.
    """
    if not head:
        raise ImageLoadError("the image file is empty (0 bytes). Send it again, whole.")
    name = _binary_name(head)
    if name in ACCEPTED:
        return name
    if name is None:
        text = _text_name(head)
        if text is not None and text != "SVG":
            raise ImageLoadError(f"the file is {text}, not an image. Check the address or path it came from.")
        name = text
    if name is None:
        raise ImageLoadError(f"the file is not an image; it begins with {head[:8].hex(' ')}. Use {_accepted()}.")
    raise UnsupportedImageFormat(
        f"the file is of the format {name}, which is not accepted. Convert it to {_accepted()}."
    )


def _binary_name(head: bytes) -> str | None:
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] == b"WEBP" else f"RIFF ({head[8:12].decode('latin-1')!r})"
    if head[4:8] == b"ftyp":
        return _iso_name(head)
    return next((name for offset, magic, name in _SIGNATURES if head.startswith(magic, offset)), None)


def _iso_name(head: bytes) -> str:
    size = int.from_bytes(head[:4], "big")
    major, compatible = head[8:12], head[16 : min(size, len(head))]
    brands = {major, *(compatible[at : at + 4] for at in range(0, len(compatible), 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    if brands & _HEIC_BRANDS:
        return "HEIC"
    return f"MP4-like video ({major.decode('latin-1')!r})"


def _text_name(head: bytes) -> str | None:
    """What kind of text it is; None for binary data, which has control characters."""
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in body:
        return "SVG"
    if body.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in body:
        return "an HTML page"
    if any(byte < 32 and byte not in b"\t\n\r\f" for byte in head):
        return None
    if body.startswith((b"{", b"[")):
        return "JSON text"
    return "XML text" if body.startswith(b"<") else "text"


def _accepted() -> str:
    return ", ".join(ACCEPTED[:-1]) + f" or {ACCEPTED[-1]}"
