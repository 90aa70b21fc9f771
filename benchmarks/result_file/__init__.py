"""The file a benchmark leaves in benchmarks/results/: its figures, after when, how and with what they were measured.

Knows no figures. A folder of its own, because `make bench` runs every script beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from kontextd_models.probe import versions

RESULTS = Path(__file__).parent.parent / "results"


def write(path: Path, report: Mapping[str, object]) -> None:
    """Make or replace the JSON file; the command is the process's own, without folders."""
    whole = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *(Path(word).name for word in sys.argv)]),
        "versions": versions(),
        **report,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
