"""Ways compared with `none`, edit by edit, remembered in a folder. Knows pictures and files; knows no engine's insides.

An interrupted run goes on where it stopped, and what was measured is not measured again, as long as its folder is
kept. The folder does not know when code or weights change: take a fresh one then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from acceleration.cases import Case
from acceleration.ways import NONE, Way
from kontextd_models import fidelity
from kontextd_models.embedded.evaluate import as_tensor, psnr
from kontextd_models.engine import Engine
from PIL import Image

EQUAL_DB = 100.0  # what equal pictures count as in a mean


@dataclass(frozen=True)
class Measured:
    """One edit by one way. PSNR in dB: to `none`, to the exact edit, and to it in the untouched region."""

    to_none: float
    ssim: float
    exact: float | None
    untouched: float | None
    computed: int
    flops: float


@dataclass(frozen=True)
class Compared:
    """One edit by one way, and by `none`."""

    case: Case
    none: Measured
    way: Measured

    @property
    def exact_loss(self) -> float | None:
        """How much worse than `none` it is, in dB."""
        return _loss(self.none.exact, self.way.exact)

    @property
    def untouched_loss(self) -> float | None:
        return _loss(self.none.untouched, self.way.untouched)


class Bench:
    """An engine, and the folder that remembers."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        (folder / "none").mkdir(parents=True, exist_ok=True)
        self._file = folder / "measured.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._known = {entry["key"]: Measured(**entry["measured"]) for entry in map(json.loads, lines)}

    def compare(self, way: Way, cases: Sequence[Case]) -> Iterator[Compared]:
        for case in cases:
            yield Compared(case, self._measured(NONE, case), self._measured(way, case))

    def _measured(self, way: Way, case: Case) -> Measured:
        key = _key(way.key, case)
        if key not in self._known:
            made = way.edit(self._engine, case)
            if way.key == NONE.key:
                made.picture.save(self._none_file(case))
            reference = self._none(case)
            self._known[key] = measured = Measured(
                min(fidelity.psnr(made.picture, reference), EQUAL_DB),
                fidelity.ssim(made.picture, reference),
                *_against_the_truth(case, made.picture),
                made.computed,
                made.flops,
            )
            with self._file.open("a") as file:
                file.write(json.dumps({"key": key, "measured": asdict(measured)}) + "\n")
        return self._known[key]

    def _none(self, case: Case) -> Image.Image:
        """What `compare` has made before it asks for anything else."""
        return Image.open(self._none_file(case))

    def _none_file(self, case: Case) -> Path:
        return self._folder / "none" / f"{_key(NONE.key, case)}.png"


def _against_the_truth(case: Case, made: Image.Image) -> tuple[float | None, float | None]:
    """PSNR to the exact edit, everywhere and outside of what a local edit paints."""
    pixels, exact, untouched = as_tensor(made), case.exact, case.untouched
    if exact is None:
        return None, None
    outside = None if untouched is None else psnr(pixels[:, untouched], exact[:, untouched])
    return psnr(pixels, exact), outside


def _loss(none: float | None, way: float | None) -> float | None:
    return None if none is None or way is None else none - way


def _key(way: str, case: Case) -> str:
    return hashlib.sha256(repr((way, case.key)).encode()).hexdigest()[:24]
