"""Asking services that are not ours: with their name for the model and their key.

A request is sent as the client meant it and says nothing of the client: none of its headers, no
salt, no tenant. The key goes to its own origin alone, over a connection to an address that was
looked at. What the service says of that key, of its account or of a model that it does not have is
this installation's fault, not the client's: it is logged, and the client gets a 5xx. Must not
choose, retry or account.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
from collections.abc import Hashable
from typing import Any

import msgspec

from cloudlm import __version__
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Endpoint
from cloudlm.core.errors import CloudlmError, NotSupported, StorageFailed, UpstreamFailed
from cloudlm.gateway.pool import Place
from cloudlm.gateway.upstream import Answer, Declined, ReplicaRefused, Upstream, refusal
from cloudlm.security.credentials import Credentials, NoCredential
from cloudlm.security.outside import Forbidden, Outside
from cloudlm.telemetry.damping import Damper
from cloudlm.telemetry.logs import get_logger

CHAT_PATH = "/v1/chat/completions"
PATHS = {
    CHAT_PATH: "/chat/completions",
    "/v1/completions": "/completions",
    "/v1/embeddings": "/embeddings",
}
"""What every such service offers, under its base address."""
THROTTLED_S = 2.0
"""How long a service that says 429 without ``Retry-After`` is left alone."""
_LARGE_BODY_BYTES = 256 * 1024
# What this gateway adds to a body for its own workers, and what only they would understand.
_OURS = ("cache_salt", "priority")
_WITH_USAGE = msgspec.Raw(b'{"include_usage":true}')
_FAULTS_OF_OURS = frozenset({401, 402, 404, 405, 407, 410, 421})
_DECLINED = frozenset({403})
"""The credentials are known and do not do for this request (RFC 9110, 15.5.4), where 401 says that
there are no good ones for the service at all (15.5.2). Providers say 403 of a prompt that their
moderation flags, of a country, of one feature."""
_NOT_THERE = frozenset({404, 405})
_BUSY = frozenset({503, 529})
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")
_MAX_SAID = 300

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encoder = msgspec.json.Encoder()
_log = get_logger(__name__)


class Foreign:
    """The client of external endpoints. ``tls`` is spoken to https addresses."""

    def __init__(
        self,
        *,
        credentials: Credentials,
        outside: Outside,
        tls: ssl.SSLContext,
        connect_timeout_s: float,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._credentials = credentials
        self._outside = outside
        self._damper = Damper()
        self._upstream = Upstream(
            token=None,
            connect_timeout_s=connect_timeout_s,
            tls=tls,
            plaintext=True,  # ``outside`` says where
            find=self._find,
            refused=refusal,
        )

    async def open(self) -> None:
        """Make the connection pool; call inside the event loop."""
        await self._upstream.open()

    async def close(self) -> None:
        """Close all connections."""
        await self._upstream.close()

    async def send(
        self, endpoint: Endpoint, path: str, body: bytes, *, timeout_s: float, now: float
    ) -> Answer:
        """Post ``body``, written for one of our workers, to ``endpoint``; raises as
        ``Upstream.send`` does, and NotSupported for what only our workers know."""
        target = PATHS.get(path)
        if target is None:
            raise _not_offered(endpoint, path)
        key = self._key(endpoint)
        told = functools.partial(self._translated, endpoint, key, path)
        headers = {"user-agent": f"cloudlm/{__version__}"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        if len(body) < _LARGE_BODY_BYTES:
            body = foreign_body(body, endpoint.upstream_model)
        else:  # in a thread, so that a megabyte of text holds up nobody else
            body = await asyncio.to_thread(foreign_body, body, endpoint.upstream_model)
        try:
            answer = await self._upstream.send(
                endpoint.url + target,
                body,
                headers,
                replica=endpoint.replica,
                timeout_s=timeout_s,
                now=now,
            )
        except ReplicaRefused as error:
            raise told(error) from None
        except Forbidden as error:
            raise self._unfit(endpoint, str(error), Forbidden.__name__) from None
        answer.translated = told
        return answer

    async def _find(self, place: Place) -> list[str]:
        return await self._outside.addresses(place.host, place.port, tls=place.tls)

    def _key(self, endpoint: Endpoint) -> str:
        if not endpoint.secret:
            return ""
        try:
            return self._credentials.key_for(endpoint.secret, endpoint.url)
        except (NoCredential, StorageFailed) as error:
            raise self._unfit(endpoint, error.message, type(error).__name__) from None

    def _unfit(self, endpoint: Endpoint, reason: str, kind: Hashable) -> UpstreamFailed:
        """What clients are told of a fault that only this installation's operator can mend."""
        self._warn("external_endpoint_unusable", endpoint, reason, kind, logging.ERROR)
        return UpstreamFailed(
            f"the service behind replica {endpoint.replica} cannot be asked as it is set up here; "
            "the gateway's log says why"
        )

    def _warn(
        self,
        event: str,
        endpoint: Endpoint,
        reason: str,
        kind: Hashable,
        level: int = logging.WARNING,
    ) -> None:
        """Say once in a while what every request may run into. ``kind`` is what the reason is
        known by: a second kind is said at once, whatever the first one's words were."""
        count = self._damper.take((event, endpoint.replica, kind), self._clock.monotonic())
        if count is not None:
            fields = {**_about(endpoint, reason), "count": count}
            _log.log(level, event, extra={"fields": fields})

    def _translated(
        self, endpoint: Endpoint, key: str, path: str, error: ReplicaRefused
    ) -> CloudlmError:
        """A service's refusal as this gateway's clients may see it."""
        status = error.answered_status
        told = error.body()["error"]
        said = hidden(str(told.get("message") or ""), key)[:_MAX_SAID]
        code, answered = told.get("code"), f"it answered {status}: {said}"
        if status in _NOT_THERE and path != CHAT_PATH:
            return _not_offered(endpoint, path)  # many offer chat alone, and are well
        if status in _DECLINED:
            self._warn("external_endpoint_declined", endpoint, answered, status)
            return Declined(
                f"the service behind replica {endpoint.replica} declined this request ({status})"
            )
        if status in _FAULTS_OF_OURS or code in _NO_MONEY:
            return self._unfit(endpoint, answered, (status, code in _NO_MONEY))
        if status == 429 or status in _BUSY:
            wait_s = error.retry_after_s or (THROTTLED_S if status == 429 else None)
            return _busy(endpoint, 503 if status in _BUSY else 429, wait_s)
        if status >= 500 or status == 408:
            self._warn("external_endpoint_failed", endpoint, answered, status)
            return UpstreamFailed(
                f"the service behind replica {endpoint.replica} failed ({status})"
            )
        return _clients_fault(endpoint, status, told, said, key)


