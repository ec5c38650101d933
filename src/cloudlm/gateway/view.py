"""The gateway's picture of the shared state: models, endpoints, keys and rights, in memory.

Polls the state's version and reads everything again when it grew, so that a request does not wait
for a database and a revoked key is refused well within a second. Only a request that would be
refused for a key or model unknown here waits for one more look. When the state cannot be read, the
last good picture serves on, for a stated time. Must not write to the state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from cloudlm.core.access import Identities
from cloudlm.core.clock import Clock
from cloudlm.core.deployment import Deployment, Endpoint, Residence
from cloudlm.core.errors import CloudlmError, ModelNotFound, Unavailable
from cloudlm.core.price import Price
from cloudlm.core.routing import DEFAULT_ROUTING, Routing
from cloudlm.core.tenant import KeyRecord
from cloudlm.gateway.model_routes import ModelRoute
from cloudlm.gateway.split import is_split, taking
from cloudlm.security.access import Directory, Policies, session_of
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

POLL_INTERVAL_S = 0.2
LOOK_INTERVAL_S = 0.05
READ_TIMEOUT_S = 2.0
LAST_GOOD_VIEW_S = 3600.0
NO_ROUTES: Mapping[str, ModelRoute] = {}
_NAMES_SHOWN = 20

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A deployment as clients see it, or an adapter of one (``parent``), or the models
    ``behind`` a route. ``created_at`` is Unix seconds; ``prices`` None leaves it to the
    gateway's table; ``tenant`` is whose it is, empty for everybody's. ``beside`` are replicas that
    take no new requests, of a revision that is tried out or was just replaced: streams that began
    there may go on there, and copies may be sent there. ``split``: revisions share requests. One
    that ``holds`` starts a replica when asked, and requests wait for it; one that is ``too_large``
    for its machine's memory never gets one. Somebody put it ``to_sleep``, or wants it awake
    (``to_wake``); neither: each replica stays as it is."""

    name: str
    created_at: float
    endpoints: tuple[Endpoint, ...] = ()
    parent: str | None = None
    routing: Routing = DEFAULT_ROUTING
    behind: tuple[str, ...] = ()
    prices: Price | None = None
    tenant: str = ""
    beside: tuple[Endpoint, ...] = ()
    split: bool = False
    holds: bool = False
    to_sleep: bool = False
    to_wake: bool = False
    target_ongoing_requests: float = 8.0
    too_large: bool = False

    @property
    def asleep(self) -> bool:
        """Whether all its replicas sleep, or those that come will."""
        if not self.endpoints:
            return self.to_sleep
        for one in self.endpoints:  # noqa: SIM110 (a generator costs more than the loop, for each request)
            if one.weight > 0:
                return False
        return True


class HiddenModel(ModelNotFound):
    """The model exists, but not for this key; what is said of it is the same."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent reading of the state. ``routed`` are the names that several models stand
    behind (``gateway.routes``), as clients see them."""

    version: int
    models: dict[str, ServedModel] = field(default_factory=dict)
    routed: dict[str, ServedModel] = field(default_factory=dict)
    keys: dict[str, KeyRecord] = field(default_factory=dict)
    directory: Directory = field(default_factory=lambda: Directory(Identities()))

    def holder(self, key_id: str) -> KeyRecord | None:
        """The key of that id, or the session of who signed in under it."""
        return self.keys.get(key_id) or self.directory.holder(key_id)

    def holders(self) -> Iterator[KeyRecord]:
        """All keys, and the sessions of all who may sign in."""
        yield from self.keys.values()
        for one in self.directory.identities.principals:
            if one.subject:
                yield session_of(one)

    def models_of(self, key: KeyRecord) -> list[ServedModel]:
        """The models that a key may use."""
        return [one for one in {**self.models, **self.routed}.values() if self._may(key, one)]

    def may_use(self, key: KeyRecord, name: str) -> bool:
        """Whether a key has the right to use a model and, if it is a tenant's own, is of it."""
        found = self.models.get(name)
        if found is not None and found.tenant and found.tenant != key.tenant:
            return False
        return self.directory.may_infer(key, name)

    def model(self, name: str, key: KeyRecord) -> ServedModel:
        """The model of that name. Raises ModelNotFound naming those that this key may use: one that
        it may not is not there for it."""
        return self._allowed(name, key, self.routed.get(name) or self.models.get(name))

    def deployed(self, name: str, key: KeyRecord) -> ServedModel:
        """As ``model``, but never a route."""
        found = self.models.get(name)
        if found is not None and self.may_use(key, name):
            return found
        return self._allowed(name, key, found)

    def _may(self, key: KeyRecord, model: ServedModel) -> bool:
        if model.behind:  # a route
            return self.directory.may_infer(key, model.name) and any(
                self.may_use(key, name) for name in model.behind
            )
        return self.may_use(key, model.name)

    def _allowed(self, name: str, key: KeyRecord, found: ServedModel | None) -> ServedModel:
        if found is not None and self._may(key, found):
            return found
        known = sorted(model.name for model in self.models_of(key))
        shown = ", ".join(known[:_NAMES_SHOWN]) + (" …" if len(known) > _NAMES_SHOWN else "")
        raise (ModelNotFound if found is None else HiddenModel)(
            f"there is no model {name[:80]!r}; "
            + (
                f"deployed here: {shown}"
                if known
                else "nothing is deployed here that this key may use"
            ),
            param="model",
        )


