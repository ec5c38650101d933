"""Contexts out of files: what is spoken, what is refused, what follows a file that changes."""

from __future__ import annotations

import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cloudlm.core.errors import BadSetting, InvalidRequest, StorageFailed
from cloudlm.core.settings import GatewaySettings, WorkerSettings
from cloudlm.security.authority import (
    Authority,
    Purpose,
    ensure_self_signed,
    expires_at,
)
from cloudlm.security.tls import LiveContext, Pair, client_context, pair_of, server_context
from cloudlm.security.transport import gateway_pair, replica_context, worker_context

DAY_S = 86_400.0


def shake(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A handshake in memory, and a byte each way, so that the server's verdict has arrived."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(to_server, to_client, server_side=True)
    other = client.wrap_bio(to_client, to_server, server_hostname=name)
    todo: list[Callable[[], object]] = [other.do_handshake, one.do_handshake]
    todo += [lambda: one.write(b"s"), lambda: other.read(1)]
    for _ in range(20):
        for step in list(todo):
            try:
                step()
                todo.remove(step)
            except ssl.SSLWantReadError:
                break
        todo = [*todo[1:], *todo[:1]] if len(todo) == 4 else todo
        if not todo:
            return one, other
    raise AssertionError("the handshake does not end")


def serial(session: ssl.SSLObject) -> int:
    der = session.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    return ensure_self_signed(tmp_path / "tls", ["my.host"], time.time())


def trusting(pem: Path) -> ssl.SSLContext:
    trust = str(pem.with_name("gateway-cert.pem"))
    return client_context([(trust, "x")], None, system=False)


def test_a_self_signed_certificate_serves_its_names(pem: Path) -> None:
    server = server_context(Pair("gateway.tls", str(pem)))
    for name in ("localhost", "127.0.0.1", "::1", "my.host"):
        one, other = shake(server, trusting(pem), name)
        assert one.version() == other.version() == "TLSv1.3"
        assert other.selected_alpn_protocol() == "http/1.1"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, trusting(pem), "other.host")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, client_context([], None))
    assert stat.S_IMODE(pem.stat().st_mode) == 0o600
    assert b"PRIVATE" not in pem.with_name("gateway-cert.pem").read_bytes()