def foreign_body(body: bytes, model: str) -> bytes:
    """A body as another service understands it, under its own name for the model. All else stays
    as it was, byte for byte. Raises msgspec.DecodeError if ``body`` is no JSON object."""
    fields = _decoder.decode(body)
    fields["model"] = msgspec.Raw(_encoder.encode(model))
    for name in _OURS:
        fields.pop(name, None)
    if "stream_options" in fields:
        fields["stream_options"] = _WITH_USAGE
    return _encoder.encode(fields)


def _not_offered(endpoint: Endpoint, path: str) -> NotSupported:
    return NotSupported(
        f"{path} is not offered for model {endpoint.model!r}: it is answered by another service"
    )


def hidden(text: str, key: str) -> str:
    """``text`` without the key, should a service repeat it."""
    return text.replace(key, "***") if key else text


def _about(endpoint: Endpoint, reason: str) -> dict[str, Any]:
    return {
        "replica": endpoint.replica,
        "model": endpoint.model,
        "upstream_model": endpoint.upstream_model,
        "secret": endpoint.secret,
        "reason": reason,
    }


def _busy(endpoint: Endpoint, status: int, wait_s: float | None) -> ReplicaRefused:
    code = "rate_limit_exceeded" if status == 429 else "overloaded"
    message = f"the service that answers for model {endpoint.model!r} takes no more requests now"
    body = {"message": message, "type": "service_unavailable", "param": None, "code": code}
    return ReplicaRefused(status, {"error": body}, wait_s)


def _clients_fault(
    endpoint: Endpoint, status: int, told: dict[str, Any], said: str, key: str
) -> ReplicaRefused:
    """What is wrong with the request itself, in the service's words with our name of the model."""
    if len(endpoint.upstream_model) > 2:
        said = said.replace(endpoint.upstream_model, endpoint.model)
    words = {
        name: hidden(value, key)[:_MAX_SAID] if isinstance(value := told.get(name), str) else None
        for name in ("type", "param", "code")
    }
    words["type"] = words["type"] or "invalid_request_error"
    return ReplicaRefused(status, {"error": {"message": said, **words}}, None)
