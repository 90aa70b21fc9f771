"""A private CA and the server's certificate, for clients that reach the box by fal's names. Knows X.509; opens no port.

The CA is limited by name constraints (RFC 5280, 4.2.1.10) to the names it was made for: a client that trusts it trusts
it for fal's names and the box's own and for nothing else, whoever gets hold of its key. So names are not added later;
a second run renews the server's certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kontextd_server.wire.errors import BadRequest
from kontextd_server.wire.hosts import parse_host
from kontextd_server.wire.key_files import write_private

CA_DAYS = 3650
LEAF_DAYS = 820  # Apple's clients refuse more than 825, also of a private CA
_CLOCKS_DIFFER = timedelta(days=1)


class CertificateError(Exception):
    """A name that cannot be certified, or a folder that holds another CA; the message has the remedy."""


@dataclass(frozen=True)
class CertificateFiles:
    """`ca` is for clients, `leaf` and `leaf_key` for `--tls-cert` and `--tls-key`; `ca_key` is best kept elsewhere."""

    ca: Path
    ca_key: Path
    leaf: Path
    leaf_key: Path

    @classmethod
    def in_folder(cls, folder: Path) -> CertificateFiles:
        names = ("ca.pem", "ca-key.pem", "server.pem", "server-key.pem")
        return cls(*(folder / name for name in names))


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def write_certificates(folder: Path, names: Sequence[str], now: datetime | None = None) -> CertificateFiles:
    """Make, or renew, what a server needs to answer for `names` (host names and addresses), all of the mode 0600.

    Raises `CertificateError`.
    """
    at = now or datetime.now(UTC)
    wanted = [_general_name(name) for name in dict.fromkeys(names)]
    files = CertificateFiles.in_folder(folder)
    authority = _authority(files, wanted, at)
    key, leaf = issue(authority, wanted, at)
    write_private(files.leaf_key, _key_pem(key))
    write_private(files.leaf, _pem(leaf) + _pem(authority.certificate))
    return files


def make_authority(wanted: Sequence[x509.GeneralName], now: datetime) -> Authority:
    """A CA that can certify these names, what is below them, and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("kontextd private CA")
    permitted = x509.NameConstraints([_constraint(one) for one in wanted], None)
    builder = _builder(name, name, key, now, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(permitted, critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Authority(builder.sign(key, SHA256()), key)


def issue(
    authority: Authority, wanted: Sequence[x509.GeneralName], now: datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A server's key and certificate for these names."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name("kontextd server"), authority.certificate.subject, key, now, LEAF_DAYS)
    builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return key, builder.add_extension(issuer_key, critical=False).sign(authority.key, SHA256())


def _authority(files: CertificateFiles, wanted: Sequence[x509.GeneralName], now: datetime) -> Authority:
    """The CA of the folder, or a new one."""
    if not files.ca.exists() and not files.ca_key.exists():
        authority = make_authority(wanted, now)
        write_private(files.ca_key, _key_pem(authority.key))
        write_private(files.ca, _pem(authority.certificate))
        return authority
    try:
        certificate = x509.load_pem_x509_certificate(files.ca.read_bytes())
        key = load_pem_private_key(files.ca_key.read_bytes(), password=None)
        permitted = certificate.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or []
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise CertificateError(f"{files.ca.parent} holds no whole CA of ours ({error}). Use another folder.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CertificateError(f"{files.ca_key} is not the key of {files.ca}. Use another folder.")
    missing = [str(one.value) for one in wanted if _constraint(one) not in permitted]
    if missing:
        raise CertificateError(f"the CA in {files.ca.parent} is not for {', '.join(missing)}. Use another folder.")
    return Authority(certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        address: IPv4Address | IPv6Address = ip_address(text.strip("[]"))
    except ValueError:
        return x509.DNSName(_host_name(text))
    return x509.IPAddress(address)


def _host_name(text: str) -> str:
    try:
        host = parse_host(text)
    except BadRequest as error:
        raise CertificateError(f"{text!r} is no host name. Use one like box.studio.example.") from error
    if host.port is not None:
        raise CertificateError(f"{text!r} has a port; a certificate is for a name. Use {host.name}.")
    return host.name


def _constraint(name: x509.GeneralName) -> x509.GeneralName:
    if isinstance(name, x509.IPAddress):
        return x509.IPAddress(ip_network(str(name.value)))
    return name


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def instructions(files: CertificateFiles, fal_names: Sequence[str], address: str) -> str:
    """What is to be done on the clients' side, ready to paste. `address` is where the box is reached."""
    ca = files.ca.absolute()
    return f"""\
Server:
  kontextd serve --host 0.0.0.0 --port 443 --tls-cert {files.leaf.absolute()} --tls-key {files.leaf_key.absolute()}

Clients, 1: the names lead to the box. In the studio's DNS, or in /etc/hosts:
  {address} {" ".join(fal_names)}

Clients, 2: copy {ca} to each of them as ca.pem and let it be trusted:
  Node:     export NODE_EXTRA_CA_CERTS=/path/to/ca.pem
  Python:   export SSL_CERT_FILE=/path/to/bundle.pem
            It replaces the usual authorities. To keep them: cat "$(python -m certifi)" ca.pem > bundle.pem
  Debian:   cp ca.pem /usr/local/share/ca-certificates/kontextd.crt && update-ca-certificates
  Browsers: import ca.pem as an authority for web sites.

Keep {files.ca_key.absolute()} off the box: it is needed again only to renew the certificate, within {LEAF_DAYS} days.
"""
