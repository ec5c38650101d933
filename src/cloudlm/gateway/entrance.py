"""Who asks: the key of a request, and what its holder may know and do.

A key that is known is found by a digest; any other is verified, after one more look at the state.
Must not know what is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cloudlm.core.access import Verb
from cloudlm.core.errors import AuthenticationFailed
from cloudlm.core.tenant import KeyRecord
from cloudlm.gateway.dialects.base import Asker
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.known import MAX_KNOWN_KEYS, KnownKeys
from cloudlm.gateway.rooms import Rooms
from cloudlm.gateway.view import Snapshot
from cloudlm.security import keys
from cloudlm.security.tokens import looks_signed

if TYPE_CHECKING:
    from cloudlm.security.guardrails.config import Moderation


class Entrance:
    """Lets in who has a good key."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._tenants = rooms.tenants
        self._keys = KnownKeys()
        self._view: Snapshot | None = None
        self._askers: dict[str, tuple[KeyRecord, Asker]] = {}  # in this view

    def known(self, headers: Mapping[str, str], view: Snapshot, now: float) -> KeyRecord | None:
        """The record of a key that was authorised before and is still good at ``now``."""
        return self._keys.find(headers, view, now)

    async def authorise(self, request: GatewayRequest, view: Snapshot) -> KeyRecord:
        """The record of a key; it is known from now on. Raises AuthenticationFailed, and what
        sessions of people raise."""
        record = await self._authorise(request, view)
        self._keys.remember(request.headers, record)
        return record

    async def _authorise(self, request: GatewayRequest, view: Snapshot) -> KeyRecord:
        """The key's record. Missing, malformed, unknown and revoked keys cost the same work and
        get the same answer. Every well-formed key that fails is looked up once more, known or
        not, so that the time says nothing either."""
        try:
            text = keys.bearer(
                request.headers.get("authorization"), request.headers.get("x-api-key")
            )
        except AuthenticationFailed:
            text = ""
        if self._rooms.people is not None and looks_signed(text):
            return await self._rooms.people.session(text)
        key_id = keys.key_id(text)
        if key_id is None:
            return keys.verify(text, None, self._rooms.pepper, 0.0)
        try:
            return self._verified(text, key_id, view)
        except AuthenticationFailed:
            return self._verified(text, key_id, await self._rooms.view.look_again())

    def _verified(self, text: str, key_id: str, view: Snapshot) -> KeyRecord:
        rooms = self._rooms
        record = keys.verify(text, view.keys.get(key_id), rooms.pepper, rooms.clock.now())
        if not view.directory.stands(record):
            raise keys.invalid_key()
        return record

    def asker(self, key: KeyRecord, view: Snapshot) -> Asker:
        """Who asks, as a dialect may know it."""
        guardrails = self._rooms.guardrails
        moderation = guardrails.moderation if guardrails is not None else None
        if view is not self._view or len(self._askers) >= MAX_KNOWN_KEYS:
            self._view = view
            self._askers.clear()
        known = self._askers.get(key.id)
        if known is None or known[0] is not key or known[1].moderation is not moderation:
            known = self._askers[key.id] = key, self._asker(key, view, moderation)
        return known[1]

    def _asker(self, key: KeyRecord, view: Snapshot, moderation: Moderation | None) -> Asker:
        return Asker(
            functools.partial(self._tenants.salted, key.tenant),
            lambda name: view.directory.may_infer(key, name, Verb.LEAD),
            lambda: sorted(view.models_of(key), key=lambda model: model.name),
            lambda name: view.model(name, key),
            moderation,
        )
