"""What a safety checker is, and how one is run so that no failure of it passes for "safe". Knows no model formats."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from queue import Empty, Queue
from typing import Protocol

from PIL import Image

from kontextd_models.errors import InvalidValue, SafetyCheckFailed


class Checker(Protocol):
    """Scores images; one that scores `threshold` or more is flagged.

    It gives scores and not verdicts, because NaN compares as "safe": that is caught in one place, `WatchedChecker`.
    """

    @property
    def name(self) -> str: ...

    @property
    def threshold(self) -> float: ...

    def scores(self, images: Sequence[Image.Image]) -> Sequence[float]:
        """One finite number for each image (RGB, any size)."""
        ...


class WatchedChecker:
    """Runs a checker one call at a time, each in a thread of its own and with a time limit.

    Python cannot stop a thread, so a call that hangs stays, as a daemon, until it returns by itself; until then every
    later call is refused at once, so that hung calls do not pile up.
    """

    def __init__(self, checker: Checker, time_limit_s: float) -> None:
        if not math.isfinite(checker.threshold):
            remedy = "nothing would ever be flagged; give it a number."
            raise InvalidValue(f"the threshold of {checker.name} is {checker.threshold}: {remedy}", field="safety")
        self.name = checker.name
        self._checker = checker
        self._time_limit_s = time_limit_s
        self._turn = threading.Lock()
        self._overdue: threading.Thread | None = None

    def flags(self, images: Sequence[Image.Image], time_limit_s: float | None = None) -> list[bool]:
        """Whether each image is flagged. Raises `SafetyCheckFailed` with the cause wherever that is not known.

        A `time_limit_s` below the usual one gives up on this call only, and does not declare the checker hung.
        """
        if self._overdue is not None and self._overdue.is_alive():
            raise self._failure(f"still hangs in a call that took over {self._time_limit_s:g} s; restart kontextd")
        limit_s = self._time_limit_s if time_limit_s is None else min(time_limit_s, self._time_limit_s)
        answers: Queue[list[float] | Exception] = Queue(1)
        call = threading.Thread(
            target=self._call, args=(images, answers), name=f"kontextd-safety-{self.name}", daemon=True
        )
        call.start()
        try:
            answer = answers.get(timeout=limit_s)
        except Empty:
            if limit_s >= self._time_limit_s:
                self._overdue = call
            raise self._failure(
                f"did not answer within {limit_s:g} s; raise its time limit if the CPU is slow"
            ) from None
        if isinstance(answer, Exception):
            remedy = "look at its model files, or name another checker"
            raise self._failure(f"raised {type(answer).__name__}: {answer}; {remedy}") from answer
        return self._judged(answer, len(images))

    def _call(self, images: Sequence[Image.Image], answers: Queue[list[float] | Exception]) -> None:
        try:
            with self._turn:
                answers.put([float(score) for score in self._checker.scores(images)])
        except Exception as error:  # whatever it is, `flags` reports it as the cause
            answers.put(error)

    def _judged(self, scores: list[float], count: int) -> list[bool]:
        if len(scores) != count:
            raise self._failure(f"gave {len(scores)} scores for {count} images; it cannot be used")
        if not all(map(math.isfinite, scores)):
            raise self._failure(f"gave the scores {scores}; its weights may be damaged: copy them again")
        return [score >= self._checker.threshold for score in scores]

    def _failure(self, what: str) -> SafetyCheckFailed:
        return SafetyCheckFailed(f"the safety checker {self.name} {what}. No image is handed out unchecked.")
