"""TLS contexts out of PEM files, and their renewal while a process runs.

Says what is spoken (TLS 1.2 or newer, forward secrecy, no renegotiation, HTTP/1.1 by ALPN), refuses
files that cannot serve with a sentence that names the setting, and follows files that change. Makes
no certificates (``authority`` does). Must not log keys, nor the text of a file.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cloudlm.core.errors import BadSetting, CloudlmError
from cloudlm.telemetry.logs import get_logger

FOLLOW_INTERVAL_S = 2.0
HANDSHAKE_TIMEOUT_S = 10.0
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
# Those of TLS 1.3 are all good and not chosen by this list.
_CIPHERS_1_2 = "ECDHE+AESGCM:ECDHE+CHACHA20"

_log = get_logger(__name__)
_Mark = tuple[int, int, int] | None


class Pair(NamedTuple):
    """A certificate and its key. ``setting`` is how the settings of both begin (``gateway.tls``);
    an empty ``key`` means that ``cert`` holds the key too."""

    setting: str
    cert: str
    key: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""
        return tuple(Path(name).expanduser() for name in (self.cert, self.key) if name)


def pair_of(setting: str, cert: str, key: str) -> Pair | None:
    """The pair that two settings name, None for none. Raises BadSetting for a key alone."""
    if key and not cert:
        raise BadSetting(
            f"{setting}_key is set and {setting}_cert is not: set both, or neither",
            param=f"{setting}_cert",
        )
    return Pair(setting, cert, key) if cert else None


def server_context(
    pair: Pair, *, minimum: str = "1.2", client_ca: str = "", ca_setting: str = ""
) -> ssl.SSLContext:
    """A server's context. With ``client_ca`` only clients with a certificate of those authorities
    get through the handshake. Raises BadSetting."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context, minimum)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, pair)
    if client_ca:
        _load_authorities(context, client_ca, ca_setting)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    authorities: Sequence[tuple[str, str]], pair: Pair | None, *, system: bool = True
) -> ssl.SSLContext:
    """A client's context, which verifies the server and its name. ``authorities`` are files to
    trust and the settings that name them; ``system`` trusts the system's authorities too. Raises
    BadSetting."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context, "1.2")
    context.set_alpn_protocols(["http/1.1"])
    if system:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    for path, setting in authorities:
        _load_authorities(context, path, setting)
    if pair is not None:
        _load_pair(context, pair)
    return context


def pinned_context(cert: str) -> ssl.SSLContext:
    """A client's context that trusts the one certificate in ``cert``, whatever name it bears: for
    asking a server of our own at an address that its certificate need not name. Raises BadSetting.
    """
    context = client_context([(cert, "gateway.tls_cert")], None, system=False)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _harden(context: ssl.SSLContext, minimum: str) -> None:
    context.minimum_version = _VERSIONS[minimum]
    context.set_ciphers(_CIPHERS_1_2)


def _load_pair(context: ssl.SSLContext, pair: Pair) -> None:
    for path, part in zip(pair.files, ("cert", "key"), strict=False):
        _readable(path, f"{pair.setting}_{part}")
    cert, *key = pair.files
    name = f"{pair.setting}_cert"
    try:
        context.load_cert_chain(cert, key[0] if key else None, password=_no_password)
    except _Encrypted:
        raise BadSetting(
            f"the private key of {name} is encrypted, and nobody is there to be asked for its "
            "password: store it without one, in a file that only this user can read",
            param=f"{pair.setting}_key",
        ) from None
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        hint = "the key belongs to another certificate" if "MISMATCH" in reason else reason
        raise BadSetting(
            f"{cert}{f' with {key[0]}' if key else ''} cannot serve ({hint}): {name} must be a PEM "
            f"file with a certificate, and its private key in the same file or in "
            f"{pair.setting}_key",
            param=name,
        ) from None


def _load_authorities(context: ssl.SSLContext, path: str, setting: str) -> None:
    file = Path(path).expanduser()
    _readable(file, setting)
    try:
        context.load_verify_locations(file)
    except (ssl.SSLError, ValueError):
        raise BadSetting(
            f"{file} holds no certificate: {setting} must be a PEM file of authorities",
            param=setting,
        ) from None


def _readable(path: Path, setting: str) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise BadSetting(
            f"{setting} names {path}, which cannot be read: {error.strerror}", param=setting
        ) from None


class _Encrypted(Exception):
    """The key asks for a password."""


def _no_password() -> str:
    raise _Encrypted


class LiveContext(ssl.SSLContext):
    """Stands for the context that ``make`` made last from ``files``, so that a server or client
    that was given it once uses new files for its next handshake. What ``make`` cannot use changes
    nothing: the last good context goes on."""

    _make: Callable[[], ssl.SSLContext]
    _files: tuple[Path, ...]
    _marks: tuple[_Mark, ...]
    _made: ssl.SSLContext | None
    on_renewal: list[Callable[[], None]]

    def __new__(cls, make: Callable[[], ssl.SSLContext], files: Sequence[Path]) -> LiveContext:
        self = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        self._make, self._files, self._made = make, tuple(files), None
        self._marks = ()
        self.on_renewal = []
        return self

    @property
    def current(self) -> ssl.SSLContext:
        """The context of the next handshake. Raises BadSetting if there never was a good one."""
        if self._made is None:
            self._marks = self._look()
            self._made = self._make()
        return self._made

    def renew(self) -> bool:
        """Make it anew if a file changed; whether that was done."""
        marks = self._look()
        if self._made is None or marks == self._marks:
            return False
        self._marks = marks
        names = [str(path) for path in self._files]
        try:
            self._made = self._make()
        except CloudlmError as error:
            fields = {"files": names, "reason": error.message}
            _log.error("certificate_not_renewed", extra={"fields": fields})
            return False
        _log.info("certificate_renewed", extra={"fields": {"files": names}})
        for call in self.on_renewal:
            call()
        return True

    async def follow(self, interval_s: float = FOLLOW_INTERVAL_S) -> None:
        """Renew until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.renew)

    def _look(self) -> tuple[_Mark, ...]:
        return tuple(_mark(path) for path in self._files)

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self.current.wrap_bio(*arguments, **options)

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        return self.current.wrap_socket(*arguments, **options)


def _mark(path: Path) -> _Mark:
    """What tells one content of a file from the next; None if there is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - follows the links that orchestrators swap
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
