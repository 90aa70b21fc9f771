"""Certificates: handshakes that succeed for every name, and that the CA is good for no other."""

from __future__ import annotations

import argparse
import json
import ssl
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from kontextd_server import cli_certs
from kontextd_server.certs import (
    Authority,
    CertificateError,
    CertificateFiles,
    issue,
    make_authority,
    write_certificates,
)
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings
from kontextd_server.wire.hosts import HostNames

NAMES = (*HostNames().all, "box.studio.lan", "10.0.0.5", "::1")


def handshake(name: str, ca: Path, leaf: Path, leaf_key: Path) -> None:
    """A TLS handshake in memory. Raises `ssl.SSLCertVerificationError` where the client does not trust the server."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(leaf, leaf_key)
    asking = ssl.create_default_context(cafile=str(ca))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(to_client, to_server, server_hostname=name)
    server = serving.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert client.version() is not None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return write_certificates(tmp_path_factory.mktemp("certs") / "new", NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_trusts_the_ca_trusts_the_server_by_every_name(files: CertificateFiles, name: str) -> None:
    handshake(name, files.ca, files.leaf, files.leaf_key)


def test_a_name_that_is_not_in_the_certificate_is_refused(files: CertificateFiles) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake("bank.example", files.ca, files.leaf, files.leaf_key)


@pytest.mark.parametrize("name", ["bank.example", "10.0.0.6"])
def test_the_ca_cannot_vouch_for_any_other_name(files: CertificateFiles, tmp_path: Path, name: str) -> None:
    """Not even in the hands of a thief."""
    authority = Authority(
        x509.load_pem_x509_certificate(files.ca.read_bytes()),
        load_pem_private_key(files.ca_key.read_bytes(), None),  # type: ignore[arg-type]
    )
    as_general = x509.DNSName(name) if name[0].isalpha() else x509.IPAddress(ip_address(name))
    key, leaf = issue(authority, [as_general], datetime.now(UTC))
    (tmp_path / "leaf.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        handshake(name, files.ca, tmp_path / "leaf.pem", tmp_path / "key.pem")


def test_only_the_owner_reads_the_files(files: CertificateFiles) -> None:
    for path in vars(files).values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_second_run_renews_the_certificate_and_keeps_the_ca(tmp_path: Path) -> None:
    write_certificates(tmp_path, NAMES, datetime.now(UTC) - timedelta(days=900))
    files = CertificateFiles.in_folder(tmp_path)
    ca = files.ca.read_bytes()
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake("fal.run", files.ca, files.leaf, files.leaf_key)
    write_certificates(tmp_path, NAMES)
    assert files.ca.read_bytes() == ca
    handshake("fal.run", files.ca, files.leaf, files.leaf_key)


def test_a_name_the_ca_was_not_made_for_needs_another_folder(tmp_path: Path) -> None:
    write_certificates(tmp_path, ["fal.run"])
    with pytest.raises(CertificateError, match=r"not for new\.lan\. Use another folder"):
        write_certificates(tmp_path, ["fal.run", "new.lan"])


def test_a_folder_whose_ca_is_not_whole_is_left_alone(tmp_path: Path) -> None:
    files = write_certificates(tmp_path, ["fal.run"])
    files.ca_key.unlink()
    with pytest.raises(CertificateError, match="no whole CA"):
        write_certificates(tmp_path, ["fal.run"])
    other = write_certificates(tmp_path / "other", ["fal.run"])
    files.ca_key.write_bytes(other.ca_key.read_bytes())
    with pytest.raises(CertificateError, match="is not the key of"):
        write_certificates(tmp_path, ["fal.run"])


@pytest.mark.parametrize("name", ["a b", "box:8443", "https://box", "*"])
def test_what_cannot_be_certified_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="Use"):
        write_certificates(tmp_path / "new", [name])
    assert not (tmp_path / "new").exists()


def test_the_certificates_last_no_longer_than_clients_accept() -> None:
    authority = make_authority([x509.DNSName("fal.run")], datetime.now(UTC))
    _, leaf = issue(authority, [x509.DNSName("fal.run")], datetime.now(UTC))
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(days=825)
    assert authority.certificate.not_valid_after_utc > leaf.not_valid_after_utc


# The command.


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli_certs.add_options(parser)
    parser.add_argument("--json", action="store_true")
    return cli_certs.run(parser.parse_args(arguments), Settings())


def test_the_command_says_what_to_do_on_the_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", str(tmp_path), "--name", "box.lan", "--name", "10.0.0.5") == 0
    told = capsys.readouterr().out
    for needed in ("--tls-cert", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", f"10.0.0.5 {' '.join(HostNames().all)}"):
        assert needed in told
    handshake("box.lan", *(tmp_path / name for name in ("ca.pem", "server.pem", "server-key.pem")))


def test_the_command_tells_scripts_where_the_files_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", str(tmp_path), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert all(Path(path).is_file() for path in told.values())
    assert told.keys() == {"ca", "ca_key", "leaf", "leaf_key"}


def test_a_mistake_in_the_command_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no host name"):
        run("-o", str(tmp_path), "--name", "a b")