def test_old_versions_are_refused(pem: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(pem.with_name("gateway-cert.pem"))
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    one, _ = shake(server_context(Pair("gateway.tls", str(pem))), old)
    cipher = one.cipher()
    assert cipher is not None
    assert cipher[0].startswith("ECDHE-")
    with pytest.raises(ssl.SSLError):
        shake(server_context(Pair("gateway.tls", str(pem)), minimum="1.3"), old)


def test_it_is_made_once_and_anew_in_time(tmp_path: Path) -> None:
    now = time.time()
    first = ensure_self_signed(tmp_path, [], now).read_bytes()
    assert ensure_self_signed(tmp_path, [], now + 200 * DAY_S).read_bytes() == first
    later = ensure_self_signed(tmp_path, [], now + 300 * DAY_S)
    assert later.read_bytes() != first
    assert expires_at(later) == pytest.approx(now + 665 * DAY_S, abs=2)
    named = ensure_self_signed(tmp_path, ["new.host"], now + 300 * DAY_S).read_bytes()
    assert ensure_self_signed(tmp_path, ["new.host"], now + 301 * DAY_S).read_bytes() == named


@pytest.mark.promise(37)
def test_workers_let_in_gateways_of_their_installation_alone(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    now = time.time()
    worker = ours.ensure(Purpose.WORKER, (), now)
    server = worker_context(
        WorkerSettings(tls_cert=str(worker), tls_client_ca=str(ours.certificate))
    )
    assert server is not None
    ours.ensure(Purpose.GATEWAY, (), now)
    one, _ = shake(server, replica_context(GatewaySettings(), ours.folder), "127.0.0.1")
    assert one.getpeercert()

    def refused(context: ssl.SSLContext) -> None:
        with pytest.raises(ssl.SSLError):
            shake(server, context, "127.0.0.1")

    ca = [(str(ours.certificate), "x")]
    refused(client_context(ca, None))  # nothing to show
    stranger = theirs.ensure(Purpose.GATEWAY, (), now)
    refused(client_context(ca, Pair("x", str(stranger))))  # shown, not known
    refused(client_context(ca, Pair("x", str(worker))))  # a worker is no gateway
    refused(replica_context(GatewaySettings(), theirs.folder))  # the worker is not theirs
    past = ours.issue(Purpose.GATEWAY, (), tmp_path / "past", now - 9 * DAY_S, days=1)
    refused(client_context(ca, Pair("x", str(past))))


def test_certificates_for_other_machines(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "home")
    now = time.time()
    file = authority.issue(Purpose.WORKER, ["10.0.0.5", "w5"], tmp_path / "out", now, days=90)
    assert sorted(path.name for path in file.parent.iterdir()) == ["ca.pem", "worker.pem"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert expires_at(file) == pytest.approx(now + 90 * DAY_S, abs=2)
    known = client_context([(str(file.parent / "ca.pem"), "x")], None, system=False)
    shake(server_context(Pair("worker.tls", str(file))), known, "10.0.0.5")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server_context(Pair("worker.tls", str(file))), known, "10.0.0.6")
    with pytest.raises(InvalidRequest, match="--name"):
        authority.issue(Purpose.WORKER, [], tmp_path / "out", now, days=90)
    with pytest.raises(InvalidRequest, match="no name"):
        authority.issue(Purpose.WORKER, ["büro"], tmp_path / "out", now, days=90)


def test_a_leaf_is_renewed_and_follows_a_new_authority(tmp_path: Path) -> None:
    authority, now = Authority(tmp_path), time.time()
    first = authority.ensure(Purpose.WORKER, (), now).read_bytes()
    assert authority.ensure(Purpose.WORKER, (), now + 15 * DAY_S).read_bytes() == first
    assert authority.ensure(Purpose.WORKER, (), now + 25 * DAY_S).read_bytes() != first
    (tmp_path / "ca-key.pem").unlink()
    second = authority.ensure(Purpose.WORKER, (), now + 25 * DAY_S)
    cert = x509.load_pem_x509_certificate(second.read_bytes())
    cert.verify_directly_issued_by(
        x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    )
    (tmp_path / "ca-key.pem").write_text("nonsense")
    with pytest.raises(StorageFailed, match="damaged"):
        authority.ensure(Purpose.WORKER, (), now)


def test_a_changed_file_serves_the_next_handshake(pem: Path) -> None:
    live = LiveContext(lambda: server_context(Pair("gateway.tls", str(pem))), [pem])
    before = serial(shake(live, trusting(pem))[1])
    assert not live.renew()
    called: list[int] = []
    live.on_renewal.append(lambda: called.append(1))
    ensure_self_signed(pem.parent, ["new.host"], time.time())
    assert serial(shake(live, client_without_names(pem))[1]) == before
    assert live.renew()
    after = serial(shake(live, trusting(pem), "new.host")[1])
    assert after != before
    good = pem.read_bytes()
    for broken in (b"", b"nonsense", good[: len(good) // 2]):
        pem.write_bytes(broken)
        assert not live.renew()
        assert serial(shake(live, trusting(pem))[1]) == after
    pem.unlink()
    assert not live.renew()
    assert serial(shake(live, trusting(pem))[1]) == after
    pem.write_bytes(good)
    assert live.renew()
    assert called == [1, 1]


def client_without_names(pem: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_bad_files_are_named(tmp_path: Path, pem: Path) -> None:
    def refused(match: str, cert: object, key: object = "") -> None:
        with pytest.raises(BadSetting, match=match) as caught:
            server_context(Pair("gateway.tls", str(cert), str(key)))
        assert "PRIVATE" not in caught.value.message

    text = tmp_path / "text.pem"
    text.write_text("not a certificate")
    refused(r"gateway.tls_cert names .*none.pem.*No such file", tmp_path / "none.pem")
    refused(r"gateway.tls_key names .*none.pem", pem, tmp_path / "none.pem")
    refused("must be a PEM file", text)
    refused("gateway.tls_key", pem.with_name("gateway-cert.pem"))
    other = ensure_self_signed(tmp_path / "other", [], time.time())
    refused("belongs to another certificate", pem.with_name("gateway-cert.pem"), other)
    key = serialization.load_pem_private_key(pem.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    refused("is encrypted", pem.with_name("gateway-cert.pem"), locked)
    with pytest.raises(BadSetting, match="upstream_ca"):
        replica_context(GatewaySettings(upstream_ca=str(text)), tmp_path)


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"tls_key is set and gateway\.tls_cert is not"):
        pair_of("gateway.tls", "", "key.pem")
    with pytest.raises(BadSetting, match="choose one"):
        gateway_pair(GatewaySettings(tls="self-signed", tls_cert="x.pem"), tmp_path, 0.0)
    with pytest.raises(BadSetting, match=r"worker\.tls_cert"):
        worker_context(WorkerSettings(tls_client_ca="ca.pem"))
    assert gateway_pair(GatewaySettings(tls="off", tls_cert="x.pem"), tmp_path, 0.0) is None
    assert gateway_pair(GatewaySettings(), tmp_path, 0.0) is None
    assert list(tmp_path.iterdir()) == []
