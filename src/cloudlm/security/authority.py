"""Makes certificates: a self-signed one for development, and an authority of the installation that
vouches for its own workers and gateways towards each other.

Everything lies in one folder of the home; a private key is in the same file as its certificate, so
that both change in one step, and only their owner can read it. Whoever needs a file asks for it
with ``ensure_…``; it is made when it is missing, does not name all that was asked for, or nears its
end. Must not serve or connect.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import secrets
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloudlm.core.errors import InvalidRequest, StorageFailed
from cloudlm.security.locks import alone_with

LEAF_DAYS = 30
SELF_SIGNED_DAYS = 365
AUTHORITY_DAYS = 3650
_RENEW_SHARE = 1 / 3
"""A certificate with less than this share of its life left is made anew."""
_BACKDATED = datetime.timedelta(minutes=5)
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Purpose(StrEnum):
    """What a certificate of the authority is good for, and for nothing else."""

    WORKER = "worker"
    GATEWAY = "gateway"


_USES = {
    Purpose.WORKER: ExtendedKeyUsageOID.SERVER_AUTH,
    Purpose.GATEWAY: ExtendedKeyUsageOID.CLIENT_AUTH,
}


def ensure_self_signed(
    folder: Path, names: Sequence[str], now: float, server: str = "gateway"
) -> Path:
    """``<server>.pem`` with certificate and key for ``names`` besides those of this machine; beside
    it ``<server>-cert.pem``, the certificate alone, for clients to trust. Raises StorageFailed."""
    file, wanted = folder / f"{server}.pem", (*LOCAL_NAMES, *names)
    with _alone_in(folder):
        if not _good(file, wanted, now):
            key = ec.generate_private_key(ec.SECP256R1())
            subject = _subject(f"cloudlm {server}, for development")
            made = _builder(subject, subject, key, key, now, SELF_SIGNED_DAYS)
            made = _for_leaf(made, wanted, [ExtendedKeyUsageOID.SERVER_AUTH])
            cert = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
            _write(folder / f"{server}-cert.pem", cert, 0o644)
            _write(file, _key_pem(key) + cert, 0o600)
    return file


class Authority:
    """The installation's own authority, in ``folder``; made with the first certificate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def certificate(self) -> Path:
        """The file by which others know what this authority signed."""
        return self.folder / "ca.pem"

    def ensure(self, purpose: Purpose, names: Sequence[str], now: float) -> Path:
        """``<purpose>-identity.pem`` for this machine and ``names``. Raises StorageFailed."""
        file = self.folder / f"{purpose}-identity.pem"
        wanted = (*LOCAL_NAMES, *names) if purpose is Purpose.WORKER else tuple(names)
        with _alone_in(self.folder):
            key, cert = self._own(now)
            if not _good(file, wanted, now, issuer=cert):
                _write(file, self._issued(purpose, wanted, now, LEAF_DAYS, key, cert), 0o600)
        return file

    def issue(
        self, purpose: Purpose, names: Sequence[str], to: Path, now: float, *, days: int
    ) -> Path:
        """A certificate with its key for another machine, in the folder ``to`` beside ``ca.pem``.
        Raises InvalidRequest and StorageFailed."""
        if purpose is Purpose.WORKER and not names:
            raise InvalidRequest(
                "a worker's certificate needs the names or addresses by which the gateway reaches "
                "it, such as --name 10.0.0.5"
            )
        with _alone_in(self.folder):
            key, cert = self._own(now)
            pem = self._issued(purpose, names, now, days, key, cert)
        file = to / f"{purpose}.pem"
        with _alone_in(to):
            _write(file, pem, 0o600)
            _write(to / "ca.pem", cert.public_bytes(serialization.Encoding.PEM), 0o644)
        return file

    def _own(self, now: float) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        file = self.folder / "ca-key.pem"
        if not file.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            subject = _subject(f"cloudlm installation {secrets.token_hex(4)}")
            made = _builder(subject, subject, key, key, now, AUTHORITY_DAYS)
            made = made.add_extension(x509.BasicConstraints(True, 0), critical=True)
            made = made.add_extension(_usage(signs=True), critical=True)
            cert = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
            _write(file, _key_pem(key) + cert, 0o600)
        pem = _read(file)
        try:
            found = serialization.load_pem_private_key(pem, None)
            certificate = x509.load_pem_x509_certificate(pem)
        except (ValueError, TypeError):
            found = None
        if not isinstance(found, ec.EllipticCurvePrivateKey):
            raise StorageFailed(
                f"the installation's authority {file} is damaged: restore it from a copy, or "
                "remove it to have a new one made (certificates of the old one are then refused)"
            )
        public = certificate.public_bytes(serialization.Encoding.PEM)
        if not self.certificate.exists() or _read(self.certificate) != public:
            _write(self.certificate, public, 0o644)
        return found, certificate

    def _issued(
        self,
        purpose: Purpose,
        names: Sequence[str],
        now: float,
        days: int,
        signer: ec.EllipticCurvePrivateKey,
        issuer: x509.Certificate,
    ) -> bytes:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(f"cloudlm {purpose}")
        made = _builder(subject, issuer.subject, key, signer, now, days)
        made = _for_leaf(made, names or [f"{purpose}.cloudlm.invalid"], [_USES[purpose]])
        cert = made.sign(signer, hashes.SHA256())
        return _key_pem(key) + cert.public_bytes(serialization.Encoding.PEM)


