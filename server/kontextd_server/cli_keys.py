"""`kontextd keys`: make, list, import, rotate and revoke API keys. Knows the job store's keys; knows no HTTP."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kontextd_server.cli_options import add_action
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_server.store import ApiKey, NewKey, Scope, Store

_SCOPES = ("infer", "admin")
_MAKES_A_STORE = ("create", "import")  # so that there are keys before the first start of a server
_SETTINGS = ("data", "database")


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = add_action(
        actions, "create", "make a key; the key alone goes to stdout, and is shown this once", *_SETTINGS
    )
    _add_owner(create)
    add_action(actions, "list", "all keys, the oldest first, without their secrets", *_SETTINGS)
    taken = add_action(actions, "import", "let an existing key in; it is read from stdin, one line", *_SETTINGS)
    _add_owner(taken)
    rotate = add_action(actions, "rotate", "a new key of the same name and scope; the old one is revoked", *_SETTINGS)
    revoke = add_action(actions, "revoke", "let a key in no more", *_SETTINGS)
    for one in (rotate, revoke):
        one.add_argument("id", metavar="ID", help="as kontextd keys list shows it")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    from kontextd_server import parts

    with parts.job_store(settings, upgrade=arguments.action in _MAKES_A_STORE) as store:
        match arguments.action:
            case "create":
                _show_new(store.keys.create(_name(arguments), _scopes(arguments)), arguments)
            case "list":
                _show(store.keys.all(), arguments)
            case "import":
                _import(store, arguments)
            case "rotate":
                _show_new(_known(store.keys.rotate(arguments.id), arguments.id), arguments)
            case "revoke":
                if not store.keys.revoke(arguments.id):
                    raise _unknown(arguments.id)
                _say_revoked(arguments)
    return 0


def _add_owner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", required=True, help="the owner of what is submitted with it; several keys may share it"
    )
    parser.add_argument(
        "--scope", choices=_SCOPES, default="infer", help="admin sees everybody's requests; default: infer"
    )


def _import(store: Store, arguments: argparse.Namespace) -> None:
    plain = sys.stdin.readline().strip()
    key = store.keys.import_key(plain, _name(arguments), _scopes(arguments), must_be_new=True)
    _show([key], arguments)


def _name(arguments: argparse.Namespace) -> str:
    name: str = arguments.name
    if not 0 < len(name) <= 100 or not name.isprintable():
        raise UsageError(f"--name is {name!r}; use 1 to 100 printable characters.")
    return name


def _scopes(arguments: argparse.Namespace) -> list[Scope]:
    from kontextd_server.store import Scope

    return [Scope(arguments.scope)]


def _known(key: NewKey | None, key_id: str) -> NewKey:
    if key is None:
        raise _unknown(key_id)
    return key


def _unknown(key_id: str) -> UsageError:
    return UsageError(f"there is no key {key_id!r} that is let in; see kontextd keys list.")


def _say_revoked(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"id": arguments.id, "status": "revoked"}))
    print(f"revoked {arguments.id}; it may be let in for a few seconds more", file=sys.stderr)


def _show_new(new: NewKey, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({**_told(new.key), "key": new.plain}))
        return
    print(new.plain)
    print(f"key {new.key.id} of {new.key.name!r}; it is not shown again", file=sys.stderr)


def _show(keys: Sequence[ApiKey], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps([_told(key) for key in keys], indent=2))
        return
    for key in keys:
        told = _told(key)
        state = f"revoked {told['revoked_at']}" if key.revoked_at is not None else "active"
        print(f"{key.id}  {key.name:20} {','.join(sorted(key.scopes)):6} made {told['created_at']}  {state}")


def _told(key: ApiKey) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created_at": _time(key.created_at),
        "revoked_at": None if key.revoked_at is None else _time(key.revoked_at),
    }


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
