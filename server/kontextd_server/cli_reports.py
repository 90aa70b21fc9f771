"""`kontextd info`, `doctor`, `verify`: what is here, is it fit, does it do what it says. Knows no torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from kontextd_models.checks import Check, as_json, failed

from kontextd_server.files.atomic import replace_whole
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings


def add_info_options(parser: argparse.ArgumentParser) -> None:
    """`info` has none of its own."""


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record",
        action="store_true",
        help="hash the model as it is now into its checksums.json, to compare with later",
    )


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: kontextd-verify.json")


def run_info(arguments: argparse.Namespace, settings: Settings) -> int:
    """What loading the model now would choose; reads its headers, not its weights."""
    from kontextd_models.description import as_text, choice, describe
    from kontextd_models.probe import gpus, versions

    model = choice(settings.engine_config())
    if arguments.json:
        print(json.dumps({"versions": versions(), "gpus": gpus(), "model": describe(model)}, indent=2))
        return 0
    cards = [f"{card['name']}, compute capability {card['capability']}" for card in gpus()]
    print(as_text(model))
    print(f"\ngpus      {'; '.join(cards) or 'none that torch sees'}")
    print(f"versions  {', '.join(f'{name} {found}' for name, found in versions().items())}")
    return 0


def run_doctor(arguments: argparse.Namespace, settings: Settings) -> int:
    from kontextd_models.checksums import record
    from kontextd_models.doctor import Patient, examine
    from kontextd_models.folder import check_folder

    patient = Patient(settings.engine_config(), Path.cwd(), dict(os.environ))
    if arguments.record:
        check_folder(patient.folder)
        print(f"{len(record(patient.folder))} sums written to {patient.folder}", file=sys.stderr)
    checks = _shown(examine(patient), quiet=arguments.json)
    if arguments.json:
        print(json.dumps(as_json(checks, model=str(patient.folder)), indent=2))
    return 1 if failed(checks) else 0


def run_verify(arguments: argparse.Namespace, settings: Settings) -> int:
    """The report is written whatever the outcome: a failed proof is worth keeping too."""
    out = arguments.out or Path("kontextd-verify.json")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or (out.exists() and not out.is_file()):
        raise UsageError(f"--out {out} cannot be written; name a file in a folder that exists.")
    from kontextd_models.probe import versions
    from kontextd_models.verify import checks, subject_of

    date, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    found = _shown(checks(subject_of(settings.engine_config())), quiet=arguments.json)
    report = as_json(found, date=date, seconds=round(time.monotonic() - began, 1), versions=versions())
    replace_whole(out, (json.dumps(report, indent=2) + "\n").encode())
    print(json.dumps(report, indent=2) if arguments.json else f"report: {out}")
    return 1 if failed(found) else 0


def _shown(checks: Iterable[Check], *, quiet: bool) -> list[Check]:
    """All checks, each printed as soon as it is made."""
    found = []
    for check in checks:
        found.append(check)
        if not quiet:
            print(check.line(), flush=True)
    return found
