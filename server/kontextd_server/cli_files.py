"""`kontextd files`: list, show, delete and prune uploads and results. Knows the file store; knows no jobs, no HTTP."""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kontextd_server.cli_options import add_action
from kontextd_server.cli_times import span, span_text
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_server.files import FolderStore, StoredFile

_MOST = 100_000
_SETTINGS = ("data", "files")


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listed = add_action(actions, "list", "uploads and results, the newest first", *_SETTINGS)
    listed.add_argument("--owner", metavar="NAME", help="only of keys of this name")
    listed.add_argument("--older-than", type=span, default=0.0, metavar="AGE", help="only these, as 30d or 12h")
    listed.add_argument("--limit", type=int, default=50, metavar="N", help="how many at most; default: %(default)s")
    show = add_action(actions, "show", "all that is known of a file", *_SETTINGS)
    show.add_argument("file", metavar="FILE", help="its URL, or its key: what stands in the URL after /files/")
    delete = add_action(actions, "delete", "remove files, each at once and for good", *_SETTINGS)
    delete.add_argument("file", nargs="+", metavar="FILE", help="as for show")
    prune = add_action(actions, "prune", "remove all files that are older than this", *_SETTINGS)
    prune.add_argument("--older-than", type=span, required=True, metavar="AGE", help="as 30d, 12h or 90min")
    prune.add_argument("--owner", metavar="NAME", help="only of keys of this name")
    prune.add_argument("--dry-run", action="store_true", help="tell what would go, and leave it")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    from kontextd_server import parts

    if not settings.files_folder.is_dir():  # to open it would make it
        raise UsageError(f"there is no file store at {settings.files_folder}: check --data or --files.")
    store = parts.file_store(settings)
    match arguments.action:
        case "list":
            _list(store, arguments)
        case "show":
            _show(_file(store, arguments.file), arguments)
        case "delete":
            _delete(store, arguments)
        case "prune":
            _prune(store, arguments)
    return 0


def _list(store: FolderStore, arguments: argparse.Namespace) -> None:
    if not 0 < arguments.limit <= _MOST:
        raise UsageError(f"--limit is {arguments.limit}; use 1 to {_MOST}.")
    files = heapq.nlargest(arguments.limit, _wanted(store, arguments), key=lambda file: (file.created_at, file.key))
    if arguments.json:
        print(json.dumps([_told(file) for file in files], indent=2))
    elif files:
        print("\n".join(_table(files, time.time())))


def _show(file: StoredFile, arguments: argparse.Namespace) -> None:
    told = _told(file)
    if arguments.json:
        print(json.dumps(told, indent=2))
        return
    for name, value in told.items():
        if value is not None:
            print(f"{name:12} {value}")


def _delete(store: FolderStore, arguments: argparse.Namespace) -> None:
    files = {file.key: file for file in [_file(store, text) for text in arguments.file]}  # all of them, or none
    for file in files.values():
        store.remove(file)
        if not arguments.json:
            print(f"{file.key} deleted")
    if arguments.json:
        print(json.dumps([{"key": key, "status": "deleted"} for key in files]))


def _prune(store: FolderStore, arguments: argparse.Namespace) -> None:
    count, size_bytes = 0, 0
    for file in _wanted(store, arguments):
        if arguments.dry_run or store.remove(file) is not None:
            count, size_bytes = count + 1, size_bytes + file.size_bytes
    if arguments.json:
        print(json.dumps({"files": count, "size_bytes": size_bytes, "dry_run": arguments.dry_run}))
    else:
        print(f"{'would delete' if arguments.dry_run else 'deleted'} {count} files of {size_bytes} bytes")


def _wanted(store: FolderStore, arguments: argparse.Namespace) -> Iterator[StoredFile]:
    newest = time.time() - arguments.older_than
    for file in store.all():
        if file.created_at <= newest and arguments.owner in (None, file.owner):
            yield file


def _file(store: FolderStore, text: str) -> StoredFile:
    """By its key, or by the URL of any name that the box has."""
    from kontextd_server.files.errors import FileNotHere
    from kontextd_server.wire.addresses import possible_file_key

    try:
        return store.info(possible_file_key(text) or text)
    except FileNotHere as error:
        raise UsageError(f"there is no file {text[:200]!r}; see kontextd files list.") from error


def _table(files: Iterable[StoredFile], now: float) -> Iterator[str]:
    yield f"{'owner':16}  {'bytes':>12}  {'age':>8}  {'expires':>8}  file"
    for file in files:
        expires = "never" if file.expires_at is None else span_text(file.expires_at - now)
        age = span_text(now - file.created_at)
        yield f"{(file.owner or '-')[:16]:16}  {file.size_bytes:>12}  {age:>8}  {expires:>8}  {file.key}"


def _told(file: StoredFile) -> dict[str, object]:
    return {
        "key": file.key,
        "owner": file.owner,
        "file_name": file.file_name,
        "content_type": file.content_type,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
        "created_at": _time(file.created_at),
        "expires_at": None if file.expires_at is None else _time(file.expires_at),
    }


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
