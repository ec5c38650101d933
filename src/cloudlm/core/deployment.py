"""What is asked and what runs: deployments, replica groups, endpoints, demand.

A *deployment* is what a user asks for under an API name. Each change of what it runs makes a new
*revision*; the replicas of one revision form a *group*, the unit that drivers know. An *endpoint*
is the address of one ready replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cloudlm.core.external import ExternalEndpoint
from cloudlm.core.placement import Placement
from cloudlm.core.price import Price
from cloudlm.core.rollout import DEFAULT_STRATEGY, Strategy
from cloudlm.core.routing import DEFAULT_ROUTING, Routing
from cloudlm.core.scaling import DEFAULT_SCALING, Scaling


@dataclass(frozen=True, slots=True)
class DeploymentSpec:
    """What the user asked for.

    ``name`` is also the model name in the OpenAI API. ``model`` is a model address
    (``models:/name/3``, ``models:/name@alias``); other addresses are imported first.
    ``engine`` is what generates: ``cloudlm`` or ``vllm``. ``options`` are its settings
    (``max_model_len``, ``dtype`` …) and ``env`` extra environment of the replica.
    ``asleep`` puts the replicas to sleep (true) or keeps them awake (false); None leaves each as
    it is. ``adapters`` are LoRA adapters by name, which is a model's name in the API too, with
    the address of each. ``prices`` is what its tokens cost (None: the gateway's own table), and
    ``tenant`` to whom it belongs: nobody else sees or uses it (empty: all may be granted it).
    ``routing`` is how requests are spread over the replicas, ``scaling`` what decides how many
    there are, ``rollout`` how a new revision takes over, and ``placement`` what is wished of the
    machines that they run on (None: nothing). ``endpoints`` are those of driver ``external``:
    services that are not ours, and nothing is started; ``model`` is then a name of theirs.
    Under a memory budget a ``pinned`` one is never unloaded for others, and ``memory_mb`` is what a
    replica needs (0: as estimated).
    """

    name: str
    model: str
    driver: str = "process"
    engine: str = "cloudlm"
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 8.0
    max_surge: int = 1
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    asleep: bool | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    prices: Price | None = None
    tenant: str = ""
    routing: Routing = DEFAULT_ROUTING
    placement: Placement | None = None
    rollout: Strategy = DEFAULT_STRATEGY
    scaling: Scaling = DEFAULT_SCALING
    endpoints: tuple[ExternalEndpoint, ...] = ()
    pinned: bool = False
    memory_mb: int = 0

    @property
    def may_be_none(self) -> bool:
        """Whether it may have no replica at all; a request then starts one and waits for it."""
        return not self.min_replicas or any(s.min_replicas == 0 for s in self.scaling.schedules)


@dataclass(frozen=True, slots=True)
class Deployment:
    """The desired fact: a spec with its generation.

    ``generation`` grows with every change; ``revision`` only when what a replica runs changes
    (model, driver, engine, options, env, adapters, endpoints), so that scaling restarts nothing.
    Going back to an earlier revision takes its number too; ``last_revision`` is the highest that
    was ever given (0: it is ``revision``). ``deleting`` asks control to stop everything and then
    remove the fact.
    """

    spec: DeploymentSpec
    generation: int = 1
    revision: int = 1
    deleting: bool = False
    created_at: float = 0.0
    updated_at: float = 0.0
    last_revision: int = 0

    def changed(self, spec: DeploymentSpec, now: float) -> Deployment:
        """This deployment with a new spec; generation and revision grow as the rules above say."""
        if spec == self.spec and not self.deleting:
            return self
        newest = max(self.last_revision, self.revision)
        same = running(spec, over=self.spec) == self.spec
        return replace(
            self,
            spec=spec,
            generation=self.generation + 1,
            revision=self.revision if same else newest + 1,
            deleting=False,
            updated_at=now,
            last_revision=newest if same else newest + 1,
        )

    def returned(self, spec: DeploymentSpec, revision: int, now: float) -> Deployment:
        """This deployment, running again what an earlier ``revision`` with ``spec`` ran. All else
        (replicas, prices, routing …) stays as it is, but see ``running`` for endpoints."""
        return replace(
            self,
            spec=running(spec, over=self.spec),
            generation=self.generation + 1,
            revision=revision,
            updated_at=now,
            last_revision=max(self.last_revision, self.revision),
        )


def running(spec: DeploymentSpec, *, over: DeploymentSpec) -> DeploymentSpec:
    """``over``, with what a replica runs (a change of which makes a new revision) out of
    ``spec``. Endpoints of others are as many as they are, do not sleep and take no memory: where
    either has some, the bounds, the sleep and what is said of memory are ``spec``'s too."""
    if spec.endpoints or over.endpoints:
        over = replace(
            over,
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            asleep=spec.asleep,
            pinned=spec.pinned,
            memory_mb=spec.memory_mb,
        )
    return replace(
        over,
        model=spec.model,
        driver=spec.driver,
        engine=spec.engine,
        options=spec.options,
        env=spec.env,
        adapters=spec.adapters,
        endpoints=spec.endpoints,
    )


class ReplicaState(StrEnum):
    """The life of one replica."""

    STARTING = "starting"
    READY = "ready"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What a driver is asked to run: ``replicas`` alike copies of one revision.

    ``model`` and those of ``adapters`` (by name) are fixed versions (``models:/name/3``), never
    an alias: a group must not change its bytes when an alias moves. Replica n of driver
    ``external`` is the n-th of ``endpoints``.
    """

    name: str
    deployment: str
    revision: int
    model: str
    replicas: int
    engine: str = "cloudlm"
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    endpoints: tuple[ExternalEndpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy as a driver sees it. ``url`` is the base address once known, without a slash;
    ``misses`` are the last looks in a row that found another's endpoint failing, or starts in a row
    that did not come about, two at most."""

    id: str
    state: ReplicaState
    url: str | None = None
    pid: int | None = None
    restarts: int = 0
    message: str = ""
    started_at: float = 0.0
    misses: int = 0


@dataclass(frozen=True, slots=True)
class GroupObservation:
    """What a driver found. ``spec`` is what was last applied, None if there is no such group."""

    name: str
    spec: GroupSpec | None
    replicas: tuple[Replica, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of one replica that may be sent requests, unless its ``weight`` is 0: then it
    sleeps. ``model`` is the API name. While requests are split between revisions, ``share`` is the
    part of them, 0 to 1, that goes to this revision, whatever its number of replicas (None: no
    split), and ``mirror`` the part of them that this revision gets a copy of.
    ``priority`` 0 is asked first. Of another's service, ``upstream_model`` is the name there, and
    ``secret`` names the key to ask with."""

    model: str
    replica: str
    url: str
    revision: int
    weight: float = 1.0
    share: float | None = None
    mirror: float = 0.0
    priority: int = 0
    upstream_model: str = ""
    secret: str = ""

    @property
    def is_external(self) -> bool:
        """Whether what answers there is not one of our workers."""
        return bool(self.upstream_model)


@dataclass(frozen=True, slots=True)
class Demand:
    """What one gateway saw of one model in its last second.

    ``prompt_tokens_per_s`` are those of requests that arrived, as far as they are not expected to
    be cached, and ``waiting_prompt_tokens`` those of requests that are at no replica yet. The rest
    is of attempts that ended well: how many, their answers' tokens, their prompts' tokens that were
    computed, and the mean times to the first token and for each further one (``ttft_s``,
    ``tpot_s``; 0 if none ended).
    """

    model: str
    gateway: str
    ongoing: int
    queued: int
    requests_per_s: float
    measured_at: float
    prompt_tokens_per_s: float = 0.0
    waiting_prompt_tokens: float = 0.0
    finished_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    computed_tokens_per_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0


class Residence(StrEnum):
    """Where a deployment stands with a machine's memory budget."""

    NONE = ""
    """No budget concerns it."""
    RESIDENT = "resident"
    LEAVING = "leaving"
    WAITING = "waiting"
    UNLOADED = "unloaded"
    TOO_LARGE = "too_large"


class DeploymentPhase(StrEnum):
    """One word for people: where a deployment stands."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    UPDATING = "updating"
    DEGRADED = "degraded"
    FAILED = "failed"
    DELETING = "deleting"
    SLEEPING = "sleeping"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """The observed fact that control writes beside the desired one. ``memory_bytes`` is what its
    replicas take of the memory budget, if there is one."""

    name: str
    phase: DeploymentPhase
    observed_generation: int
    wanted_replicas: int
    ready_replicas: int
    replicas: tuple[Replica, ...] = ()
    message: str = ""
    updated_at: float = 0.0
    residence: Residence = Residence.NONE
    memory_bytes: int = 0
