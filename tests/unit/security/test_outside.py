"""Where connections to others' services may lead (promise 15)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import ExternalSettings
from cloudlm.security.outside import METADATA, Forbidden, Outside

EVERYTHING = "0.0.0.0/0, ::/0"
NEVER = [
    "169.254.169.254",
    "169.254.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "fe80::1",
    "fe80::1%eth0",
    "0.0.0.0",
    "0.1.2.3",
    "::",
    "::127.0.0.1",
    "224.0.0.1",
    "ff02::1",
    "255.255.255.255",
    "250.1.1.1",
    *sorted(map(str, METADATA)),
]
PRIVATE = [
    "127.0.0.1",
    "127.9.9.9",
    "::1",
    "::ffff:127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "fd12::1",
    "fec0::1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
]


def outside(networks: str = "", plaintext: str = "loopback") -> Outside:
    return Outside(ExternalSettings(networks=networks, plaintext=plaintext))


@pytest.mark.promise(15)
@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_never_reached(address: str) -> None:
    assert outside().refusal(address, tls=True)
    assert outside(EVERYTHING, "networks").refusal(address, tls=True)


@pytest.mark.promise(15)
@pytest.mark.parametrize("address", PRIVATE)
def test_private_ones_need_the_operators_word(address: str) -> None:
    assert outside().refusal(address, tls=True)
    assert not outside(EVERYTHING).refusal(address, tls=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808"])
def test_public_ones_are_reached_with_tls_alone(address: str) -> None:
    assert not outside().refusal(address, tls=True)
    assert "TLS" in outside().refusal(address, tls=False)
    assert "TLS" in outside(EVERYTHING).refusal(address, tls=False)
    assert not outside(EVERYTHING, "networks").refusal(address, tls=False)


def test_this_machine_needs_no_tls() -> None:
    assert not outside("127.0.0.0/8, ::1").refusal("127.0.0.1", tls=False)
    assert not outside("127.0.0.0/8, ::1").refusal("::1", tls=False)
    assert "TLS" in outside("10.0.0.0/8").refusal("10.0.0.1", tls=False)


@pytest.mark.promise(15)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["::ffff:0:0", "64:ff9b::"]))
def test_an_address_in_another_dress_is_the_same_address(number: int, dress: str) -> None:
    plain = str(ipaddress.IPv4Address(number))
    dressed = str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(dress)) + number))
    one = outside("10.0.0.0/8")
    assert one.refusal(plain, tls=True) == one.refusal(dressed, tls=True)


@pytest.mark.promise(15)
@given(st.ip_addresses())
def test_no_setting_opens_what_is_never_reached(address: ipaddress.IPv4Address) -> None:
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        assert outside(EVERYTHING, "networks").refusal(str(address), tls=True)


@pytest.mark.promise(15)
def test_a_name_gives_only_addresses_that_may_be_reached() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return {"mixed": ["10.0.0.1", "8.8.8.8", "8.8.8.8"], "bad": ["169.254.169.254"]}[host]

    import asyncio

    one = Outside(ExternalSettings(), resolve)
    assert asyncio.run(one.addresses("mixed", 443, tls=True)) == ["8.8.8.8"]
    with pytest.raises(Forbidden, match="metadata"):
        asyncio.run(one.addresses("bad", 443, tls=True))


@pytest.mark.parametrize("text", ["10.0.0.1/8", "home", "10.0.0.0/33", "10.0.0.0/8; ::1"])
def test_a_setting_that_names_no_network_is_refused(text: str) -> None:
    with pytest.raises(BadSetting, match=r"external\.networks"):
        outside(text)
