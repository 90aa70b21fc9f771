"""The progress of an edit on a terminal: a bar that is drawn over, or a few lines where stderr is a file."""

from __future__ import annotations

from typing import TextIO

from kontextd_models import Step

_BAR = 30  # characters
_LINES = 5  # of an edit whose stderr is no terminal


class Progress:
    """Shows each `Step` it is given. A quiet one (`stream` None) shows nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.drawn = False

    def announce(self, text: str) -> None:
        """What goes on before the first step, for people who wait; a file is not told."""
        if self.stream is not None and self.stream.isatty():
            self.stream.write(f"\r{text}\x1b[K")
            self.stream.flush()
            self.drawn = True

    def show(self, step: Step) -> None:
        if self.stream is None:
            return
        counted = f"step {step.index}/{step.total}  {step.elapsed_s:.1f} s"
        if self.stream.isatty():
            filled = _BAR * step.index // step.total
            self.stream.write(f"\r[{'#' * filled}{'.' * (_BAR - filled)}] {counted}\x1b[K")
            self.drawn = True
        elif _is_milestone(step):
            self.stream.write(f"{counted}\n")
        self.stream.flush()

    def close(self) -> None:
        """End the bar's line, so that what follows starts on its own."""
        if self.stream is not None and self.drawn:
            self.stream.write("\n")
            self.stream.flush()
            self.drawn = False


def _is_milestone(step: Step) -> bool:
    return step.index * _LINES // step.total > (step.index - 1) * _LINES // step.total