class View:
    """Follows the state. ``run`` is the one task that refreshes it."""

    def __init__(
        self,
        state: State,
        clock: Clock,
        *,
        poll_interval_s: float = POLL_INTERVAL_S,
        last_good_view_s: float = LAST_GOOD_VIEW_S,
        policies: Policies | None = None,
        routes: Mapping[str, ModelRoute] = NO_ROUTES,
    ) -> None:
        self._state = state
        self._routes = routes
        self._clock = clock
        self._policies = policies
        self._poll_interval_s = poll_interval_s
        self._last_good_view_s = last_good_view_s
        self._snapshot: Snapshot | None = None
        self._read_at = clock.monotonic()
        self._failing = False
        self._outdated = False
        self._looking = asyncio.Lock()
        self._looks = 0
        self._looked_at = -LOOK_INTERVAL_S
        self.on_change: list[Callable[[Snapshot], None]] = []

    @property
    def age_s(self) -> float:
        """Seconds since the state was last reached."""
        return self._clock.monotonic() - self._read_at

    @property
    def ready(self) -> bool:
        """Whether there is a picture young enough to serve from."""
        return self._snapshot is not None and self.age_s <= self._last_good_view_s

    def snapshot(self) -> Snapshot:
        """The latest picture. Raises Unavailable if there is none or it is too old."""
        if self._snapshot is None:
            raise Unavailable("the gateway has not read its state yet", retry_after_s=1.0)
        if self._clock.monotonic() - self._read_at > self._last_good_view_s:
            raise Unavailable(
                f"the gateway has not reached its state for {self.age_s:.0f} s, longer than the "
                f"{self._last_good_view_s:.0f} s it may serve without",
                retry_after_s=5.0,
            )
        return self._snapshot

    async def refresh(self) -> bool:
        """Look once; True if the state was reached. Never raises what the state raises."""
        async with self._looking:  # one at a time, so that no older picture replaces a newer one
            return await self._look()

    async def reread(self) -> None:
        """The routes are others now: make a new picture, at the next look if not now."""
        self._outdated = True
        await self.refresh()

    async def _look(self) -> bool:
        self._looks += 1
        self._looked_at = self._clock.monotonic()
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                version = await self._state.version()
                before = self._snapshot
                same = before is not None and version == before.version and not self._outdated
                fresh = None if same else await self._read(version)
        except (CloudlmError, OSError) as error:  # OSError holds TimeoutError
            if not self._failing:
                _log.warning("state_unreachable", extra={"fields": {"reason": repr(error)}})
            self._failing = True
            return False
        if self._failing:
            _log.info("state_reached_again", extra={"fields": {"after_s": round(self.age_s, 1)}})
        self._failing = False
        self._read_at = self._clock.monotonic()
        if fresh is not None:
            self._snapshot, self._outdated = fresh, False
            for told in self.on_change:
                told(fresh)
        return True

    async def look_again(self) -> Snapshot:
        """A picture read after this call, for what the last one lacks: a key or model made a
        moment ago is not unknown. All who ask meanwhile share one look, and looks keep a distance,
        so that a flood of bad requests does not reach the database. Raises as ``snapshot``."""
        looks = self._looks
        async with self._looking:
            if self._looks == looks:
                pause_s = self._looked_at + LOOK_INTERVAL_S - self._clock.monotonic()
                if pause_s > 0:
                    await self._clock.sleep(pause_s)
                await self._look()
        return self.snapshot()

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            try:
                await self.refresh()
            except Exception:  # a fault of ours must not stop the gateway from seeing revocations
                _log.exception("view_refresh_failed")
            await self._clock.sleep(self._poll_interval_s)

    async def _read(self, version: int) -> Snapshot:
        # The version is read first: a change made meanwhile grows it and is read next time.
        deployments = await self._state.list_deployments()
        endpoints = await self._state.list_endpoints()
        keys = await self._state.list_keys()
        residences = {one.name: one.residence for one in await self._state.list_statuses()}
        models = {
            name: served(
                d,
                name,
                [e for e in endpoints if e.model == name],
                residences.get(d.spec.name, Residence.NONE),
            )
            for d in deployments
            if not d.deleting
            for name in (d.spec.name, *d.spec.adapters)
        }
        directory = Directory(await self._state.list_identities(), keys, self._policies)
        routed = {
            name: found
            for name, route in self._routes.items()
            if (found := _routed(route, models)) is not None
        }
        return Snapshot(version, models, routed, {record.id: record for record in keys}, directory)


def served(
    deployment: Deployment,
    name: str,
    endpoints: list[Endpoint],
    residence: Residence = Residence.NONE,
) -> ServedModel:
    """A deployment, or the adapter of it with this name, as clients see it. Where a memory budget
    concerns it, it is loaded when asked."""
    spec = deployment.spec
    taken, beside = taking(endpoints)
    return ServedModel(
        name,
        deployment.created_at,
        tuple(taken),
        None if name == spec.name else spec.name,
        routing=spec.routing,
        prices=spec.prices,
        tenant=spec.tenant,
        beside=tuple(beside),
        split=is_split(taken),
        holds=(spec.may_be_none or residence is not Residence.NONE) and not spec.asleep,
        to_sleep=spec.asleep is True,
        to_wake=spec.asleep is False,
        target_ongoing_requests=spec.target_ongoing_requests,
        too_large=residence is Residence.TOO_LARGE,
    )


def _routed(route: ModelRoute, models: Mapping[str, ServedModel]) -> ServedModel | None:
    """A route as clients see it, None if nothing that it names is deployed."""
    behind = [models[name] for name in route.models if name in models]
    if not behind:
        return None
    endpoints = (endpoint for model in behind for endpoint in model.endpoints)
    created_at = max(model.created_at for model in behind)
    names = tuple(model.name for model in behind)
    return ServedModel(route.name, created_at, tuple(endpoints), behind=names)