def expires_at(file: Path) -> float:
    """When the first certificate in ``file`` ends, Unix seconds. Raises StorageFailed, and
    ValueError if there is none."""
    return x509.load_pem_x509_certificate(_read(file)).not_valid_after_utc.timestamp()


def _good(
    file: Path, names: Sequence[str], now: float, issuer: x509.Certificate | None = None
) -> bool:
    """Whether ``file`` holds a certificate that names all of ``names``, will last, and is signed by
    ``issuer``."""
    try:
        found = x509.load_pem_x509_certificate(file.read_bytes())
        said = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if issuer is not None:
            found.verify_directly_issued_by(issuer)
    except Exception:  # missing, damaged, or of another authority: a new one is made
        return False
    begin, end = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
    lasts = end - now > (end - begin) * _RENEW_SHARE
    return lasts and all(_general(name) in said for name in names)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    now: float,
    days: int,
) -> x509.CertificateBuilder:
    at = datetime.datetime.fromtimestamp(now, datetime.UTC)
    known_by = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - _BACKDATED)
        .not_valid_after(at + datetime.timedelta(days=days))
        .add_extension(known_by, critical=False)
        .add_extension(signed_by, critical=False)
    )


def _for_leaf(
    made: x509.CertificateBuilder, names: Sequence[str], uses: list[x509.ObjectIdentifier]
) -> x509.CertificateBuilder:
    known = x509.SubjectAlternativeName([_general(name) for name in dict.fromkeys(names)])
    return (
        made.add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(known, critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise InvalidRequest(
            f"{name[:80]!r} is no name that a certificate can bear: expected an address or an "
            "ASCII host name"
        ) from None


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make ``folder``, private, and keep other processes from writing there meanwhile."""
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            held.enter_context(alone_with(folder))
        except OSError as error:
            raise StorageFailed(f"cannot use the folder {folder}: {error.strerror}") from None
        yield


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StorageFailed(f"cannot read {file}: {error.strerror}") from None


def _write(file: Path, content: bytes, mode: int) -> None:
    """Put ``content`` in place of ``file`` in one step; it is private before it holds a byte. As
    ``state.drafts``, which workers may not import."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as open_file:
                open_file.write(content)
                open_file.flush()
                os.fchmod(open_file.fileno(), mode)
                os.fsync(open_file.fileno())
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailed(f"cannot write {file}: {error.strerror}") from None
