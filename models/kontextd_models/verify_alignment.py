"""The proof that an edit which changes nothing comes back where it was. Knows engines and pictures; prints nothing.

Measured by phase correlation on several pictures and aspects, at sizes that an input may have but the stock pipeline
would stretch the reference at. Its displacement, with one picture at each size, is written beside ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image

from kontextd_models.alignment import displacement
from kontextd_models.checks import Check
from kontextd_models.engine import Engine
from kontextd_models.fingerprint import GUIDANCE, SEED, fixed_edit
from kontextd_models.limits import ModelLimits
from kontextd_models.pictures import PICTURES, picture_at
from kontextd_models.records import ResolutionMode
from kontextd_models.resolution import Size, plan
from kontextd_models.stock import StockEdit, snapped, stock_picture

LIMIT_PX = 0.5
_ASPECTS = (ResolutionMode.R1_1, ResolutionMode.R16_9, ResolutionMode.R3_4)
# Kontext turns small at few steps; eight already give back what nothing is to be changed in.
_STEPS = 8
_IDENTITY_PROMPT = "keep the image exactly as it is, do not change anything"


def check_alignment(engine: Engine, *, knows_identity: bool = True) -> Check:
    """Every picture at every size, and the worst of them by name. A random model (`knows_identity`) is not asked."""
    if not knows_identity:
        return Check("alignment", None, "the weights are random: no instruction gives a picture back unchanged")
    prompt, limits = engine.model.card.identity_prompt or _IDENTITY_PROMPT, engine.model.limits
    ours, theirs = {}, {}
    for size in sizes(limits):
        for name in PICTURES:
            picture = picture_at(name, size)
            ours[_key(name, size)] = _distance(picture, fixed_edit(engine, picture, prompt, _STEPS).images[0])
        photo = picture_at(PICTURES[0], size)
        stretched = StockEdit(snapped(photo, limits.preferred_sizes), prompt, *size, _STEPS, GUIDANCE, SEED)
        theirs[_key(PICTURES[0], size)] = _distance(photo, stock_picture(engine.model, stretched))
    figures = {"ours_px": ours, "stock_px": theirs, "worst": _worst(ours), "limit_px": LIMIT_PX, "prompt": prompt}
    passed = all(px is not None and px < LIMIT_PX for px in ours.values())
    detail = f"{len(ours)} edits moved by {_told(ours)} at most, the stock pipeline's {len(theirs)} by {_told(theirs)}"
    return Check("alignment", passed, detail, figures)


def sizes(limits: ModelLimits) -> tuple[Size, ...]:
    """(width, height) of each aspect at the model's native area."""
    side = max(limits.min_input_side, math.isqrt(limits.native_area))
    plans = [plan(mode, side, side, limits) for mode in _ASPECTS]
    return tuple((planned.width, planned.height) for planned in plans)


def _key(name: str, size: Size) -> str:
    return f"{name} {size[0]}x{size[1]}"


def _distance(picture: Image.Image, edited: Image.Image) -> float | None:
    """Pixels that `edited` lies beside `picture`; None where it shows nothing."""
    try:
        return math.hypot(*displacement(np.asarray(picture), np.asarray(edited)))
    except ValueError:
        return None


def _worst(distances: Mapping[str, float | None]) -> str:
    """The name of the largest; of the first that could not be measured, where there is one."""
    return max(distances, key=lambda name: math.inf if (px := distances[name]) is None else px)


def _told(distances: Mapping[str, float | None]) -> str:
    worst = _worst(distances)
    px = distances[worst]
    return f"{'no measurable distance' if px is None else f'{px:.2f} px'} ({worst})"
