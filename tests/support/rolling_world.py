"""A deployment on its way from one revision to the next, with the answers that its replicas give,
and with a control that can be killed after any write."""

from __future__ import annotations

from msgspec.structs import replace

from cloudlm.core.deployment import Endpoint
from cloudlm.core.rollout import Kind, Step, Strategy
from cloudlm.core.tenant import LedgerRow, Outcome

STEP_S = 4.0
STRATEGIES = {
    kind: Strategy(kind, steps=(Step(10.0, STEP_S), Step(50.0, STEP_S)), bake_s=STEP_S)
    for kind in Kind
}
_WRITES = (
    "put_status",
    "put_endpoints",
    "put_rollout",
    "end_revision",
    "fix_revision",
    "return_to",
    "remove_deployment",
    "take_lease",
    "renew_lease",
)


class Killed(BaseException):
    """The control process was killed at this moment."""


class Kills:
    """Kills control after its ``at``-th write or order to a driver, and at each ``every``-th
    after."""

    def __init__(self, at=0, every=0):
        self.count = 0
        self.at = at
        self._next = at
        self._every = every

    def note(self):
        self.count += 1
        if self.count == self._next:
            self._next = self.count + self._every if self._every else 0
            raise Killed


class MortalState:
    """A state under a control that may be killed."""

    def __init__(self, state, kills):
        self._state = state
        self._kills = kills

    def __getattr__(self, name):
        found = getattr(self._state, name)
        if name not in _WRITES:
            return found

        async def written(*arguments, **named):
            result = await found(*arguments, **named)
            self._kills.note()
            return result

        return written


def mortal_driver(driver, state, kills):
    """Have ``driver`` check that who is stopped is asked by nobody, and kill."""

    async def check(name, kept):
        asked = {endpoint.replica for endpoint in await state.list_endpoints()}
        group = driver.world.groups.get(name)
        leaving = {one for one in (group.replicas if group else ()) if one not in kept}
        assert not leaving & asked, f"stopped while requests went there: {leaving & asked}"

    apply, delete = driver.apply, driver.delete

    async def applied(spec):
        await check(spec.name, {f"{spec.name}-{n}" for n in range(spec.replicas)})
        await apply(spec)
        kills.note()

    async def deleted(name):
        await check(name, ())
        await delete(name)
        kills.note()

    driver.apply, driver.delete = applied, deleted
    return driver


class Answers:
    """What replicas answer: a ledger row for each endpoint that gets requests or copies."""

    def __init__(self, plane):
        self._plane = plane
        self._number = 0
        self.bad = frozenset()
        self.slow = frozenset()
        self.each = 6

    async def give(self):
        state, now = self._plane.state, self._plane.clock.now()
        rows = []
        for endpoint in await state.list_endpoints():
            if takes(endpoint) or endpoint.mirror > 0:
                rows += [self._row(endpoint, now) for _ in range(self.each)]
        await state.append_ledger(rows)

    def _row(self, endpoint, now):
        self._number += 1
        bad, slow = endpoint.revision in self.bad, endpoint.revision in self.slow
        first_s = 5.0 if slow else 0.1
        row = LedgerRow(
            f"row-{self._number}",
            "r",
            1,
            "default",
            "k",
            endpoint.model,
            endpoint.replica,
            Outcome.FINISHED,
            200,
            1,
            1,
            0,
            now,
            2 * first_s,
            first_s,
        )
        if not bad:
            return row
        return replace(row, outcome=Outcome.FAILED, status=502, first_token_s=None)


def takes(endpoint: Endpoint) -> bool:
    """Whether new requests go there."""
    return endpoint.weight > 0 and (endpoint.share is None or endpoint.share > 0)
