"""Which addresses may be connected to, for what. Pure: addresses and names in, yes or an error out; knows no network.

Public addresses are open to everybody, unless this box is off-line. Everything else is closed until the operator lists
it for the purpose: a CIDR opens its addresses, a host name opens private addresses under that name (a studio's own
servers), but not loopback and link-local ones, since whoever answers for the name in DNS would choose them. Metadata
services are never open.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from kontextd_server.fetch.errors import AddressDenied

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Purpose(StrEnum):
    IMAGE = "image"
    LORA = "lora"
    WEBHOOK = "webhook"

    @property
    def allow_setting(self) -> str:
        return f"KONTEXTD_FETCH_ALLOW_{self.name}"


# Where clouds answer with the machine's own credentials: AWS (also ECS, EKS), Azure, Google, DigitalOcean, Oracle and
# OpenStack share 169.254.169.254; the others are named.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            "169.254.169.254",
            "169.254.170.2",  # AWS ECS
            "169.254.170.23",  # AWS EKS
            "fd00:ec2::254",  # AWS
            "fd00:ec2::23",  # AWS EKS
            "fd20:ce::254",  # Google
            "100.100.100.200",  # Alibaba
            "192.0.0.192",  # Oracle
            "168.63.129.16",  # Azure's wire server, a public address
        ),
    )
)
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data"})

_PUBLIC = "public, and this server is off-line"
_OPEN_BY_NAME = frozenset({"private", "shared (CGNAT)", "unique local", _PUBLIC})  # what a listed host name opens

# IANA's registries of special-purpose addresses (RFC 6890 and its updates), of IPv4 and IPv6. Tables of our own: those
# of the `ipaddress` module change with the release of Python.
_SPECIAL_IPV4 = tuple(
    (ipaddress.ip_network(network), kind)
    for network, kind in (
        ("0.0.0.0/8", "of this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared (CGNAT)"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "for documentation"),
        ("192.88.99.0/24", "reserved"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
_SPECIAL_IPV6 = tuple(
    (ipaddress.ip_network(network), kind)
    for network, kind in (
        ("::1/128", "loopback"),
        ("2001::/32", "a Teredo tunnel"),
        ("2001::/23", "reserved"),
        ("2001:db8::/32", "for documentation"),
        ("2002::/16", "a 6to4 tunnel"),
        ("3fff::/20", "for documentation"),
        ("fc00::/7", "unique local"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    )
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the way to IPv4 where there is only IPv6
_LAST_32_BITS = 2**32 - 1
# Prefixes after which the last 32 bits are an IPv4 address: compatible, translated (RFC 2765), NAT64 (RFC 6052, 8215).
_HOLD_IPV4 = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")))


@dataclass(frozen=True)
class AllowList:
    """What an operator opened for one purpose: exact host names, `*.` with a domain, and networks."""

    hosts: frozenset[str] = frozenset()
    domains: tuple[str, ...] = ()  # each with its leading dot
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> AllowList:
        """Of `nas.studio.lan`, `*.studio.lan`, `10.0.0.0/8`, `192.168.1.7`. Raises `ValueError` with the remedy."""
        hosts, domains, networks = set(), [], []
        for entry in entries:
            name = entry.strip().lower().removesuffix(".")
            if network := _network(name):
                networks.append(network)
            elif name.startswith("*.") and _is_name(name[2:]):
                domains.append(name[1:])
            elif _is_name(name):
                hosts.add(name)
            else:
                raise ValueError(f"{entry!r} is no host, *.domain, address or CIDR such as 10.0.0.0/8")
        return cls(frozenset(hosts), tuple(domains), tuple(networks))

    def names(self, host: str) -> bool:
        return host in self.hosts or host.endswith(self.domains)

    def holds(self, address: Address) -> bool:
        return any(address in network for network in self.networks)

    def __bool__(self) -> bool:
        return bool(self.hosts or self.domains or self.networks)


def check_name(host: str, purpose: Purpose) -> None:
    """Refuse the names of metadata services: a proxy would resolve them where we cannot see the address."""
    if host in _METADATA_NAMES or host.endswith(".metadata.google.internal"):
        raise _never(host, purpose)


def check_address(
    address: Address, host: str, purpose: Purpose, allow: AllowList, *, listed_only: bool = False
) -> None:
    """Raises `AddressDenied`, naming address, purpose and setting, unless `host` may be reached at `address`.

    `listed_only`: this box is off-line, so that a public address has to be listed like any other.
    """
    forms = [plain(address), *_hidden(plain(address))]
    if any(form in _METADATA for form in forms):
        raise _never(f"{host} ({address})" if host != str(address) else host, purpose)
    kind = _kind(forms[0]) or (_PUBLIC if listed_only else None)
    if kind is None or any(allow.holds(form) for form in forms):
        return
    if kind in _OPEN_BY_NAME and allow.names(host):
        return
    where = host if host == str(address) else f"{host} has the address {address}, which"
    remedy = f"{host} or {address}" if kind in _OPEN_BY_NAME and host != str(address) else str(address)
    raise AddressDenied(
        f"{where} is {kind}: denied for the purpose '{purpose}'. The operator of this server can allow it by adding "
        f"{remedy} to {purpose.allow_setting}.",
        setting=purpose.allow_setting,
    )


def check_through_proxy(host: str, purpose: Purpose, allow: AllowList) -> None:
    """A proxy resolves names itself, so that only listed hosts, and listed addresses written as such, pass."""
    check_name(host, purpose)
    address = as_address(host)
    if address is not None and any(form in _METADATA for form in (plain(address), *_hidden(plain(address)))):
        raise _never(host, purpose)
    if allow.names(host) or (address is not None and allow.holds(plain(address))):
        return
    raise AddressDenied(
        f"{host} is not listed: denied for the purpose '{purpose}', whose requests go through a proxy. The operator of "
        f"this server can allow it by adding {host} to {purpose.allow_setting}.",
        setting=purpose.allow_setting,
    )


def as_address(host: str) -> Address | None:
    """The address that a host is written as; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def plain(address: Address) -> Address:
    """The IPv4 address that `::ffff:a.b.c.d` stands for: the kernel connects to it by IPv4."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _hidden(address: Address) -> Iterator[Address]:
    """The IPv4 addresses that an IPv6 one carries for somebody on the way to unpack."""
    if not isinstance(address, ipaddress.IPv6Address):
        return
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if any(address in network for network in _HOLD_IPV4):
        yield ipaddress.IPv4Address(int(address) & _LAST_32_BITS)


def _kind(address: Address) -> str | None:
    """What kind of special address it is; None for a public one."""
    if isinstance(address, ipaddress.IPv4Address):
        return next((kind for network, kind in _SPECIAL_IPV4 if address in network), None)
    if address in _NAT64:
        return _kind(ipaddress.IPv4Address(int(address) & _LAST_32_BITS))
    special = next((kind for network, kind in _SPECIAL_IPV6 if address in network), None)
    return special or (None if address in _GLOBAL_UNICAST else "reserved")


def _never(where: str, purpose: Purpose) -> AddressDenied:
    return AddressDenied(
        f"{where} is a metadata service, which hands out a machine's credentials: it is never open, for '{purpose}' or "
        "anything else. Use another address.",
        setting=None,
    )


def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _is_name(text: str) -> bool:
    labels = text.split(".")
    return text.isascii() and all(label.replace("-", "").replace("_", "").isalnum() for label in labels)
