"""A whole control plane without processes or network: memory state, memory driver, manual clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cloudlm.control.api.caller import Callers
from cloudlm.control.api.services import Services
from cloudlm.control.audit import Auditor
from cloudlm.control.budget import MemoryBudget
from cloudlm.control.drivers import Drivers
from cloudlm.control.jobs import Jobs, Kind
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.probe import UNREACHABLE, Sample
from cloudlm.control.reconcile import Reconciler
from cloudlm.core.clock import ManualClock
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import BrokenModel, ModelNotFound, NotFound
from cloudlm.core.model import Manifest, ModelFile
from cloudlm.core.settings import ControlSettings
from cloudlm.core.wire import import_from_body
from cloudlm.drivers.base import Ability, DriverContext
from cloudlm.drivers.external import ExternalDriver
from cloudlm.drivers.external_look import Look
from cloudlm.drivers.memory import MemoryDriver, MemoryWorld
from cloudlm.security.credentials import Credentials
from cloudlm.state.memory import MemoryState

PEPPER = b"p" * 32


def manifest(name, version):
    return Manifest(
        name=name,
        version=version,
        files=(ModelFile("model.safetensors", 10, "0" * 64),),
        task="generate",
        architecture="LlamaForCausalLM",
        precision="float32",
        parameters=10,
        context_length=64,
    )


class MemoryRegistry:
    """The registry's verbs over dictionaries."""

    def __init__(self):
        self.versions = {"bank": [manifest("bank", 1), manifest("bank", 2)]}
        self.aliases = {"bank": {"champion": 1}}

    def list_models(self):
        return sorted(self.versions)

    def list_versions(self, name):
        if name not in self.versions:
            raise ModelNotFound(f"model {name!r} is not registered; registered: bank")
        return self.versions[name]

    def configuration(self, ref):
        raise BrokenModel(f"{ref} has no config.json", param="model")

    def list_aliases(self, name):
        return dict(self.aliases.get(name, {}))

    def resolve(self, ref):
        versions = self.list_versions(ref.name)
        number = ref.version or versions[-1].version
        if ref.alias is not None:
            if ref.alias not in self.aliases.get(ref.name, {}):
                raise ModelNotFound(f"model {ref.name!r} has no alias {ref.alias!r}")
            number = self.aliases[ref.name][ref.alias]
        for version in versions:
            if version.version == number:
                return version
        raise ModelNotFound(f"{ref} does not exist")

    def set_alias(self, name, alias, version):
        self.list_versions(name)
        self.aliases.setdefault(name, {})[alias] = version

    def remove_alias(self, name, alias):
        if alias not in self.aliases.get(name, {}):
            raise NotFound(f"model {name!r} has no alias {alias!r}")
        del self.aliases[name][alias]

    def remove(self, ref):
        found = self.resolve(ref)
        self.versions[ref.name].remove(found)


class ProbedDriver(MemoryDriver):
    """Replicas that must be asked, as those of the process driver."""

    abilities = MemoryDriver.abilities | {Ability.PER_REPLICA_ADDRESS}


class ScriptedProber:
    """Answers by replica id; READY for those not named."""

    def __init__(self):
        self.samples = {}
        self.default = Sample(True, ready=True)
        self.missing_once = set()

    async def probe(self, url):
        replica = url.removeprefix("http://").removesuffix(".memory.invalid")
        if replica in self.missing_once:
            self.missing_once.discard(replica)
            return UNREACHABLE
        return self.samples.get(replica, self.default)

    def misses_once(self, replica):
        self.missing_once.add(replica)

    def silence(self, replica):
        self.samples[replica] = UNREACHABLE


class ScriptedTurner:
    """Turns the replicas that the prober tells of; ``refusal`` is raised instead."""

    def __init__(self, prober):
        self.prober = prober
        self.asked = []
        self.refusal = None

    async def turn(self, url, *, asleep):
        replica = url.removeprefix("http://").removesuffix(".memory.invalid")
        self.asked.append((replica, asleep))
        if self.refusal is not None:
            raise self.refusal
        self.prober.samples[replica] = Sample(True, ready=not asleep, sleeping=asleep)


