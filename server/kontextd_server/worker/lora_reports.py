"""What became of a request's LoRAs, as it is told in the result and in the job's log. Knows no engine, no files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kontextd_models import Done, LoraReport

from kontextd_server.fetch.urls import MAX_URL
from kontextd_server.wire import schema

_NAMED = 5  # tensors without a place, in one message
_CUT = 100  # characters of a path that is no URL: a data URI holds the whole file


def wire_reports(wanted: Sequence[schema.LoraWeight], done: Done) -> tuple[schema.LoraReport, ...]:
    """One for each LoRA of the request, in its order; an engine without LoRAs tells of none."""
    return tuple(
        schema.LoraReport(
            path=_as_sent(lora.path), matched=report.matched, total=report.total, warnings=_warnings(report)
        )
        for lora, report in zip(wanted, done.loras, strict=False)
    )


def coverage_lines(done: Done, *, transient: bool) -> Iterator[str]:
    """One a LoRA. Its name is a word of the caller's, of which a transient job leaves no trace."""
    for place, report in enumerate(done.loras):
        name = f"loras[{place}]" if transient else f"loras[{place}] ({report.name})"
        dialects = ", ".join(report.dialects)
        yield f"{name}: {report.matched} of {report.total} tensors used ({dialects}), scale {report.scale:g}"


def _as_sent(path: str) -> str:
    return path if len(path) <= MAX_URL else f"{path[:_CUT]}…"


def _warnings(report: LoraReport) -> list[str]:
    if not report.unmatched:
        return []
    named = ", ".join(report.unmatched[:_NAMED])
    more = len(report.unmatched) - _NAMED
    rest = f" and {more} more" if more > 0 else ""
    return [f"{len(report.unmatched)} of its {report.total} tensors have no place in this model: {named}{rest}."]
