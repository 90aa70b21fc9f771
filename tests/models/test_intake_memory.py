"""What opening a picture takes, form by form: the table at the top of `intake.py` holds, measured in real processes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

SIDE = 2048
MIB = 2**20
LARGEST = 14142
AVIF_THREADS = 12 * MIB  # scratch of its decoder's threads, whatever the size
# `SIDE` square, YUV 4:4:4 with alpha, 10 bits. Pillow writes 8 bits only: this was made with libavif, then deflated.
DEEP_AVIF = (
    "eNpjYGBQSCupLEgsy0xjAAIQnZuZZpibmZjm62joyMDA2JabWpLIAAGKGSk5RVA2Q0FmcgkDGuAryCzJBbMYgVgnMyc/GcRxYWBgAosAMdMj"
    "kD1APpjHuA6ITYBsp8zMPLATwDJSQE4qE9ScxDIDQ+f8nHywzQgZJoiMY05BRiJEpig1DeaOxNKKHLCdIFsPZxYUFQDpuZkFyflAWiSzuCAV"
    "opADihkECjIrMkEMZi4uLiDFk1hm6Nyo4wASEk7OzynKS86pAJrIxMDWAPEoRDkjQjFPDEjAAmi1M4hRWpRnlVuQmg4mnKySM5MLrIori0tS"
    "c4utgGoyczITiyqtEmHOl8ssyIWFM9DhLIxMzSwMTCyMrG3sQFvm5qYklggxcLFLa+3//z85wGgZkwADw5YQ5gxzyQYxtfZu9SP37YJ0wkTu"
    "p1zynpNR787lz1b/s4p34tLryUovvt2Qv9B0INPj1UO2edd1ZolOFffcXW3s35PrHai0R9rh4tdv177a59i/UL3IYcJy9BdvqORMQw3Og0Gz"
    "ZmzgmhK6fRnnnqCG/48f/9fP/BEasveKp737gVCe1Znf6hsYNiy4m3Z0d+1fp1UzVsnKuIqG5tjd3Vt7DCQzv0Q0WIJ5+R+WD56Mf0Ei03h+"
    "tYYaNliVvzLWDGH/Lvn71o0urVU3ao++rt9x/gODmPCnaYeay37/avXc0qCjYZ6/f8kb5+V/WANOnV4T2GBVD7QzQ9IRbFfrVjER6e33r6jc"
    "OxUKMrsuQGgz2Mj6pXxKXau2yfuVaa3sYbz89wAwzLisQWGWzcTENsEoUChgxkFDk8s+FzwYzp/hSVhzvrZc/UWp9NuPM10brx03ao5P2frD"
    "9KCt1bkTmT7MF7smxrTMFa+0L/miomf40HK9ddKPwvzzT6aJzBDZM8epZ9KzygQAsJIMbA=="
)
# Opens each file in a child of its own, so that no other file's memory is at hand there; a small one of its kind first,
# since what the libraries take once is no part of a picture. Working area and bands are scaled with the picture: bytes
# a pixel are those of the largest one.
MEASURE = """
import json, os, re, sys, warnings
from pathlib import Path
from PIL import AvifImagePlugin
from kontextd_models import intake
AvifImagePlugin.DEFAULT_MAX_THREADS = 2  # or the figures depend on the machine
largest, *rest = sys.argv[1:]
warnings.simplefilter("error")
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
for small, path, whole in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
    if os.fork() == 0:
        scale = (int(whole) / int(largest)) ** 2
        limits = intake.IntakeLimits(working_area=int(intake.IntakeLimits.working_area * scale))
        intake._BAND_PIXELS = int(intake._BAND_PIXELS * scale)
        intake.open_image(Path(small), limits)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is what is in use now
        idle = peak()
        taken = intake.open_image(Path(path), limits)
        print(json.dumps([Path(path).name, taken.width, taken.height, taken.image.size, peak() - idle]), flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, path
"""


@dataclass(frozen=True)
class Form:
    """A kind of file. `bytes_a_pixel` is what the table says for the largest picture; `once` what no size changes."""

    kind: str
    mode: str
    bytes_a_pixel: float
    options: Mapping[str, object] = field(default_factory=dict)
    frames: int = 1
    once: int = 2 * MIB  # of 8 to 74 that are measured

    def save(self, path: Path, side: int) -> None:
        first, *others = (self.picture(side, frame) for frame in range(self.frames))
        animated = {"save_all": True, "append_images": others} if others else {}
        whole_strip = {"strip_size": 3 * side * side} if "compression" in self.options else {}
        first.save(path, self.kind, **animated, **whole_strip, **self.options)

    def picture(self, side: int, frame: int) -> Image.Image:
        bands = len(Image.new(self.mode, (1, 1)).getbands())
        colour = (90 + 50 * frame,) * bands if bands > 1 else 1 if self.mode == "1" else 90 + 50 * frame
        image = Image.new(self.mode, (side, side), colour)
        if self.mode == "P":
            image.putpalette(bytes(range(256)) * 3)
        return image


FLAT = {"compress_level": 1}
LOSSLESS = {"lossless": True, "method": 0, "quality": 0}
QUICK = {"speed": 10, "quality": 30}
ONE_STRIP = {"compression": "tiff_adobe_deflate"}
FORMS = {
    "baseline JPEG": Form("JPEG", "RGB", 0.65),
    "baseline JPEG in CMYK": Form("JPEG", "CMYK", 0.65),
    "progressive JPEG, 4:2:0": Form("JPEG", "RGB", 3.3, {"progressive": True, "subsampling": 2}),
    "progressive JPEG, 4:4:4": Form("JPEG", "RGB", 6.3, {"progressive": True, "subsampling": 0}),
    "progressive JPEG in CMYK": Form("JPEG", "CMYK", 8.3, {"progressive": True}),
    "PNG with a palette": Form("PNG", "P", 1.7, FLAT),
    "PNG with a palette and a see-through colour": Form("PNG", "P", 2.0, {**FLAT, "transparency": 90}),
    "animated GIF": Form("GIF", "P", 1.7, frames=2),
    "PNG of 16 bits": Form("PNG", "I;16", 2.5, FLAT),
    "PNG in colour": Form("PNG", "RGB", 4.7, FLAT),
    "PNG in grey with alpha": Form("PNG", "LA", 5.0, FLAT),
    "animated PNG": Form("PNG", "RGBA", 5.0, FLAT, frames=2),
    "BMP": Form("BMP", "RGB", 4.7),
    "TIFF of floats": Form("TIFF", "F", 4.7),
    "TIFF in one strip": Form("TIFF", "RGB", 7.1, ONE_STRIP),
    "TIFF in one strip, to be turned": Form("TIFF", "RGB", 11.1, {**ONE_STRIP, "tiffinfo": {274: 6}}),
    "WebP": Form("WEBP", "RGB", 16.1, LOSSLESS),
    "animated WebP": Form("WEBP", "RGBA", 16.1, LOSSLESS, frames=2),
    "AVIF": Form("AVIF", "RGB", 9.3, QUICK, once=AVIF_THREADS),
    "AVIF with alpha": Form("AVIF", "RGBA", 11.6, QUICK, once=AVIF_THREADS),
}


# Two that are told by their absolute size, and the baseline JPEG that just cannot be halved: decoded whole, it is the
# worst of its kind, 28 bytes for each pixel of the working area.
WORKING_SIDE = 2896
ABSOLUTE = {
    "largest grey JPEG": (Form("JPEG", "L", 0), LARGEST, 70 * MIB),  # decoded whole: 191 MiB
    "largest PNG of 1 bit": (Form("PNG", "1", 0, FLAT), LARGEST, 250 * MIB),  # with a second copy: 382 MiB
    "JPEG just over": (Form("JPEG", "RGB", 0), 2 * WORKING_SIDE - 1, 230 * MIB),
}


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, int]:
    """Bytes that the process of each form peaked at above an idle one."""
    small, large = (tmp_path_factory.mktemp(size) for size in ("small", "large"))
    rows = [(name, form, SIDE, SIDE) for name, form in FORMS.items()]
    rows += [(name, form, side, LARGEST) for name, (form, side, _) in ABSOLUTE.items()]
    for name, form, side, _ in rows:
        form.save(small / name, 64)
        form.save(large / name, side)
    (large / "deep AVIF").write_bytes(zlib.decompress(base64.b64decode("".join(DEEP_AVIF))))
    arguments = [str(word) for name, _, _, whole in rows for word in (small / name, large / name, whole)]
    arguments += [str(small / "AVIF"), str(large / "deep AVIF"), str(SIDE)]
    ran = subprocess.run([sys.executable, "-c", MEASURE, str(LARGEST), *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    sides = {name: side for name, _, side, _ in rows} | {"deep AVIF": SIDE}
    assert {name: (width, height) for name, width, height, *_ in found} == {
        name: (side, side) for name, side in sides.items()
    }
    assert {tuple(row[3]) for row in found if row[0] in ABSOLUTE} == {(WORKING_SIDE, WORKING_SIDE)}
    return {row[0]: row[4] for row in found}


@pytest.mark.parametrize("name", FORMS)
def test_opening_a_picture_takes_what_the_table_says_and_no_more(name: str, peaks: Mapping[str, int]) -> None:
    form = FORMS[name]
    assert peaks[name] <= form.bytes_a_pixel * SIDE**2 + form.once
    assert peaks[name] >= 0.8 * form.bytes_a_pixel * SIDE**2  # or the table says too much, or nothing was measured


def test_the_most_that_any_form_takes_is_said(peaks: Mapping[str, int]) -> None:
    at_one_size = {name: peak for name, peak in peaks.items() if name not in ABSOLUTE}
    assert at_one_size["deep AVIF"] == max(at_one_size.values())
    assert at_one_size["deep AVIF"] <= 17.5 * SIDE**2 + AVIF_THREADS


@pytest.mark.parametrize("name", ABSOLUTE)
def test_the_largest_picture_passes_in_bounded_memory(name: str, peaks: Mapping[str, int]) -> None:
    *_, allowed_bytes = ABSOLUTE[name]
    assert 0.7 * allowed_bytes <= peaks[name] <= allowed_bytes
