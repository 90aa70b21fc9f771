"""The one door that images leave by. Knows which checkers run and when; knows no model formats and no requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from kontextd_models.errors import ContentPolicyViolation, InvalidValue
from kontextd_models.records import SafetyConfig
from kontextd_models.safety.checker import Checker, WatchedChecker
from kontextd_models.safety.screen import PreviewScreen, blackened

EMBEDDED = "embedded"


class SafetyGate:
    """All checkers see every image, and one flag is enough.

    Every method that looks at images raises `SafetyCheckFailed` where a checker fails, so nothing leaves unchecked.
    """

    def __init__(self, config: SafetyConfig, *, checkers: Sequence[Checker] | None = None) -> None:
        """Load the checkers that `config` names, or take `checkers` in their place.

        Raises `ModelError` naming the file at fault, and `InvalidValue` for a setting that cannot be.
        """
        _check_settings(config)
        loaded = load_checkers(config) if checkers is None else checkers
        self._checkers = [WatchedChecker(checker, config.time_limit_s) for checker in loaded]
        self._forced = config.forced
        self._checks_inputs = config.check_inputs

    def applies(self, asked: bool) -> bool:
        """Whether a request's images are checked: where it asks for it, and where the operator forces it."""
        return asked or self._forced

    def check(
        self, images: Sequence[Image.Image], *, asked: bool = True
    ) -> tuple[tuple[Image.Image, ...], tuple[bool, ...]]:
        """The images with each flagged one replaced by black of its size, and the flags."""
        if not self.applies(asked):
            return tuple(images), (False,) * len(images)
        flags = self.flags(images)
        checked = (blackened(image) if flag else image for image, flag in zip(images, flags, strict=True))
        return tuple(checked), flags

    def check_input(self, image: Image.Image, *, asked: bool = True) -> None:
        """Raise `ContentPolicyViolation` for a flagged input, where the setting `check_inputs` says to look at it.

        `image` is the prepared one: of an image with alpha, a checker would see colours that are never used.
        """
        if self._checks_inputs and self.applies(asked) and any(self.flags([image])):
            raise ContentPolicyViolation("the input image was flagged by the safety checker. Use another image.")

    def flags(self, images: Sequence[Image.Image], time_limit_s: float | None = None) -> tuple[bool, ...]:
        """Whether any checker flags each image. `time_limit_s` shortens the limit of each checker."""
        if not images:
            return ()
        verdicts = [checker.flags(images, time_limit_s) for checker in self._checkers]
        return tuple(any(of_image) for of_image in zip(*verdicts, strict=True))

    def preview_screen(self, *, asked: bool = True) -> PreviewScreen:
        """A screen for the previews of one edit; its owner closes it."""
        return PreviewScreen(self.flags if self.applies(asked) else None)


def load_checkers(config: SafetyConfig) -> list[Checker]:
    """The checkers by name: "embedded", or a folder."""
    return [_load(name, config.threshold) for name in config.checkers]


def _load(name: str, threshold: float) -> Checker:
    if name == EMBEDDED:
        from kontextd_models.safety.open_nsfw import OpenNsfwChecker

        return OpenNsfwChecker(threshold)
    from kontextd_models.safety.folder import load_folder

    return load_folder(Path(name))


def _check_settings(config: SafetyConfig) -> None:
    if not config.checkers:
        remedy = f"Name {EMBEDDED!r} or a checker's folder; a request switches the check off, where it is not forced."
        raise InvalidValue(f"the list of safety checkers is empty. {remedy}", field="safety")
    if not 0 <= config.threshold <= 1:  # NaN fails this too
        raise InvalidValue(f"the safety threshold is {config.threshold}; it must be from 0 to 1.", field="safety")
    if not 0 < config.time_limit_s < math.inf:
        raise InvalidValue(f"the safety time limit is {config.time_limit_s} s; it must be above 0.", field="safety")
