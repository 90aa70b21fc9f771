"""A step as a log line in the form of tqdm's bars, which clients parse. Knows numbers and blocks; knows no jobs."""

from __future__ import annotations

_BLOCKS = " ▏▎▍▌▋▊▉█"
_BAR_WIDTH = 10


def progress_line(done: int, total: int, elapsed_s: float) -> str:
    """` 40%|████      | 12/30 [00:02<00:04,  4.10it/s]`: what tqdm shows after `done` of `total` steps."""
    rate = done / elapsed_s if elapsed_s > 0 else None
    remaining = _clock((total - done) / rate) if rate else "?"
    times = f"[{_clock(elapsed_s)}<{remaining}, {_speed(rate)}]"
    return f"{100 * (done / total):3.0f}%|{_bar(done / total)}| {done}/{total} {times}"


def _bar(fraction: float) -> str:
    whole, eighths = divmod(int(fraction * _BAR_WIDTH * 8), 8)
    return (_BLOCKS[-1] * whole + (_BLOCKS[eighths] if whole < _BAR_WIDTH else "")).ljust(_BAR_WIDTH)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:d}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


def _speed(rate: float | None) -> str:
    if rate is None:
        return "?it/s"
    return f"{rate:5.2f}it/s" if rate >= 1 else f"{1 / rate:5.2f}s/it"
