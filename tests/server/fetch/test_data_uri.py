"""Data URIs as browsers and careless callers write them."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kontextd_server.fetch.data_uri import decode
from kontextd_server.fetch.errors import InputTooLarge, InvalidDataUri


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
    assert decode(uri, 100) == (data, kind)


@pytest.mark.parametrize(
    "uri",
    ["data:", "data:image/png;base64", "data:;base64,?", "data:;base64,A", "data:;base64,AA*A", "data:;base64,ü",
     "data:;base64,AA==AA==", "data:" + "x" * 2000 + ",y", "data:;base64,-_-_"],
)  # fmt: skip
def test_what_does_not_decode_is_refused(uri: str) -> None:
    with pytest.raises(InvalidDataUri):
        decode(uri, 100)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_the_limit_is_one_of_bytes(data: bytes, limit: int) -> None:
    plain = "data:," + "".join(f"%{byte:02x}" for byte in data)
    for uri in (f"data:x/y;base64,{base64.b64encode(data).decode()}", plain):
        if len(data) > limit:
            with pytest.raises(InputTooLarge, match=f"{limit} bytes"):
                decode(uri, limit)
        else:
            assert decode(uri, limit)[0] == data