class ScriptedLooks:
    """What looks at others' endpoints find, by URL; WELL for those not named."""

    def __init__(self):
        self.found = {}
        self.looked = []

    async def look(self, endpoint):
        self.looked.append(endpoint.url)
        return self.found.get(endpoint.url, Look())


@dataclass
class Plane:
    """Control and everything around it; ``restart`` makes a new control over the same world."""

    home: object
    clock: ManualClock = field(default_factory=ManualClock)
    state: MemoryState = field(default_factory=MemoryState)
    world: MemoryWorld = field(default_factory=MemoryWorld)
    elsewhere: MemoryWorld = field(default_factory=MemoryWorld)
    registry: MemoryRegistry = field(default_factory=MemoryRegistry)
    prober: ScriptedProber = field(default_factory=ScriptedProber)
    looks: ScriptedLooks = field(default_factory=ScriptedLooks)
    imported: list = field(default_factory=list)
    budget_mb: int = 0
    asker: object = None

    def __post_init__(self):
        self.turner = ScriptedTurner(self.prober)
        self.credentials = Credentials(self.home / "secrets", {})
        self.restart()

    def restart(self):
        context = DriverContext(self.home, self.clock, {}, {})
        build = {
            "process": lambda context: ProbedDriver(context, self.world),
            "memory": lambda context: MemoryDriver(context, self.elsewhere),
            "external": lambda context: ExternalDriver(context, self.looks),
        }
        self.drivers = Drivers(context, build)
        self.metrics = ControlMetrics()
        self.memory = MemoryBudget(self.registry, self.budget_mb * 2**20, clock=self.clock)
        self.reconciler = self.reconciler_of(self.state, self.drivers)
        self.jobs = Jobs(self.state, self.clock, {"import": Kind(import_from_body, self._import)})

    def reconciler_of(self, state, drivers):
        return Reconciler(
            state,
            drivers,
            self.registry,
            self.prober,
            self.clock,
            ControlSettings(drain_timeout_s=30.0, stall_timeout_s=20.0),
            self.metrics,
            self.turner,
            self.credentials,
            self.memory,
            asker=self.asker,
        )

    def _import(self, arguments, report):
        report(0.5, "copying")
        self.imported.append(arguments["source"])
        return {"model": "models:/bank/3"}

    async def ask(self, name="bank", model="models:/bank/1", **changes):
        spec = DeploymentSpec(name, model, **changes)
        return await self.state.put_deployment(spec, now=self.clock.now())

    async def steps(self, count=1, seconds=0.5):
        for _ in range(count):
            await self.reconciler.step()
            await self.clock.advance(seconds)

    async def serving(self):
        return [endpoint.replica for endpoint in await self.state.list_endpoints()]

    def running(self):
        groups = [*self.world.groups.values(), *self.elsewhere.groups.values()]
        return sorted(replica for group in groups for replica in group.replicas)


@pytest.fixture
async def plane(tmp_path):
    made = Plane(tmp_path)
    yield made
    await made.jobs.close()


@pytest.fixture
def pepper():
    return PEPPER


@pytest.fixture
async def plane_at(tmp_path):
    """Makes planes with homes of their own."""
    planes = []

    def make(name):
        planes.append(Plane(tmp_path / name))
        return planes[-1]

    yield make
    for one in planes:
        await one.jobs.close()


@pytest.fixture
def services(plane, pepper):
    """Everything behind the API of ``plane``; the auditor signs with a seed of ``s``."""
    return Services(
        state=plane.state,
        registry=plane.registry,
        drivers=plane.drivers,
        reconciler=plane.reconciler,
        jobs=plane.jobs,
        metrics=plane.metrics,
        pepper=pepper,
        clock=plane.clock,
        callers=Callers(plane.state, pepper, plane.clock),
        auditor=Auditor(plane.state, plane.clock, b"s" * 32, plane.home / "checkpoints"),
    )
