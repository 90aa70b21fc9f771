"""One finding of `kontextd doctor` or `kontextd verify`, and how findings are shown. Knows no torch and no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

_MARKS = {True: "ok", False: "FAILED", None: "n/a"}


@dataclass(frozen=True)
class Check:
    """`passed` None: does not apply here, `detail` says why. Where it failed, `detail` holds the remedy."""

    name: str
    passed: bool | None
    detail: str
    figures: Mapping[str, object] = field(default_factory=dict)

    def line(self) -> str:
        """The row of this check in a table."""
        return f"{_MARKS[self.passed]:6}  {self.name:22}  {self.detail}"


def failed(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.passed is False]


def as_json(checks: Iterable[Check], **header: object) -> dict[str, object]:
    """One object for a report: the header, whether nothing failed, and a row for each check."""
    rows = list(checks)
    return {**header, "passed": not failed(rows), "checks": [asdict(row) for row in rows]}
