"""Checks previews beside the denoise loop, never in its way. Knows small images; knows no latents and no model formats.

    screen.submit(image_index, preview)    # after a step; returns at once
    preview = screen.take(image_index)     # for the `Step`: the newest checked one, often of an earlier step, or None

A preview that finds the checker at work waits in a queue of one, and a newer one takes its place: previews are dropped,
steps are not delayed. A flagged preview turns black, and so do all later ones of that image. Where the checker fails
there are no more previews in this edit; the final check decides what becomes of the images.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from kontextd_models.errors import SafetyCheckFailed

log = logging.getLogger(__name__)

# What `close` may have to wait for, per checker: a preview that takes longer is of no use to anyone.
TIME_LIMIT_S = 2.0

Numbered = tuple[int, Image.Image]  # the index of the image in its request, and a preview of it


class Flags(Protocol):
    def __call__(self, images: Sequence[Image.Image], time_limit_s: float | None = None) -> Sequence[bool]: ...


def blackened(image: Image.Image) -> Image.Image:
    """A black image of the same size."""
    return Image.new("RGB", image.size)


class PreviewScreen:
    """For one edit, used by one thread; it has one of its own from the first preview until `close`.

    `flags` None, where the safety checker is off, lets previews straight through.
    """

    def __init__(self, flags: Flags | None) -> None:
        self._flags = flags
        self._changed = threading.Condition()  # guards all below
        self._waiting: Numbered | None = None
        self._finished: Numbered | None = None
        self._black: set[int] = set()  # indices of the images that were flagged
        self._failure: SafetyCheckFailed | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def failure(self) -> SafetyCheckFailed | None:
        """Why there are no more previews, where the checker failed."""
        return self._failure

    def submit(self, image_index: int, preview: Image.Image) -> None:
        """Hand in a preview to be checked. Returns at once."""
        with self._changed:
            if self._closed or self._failure is not None:
                return
            if self._flags is None:
                self._finished = (image_index, preview)
            elif image_index in self._black:
                self._finished = (image_index, blackened(preview))
            else:
                self._waiting = (image_index, preview)
                self._start()
                self._changed.notify()

    def take(self, image_index: int) -> Image.Image | None:
        """The newest preview of that image that is checked and was not taken before. Returns at once."""
        with self._changed:
            finished, self._finished = self._finished, None
        return finished[1] if finished is not None and finished[0] == image_index else None

    def close(self) -> None:
        """End the thread; what is not taken is lost. May be called twice. Waits for the check under way at most."""
        with self._changed:
            self._closed = True
            self._waiting = self._finished = None
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="kontextd-preview-screen", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            image_index, preview = job
            try:
                flagged = self._is_flagged(image_index, preview)
            except SafetyCheckFailed as error:
                self._give_up(error)
                return
            self._finish(image_index, preview, flagged)

    def _next(self) -> Numbered | None:
        """The preview that waits, as soon as one does; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting is not None)
            job, self._waiting = self._waiting, None
            return None if self._closed else job

    def _is_flagged(self, image_index: int, preview: Image.Image) -> bool:
        if image_index in self._black:
            return True
        assert self._flags is not None  # `submit` starts no thread without it
        return any(self._flags([preview], time_limit_s=TIME_LIMIT_S))

    def _finish(self, image_index: int, preview: Image.Image, flagged: bool) -> None:
        with self._changed:
            if self._closed:
                return
            if flagged:
                self._black.add(image_index)
                preview = blackened(preview)
            self._finished = (image_index, preview)

    def _give_up(self, error: SafetyCheckFailed) -> None:
        with self._changed:
            self._failure = error
            self._waiting = None
        log.warning("no more previews in this edit: %s", error)
