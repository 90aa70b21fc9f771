"""API keys: shown once, found by hash, revoked for good."""

from __future__ import annotations

from pathlib import Path

import pytest
from kontextd_server.store import KeyRefused, Scope, Store, open_store, sqlite_url


def test_a_key_is_found_by_its_plain_text(store: Store) -> None:
    new = store.keys.create("studio", [Scope.INFER, Scope.ADMIN])
    key_id, _, secret = new.plain.partition(":")
    assert (key_id, len(secret)) == (new.key.id, 64)
    found = store.keys.find(new.plain)
    assert (found.name, found.scopes) == ("studio", {Scope.INFER, Scope.ADMIN})
    assert store.keys.find(new.plain[:-1]) is None
    assert store.keys.find(key_id) is None
    assert store.keys.find("") is None


def test_a_key_can_only_infer_unless_said_otherwise(store: Store) -> None:
    assert store.keys.create("studio").key.scopes == {Scope.INFER}


def test_a_revoked_key_is_not_found_but_listed(store: Store, clock) -> None:
    first, second = store.keys.create("studio"), store.keys.create("lab")
    assert store.keys.revoke(first.key.id) is True
    assert store.keys.revoke(first.key.id) is False
    assert store.keys.revoke("unknown") is False
    assert store.keys.find(first.plain) is None
    assert store.keys.find(second.plain) == second.key
    assert {key.id: key.revoked_at for key in store.keys.all()} == {first.key.id: clock.now, second.key.id: None}


def test_rotation_keeps_name_and_scopes(store: Store) -> None:
    old = store.keys.create("studio", [Scope.ADMIN])
    new = store.keys.rotate(old.key.id)
    assert (new.key.name, new.key.scopes) == ("studio", {Scope.ADMIN})
    assert store.keys.find(old.plain) is None
    assert store.keys.find(new.plain) == new.key
    assert store.keys.rotate(old.key.id) is None


def test_existing_keys_can_be_imported(store: Store) -> None:
    plain = "0f3c1b52-9f1c-4d0e-8a3b-1c2d3e4f5a6b:0123456789abcdef0123456789abcdef"
    key = store.keys.import_key(plain, "studio")
    assert store.keys.find(plain) == key
    assert store.keys.import_key(plain, "another name", [Scope.ADMIN]) == key
    store.keys.revoke(key.id)
    store.keys.import_key(plain, "studio")
    assert store.keys.find(plain) is None


@pytest.mark.parametrize(
    "plain", ["", "id:short", "with a space:0123456789abcdef", "snow☃:0123456789abcdef", "x" * 1025]
)
def test_what_nobody_could_send_or_anybody_guess_is_no_key(store: Store, plain: str) -> None:
    with pytest.raises(KeyRefused, match="'studio' cannot be taken over") as refusal:
        store.keys.import_key(plain, "studio")
    assert plain == "" or plain not in str(refusal.value)
    assert store.keys.all() == ()


def test_a_key_that_must_be_new_is_refused_where_it_is_known(store: Store) -> None:
    plain = "studio:0123456789abcdef0123456789abcdef"
    key = store.keys.import_key(plain, "studio", must_be_new=True)
    with pytest.raises(KeyRefused, match=f"known already as {key.id} of 'studio': it is let in") as refusal:
        store.keys.import_key(plain, "lab", must_be_new=True)
    assert "0123" not in str(refusal.value)
    store.keys.revoke(key.id)
    with pytest.raises(KeyRefused, match="it is revoked"):
        store.keys.import_key(plain, "lab", must_be_new=True)
    assert [known.name for known in store.keys.all()] == ["studio"]


def test_a_key_is_found_by_its_id_until_it_is_revoked(store: Store) -> None:
    key = store.keys.create("studio").key
    assert store.keys.by_id(key.id) == key
    assert store.keys.by_id("unknown") is None
    store.keys.revoke(key.id)
    assert store.keys.by_id(key.id) is None


def test_the_plain_key_is_nowhere_in_the_file_nor_in_a_printed_record(sqlite_file: Path) -> None:
    store = open_store(sqlite_url(sqlite_file))
    new = store.keys.create("studio")
    secret = new.plain.split(":")[1]
    assert secret not in repr(new)
    for file in sqlite_file.parent.glob("store.db*"):
        assert secret.encode() not in file.read_bytes()
    store.close()
