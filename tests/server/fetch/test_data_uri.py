"""Data URIs as browsers and careless callers write them."""

from __future__ import annotations

import base64
import subprocess
import sys
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kontextd_server.fetch.data_uri import decode, unquoted
from kontextd_server.fetch.errors import InputTooLarge, InvalidDataUri

PIECE = 2**16  # characters that are decoded at once

# VmHWM is of this process alone; what getrusage tells begins with the peak of the parent.
PEAK = """
import re, sys
from collections import deque
from pathlib import Path
from kontextd_server.fetch.data_uri import decode
def peak_kib():
    return int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1])
uri = sys.argv[1] + sys.argv[2] * (4_000_008 // len(sys.argv[2]))
before = peak_kib()
deque(decode(uri, 2**25)[0], maxlen=0)
print(peak_kib() - before)
"""


def decoded(uri: str, max_bytes: int) -> tuple[bytes, str]:
    pieces, kind = decode(uri, max_bytes)
    return b"".join(pieces), kind


@pytest.mark.parametrize(
    ("uri", "data", "kind"),
    [
        ("data:image/png;base64,AAEC", b"\x00\x01\x02", "image/png"),
        ("DATA:image/png;BASE64,AAEC", b"\x00\x01\x02", "image/png"),
        ("data:image/png; base64 ,AAEC", b"\x00\x01\x02", "image/png"),
        ("data:;base64,AAEC", b"\x00\x01\x02", ""),
        ("data:,a%20b", b"a b", ""),
        ("data:text/plain;charset=utf-8,x", b"x", "text/plain;charset=utf-8"),
        ("data:text/plain;charset=utf-8;base64,eA==", b"x", "text/plain;charset=utf-8"),
        ("data:;base64,eA", b"x", ""),
        ("data:;base64,e A\n=\t=", b"x", ""),
        ("data:;base64,%65%41%3D%3D", b"x", ""),
        ("data:;base64,%2B%2F%2B%2F", b"\xfb\xff\xbf", ""),
        ("data:;base64,", b"", ""),
        ("  data:,x", b"x", ""),
        ("data:,ü", "ü".encode(), ""),
        ("data:,a,b", b"a,b", ""),
    ],
)
def test_a_data_uri_is_decoded(uri: str, data: bytes, kind: str) -> None:
    assert decoded(uri, 100) == (data, kind)


@pytest.mark.parametrize(
    "uri",
    ["data:", "data:image/png;base64", "data:;base64,?", "data:;base64,A", "data:;base64,AA*A", "data:;base64,ü",
     "data:;base64,AA==AA==", "data:" + "x" * 2000 + ",y", "data:;base64,-_-_", "data:;base64,\ud800"],
)  # fmt: skip
def test_what_does_not_decode_is_refused(uri: str) -> None:
    with pytest.raises(InvalidDataUri):
        decoded(uri, 100)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_the_limit_is_one_of_bytes(data: bytes, limit: int) -> None:
    plain = "data:," + "".join(f"%{byte:02x}" for byte in data)
    for uri in (f"data:x/y;base64,{base64.b64encode(data).decode()}", plain):
        if len(data) > limit:
            with pytest.raises(InputTooLarge, match=f"{limit} bytes"):
                decoded(uri, limit)
        else:
            assert decoded(uri, limit)[0] == data


@settings(max_examples=200, deadline=None)
@given(st.text("%%%4aGé,", max_size=12), st.integers(0, 8), st.text("%%4aG", max_size=8))
def test_what_is_unquoted_in_pieces_is_what_is_unquoted_at_once(text: str, before: int, after: str) -> None:
    """Around the end of a piece, with whole, half and doubtful escapes across it."""
    whole = "q" * (PIECE - before) + text + "q" * (PIECE - len(text)) + after
    assert b"".join(unquoted(f"data:,{whole}", len("data:,"))) == unquote_to_bytes(whole)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.integers(0, 5))
def test_any_text_is_unquoted(text: str, start: int) -> None:
    assert b"".join(unquoted(text, start)) == unquote_to_bytes(text[start:])


@pytest.mark.parametrize("wrapped_at", [1, 3, 76, PIECE])
@pytest.mark.parametrize("is_escaped", [False, True])
def test_base64_of_many_pieces_is_decoded(wrapped_at: int, is_escaped: bool) -> None:
    data = bytes(range(256)) * 400
    text = base64.b64encode(data).decode().rstrip("=")
    lines = "\r\n".join(text[at : at + wrapped_at] for at in range(0, len(text), wrapped_at))
    body = "".join(f"%{ord(character):02X}" for character in lines) if is_escaped else lines
    assert decoded(f"data:;base64,{body}", 10**7)[0] == data


@pytest.mark.parametrize(
    "body",
    ["A" * PIECE + "AA=A", "AA==" + " " * PIECE + "AA==", "AAA" + " " * PIECE + "=A", "A" * PIECE + "*AAA",
     "A" * PIECE + "A"],
)  # fmt: skip
def test_base64_that_goes_wrong_in_a_later_piece_is_refused(body: str) -> None:
    with pytest.raises(InvalidDataUri, match="base64"):
        decoded(f"data:;base64,{body}", 10**6)


def test_padding_may_reach_over_pieces() -> None:
    assert decoded("data:;base64,eA=" + " " * PIECE + "=", 10**6)[0] == b"x"


@pytest.mark.parametrize(("head", "filler"), [("data:,", "%"), ("data:;base64,", "%41"), ("data:;base64,", "A ")])
def test_no_text_takes_much_more_memory_than_it_has(head: str, filler: str) -> None:
    told = subprocess.run([sys.executable, "-c", PEAK, head, filler], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 32 * 1024
