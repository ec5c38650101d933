"""Where connections to services that are not ours may lead; every address is looked at.

A name is resolved once and the connection is made to the address that was judged, so that a name
which means something else a moment later gains nothing (DNS rebinding). Link-local addresses and
those where clouds keep machines' credentials are never reached, whatever a setting says; private
ones and this machine only where ``external.networks`` allows it. Must not connect.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import ExternalSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "168.63.129.16",  # Azure's host agent; a public address
        "100.100.100.200",  # Alibaba Cloud
        "192.0.0.192",  # Oracle Cloud
        "fd00:ec2::254",  # AWS
        "fd20:ce::254",  # Google Cloud
        "fd00:42::42",  # Scaleway
    )
)
"""Where clouds' machines ask for their credentials, besides 169.254.169.254: each provider's
documentation of its instance metadata service."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")


class Forbidden(Exception):
    """A connection is not allowed; its text says why, for the log and the operator."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, as the system knows it. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(entry[4][0]) for entry in found]


class Outside:
    """What an installation allows. Raises BadSetting for a setting that cannot be read."""

    def __init__(self, settings: ExternalSettings, resolve: Resolve = resolve) -> None:
        self._networks = _networks(settings.networks)
        self._plaintext = settings.plaintext == "networks"
        self._resolve = resolve

    async def addresses(self, host: str, port: int, *, tls: bool) -> list[str]:
        """The addresses of ``host`` that may be connected to, at least one. Raises Forbidden, and
        OSError if the name means nothing."""
        found = list(dict.fromkeys(await self._resolve(host, port)))
        refusals = {one: self.refusal(one, tls=tls) for one in found}
        allowed = [one for one in found if not refusals[one]]
        if not allowed:
            why = next(iter(refusals.values()), "it has no address")
            raise Forbidden(f"{host} may not be connected to: {why}")
        return allowed

    def refusal(self, address: str, *, tls: bool) -> str:
        """Why an IP address may not be connected to, empty if it may."""
        try:
            given = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return f"{address[:60]!r} is no IP address"
        for one in _meant(given):
            why = self._refusal(one, tls=tls)
            if why:
                return why
        return ""

    def _refusal(self, address: Address, *, tls: bool) -> str:
        if _is_never(address):
            return f"{address} is a link-local, metadata or otherwise unusable address"
        listed = any(address in network for network in self._networks)
        if not (listed or _is_public(address)):
            kind = "of this machine" if address.is_loopback else "private"
            return f"{address} is {kind}; external.networks does not hold it"
        plain = listed and (self._plaintext or address.is_loopback)
        if not (tls or plain):
            return (
                f"{address} would be spoken to without TLS, which shows prompts and keys to the "
                "network; use https, or trust the network with external.networks and "
                "external.plaintext=networks"
            )
        return ""


def _meant(address: Address) -> list[Address]:
    """The address, and the IPv4 addresses that it stands for where IPv6 holds one."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    tunnels = (address.sixtofour, *(address.teredo or ()))
    return [address, *(one for one in tunnels if one is not None)]


def _is_never(address: Address) -> bool:
    return (
        address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (address.is_reserved and not address.is_loopback)
        or address in METADATA
        or address in _THIS_NETWORK
    )


def _is_public(address: Address) -> bool:
    old = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not old


def _networks(text: str) -> tuple[Network, ...]:
    found: list[Network] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(ipaddress.ip_network(part))
        except ValueError as error:
            raise BadSetting(
                f"external.networks: {part[:60]!r} is no network ({error}); expected such as "
                "'127.0.0.0/8, 10.2.0.0/16, fd12:3456::/32'",
                param="external.networks",
            ) from None
    return tuple(found)
