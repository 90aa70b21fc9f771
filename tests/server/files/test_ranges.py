"""Range fields of RFC 9110, section 14."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kontextd_server.files import Span, parse_range
from kontextd_server.files.errors import InvalidRange


@pytest.mark.parametrize(
    ("text", "size", "span"),
    [
        ("bytes=0-0", 10, Span(0, 1)),
        ("bytes=0-", 10, Span(0, 10)),
        ("bytes=9-", 10, Span(9, 10)),
        ("bytes=2-5", 10, Span(2, 6)),
        ("bytes=2-500", 10, Span(2, 10)),
        ("bytes=-3", 10, Span(7, 10)),
        ("bytes=-30", 10, Span(0, 10)),
        ("BYTES = 1 - 2", 10, Span(1, 3)),
    ],
)
def test_one_range_is_a_part_of_the_file(text: str, size: int, span: Span) -> None:
    assert parse_range(text, size) == span


@pytest.mark.parametrize(
    "text",
    [None, "", "bytes=", "bytes=-", "bytes=a-b", "items=0-1", "bytes=0-1,3-4", "bytes=5-2", "0-1", "bytes=1",
     "bytes=--1", "bytes=+1-2", "bytes=0x1-2", "bytes=1_0-20", "bytes=１-２", "bytes=0-0\x00",
     "bytes=" + "9" * 500 + "-"],
)  # fmt: skip
def test_what_is_not_one_range_asks_for_the_whole(text: str | None) -> None:
    assert parse_range(text, 10) is None


@pytest.mark.parametrize(("text", "size"), [("bytes=10-", 10), ("bytes=99-100", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_a_range_after_the_end_is_refused(text: str, size: int) -> None:
    with pytest.raises(InvalidRange):
        parse_range(text, size)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"bytes=[0-9]{0,4}-[0-9]{0,4}", fullmatch=True), st.integers(0, 2000))
def test_no_range_reaches_outside_the_file(text: str, size: int) -> None:
    try:
        span = parse_range(text, size)
    except InvalidRange:
        return
    assert span is None or 0 <= span.start < span.stop <= size
    assert span is None or span.size_bytes > 0
