"""Servers, names and a fetcher for each test; `tests/loopback.py` has the classes."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from kontextd_server.certs import CertificateFiles, write_certificates
from kontextd_server.fetch import FetchConfig
from kontextd_server.pictures import encode_png
from loopback import Bench, Names, Origin, weights
from PIL import Image


@pytest.fixture
def origin() -> Iterator[Origin]:
    server = Origin()
    yield server
    server.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    """Of a CA that nobody else trusts, for the name studio.test."""
    return write_certificates(tmp_path_factory.mktemp("certificates"), ["studio.test"])


@pytest.fixture
def secure_origin(certificates: CertificateFiles) -> Iterator[Origin]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.leaf, certificates.leaf_key)
    server = Origin(tls=context)
    yield server
    server.close()


@pytest.fixture
def names() -> Names:
    return Names()


@pytest.fixture
def bench(tmp_path: Path, names: Names) -> Bench:
    return Bench(tmp_path, names, FetchConfig(cache=tmp_path / "cache"))


@pytest.fixture
def png() -> bytes:
    return encode_png(Image.effect_noise((48, 40), 90).convert("RGB"))


@pytest.fixture
def safetensors() -> bytes:
    return weights()
