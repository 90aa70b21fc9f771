"""Collects the training photos from packages into one folder, licences checked. Knows no torch.

    apt-get download gcompris-qt-data && dpkg -x gcompris-qt-data_*.deb gcompris
    python -m kontextd_models.embedded.photos gcompris photos

takes the 45 or so photos of gcompris-qt-data that its Debian copyright file states to be in the public domain, CC0 or
CC-BY (their sources are named there); share-alike and GPL pictures are left out. scikit-image's and scikit-learn's
photos are not taken: they are kept for evaluation.
"""

from __future__ import annotations

import argparse
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_FREE_LICENSES = re.compile(r"^(public-domain|CC0-1\.0|CC-BY-[\d.]+)$")
_PHOTO = re.compile(r"\.jpe?g$", re.IGNORECASE)
_COMPRESSED, _DIRECTORY, _ZSTD = 1, 2, 4  # node flags of Qt's resource format


def free_photos(copyright_text: str) -> dict[str, tuple[str, str]]:
    """`folder/stem` → (licence, copyright and source) of each freely licensed photo of a DEP-5 file.

    The package ships the photos as WebP under the stems of the JPEGs that its copyright file lists.
    """
    free: dict[str, tuple[str, str]] = {}
    for paragraph in copyright_text.split("\n\n"):
        fields = dict(re.findall(r"^(\w[\w-]*):((?:.*\n?(?=[ \t]))*.*)", paragraph, re.MULTILINE))
        license_name = fields.get("License", "").strip().split("\n")[0]
        origin = " ".join(f"{fields.get('Copyright', '')} {fields.get('Comment', '')}".split())
        for pattern in fields.get("Files", "").split():
            if not _PHOTO.search(pattern):
                continue
            if _FREE_LICENSES.match(license_name):
                free[_key(pattern)] = (license_name, origin)
            else:  # in this format a later paragraph overrides an earlier one
                free.pop(_key(pattern), None)
    return free


def _key(path: str) -> str:
    parent, name = PurePosixPath(path).parts[-2:]
    return f"{parent}/{PurePosixPath(name).stem}"


def rcc_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, content) of each file in a Qt binary resource file (format 1 to 3, `rcc --binary`)."""
    magic, version, tree, payload, names = struct.unpack_from(">4sIIII", data)
    if magic != b"qres":
        raise ValueError(f"not a Qt resource file: starts with {magic!r}")
    node_size = 22 if version >= 2 else 14

    def name_of(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        return data[names + offset + 6 : names + offset + 6 + 2 * length].decode("utf-16-be")

    def walk(index: int, path: str) -> Iterator[tuple[str, bytes]]:
        name_offset, flags = struct.unpack_from(">IH", data, tree + index * node_size)
        if flags & _DIRECTORY:
            count, first = struct.unpack_from(">II", data, tree + index * node_size + 6)
            here = f"{path}/{name_of(name_offset)}" if index else ""
            for child in range(first, first + count):
                yield from walk(child, here)
            return
        (offset,) = struct.unpack_from(">I", data, tree + index * node_size + 10)
        (size,) = struct.unpack_from(">I", data, payload + offset)
        content = data[payload + offset + 4 : payload + offset + 4 + size]
        if flags & _COMPRESSED:
            content = zlib.decompress(content[4:])
        if not flags & _ZSTD:
            yield f"{path}/{name_of(name_offset)}", content

    yield from walk(0, "")


def collect(package_root: Path, out: Path) -> list[str]:
    """Write the free photos of an unpacked gcompris-qt-data below `out`; return one attribution line for each."""
    copyright_text = (package_root / "usr/share/doc/gcompris-qt-data/copyright").read_text()
    free = free_photos(copyright_text)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for archive in sorted((package_root / "usr/share/gcompris-qt/rcc").glob("*.rcc")):
        for path, content in rcc_files(archive.read_bytes()):
            if path.endswith((".webp", ".jpg", ".jpeg")) and (key := _key(path)) in free:
                name = key.replace("/", "-") + PurePosixPath(path).suffix
                (out / name).write_bytes(content)
                lines.append(f"{name}: {free[key][0]}, {free[key][1]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("package_root", type=Path, help="folder into which the Debian package was unpacked")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    lines = collect(arguments.package_root, arguments.out)
    (arguments.out / "ATTRIBUTION.txt").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} photos in {arguments.out}")


if __name__ == "__main__":
    main()
