"""Who asks many models on one machine, for tests of the memory budget."""

from __future__ import annotations

from cloudlm.control.probe import Sample
from cloudlm.core.deployment import Demand

SIZE_MB = 100


class Clients:
    """The gateway and who asks it: requests wait until their model has an endpoint, and are
    answered in the second after."""

    def __init__(self, plane):
        self.plane = plane
        self.waiting = {}
        self.sent = self.answered = 0
        self.longest_s = 0.0

    def ask(self, name):
        self.sent += 1
        self.waiting.setdefault(name, []).append(self.plane.clock.monotonic())

    async def second(self):
        plane = self.plane
        serving = {one.model for one in await plane.state.list_endpoints() if one.weight > 0}
        now = plane.clock.monotonic()
        rows = []
        for one in await plane.state.list_deployments():
            name = one.spec.name
            asked = len(self.waiting.get(name, ()))
            rows.append(Demand(name, "g1", asked, asked, float(asked), plane.clock.now()))
            if name in serving and asked:
                self.longest_s = max(self.longest_s, now - min(self.waiting[name]))
                self.answered += len(self.waiting.pop(name))
        await plane.state.put_demand(rows)
        await plane.steps(2)


def at_work(plane, *replicas):
    """These replicas have a request that goes on and on."""
    for one in replicas:
        plane.prober.samples[one] = Sample(
            True, ready=True, running=1, steps=int(2 * plane.clock.monotonic()) + 1
        )


def present(plane):
    return {one.rpartition("-r")[0] for one in plane.running()}


async def phase(plane, name):
    return (await plane.state.get_status(name)).phase


async def residence(plane, name):
    return (await plane.state.get_status(name)).residence
