"""Which addresses are open, in every disguise."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kontextd_server.fetch import AllowList, Purpose
from kontextd_server.fetch.addresses import check_address, check_name, check_through_proxy
from kontextd_server.fetch.errors import AddressDenied

NOTHING = AllowList()
EVERYTHING = AllowList.parse(["0.0.0.0/0", "::/0"])
METADATA = ["169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200", "192.0.0.192", "168.63.129.16",
            "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"]  # fmt: skip


def is_denied(address: str, host: str | None = None, allow: AllowList = NOTHING) -> bool:
    try:
        check_address(ipaddress.ip_address(address), host or address, Purpose.IMAGE, allow)
    except AddressDenied:
        return True
    return False


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.216.34", "1.1.1.1", "172.15.255.255", "172.32.0.0", "100.63.255.255", "100.128.0.0",
     "223.255.255.255", "2606:4700::1111", "2a00:1450:4001:830::200e", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"],
)  # fmt: skip
def test_public_addresses_are_open(address: str) -> None:
    assert not is_denied(address)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("0.0.0.0", "of this network"),
        ("0.1.2.3", "of this network"),
        ("10.0.0.5", "private"),
        ("100.64.0.1", "CGNAT"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("169.254.0.1", "link-local"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.0.0.8", "reserved"),
        ("192.0.2.1", "documentation"),
        ("192.88.99.1", "reserved"),
        ("192.168.1.1", "private"),
        ("198.18.0.1", "benchmarks"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.250", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::", "reserved"),
        ("::1", "loopback"),
        ("::127.0.0.1", "reserved"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:10.0.0.1", "private"),
        ("::ffff:0:10.0.0.1", "reserved"),
        ("64:ff9b::10.0.0.1", "private"),
        ("64:ff9b::127.0.0.1", "loopback"),
        ("64:ff9b:1::8.8.8.8", "reserved"),
        ("2002:7f00:1::1", "6to4"),
        ("2002:808:808::1", "6to4"),
        ("2001:0:7f00:1::", "Teredo"),
        ("2001:db8::1", "documentation"),
        ("3fff::1", "documentation"),
        ("100::1", "reserved"),
        ("fc00::1", "unique local"),
        ("fd12:3456::1", "unique local"),
        ("fe80::1", "link-local"),
        ("fec0::1", "reserved"),
        ("ff02::1", "multicast"),
        ("4000::1", "reserved"),
    ],
)
def test_everything_else_is_closed_and_says_why(address: str, kind: str) -> None:
    with pytest.raises(AddressDenied, match=kind) as caught:
        check_address(ipaddress.ip_address(address), "host.test", Purpose.LORA, NOTHING)
    assert str(ipaddress.ip_address(address)) in str(caught.value)
    assert "'lora'" in str(caught.value)
    assert caught.value.setting == "KONTEXTD_FETCH_ALLOW_LORA"
    assert "KONTEXTD_FETCH_ALLOW_LORA" in str(caught.value)


@pytest.mark.parametrize("address", METADATA)
def test_metadata_services_are_never_open(address: str) -> None:
    number = int(ipaddress.ip_address(address))
    disguises = [address]
    if "." in address:
        disguises += [f"::ffff:{address}", f"::{address}", f"64:ff9b::{address}", f"64:ff9b:1::{address}"]
        disguises += [str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80)))]  # 6to4
        disguises += [str(ipaddress.IPv6Address((0x20010000 << 96) | (number ^ 0xFFFFFFFF)))]  # a Teredo client
    allow = AllowList(frozenset({"host.test"}), (".test",), EVERYTHING.networks)
    for disguise in disguises:
        with pytest.raises(AddressDenied, match="metadata") as caught:
            check_address(ipaddress.ip_address(disguise), "host.test", Purpose.IMAGE, allow)
        assert caught.value.setting is None


@pytest.mark.parametrize("name", ["metadata.google.internal", "metadata", "metadata.goog", "instance-data"])
def test_the_names_of_metadata_services_are_never_open(name: str) -> None:
    for check in (check_name, lambda host, purpose: check_through_proxy(host, purpose, AllowList.parse([name]))):
        with pytest.raises(AddressDenied, match="metadata"):
            check(name, Purpose.IMAGE)


def test_a_network_opens_its_addresses() -> None:
    allow = AllowList.parse(["10.1.0.0/16", "fd12::/64", "127.0.0.1"])
    assert not is_denied("10.1.2.3", allow=allow)
    assert not is_denied("::ffff:10.1.2.3", allow=allow)
    assert not is_denied("fd12::7", allow=allow)
    assert not is_denied("127.0.0.1", allow=allow)
    assert is_denied("10.2.0.1", allow=allow)
    assert is_denied("127.0.0.2", allow=allow)


def test_a_name_opens_private_addresses_under_this_name_alone() -> None:
    allow = AllowList.parse(["nas.studio.lan", "*.render.lan"])
    for host in ("nas.studio.lan", "a.render.lan", "a.b.render.lan"):
        assert not is_denied("10.0.0.5", host, allow)
        assert not is_denied("fd00::5", host, allow)
        assert not is_denied("100.64.0.5", host, allow)
    for host in ("other.studio.lan", "render.lan", "evilrender.lan", "nas.studio.lan.evil.test", "10.0.0.5"):
        assert is_denied("10.0.0.5", host, allow)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "169.254.1.1", "fe80::1", "0.0.0.0", "224.0.0.1", "::ffff:127.0.0.1"]
)
def test_whoever_answers_for_a_listed_name_cannot_open_the_loopback(address: str) -> None:
    assert is_denied(address, "nas.studio.lan", AllowList.parse(["nas.studio.lan"]))


def test_a_remedy_names_the_host_too_where_that_would_do() -> None:
    with pytest.raises(AddressDenied, match=r"adding nas\.test or 10\.0\.0\.5 to KONTEXTD_FETCH_ALLOW_IMAGE"):
        check_address(ipaddress.ip_address("10.0.0.5"), "nas.test", Purpose.IMAGE, NOTHING)


def test_through_a_proxy_only_what_is_listed_passes() -> None:
    allow = AllowList.parse(["nas.studio.lan", "*.public.test", "10.0.0.0/8"])
    for host in ("nas.studio.lan", "a.public.test", "10.0.0.5"):
        check_through_proxy(host, Purpose.IMAGE, allow)
    for host in ("other.lan", "11.0.0.1", "169.254.169.254", "8.8.8.8"):
        with pytest.raises(AddressDenied):
            check_through_proxy(host, Purpose.IMAGE, allow)


@pytest.mark.parametrize(
    "entry", ["", "*", "*.", "a b", "http://nas.lan", "nas.lan:80", "nas.lan/x", "10.0.0.0/33", "ü.lan", "-"]
)
def test_a_mistake_in_a_list_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match=r"is no host, \*\.domain, address or CIDR"):
        AllowList.parse([entry])


def test_entries_are_read_as_people_write_them() -> None:
    allow = AllowList.parse([" NAS.Studio.LAN. ", "10.0.0.7/8", "*.Render.lan"])
    assert allow.names("nas.studio.lan")
    assert allow.names("a.render.lan")
    assert allow.holds(ipaddress.ip_address("10.200.0.1"))
    assert not AllowList.parse([])


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_way_to_write_an_ipv4_address_opens_more_than_the_address_itself(number: int) -> None:
    plain = is_denied(str(ipaddress.IPv4Address(number)))
    for prefix in (0xFFFF << 32, 0x64FF9B << 96):
        assert is_denied(str(ipaddress.IPv6Address(prefix | number))) == plain
    for prefix in (0, 0xFFFF << 48, (0x2002 << 112) | (number << 80), 0x20010000 << 96):
        assert is_denied(str(ipaddress.IPv6Address(prefix | number)))


@settings(max_examples=120, deadline=None)
@given(st.ip_addresses())
def test_whatever_the_library_calls_private_is_closed(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    tunnelled = address.version == 6 and address in ipaddress.IPv6Network("64:ff9b::/96")
    if (address.is_private or address.is_multicast or address.is_reserved) and not tunnelled:
        mapped = getattr(address, "ipv4_mapped", None)
        assert is_denied(str(address)) or (mapped is not None and mapped.is_global)
