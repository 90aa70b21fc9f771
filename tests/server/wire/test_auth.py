"""Keys and tokens: who is let in, as whom, and to what."""

from __future__ import annotations

import base64
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kontextd_server.wire.auth import (
    Authenticator,
    Identity,
    KeyScope,
    files_token,
    infer_token,
)
from kontextd_server.wire.errors import AuthError, Invalid, NotPermitted
from kontextd_server.wire.hosts import Role
from kontextd_server.wire.tokens import Audience, Claims, TokenSigner, aliases
from starlette.requests import HTTPConnection

INFER, ADMIN = frozenset({KeyScope.INFER}), frozenset({KeyScope.ADMIN})
NOW = 1_700_000_000
SIGNER = TokenSigner(b"s" * 32)
STUDIO = Identity("studio", "k1", INFER)


@dataclass(frozen=True)
class BookKey:
    id: str
    name: str
    scopes: frozenset[str]


class Book:
    """A `KeyBook` of two keys."""

    def __init__(self) -> None:
        self.keys = {
            "id:secret": BookKey("k1", "studio", frozenset({"infer"})),
            "admin-key": BookKey("k2", "boss", frozenset({"admin"})),
        }

    def find(self, plain: str) -> BookKey | None:
        return self.keys.get(plain)

    def by_id(self, key_id: str) -> BookKey | None:
        return next((key for key in self.keys.values() if key.id == key_id), None)


def identify(
    *authorization: str, query: str = "", role: Role = Role.QUEUE, now_s: float = NOW, book: Book | None = None
) -> Identity:
    headers = [(b"authorization", value.encode("latin-1")) for value in authorization]
    connection = HTTPConnection({"type": "http", "headers": headers, "query_string": query.encode()})
    return Authenticator(book or Book(), SIGNER).identify(connection, role, now_s)


@pytest.mark.parametrize("value", ["Key id:secret", "key id:secret", "Bearer id:secret", "BEARER  id:secret"])
def test_a_key_is_taken_as_key_and_as_bearer(value: str) -> None:
    assert identify(value) == STUDIO


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("",),
        ("Key",),
        ("Key ",),
        ("Basic id:secret",),
        ("id:secret",),
        ("Key id:secret extra",),
        ("Key id:Secret",),
        ("Key id:secre",),
        ("Key id:secret\xff",),
        ("Key id:secret", "Key id:secret"),
        (f"Key {'x' * 5000}",),
    ],
)
def test_everybody_else_stays_outside(values: tuple[str, ...]) -> None:
    with pytest.raises(AuthError):
        identify(*values)


def test_a_scope_is_needed_and_an_admin_has_all() -> None:
    STUDIO.require(KeyScope.INFER)
    identify("Key admin-key").require(KeyScope.INFER)
    with pytest.raises(NotPermitted, match="admin"):
        STUDIO.require(KeyScope.ADMIN)


def test_requests_belong_to_their_owner_and_an_admin_sees_all() -> None:
    assert STUDIO.may_see("studio")
    assert not STUDIO.may_see("boss")
    assert identify("Key admin-key").may_see("studio")


# Tokens.


def token(apps: Sequence[str] = ("flux-kontext-lora",), expires_at: int = NOW + 120) -> str:
    return infer_token(SIGNER, STUDIO, apps, expires_at)


@pytest.mark.parametrize("role", [Role.RUN, Role.QUEUE])
def test_a_token_lets_a_browser_in_by_the_url(role: Role) -> None:
    found = identify(query=f"a=b&fal_jwt_token={token()}", role=role)
    assert (found.owner, found.scopes, found.apps) == ("studio", INFER, ("flux-kontext-lora",))
    assert identify(f"Bearer {token()}", role=role) == found


def test_a_token_is_for_its_endpoints_only() -> None:
    found = identify(query=f"fal_jwt_token={token()}")
    found.require_app("flux-kontext-lora")
    with pytest.raises(NotPermitted, match="flux-kontext-lora"):
        found.require_app("flux-kontext")
    STUDIO.require_app("flux-kontext")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        (["flux-kontext-lora"], ("flux-kontext-lora",)),
        (["fal-ai/flux-kontext-lora"], ("flux-kontext-lora",)),
        (["fal-ai/flux-kontext-lora/stream"], ("flux-kontext-lora",)),
        (["fal-ai/flux-kontext/dev/stream", "flux-kontext"], ("flux-kontext",)),
        (["comfy/owner/alias"], ("alias",)),
        ([], ()),
    ],
)
def test_an_app_is_named_by_alias_or_as_a_token_provider_is_given_it(asked: list[str], meant: tuple[str, ...]) -> None:
    assert aliases(asked) == meant


