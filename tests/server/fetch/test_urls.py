"""One parser, and the URLs that make two parsers disagree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kontextd_server.fetch.errors import InvalidReference
from kontextd_server.fetch.urls import Target, follow, parse, scheme_of


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("http://a.test", Target("http", "a.test", 80, "/")),
        ("HTTPS://A.Test/X?y=1#z", Target("https", "a.test", 443, "/X?y=1")),
        ("  http://a.test:8080/x  ", Target("http", "a.test", 8080, "/x")),
        ("http://a.test./x", Target("http", "a.test", 80, "/x")),
        ("http://[::1]:81/x", Target("http", "::1", 81, "/x")),
        ("http://[0:0::0:1]/", Target("http", "::1", 80, "/")),
        ("http://[::ffff:10.0.0.1]/", Target("http", "::ffff:a00:1", 80, "/")),
        ("http://127.0.0.1/", Target("http", "127.0.0.1", 80, "/")),
        ("http://a.test/a b", Target("http", "a.test", 80, "/a%20b")),
        ("http://a.test/%20%2F?x=%26", Target("http", "a.test", 80, "/%20%2F?x=%26")),
        ("http://a.test/ü?ü=ü", Target("http", "a.test", 80, "/%C3%BC?%C3%BC=%C3%BC")),
        ("http://bücher.test/", Target("http", "xn--bcher-kva.test", 80, "/")),
        ("http://a.test?x", Target("http", "a.test", 80, "/?x")),
        ("http://good.test#@evil.test/\n", Target("http", "good.test", 80, "/")),
        ("http://a.test:/x", Target("http", "a.test", 80, "/x")),
        ("http://under_score.test/", Target("http", "under_score.test", 80, "/")),
        ("http://a.test//x/../y", Target("http", "a.test", 80, "//x/../y")),
    ],
)
def test_a_url_is_taken_apart(text: str, target: Target) -> None:
    assert parse(text) == target
    assert parse(target.url) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.test/x",
        "//a.test/x",
        "http:/a.test",
        "http://",
        "http:///x",
        "http://:80/",
        "ftp://a.test/",
        "file:///etc/passwd",
        "gopher://a.test/",
        "javascript:alert(1)",
        "http://user@a.test/",
        "http://user:secret@a.test/",
        "http://@a.test/",
        "http://good.test@evil.test/",
        "http://good.test\\@evil.test/",
        "http://good.test\\.evil.test/",
        "http:\\\\evil.test/",
        "http://a.test/\r\nHost: evil",
        "http://a.te\tst/",
        "http://a.test\x00/",
        "http://a.test:0/",
        "http://a.test:65536/",
        "http://a.test:-1/",
        "http://a.test:x/",
        "http://a.test:８０/",
        "http://[::1/",
        "http://[::1]x/",
        "http://[fe80::1%25eth0]/",
        "http://[v1.x]/",
        "http://::1/",
        "http://a%2etest/",
        "http://%31%32%37.0.0.1/",
        "http://a..test/",
        "http://.test/",
        "http://a b.test/",
        "http://a,b.test/",
        "http://" + "a" * 300 + ".test/",
        "http://" + "ü" * 80 + ".test/",
        "http://a.test/" + "x" * 9000,
        "http://a.test\u2028/",
        "http://a\u2100.test:80\u2215@b.test/",
    ],
)
def test_what_two_parsers_could_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse(text)


def test_a_password_is_not_repeated_and_neither_is_a_query() -> None:
    for text in ("http://user:s3cret@a.test/?sig=s3cret", "http://user:s3cret@a.test:x/", "ftp://a:s3cret@b/?s3cret"):
        with pytest.raises(InvalidReference) as caught:
            parse(text)
        assert "s3cret" not in str(caught.value)
    assert str(parse("https://a.test:8443/x?sig=s3cret")) == "https://a.test:8443/x"


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/y", "http://a.test:81/y"),
        ("y?z", "http://a.test:81/b/y?z"),
        ("//b.test/y", "http://b.test/y"),
        ("https://b.test/y", "https://b.test/y"),
        ("?q", "http://a.test:81/b/c?q"),
        ("", "http://a.test:81/b/c"),
        ("../../../y", "http://a.test:81/y"),
    ],
)
def test_a_redirect_leads_on(location: str, url: str) -> None:
    assert follow(parse("http://a.test:81/b/c"), location).url == url


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "data:,x", "http://x@b.test/", "http://[", "\\\\b.test", "javascript:x"]
)
def test_a_redirect_to_what_cannot_be_fetched_is_refused(location: str) -> None:
    with pytest.raises(InvalidReference):
        follow(parse("http://a.test/"), location)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"https?://[^/]{0,20}/?.{0,20}", fullmatch=True))
def test_a_url_is_refused_or_means_the_same_for_ever(text: str) -> None:
    try:
        target = parse(text)
    except InvalidReference:
        return
    assert parse(target.url) == target
    assert target.url.isascii()
    assert target.url.isprintable()
    assert " " not in target.url
    assert not set(target.host) & set("/\\@?#% ")


def test_what_looks_like_a_url_has_a_scheme() -> None:
    assert [scheme_of(text) for text in ("Data:,x", " http://x", "owner/name", "c:\\x", "", "1a:x")] == [
        "data", "http", None, "c", None, None]  # fmt: skip
