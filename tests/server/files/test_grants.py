"""Upload grants: nobody makes one up, changes one, or uses one for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kontextd_server.files import FOR_EVER, Grant, GrantSigner, Label
from kontextd_server.files.errors import GrantExpired, InvalidGrant

SECRET, OTHER = b"s" * 32, b"o" * 32
LABEL = Label("ü\ud800.png", "image/png", 3600.0, "anna")
GRANT = Grant("a" * 26 + "-x.png", LABEL, 1_700_000_100.0, "u" * 26)


@pytest.fixture
def signer(clock: Callable[[], float]) -> GrantSigner:
    return GrantSigner([SECRET], clock)


@pytest.mark.parametrize(
    "grant",
    [
        GRANT,
        replace(GRANT, upload_id=None),
        replace(GRANT, label=Label()),
        replace(GRANT, label=Label(lifetime_s=FOR_EVER)),
    ],
)
def test_a_grant_says_what_it_was_given_for(signer: GrantSigner, grant: Grant) -> None:
    token = signer.issue(grant)
    assert signer.check(token) == grant
    assert token.isascii()
    assert not set(token) & set("/?#&%+ =")  # it stands in a URL as it is


def test_a_grant_is_short_whatever_the_name(signer: GrantSigner) -> None:
    token = signer.issue(replace(GRANT, label=Label("\U0001f600" * 100_000, "x" * 100_000)))
    assert len(token) < 4096
    assert signer.check(token).label.file_name == "\U0001f600" * 255


def test_a_grant_ends(signer: GrantSigner, clock: Callable[[], float]) -> None:
    token = signer.issue(GRANT)
    clock.now = GRANT.expires_at
    with pytest.raises(GrantExpired, match="Ask for a new one"):
        signer.check(token)


def test_each_character_counts(signer: GrantSigner) -> None:
    token = signer.issue(GRANT)
    for at in range(0, len(token), 7):
        for other in "A.~":
            if token[at] != other:
                with pytest.raises(InvalidGrant):
                    signer.check(token[:at] + other + token[at + 1 :])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_no_other_text_is_a_grant(text: str) -> None:
    with pytest.raises(InvalidGrant):
        GrantSigner([SECRET]).check(text)


@pytest.mark.parametrize("text", ["", ".", "a", "a.b.c", "é.é", "x" * 10_000])
def test_what_is_no_grant_is_refused(signer: GrantSigner, text: str) -> None:
    with pytest.raises(InvalidGrant):
        signer.check(text)


def test_another_secret_makes_another_grant_until_it_is_accepted_too(clock: Callable[[], float]) -> None:
    old, new, both = GrantSigner([SECRET], clock), GrantSigner([OTHER], clock), GrantSigner([OTHER, SECRET], clock)
    with pytest.raises(InvalidGrant):
        new.check(old.issue(GRANT))
    assert both.check(old.issue(GRANT)) == both.check(both.issue(GRANT)) == new.check(both.issue(GRANT)) == GRANT


@pytest.mark.parametrize("secrets", [[], [b"short"], [SECRET, b""]])
def test_a_guessable_secret_is_refused(secrets: list[bytes]) -> None:
    with pytest.raises(ValueError, match="32 random bytes"):
        GrantSigner(secrets)
