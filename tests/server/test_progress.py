"""Progress as a terminal and as a file see it."""

from __future__ import annotations

import io

from kontextd_models import Step
from kontextd_server.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on(stream: io.StringIO, total: int) -> str:
    progress = Progress(stream)
    progress.announce("loading a model")
    for index in range(1, total + 1):
        progress.show(Step(index, total, elapsed_s=index / 2))
    progress.close()
    progress.close()
    return stream.getvalue()


def test_a_terminal_gets_a_bar_that_is_drawn_over_and_one_line_end() -> None:
    drawn = shown_on(Terminal(), 3).split("\r")
    assert drawn[1].startswith("loading a model")
    assert drawn[2].startswith("[##########....................] step 1/3  0.5 s")
    assert drawn[4].startswith(f"[{'#' * 30}] step 3/3  1.5 s")
    assert "".join(drawn).count("\n") == 1
    assert drawn[-1].endswith("\n")


def test_a_file_gets_five_lines_whatever_the_number_of_steps() -> None:
    lines = shown_on(io.StringIO(), 50).splitlines()
    assert lines == [f"step {step}/50  {step / 2:.1f} s" for step in (10, 20, 30, 40, 50)]


def test_a_short_edit_gets_a_line_a_step() -> None:
    assert len(shown_on(io.StringIO(), 3).splitlines()) == 3


def test_a_quiet_one_shows_nothing() -> None:
    progress = Progress(None)
    progress.announce("loading")
    progress.show(Step(1, 1, 0.0))
    progress.close()
