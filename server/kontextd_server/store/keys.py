"""API keys: made, looked up, revoked. Knows hashes and names; knows no headers. Plain keys are never stored."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Collection
from uuid import uuid4

import sqlalchemy as sa

from kontextd_server.store.database import Database
from kontextd_server.store.errors import KeyRefused
from kontextd_server.store.prepared import Row
from kontextd_server.store.records import ApiKey, NewKey, Scope
from kontextd_server.store.tables import api_keys


class ApiKeys:
    """A key's name is the owner of what is submitted with it: several keys may share one, which makes rotation easy."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database, self._clock = database, clock

    def create(self, name: str, scopes: Collection[Scope] = (Scope.INFER,)) -> NewKey:
        """A new key of the form `id:secret`."""
        with self._database.write() as connection:
            return self._create(connection, name, scopes)

    def import_key(
        self, plain: str, name: str, scopes: Collection[Scope] = (Scope.INFER,), *, must_be_new: bool = False
    ) -> ApiKey:
        """Keep an existing key, so that its users need not change it. Raises `KeyRefused`.

        One that is known already, revoked perhaps, stays as it is; where it `must_be_new`, it is refused.
        """
        if not _KEY.fullmatch(plain):
            raise KeyRefused(
                f"the key for {name!r} cannot be taken over: it has {len(plain)} characters. A key is 16 to 1024 "
                "characters of ASCII without a space, such as id:secret."
            )
        key_id = str(uuid4())
        with self._database.write() as connection:
            key = self._insert(connection, key_id, plain, name, scopes)
        if must_be_new and key.id != key_id:
            state = "it is revoked" if key.revoked_at is not None else "it is let in"
            raise KeyRefused(f"the key for {name!r} is known already as {key.id} of {key.name!r}: {state}.")
        return key

    def find(self, plain: str) -> ApiKey | None:
        """The key, unless it is unknown or revoked.

        Found by the hash of the whole: how long that takes says nothing about the secrets of keys that exist.
        """
        with self._database.read() as connection:
            row = connection.execute(_FIND, {"wanted": _sha256(plain)}).one_or_none()
        return None if row is None else _to_key(row)

    def by_id(self, key_id: str) -> ApiKey | None:
        """The key, unless it is unknown or revoked."""
        with self._database.read() as connection:
            row = connection.execute(_BY_ID, {"wanted": key_id}).one_or_none()
        return None if row is None else _to_key(row)

    def all(self) -> tuple[ApiKey, ...]:
        """Every key, the oldest first, revoked ones too."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)).all()
        return tuple(_to_key(row) for row in rows)

    def revoke(self, key_id: str) -> bool:
        """No call is let in with it from now on; False if there is no such key or it was revoked before."""
        with self._database.write() as connection:
            return self._revoke(connection, key_id) is not None

    def rotate(self, key_id: str) -> NewKey | None:
        """A new key of the same name and scopes in place of this one, which is revoked; None as in `revoke`."""
        with self._database.write() as connection:
            old = self._revoke(connection, key_id)
            return None if old is None else self._create(connection, old.name, old.scopes)

    def _create(self, connection: sa.Connection, name: str, scopes: Collection[Scope]) -> NewKey:
        key_id = str(uuid4())
        plain = f"{key_id}:{secrets.token_hex(32)}"
        return NewKey(self._insert(connection, key_id, plain, name, scopes), plain)

    def _insert(
        self, connection: sa.Connection, key_id: str, plain: str, name: str, scopes: Collection[Scope]
    ) -> ApiKey:
        insert = self._database.insert(api_keys).values(
            id=key_id,
            name=name,
            sha256=_sha256(plain),
            scopes=",".join(sorted(scopes)),
            created_at=self._clock(),
        )
        connection.execute(insert.on_conflict_do_nothing(index_elements=["sha256"]))
        return _to_key(connection.execute(sa.select(api_keys).where(api_keys.c.sha256 == _sha256(plain))).one())

    def _revoke(self, connection: sa.Connection, key_id: str) -> ApiKey | None:
        row = connection.execute(
            sa.update(api_keys)
            .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=self._clock())
            .returning(api_keys)
        ).one_or_none()
        return None if row is None else _to_key(row)


_GOOD = sa.select(api_keys).where(api_keys.c.revoked_at.is_(None))
_FIND = _GOOD.where(api_keys.c.sha256 == sa.bindparam("wanted"))
_BY_ID = _GOOD.where(api_keys.c.id == sa.bindparam("wanted"))
# What can stand in a header. Shorter ones could be guessed from their hash.
_KEY = re.compile(r"[\x21-\x7e]{16,1024}")


def _sha256(plain: str) -> str:
    # Keys are long and random, so a fast hash without salt gives nothing away.
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()


def _to_key(row: Row) -> ApiKey:
    scopes = frozenset(Scope(name) for name in row.scopes.split(",") if name)
    return ApiKey(row.id, row.name, scopes, row.created_at, row.revoked_at)