def test_a_token_ends_at_its_time_and_with_its_key() -> None:
    query = f"fal_jwt_token={token()}"
    identify(query=query, now_s=NOW + 119.9)
    with pytest.raises(AuthError, match="expired"):
        identify(query=query, now_s=NOW + 120)
    book = Book()
    del book.keys["id:secret"]
    with pytest.raises(AuthError, match="revoked"):
        identify(query=query, book=book)


def test_a_token_is_of_no_use_elsewhere() -> None:
    for role in (Role.REST, Role.FILES, Role.OWN):
        with pytest.raises(AuthError, match="Use a key"):
            identify(query=f"fal_jwt_token={token()}", role=role)


@pytest.mark.parametrize("character", ["a", "é", "\U0001f600"])
def test_no_token_is_given_out_that_is_too_long_to_be_taken(character: str) -> None:
    def token_of(number: int) -> str:
        return infer_token(SIGNER, STUDIO, [character * 10 + str(app) for app in range(number)], NOW + 60)

    most = bisect_left(range(1000), True, key=lambda number: not is_made(token_of, number)) - 1
    made = token_of(most)
    assert 4000 < len(made) <= 4096
    for identity in (identify(f"Bearer {made}"), identify(query=f"fal_jwt_token={made}", role=Role.RUN)):
        assert len(identity.apps or ()) == most
    with pytest.raises(Invalid, match=r"body\.allowed_apps: .* over 4096\. Name fewer apps"):
        token_of(most + 1)


def is_made(make: Callable[[int], str], number: int) -> bool:
    try:
        make(number)
    except Invalid:
        return False
    return True


def test_a_token_for_files_is_for_files_only() -> None:
    made = files_token(SIGNER, STUDIO, NOW + 60)
    assert identify(f"Bearer {made}", role=Role.FILES).owner == "studio"
    for role in (Role.RUN, Role.QUEUE, Role.REST):
        with pytest.raises(AuthError):
            identify(f"Bearer {made}", role=role)


def test_a_key_never_counts_in_a_url() -> None:
    with pytest.raises(AuthError, match="never a key"):
        identify(query="fal_jwt_token=id%3Asecret")


def test_an_admins_token_can_only_infer() -> None:
    made = infer_token(SIGNER, Identity("boss", "k2", ADMIN), ["x"], NOW + 60)
    assert identify(f"Bearer {made}").scopes == INFER


@given(st.data())
def test_a_changed_token_is_refused(data: st.DataObject) -> None:
    made = token()
    position = data.draw(st.integers(0, len(made) - 1))
    character = data.draw(st.characters(codec="ascii", exclude_characters=made[position]))
    with pytest.raises(AuthError):
        SIGNER.verify(made[:position] + character + made[position + 1 :], NOW)


@given(st.text())
def test_any_text_is_no_token(text: str) -> None:
    with pytest.raises(AuthError):
        SIGNER.verify(text, NOW)


def test_a_token_of_another_installation_is_refused(tmp_path: Path) -> None:
    other = TokenSigner.from_file(tmp_path / "data" / "token-secret")
    assert other == TokenSigner.from_file(tmp_path / "data" / "token-secret")
    claims = Claims("k1", Audience.INFER, NOW + 60, ("a",))
    assert other.verify(other.issue(claims), NOW) == claims
    with pytest.raises(AuthError):
        SIGNER.verify(other.issue(claims), NOW)


def test_a_token_is_a_jwt_and_one_without_a_signature_is_none() -> None:
    header, payload, _ = token().split(".")
    assert json.loads(base64.urlsafe_b64decode(header + "==")) == {"alg": "HS256", "typ": "JWT"}
    assert json.loads(base64.urlsafe_b64decode(payload + "=="))["exp"] == NOW + 120
    unsigned = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    for forged in (f"{unsigned}.{payload}.", f"{header}.{payload}.", f"{header}.{payload}"):
        with pytest.raises(AuthError):
            SIGNER.verify(forged, NOW)
