"""`kontextd mirror`: let URLs and hub ids stand for files of this box. Knows the mirror; knows no network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_server.cli_options import add_action
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_server.mirror import Mirror, Mirrored

_SETTINGS = ("data", "files")


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = add_action(actions, "add", "let a URL or hub id stand for a copy of a file", *_SETTINGS)
    add.add_argument("url", metavar="URL", help="exactly as clients send it, or a hub id such as owner/name")
    add.add_argument("file", type=Path, metavar="FILE")
    taken = add_action(actions, "import", "add what a list holds, one URL FILE a line", *_SETTINGS)
    taken.add_argument("list", type=Path, metavar="LIST", help="# begins a comment; files lie beside the list")
    remove = add_action(actions, "remove", "let a URL stand for nothing again", *_SETTINGS)
    remove.add_argument("url", metavar="URL")
    add_action(actions, "list", "all that is mirrored", *_SETTINGS)
    add_action(actions, "missing", "what was asked for and is not here, the latest first", *_SETTINGS)


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    from kontextd_server.mirror import Mirror, MirrorError

    there = Mirror(settings.files_folder)
    try:
        match arguments.action:
            case "add":
                _show([there.add(arguments.url, arguments.file)], arguments)
            case "import":
                _show(there.import_list(arguments.list), arguments)
            case "remove":
                if not there.remove(arguments.url):
                    raise UsageError(f"{arguments.url!r} is not mirrored; see kontextd mirror list.")
                _say_removed(arguments)
            case "list":
                _show(there.entries(), arguments)
            case "missing":
                _show_missing(there, arguments)
    except MirrorError as error:
        raise UsageError(str(error)) from error
    return 0


def _say_removed(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"url": arguments.url, "status": "removed"}))
    print(f"removed {arguments.url}", file=sys.stderr)


def _show(entries: Sequence[Mirrored], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        print(f"{entry.sha256[:16]}  {entry.size_bytes:>12}  {entry.url}")


def _show_missing(there: Mirror, arguments: argparse.Namespace) -> None:
    missing = there.missing()
    if arguments.json:
        print(json.dumps([asdict(note) for note in missing], indent=2))
        return
    for note in missing:
        at = datetime.fromtimestamp(note.last_at, UTC).isoformat(timespec="seconds")
        print(f"{at}  {note.purpose:5}  {note.url}")
