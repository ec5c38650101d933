"""The state contract, for every implementation."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.ext.asyncio import create_async_engine

from cloudlm.core.access import (
    FIRST_IDENTITIES,
    CustomRole,
    Effect,
    Grant,
    Limits,
    Principal,
    PrincipalKind,
    Project,
    Rule,
    Tenant,
)
from cloudlm.core.audit import (
    AuditEvent,
    AuditHead,
    AuditOutcome,
    AuditRecord,
    Checkpoint,
    chained,
)
from cloudlm.core.deployment import (
    Demand,
    Deployment,
    DeploymentPhase,
    DeploymentSpec,
    DeploymentStatus,
    Endpoint,
    Replica,
    ReplicaState,
    Residence,
)
from cloudlm.core.errors import Conflict, InvalidRequest, NotFound, StorageFailed
from cloudlm.core.figures import ModelFigures
from cloudlm.core.job import Job, JobState
from cloudlm.core.pace import Pace
from cloudlm.core.placement import Latency, Measured, Placement, Traffic, Users
from cloudlm.core.routing import Policy, Routing
from cloudlm.core.tenant import KeyRecord, LedgerRow, Outcome
from cloudlm.core.usage import UsageQuery
from cloudlm.state.base import State
from cloudlm.state.migrations import VERSION_TABLE
from cloudlm.state.open import open_state
from cloudlm.state.tables import metadata

SPEC = DeploymentSpec(
    "bank",
    "models:/starter/1",
    options={"dtype": "float32", "kv_cache_mb": 64},
    routing=Routing(Policy.POWER_OF_TWO, "x-user-id", 0.5),
    placement=Placement(
        Traffic(2.0, 800, 200),
        regions=("eu",),
        users=(Users(48.1, 11.6),),
        latencies=(Latency("eu", 30.0),),
        figures=ModelFigures(8_000_000_000, 32, 8, 128, 4096, 128_256),
        measured=(Measured("L4", 1, 3000.0, 40.0),),
    ),
)
ODD = "odd \0 \\u0041 \\ \ud800 ü 猫 '; DROP TABLE jobs; --"


@pytest.fixture
async def state(state_url: str) -> AsyncIterator[State]:
    opened = await open_state(state_url)
    yield opened
    await opened.close()


def endpoint(number: int, model: str = "bank", revision: int = 1) -> Endpoint:
    return Endpoint(
        model, f"{model}-r{revision}-{number}", f"http://127.0.0.1:{8100 + number}", revision
    )


def row(number: int, request_id: str = "req", started_at: float = 100.0) -> LedgerRow:
    return LedgerRow(
        id=f"row-{number:05}",
        request_id=request_id,
        attempt=1,
        tenant="default",
        key_id="k1",
        model="bank",
        replica="bank-r1-0",
        outcome=Outcome.FINISHED,
        status=200,
        prompt_tokens=3,
        completion_tokens=2**40,
        cached_tokens=0,
        started_at=started_at,
        duration_s=0.1,
        first_token_s=0.05 if number % 2 else None,
    )


KEY = KeyRecord("k1", "laptop", "admin", "ab" * 32, "wxyz", created_at=5.5)


class TestDeployments:
    async def test_what_was_put_is_read_back(self, state: State) -> None:
        put = await state.put_deployment(SPEC, now=10.25)
        assert (put.generation, put.revision, put.deleting) == (1, 1, False)
        assert (put.created_at, put.updated_at) == (10.25, 10.25)
        assert put.spec == SPEC
        assert await state.get_deployment("bank") == put
        assert await state.list_deployments() == [put]
        assert await state.get_deployment("other") is None

    async def test_an_equal_spec_changes_nothing(self, state: State) -> None:
        first = await state.put_deployment(SPEC, now=1.0)
        version = await state.version()
        assert await state.put_deployment(replace(SPEC), now=2.0) == first
        assert await state.get_deployment("bank") == first
        assert await state.version() == version

    async def test_scaling_keeps_the_revision(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        scaled = await state.put_deployment(replace(SPEC, max_replicas=4), now=2.0)
        assert (scaled.generation, scaled.revision) == (2, 1)
        moved = await state.put_deployment(replace(SPEC, model="models:/starter/2"), now=3.0)
        assert (moved.generation, moved.revision) == (3, 2)
        assert (moved.created_at, moved.updated_at) == (1.0, 3.0)
        assert await state.get_deployment("bank") == moved

    async def test_the_expected_generation_is_compared(self, state: State) -> None:
        with pytest.raises(Conflict, match="does not exist"):
            await state.put_deployment(SPEC, now=1.0, expected_generation=3)
        assert await state.list_deployments() == []
        await state.put_deployment(SPEC, now=1.0, expected_generation=0)
        with pytest.raises(Conflict, match="exists already"):
            await state.put_deployment(SPEC, now=2.0, expected_generation=0)
        wider = replace(SPEC, max_replicas=2)
        with pytest.raises(Conflict, match="generation 1, not 2"):
            await state.put_deployment(wider, now=2.0, expected_generation=2)
        assert (await state.put_deployment(wider, now=2.0, expected_generation=1)).generation == 2

    async def test_names_are_listed_in_code_point_order(self, state: State) -> None:
        names = ["b", "a-b", "a.b", "a_b", "ab", "a1", "z", "a-c", "B"]
        for name in names:
            await state.put_deployment(replace(SPEC, name=name), now=1.0)
        assert [one.spec.name for one in await state.list_deployments()] == sorted(names)

    async def test_deletion_is_asked_once(self, state: State) -> None:
        assert await state.mark_deleting("bank", now=1.0) is None
        await state.put_deployment(SPEC, now=1.0)
        asked = await state.mark_deleting("bank", now=2.0)
        assert asked is not None
        assert (asked.generation, asked.deleting, asked.updated_at) == (2, True, 2.0)
        version = await state.version()
        assert await state.mark_deleting("bank", now=3.0) == asked
        assert await state.version() == version
        assert await state.list_deployments() == [asked]

    async def test_removal_needs_the_generation_that_was_deleted(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        assert not await state.remove_deployment("bank", generation=1), "nobody asked for deletion"
        await state.mark_deleting("bank", now=2.0)
        assert not await state.remove_deployment("bank", generation=1)
        revived = await state.put_deployment(SPEC, now=3.0)
        assert (revived.generation, revived.deleting) == (3, False)
        assert not await state.remove_deployment("bank", generation=2)
        await state.mark_deleting("bank", now=4.0)
        assert await state.remove_deployment("bank", generation=4)
        assert not await state.remove_deployment("bank", generation=4)
        assert await state.list_deployments() == []

    async def test_removal_forgets_status_and_endpoints(self, state: State) -> None:
        for name in ("bank", "other"):
            await state.put_deployment(replace(SPEC, name=name), now=1.0)
            await state.put_endpoints(name, [endpoint(0, name)])
            await state.put_status(DeploymentStatus(name, DeploymentPhase.READY, 1, 1, 1))
        await state.mark_deleting("bank", now=2.0)
        await state.remove_deployment("bank", generation=2)
        assert await state.get_status("bank") is None
        assert [one.name for one in await state.list_statuses()] == ["other"]
        assert [one.model for one in await state.list_endpoints()] == ["other"]

    async def test_statuses_are_replaced(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        replicas = (
            Replica("bank-r1-0", ReplicaState.READY, "http://127.0.0.1:8100", 123, 2, "", 4.5),
            Replica("bank-r1-1", ReplicaState.BACKOFF, message=ODD),
        )
        first = DeploymentStatus("bank", DeploymentPhase.STARTING, 1, 2, 0, (), "wait", 5.0)
        second = DeploymentStatus("bank", DeploymentPhase.DEGRADED, 1, 2, 1, replicas, ODD, 6.0)
        await state.put_status(first)
        assert await state.get_status("bank") == first
        await state.put_status(second)
        assert await state.get_status("bank") == second
        assert await state.list_statuses() == [second]

    async def test_only_another_residence_in_a_status_is_a_new_version(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        said = DeploymentStatus("bank", DeploymentPhase.STARTING, 1, 1, 0)
        before = await state.version()
        for phase in DeploymentPhase:
            await state.put_status(replace(said, phase=phase, memory_bytes=2**40))
        assert await state.version() == before
        await state.put_status(replace(said, residence=Residence.UNLOADED))
        assert await state.version() > before
        found = await state.get_status("bank")
        assert found is not None
        assert found.residence is Residence.UNLOADED

    async def test_a_status_without_its_deployment_is_not_kept(self, state: State) -> None:
        await state.put_status(DeploymentStatus("gone", DeploymentPhase.READY, 1, 1, 1))
        assert await state.list_statuses() == []


class TestEndpointsAndDemand:
    async def test_endpoints_are_replaced_and_sorted(self, state: State) -> None:
        await state.put_endpoints("bank", [endpoint(2), endpoint(1)])
        await state.put_endpoints("atlas", [replace(endpoint(3, "atlas"), weight=0.25)])
        assert [one.replica for one in await state.list_endpoints()] == [
            "atlas-r1-3",
            "bank-r1-1",
            "bank-r1-2",
        ]
        await state.put_endpoints("bank", [endpoint(1, revision=2)])
        assert await state.list_endpoints() == [
            replace(endpoint(3, "atlas"), weight=0.25),
            endpoint(1, revision=2),
        ]
        await state.put_endpoints("bank", [])
        assert [one.model for one in await state.list_endpoints()] == ["atlas"]

    async def test_unchanged_endpoints_change_no_version(self, state: State) -> None:
        await state.put_endpoints("bank", [endpoint(1), endpoint(2)])
        version = await state.version()
        await state.put_endpoints("bank", [endpoint(2), endpoint(1)])
        await state.put_endpoints("none", [])
        assert await state.version() == version
        await state.put_endpoints("bank", [replace(endpoint(1), weight=0.5), endpoint(2)])
        assert await state.version() > version

    async def test_endpoints_of_another_model_or_twice_are_refused(self, state: State) -> None:
        with pytest.raises(InvalidRequest, match="other"):
            await state.put_endpoints("bank", [endpoint(1, "other")])
        with pytest.raises(InvalidRequest, match="twice"):
            await state.put_endpoints("bank", [endpoint(1), endpoint(1)])
        assert await state.list_endpoints() == []

    async def test_demand_is_replaced_per_model_and_gateway(self, state: State) -> None:
        await state.put_demand([])
        old = Demand("bank", "g1", 1, 0, 0.5, 100.0)
        others = [Demand("atlas", "g1", 4, 0, 0.0, 100.0), Demand("bank", "g2", 2, 1, 9.5, 101.0)]
        new = Demand("bank", "g1", 3, 7, 1.25, 102.0)
        await state.put_demand([old, *others])
        await state.put_demand([new])
        assert await state.list_demand(since=0.0) == [others[0], new, others[1]]
        assert await state.list_demand(since=101.0) == [new, others[1]]
        assert await state.list_demand(since=103.0) == []

    async def test_the_last_report_of_a_batch_counts(self, state: State) -> None:
        reports = [Demand("bank", "g1", number, 0, 0.0, 100.0) for number in (1, 2)]
        await state.put_demand(reports)
        assert await state.list_demand(since=0.0) == [reports[1]]

    async def test_all_that_a_report_says_is_kept(self, state: State) -> None:
        report = Demand("bank", "g1", 1, 2, 3.5, 100.0, 4.5, 5.5, 6.5, 7.5, 8.5, 0.25, 0.125)
        await state.put_demand([report])
        assert await state.list_demand(since=0.0) == [report]

    async def test_the_mark_is_when_the_newest_report_was_measured(self, state: State) -> None:
        assert await state.demand_mark() == 0.0
        await state.put_demand([Demand("bank", "g1", 1, 0, 0.0, 100.0)])
        await state.put_demand([Demand("atlas", "g2", 1, 0, 0.0, 99.0)])
        assert await state.demand_mark() == 100.0

    async def test_paces_are_kept_per_version_and_go_with_their_deployment(
        self, state: State
    ) -> None:
        for name in ("bank", "atlas"):
            await state.put_deployment(DeploymentSpec(name, "models:/m/1"), now=1.0)
        first = Pace("bank", "models:/bank/1", start_s=12.5)
        second = Pace("bank", "models:/bank/2").answered(0.001, 80.0, 0.03, 4.0)
        other = Pace("atlas", "models:/bank/1", start_s=1.0)
        for pace in (second, first, other):
            await state.put_pace(pace)
        await state.put_pace(first.started(30.0))
        assert await state.list_paces() == [other, first.started(30.0), second]
        marked = await state.mark_deleting("bank", now=2.0)
        assert marked is not None
        await state.remove_deployment("bank", generation=marked.generation)
        assert await state.list_paces() == [other]

    async def test_a_gateway_s_clock_drops_nobody_s_reports(self, state: State) -> None:
        await state.put_demand([Demand("bank", "right", 1, 0, 0.0, 100.0)])
        await state.put_demand([Demand("bank", "ahead", 1, 0, 0.0, 100.0 + 2 * 3600)])
        gateways = [one.gateway for one in await state.list_demand(since=0.0)]
        assert gateways == ["ahead", "right"]

    async def test_reports_are_dropped_unless_they_were_replaced(self, state: State) -> None:
        gone = Demand("bank", "gone", 1, 0, 0.0, 100.5)
        late = Demand("bank", "late", 1, 0, 0.0, 100.5)
        other = Demand("atlas", "gone", 1, 0, 0.0, 100.5)
        again = replace(late, measured_at=200.5)
        await state.put_demand([gone, late, other])
        await state.put_demand([again])
        await state.drop_demand([])
        await state.drop_demand([late, gone, Demand("bank", "unknown", 1, 0, 0.0, 100.5)])
        assert await state.list_demand(since=0.0) == [other, again]


class TestVersion:
    async def test_it_grows_with_what_gateways_must_see(self, state: State) -> None:
        seen = [await state.version()]

        async def grew() -> bool:
            seen.append(await state.version())
            return seen[-1] > seen[-2]

        await state.put_deployment(SPEC, now=1.0)
        assert await grew()
        await state.put_endpoints("bank", [endpoint(1)])
        assert await grew()
        await state.put_key(KEY)
        assert await grew()
        await state.revoke_key("k1", now=2.0)
        assert await grew()
        await state.mark_deleting("bank", now=2.0)
        assert await grew()
        await state.remove_deployment("bank", generation=2)
        assert await grew()

    async def test_it_stands_still_otherwise(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        await state.put_key(KEY)
        await state.revoke_key("k1", now=2.0)
        version = await state.version()
        await state.put_status(DeploymentStatus("bank", DeploymentPhase.READY, 1, 1, 1))
        await state.put_demand([Demand("bank", "g1", 1, 0, 0.5, 100.0)])
        await state.put_job(Job("j1", "import", {}))
        await state.append_ledger([row(1)])
        await state.revoke_key("k1", now=3.0)
        await state.remove_deployment("bank", generation=1)
        with pytest.raises(Conflict):
            await state.put_key(KEY)
        assert await state.version() == version


class TestKeys:
    async def test_a_key_is_stored_once(self, state: State) -> None:
        await state.put_key(KEY)
        with pytest.raises(Conflict):
            await state.put_key(replace(KEY, role="user", digest="cd" * 32))
        assert await state.get_key("k1") == KEY
        assert await state.get_key("k2") is None
        assert await state.get_key(ODD) is None

    async def test_keys_are_listed_by_creation(self, state: State) -> None:
        records = [replace(KEY, id=f"k{n}", created_at=float(10 - n)) for n in range(3)]
        for record in records:
            await state.put_key(record)
        assert await state.list_keys() == records[::-1]

    async def test_the_first_revocation_stays(self, state: State) -> None:
        assert await state.revoke_key("k1", now=1.0) is None
        await state.put_key(KEY)
        revoked = await state.revoke_key("k1", now=7.5)
        assert revoked == replace(KEY, revoked_at=7.5)
        assert await state.revoke_key("k1", now=9.0) == revoked
        assert await state.get_key("k1") == revoked


class TestKeyChanges:
    async def test_a_change_is_of_what_was_read(self, state: State) -> None:
        await state.put_key(KEY)
        wider = replace(KEY, models=("a", ODD), limits=Limits(5, None, 2, 1.5), expires_at=9.0)
        await state.change_key(wider, replaces=KEY)
        assert await state.get_key("k1") == wider
        with pytest.raises(Conflict, match="changed meanwhile"):
            await state.change_key(KEY, replaces=KEY)
        with pytest.raises(NotFound):
            await state.change_key(KEY, replaces=replace(KEY, id="none"))

    async def test_a_rotation_is_one_write(self, state: State) -> None:
        await state.put_key(KEY)
        retired, new = replace(KEY, expires_at=50.0), replace(KEY, id="k2", created_at=6.0)
        await state.change_key(retired, replaces=KEY, successor=new)
        assert await state.list_keys() == [retired, new]
        with pytest.raises(Conflict):
            await state.change_key(KEY, replaces=retired, successor=new)
        assert await state.list_keys() == [retired, new]

    async def test_the_last_use_is_the_latest_noted_or_in_the_ledger(self, state: State) -> None:
        await state.put_key(KEY)
        await state.put_key(replace(KEY, id="k2"))
        version = await state.version()
        assert await state.last_uses() == {}
        await state.touch_keys({"k1": 20.0, "nobody": 1.0})
        await state.touch_keys({"k1": 10.0})
        assert await state.last_uses() == {"k1": 20.0}
        await state.append_ledger([row(1, started_at=30.0), row(2, started_at=25.0)])
        assert await state.last_uses() == {"k1": 30.0}
        assert await state.version() == version
        changed = replace(KEY, name="new")
        await state.change_key(changed, replaces=KEY)  # a use meanwhile is no conflict
        assert (await state.get_key("k1")) == replace(changed, last_used_at=20.0)


class TestIdentities:
    async def test_the_installation_is_there_from_the_first_moment(self, state: State) -> None:
        assert await state.list_identities() == FIRST_IDENTITIES

    async def test_everything_is_read_back(self, state: State) -> None:
        tenant = Tenant("acme", ODD, Limits(1, 2, 3, 4.5), 1.0, 2.0)
        project = Project("acme", "web", ODD, Limits(), 1.0)
        grants = (Grant("developer", "acme/web", "root"),)
        person = Principal(
            "p-1", ODD, PrincipalKind.PERSON, "acme", "web", grants, ODD, created_at=1.0
        )
        role = CustomRole("acme", "r", (Rule(("read",), ("keys:@self",), Effect.DENY),), 1.0)
        for fact in (tenant, project, person, role):
            version = await state.version()
            await state.put_identity(fact)
            assert await state.version() > version
        found = await state.list_identities()
        assert found.tenants == (tenant, *FIRST_IDENTITIES.tenants)
        assert found.projects == (project, *FIRST_IDENTITIES.projects)
        assert found.principals == (person, *FIRST_IDENTITIES.principals)
        assert found.roles == (role,)

    async def test_what_belongs_to_nothing_is_refused(self, state: State) -> None:
        for fact in (
            Project("none", "web"),
            Principal("p", "n", PrincipalKind.SERVICE, "default", "none"),
            CustomRole("none", "r", ()),
        ):
            with pytest.raises(NotFound):
                await state.put_identity(fact)
        assert await state.list_identities() == FIRST_IDENTITIES

    async def test_no_change_is_lost(self, state: State) -> None:
        first = Tenant("acme")
        await state.put_identity(first)
        with pytest.raises(Conflict, match="exists already"):
            await state.put_identity(replace(first, title="x"))
        await state.put_identity(replace(first, title="one"), replaces=first)
        with pytest.raises(Conflict, match="changed meanwhile"):
            await state.put_identity(replace(first, title="two"), replaces=first)
        with pytest.raises(Conflict):
            await state.remove_identity(first)

    async def test_only_what_is_empty_can_be_removed(self, state: State) -> None:
        tenant, project = Tenant("acme"), Project("acme", "web")
        role = CustomRole("acme", "r", ())
        holder = Principal(
            "p", "n", PrincipalKind.SERVICE, "acme", "web", (Grant("r", "acme/web"),)
        )
        for fact in (tenant, project, role, holder):
            await state.put_identity(fact)
        for needed in (tenant, project, role):
            with pytest.raises(Conflict, match="still needed by"):
                await state.remove_identity(needed)
        assert await state.remove_principal("p", heir="root", heir_key="k0", now=1.0) == holder
        for free in (role, project, tenant):
            await state.remove_identity(free)
        assert await state.list_identities() == FIRST_IDENTITIES

    async def test_who_is_removed_leaves_nothing_unbounded(self, state: State) -> None:
        gone = Principal("p-1", "gone", PrincipalKind.PERSON)
        child = Principal(
            "p-2", "c", PrincipalKind.SERVICE, grants=(Grant("user", "default", "p-1"),)
        )
        for fact in (gone, child):
            await state.put_identity(fact)
        own = replace(KEY, id="own", principal="p-1", created_at=1.0)
        made = replace(KEY, id="made", principal="p-2", made_with="own", created_at=2.0)
        for key in (own, made):
            await state.put_key(key)
        await state.remove_principal("p-1", heir="root", heir_key="mine", now=7.0)
        found = await state.list_identities()
        heir = replace(child, grants=(Grant("user", "default", "root"),))
        assert found.principals == (heir, *FIRST_IDENTITIES.principals)
        assert await state.list_keys() == [
            replace(own, revoked_at=7.0),
            replace(made, made_with="mine"),
        ]
        assert await state.remove_principal("p-1", heir="root", heir_key="k", now=8.0) is None
        with pytest.raises(Conflict, match="installation itself"):
            await state.remove_principal("root", heir="p-2", heir_key="k", now=8.0)

    async def test_one_subject_is_one_person(self, state: State) -> None:
        person = Principal("p-1", "a", PrincipalKind.PERSON, subject="https://issuer#1")
        await state.put_identity(person)
        with pytest.raises(Conflict, match="subject"):
            await state.put_identity(replace(person, id="p-2"))


def deed(number: int) -> AuditEvent:
    return AuditEvent(
        float(number), "control", ODD, "k", "t", "a", "x", "::1", AuditOutcome.DONE, 200
    )


class TestAudit:
    async def test_events_are_chained_in_order(self, state: State) -> None:
        assert await state.audit_head() == AuditHead()
        version = await state.version()
        expected = chained(AuditHead(), [deed(n) for n in range(5)])
        await state.append_audit([deed(0), deed(1)])
        head = await state.append_audit([deed(n) for n in range(2, 5)])
        assert await state.list_audit() == expected
        assert head == await state.audit_head() == AuditHead(5, expected[-1].hash)
        assert await state.list_audit(after=1, limit=2) == expected[1:3]
        assert await state.list_audit(tenant="t", limit=1) == expected[:1]
        assert await state.list_audit(tenant="none") == []
        assert await state.append_audit([]) == head
        assert await state.version() == version

    async def test_checkpoints_are_kept(self, state: State) -> None:
        marks = [Checkpoint(2, "b" * 64, 2.0, "ff"), Checkpoint(1, "a" * 64, 1.0, "00")]
        for mark in marks:
            await state.put_checkpoint(mark)
        await state.put_checkpoint(replace(marks[0], at=3.0))
        assert await state.list_checkpoints() == [marks[1], replace(marks[0], at=3.0)]

    def test_processes_that_are_killed_leave_a_whole_chain(self, shared_state_url: str) -> None:
        script = """
            import asyncio, sys
            from cloudlm.core.audit import AuditEvent, AuditOutcome
            from cloudlm.state.open import open_state

            async def main(url, who):
                state = await open_state(url)
                print("ready", flush=True)
                while True:
                    event = AuditEvent(1.0, "s", who, "", "", "", "", "", AuditOutcome.DONE)
                    await state.append_audit([event])

            asyncio.run(main(sys.argv[1], sys.argv[2]))
        """
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), shared_state_url]
        processes = [
            subprocess.Popen([*command, who], stdout=subprocess.PIPE) for who in ("a", "b")
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while len(asyncio.run(_audit(shared_state_url))[0]) < 20:
            assert time.monotonic() < deadline
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        records, head = asyncio.run(_audit(shared_state_url))
        assert records == chained(AuditHead(), [one.event for one in records])
        assert head == AuditHead(records[-1].seq, records[-1].hash)


async def _audit(url: str) -> tuple[list[AuditRecord], AuditHead]:
    state = await open_state(url)
    try:
        return await state.list_audit(limit=100_000), await state.audit_head()
    finally:
        await state.close()


class TestJobs:
    async def test_a_job_is_replaced_until_it_has_ended(self, state: State) -> None:
        job = Job("j1", "import", {"source": "/models/a", "deep": {"list": [1, 2.5, None, True]}})
        await state.put_job(job)
        assert await state.get_job("j1") == job
        running = replace(job, state=JobState.RUNNING, progress=0.5, message=ODD, updated_at=2.0)
        await state.put_job(running)
        assert await state.get_job("j1") == running
        failed = replace(running, state=JobState.FAILED, error={"message": ODD, "code": None})
        await state.put_job(failed)
        await state.put_job(failed)  # the same again is no change
        for late in (running, replace(failed, progress=1.0), replace(failed, error=None)):
            with pytest.raises(Conflict, match="ended"):
                await state.put_job(late)
        assert await state.get_job("j1") == failed
        assert await state.get_job("j2") is None

    async def test_jobs_are_listed_newest_first(self, state: State) -> None:
        jobs = [Job(f"j{n}", "import", {}, created_at=float(n // 2)) for n in range(6)]
        for job in jobs:
            await state.put_job(job)
        assert await state.list_jobs() == jobs[::-1]
        assert await state.list_jobs(limit=2) == [jobs[5], jobs[4]]
        assert await state.list_jobs(limit=0) == []

    async def test_unfinished_jobs_are_listed_oldest_first_among_many_that_ended(
        self, state: State
    ) -> None:
        states = list(JobState)
        jobs = [
            Job(f"j{n:02}", "import", {}, state=states[n % len(states)], created_at=float(n // 2))
            for n in range(4 * len(states))
        ]
        for job in reversed(jobs):
            await state.put_job(job)
        unfinished = [job for job in jobs if not job.state.ended]
        assert len(unfinished) == 8
        assert await state.list_unfinished_jobs() == unfinished
        assert await state.list_unfinished_jobs(limit=3) == unfinished[:3]
        assert await state.list_unfinished_jobs(limit=0) == []

    async def test_what_is_read_is_the_readers_own(self, state: State) -> None:
        arguments = {"source": "a", "tags": ["x"]}
        await state.put_job(Job("j1", "import", arguments))
        arguments["tags"].append("y")  # type: ignore[attr-defined]
        first = await state.get_job("j1")
        assert first is not None
        assert first.arguments == {"source": "a", "tags": ["x"]}
        first.arguments["tags"].append("z")  # type: ignore[attr-defined]
        again = await state.get_job("j1")
        assert again is not None
        assert again.arguments == {"source": "a", "tags": ["x"]}


class TestLedger:
    @pytest.mark.promise(3)
    async def test_a_retry_doubles_nothing(self, state: State) -> None:
        await state.append_ledger([])
        await state.append_ledger([row(1), row(2), row(1)])
        await state.append_ledger([msgspec.structs.replace(row(2), prompt_tokens=999), row(3)])
        assert await state.list_ledger() == [row(1), row(2), row(3)]

    async def test_it_is_listed_oldest_first_and_filtered(self, state: State) -> None:
        rows = [row(n, request_id=f"req-{n % 2}", started_at=100.0 - n // 2) for n in range(6)]
        await state.append_ledger(rows)
        oldest_first = [rows[n] for n in (4, 5, 2, 3, 0, 1)]
        assert await state.list_ledger() == oldest_first
        assert await state.list_ledger(since=99.0) == oldest_first[2:]
        assert await state.list_ledger(request_id="req-1") == [rows[5], rows[3], rows[1]]
        assert await state.list_ledger(request_id="req-1", since=99.0, limit=1) == [rows[3]]
        assert await state.list_ledger(limit=0) == []

    async def test_a_large_batch_arrives_whole(self, state: State) -> None:
        rows = [row(number) for number in range(1234)]
        await state.append_ledger(rows)
        assert await state.list_ledger(limit=5000) == rows
        assert len(await state.list_ledger()) == 1000

    @pytest.mark.promise(6)
    async def test_no_text_can_stop_a_row(self, state: State) -> None:
        odd = msgspec.structs.replace(row(1), model=ODD, request_id=ODD)
        await state.append_ledger([odd])
        assert await state.list_ledger(request_id=ODD) == [odd]


class TestSharing:
    """Several openings of one store: tasks, connections and processes."""

    async def test_one_process_sees_what_another_wrote(self, shared_state_url: str) -> None:
        control, gateway = await open_state(shared_state_url), await open_state(shared_state_url)
        try:
            before = await gateway.version()
            await control.put_endpoints("bank", [endpoint(1)])
            assert await gateway.version() == before + 1
            assert await gateway.list_endpoints() == [endpoint(1)]
        finally:
            await control.close()
            await gateway.close()

    async def test_compare_and_set_admits_one(self, shared_state_url: str) -> None:
        states = [await open_state(shared_state_url) for _ in range(2)]
        try:
            tries = [
                states[number % 2].put_deployment(
                    replace(SPEC, max_replicas=number + 1), now=1.0, expected_generation=0
                )
                for number in range(10)
            ]
            done = await asyncio.gather(*tries, return_exceptions=True)
            assert sum(isinstance(one, Conflict) for one in done) == 9
            winner = next(one for one in done if not isinstance(one, BaseException))
            assert await states[0].list_deployments() == [winner]
            assert await states[0].version() == 1
        finally:
            for state in states:
                await state.close()

    async def test_readers_see_whole_writes(self, shared_state_url: str) -> None:
        writer, reader = await open_state(shared_state_url), await open_state(shared_state_url)
        stop = asyncio.Event()

        async def read() -> set[frozenset[int]]:
            seen = set()
            while not stop.is_set():
                seen.add(frozenset(one.revision for one in await reader.list_endpoints()))
            return seen

        reading = asyncio.create_task(read())
        try:
            for revision in range(30):
                endpoints = [endpoint(n, revision=revision) for n in range(8)]
                await writer.put_endpoints("bank", endpoints)
            stop.set()
            assert all(len(revisions) <= 1 for revisions in await reading)
        finally:
            stop.set()
            await writer.close()
            await reader.close()

    async def test_gateways_append_the_same_rows_together(self, shared_state_url: str) -> None:
        states = [await open_state(shared_state_url) for _ in range(2)]
        rows = [row(number) for number in range(300)]
        demand = [Demand(f"m{number}", "g", 1, 0, 0.0, 1.0) for number in range(50)]
        try:
            for _ in range(5):
                await asyncio.gather(
                    states[0].append_ledger(rows),
                    states[1].append_ledger(rows[::-1]),
                    states[0].put_demand(demand),
                    states[1].put_demand(demand[::-1]),
                )
            assert await states[0].list_ledger() == rows
        finally:
            for state in states:
                await state.close()

    def test_processes_lose_no_change(self, shared_state_url: str) -> None:
        script = """
            import asyncio, sys
            from cloudlm.core.deployment import DeploymentSpec
            from cloudlm.core.errors import Conflict
            from cloudlm.state.open import open_state

            async def main(url, who):
                state = await open_state(url)
                done = 0
                while done < 25:
                    current = await state.get_deployment("bank")
                    found = 0 if current is None else current.generation
                    spec = DeploymentSpec("bank", "models:/a/1", env={"WHO": f"{who}-{done}"})
                    try:
                        await state.put_deployment(spec, now=1.0, expected_generation=found)
                    except Conflict:
                        continue
                    done += 1
                await state.close()

            asyncio.run(main(sys.argv[1], sys.argv[2]))
        """
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), shared_state_url]
        processes = [subprocess.Popen([*command, who]) for who in "ab"]
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
        deployments, version = asyncio.run(_read(shared_state_url))
        assert [(one.generation, one.revision) for one in deployments] == [(50, 50)]
        assert version == 50


class TestSchema:
    def test_processes_may_open_a_new_database_together(self, empty_database_url: str) -> None:
        script = """
            import asyncio, sys
            import cloudlm.state.sql
            from cloudlm.state.open import open_state

            async def main(url):
                state = await open_state(url)
                assert await state.version() == 0
                await state.close()

            sys.stdin.readline()  # all start at once, their imports done
            asyncio.run(main(sys.argv[1]))
        """
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), empty_database_url]
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(4)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.close()
        assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]

    async def test_migrations_build_the_tables_that_the_code_knows(
        self, shared_state_url: str
    ) -> None:
        assert await _on_connection(shared_state_url, _differences) == []

    async def test_the_tables_of_a_newer_cloudlm_are_refused(self, shared_state_url: str) -> None:
        await _on_connection(
            shared_state_url,
            lambda connection: connection.exec_driver_sql(
                "UPDATE schema_version SET version_num = '9999'"
            ),
        )
        with pytest.raises(StorageFailed, match=r"newer cloudlm \(revision '9999'.*upgrade"):
            await open_state(shared_state_url)

    async def test_tables_of_others_are_left_alone(self, empty_database_url: str) -> None:
        await _on_connection(
            empty_database_url,
            lambda connection: connection.exec_driver_sql("CREATE TABLE jobs (mine INTEGER)"),
        )
        with pytest.raises(StorageFailed, match="a table 'jobs' that cloudlm did not make"):
            await open_state(empty_database_url)

    async def test_a_failed_migration_leaves_nothing(
        self, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from alembic import op

        def fail(*_args: object, **_kwargs: object) -> None:
            raise RuntimeError("killed half-way")

        with monkeypatch.context() as patch:
            patch.setattr(op, "create_index", fail)
            with pytest.raises(RuntimeError, match="half-way"):
                await open_state(empty_database_url)
        assert await _on_connection(empty_database_url, _table_names) == []
        await (await open_state(empty_database_url)).close()
        assert "ledger" in await _on_connection(empty_database_url, _table_names)


def _differences(connection: sa.Connection) -> list[Any]:
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "compare_type": True}
    )
    return list(compare_metadata(context, metadata))


def _table_names(connection: sa.Connection) -> list[str]:
    return sa.inspect(connection).get_table_names()


async def _on_connection(url: str, work: Callable[[sa.Connection], Any]) -> Any:
    """Do something to a database behind the state's back."""
    engine = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


async def _read(url: str) -> tuple[list[Deployment], int]:
    state = await open_state(url)
    try:
        return await state.list_deployments(), await state.version()
    finally:
        await state.close()


def test_the_port_and_its_twins_have_the_same_methods() -> None:
    from cloudlm.state.memory import MemoryState
    from cloudlm.state.sql import SqlState

    methods = {name for name in dir(State) if re.match(r"[a-z]", name)}
    for twin in (MemoryState, SqlState):
        assert {name for name in dir(twin) if re.match(r"[a-z]", name)} == methods


async def test_usage_sums_what_the_ledger_holds(state: State) -> None:
    day = 86_400.0
    rows = [
        msgspec.structs.replace(
            row(number, started_at=(2 + number % 3) * day - 0.5),
            tenant="acme" if number % 2 else ODD,
            key_id=f"k{number % 4}",
            attempt=1 + number // 10,
            completion_tokens=number,
            project="web",
            cost=2**40 + number,
        )
        for number in range(20)
    ]
    await state.append_ledger(rows)
    (everything,) = await state.usage(UsageQuery(0.0, 9 * day, ()))
    assert (everything.requests, everything.attempts) == (10, 20)
    assert (everything.prompt_tokens, everything.completion_tokens) == (60, sum(range(20)))
    assert everything.cost == 20 * 2**40 + sum(range(20))
    days = await state.usage(UsageQuery(0.0, 9 * day))
    assert [one.day for one in days] == ["1970-01-02", "1970-01-03", "1970-01-04"]
    assert [one.attempts for one in days] == [7, 7, 6]
    of_acme = await state.usage(UsageQuery(0.0, 9 * day, ("tenant", "key"), tenant="acme"))
    assert [(one.tenant, one.key, one.attempts) for one in of_acme] == [
        ("acme", "k1", 5),
        ("acme", "k3", 5),
    ]
    both = {one.tenant for one in await state.usage(UsageQuery(0.0, 9 * day, ("tenant",)))}
    assert len(both) == 2
    (cut,) = await state.usage(UsageQuery(2 * day - 0.5, 2 * day, ("day", "project", "model")))
    assert (cut.day, cut.project, cut.model, cut.attempts) == ("1970-01-02", "web", "bank", 7)
    assert await state.usage(UsageQuery(0.0, 9 * day, project="other")) == []
    assert await state.usage(UsageQuery(0.0, 1.0, ())) == []
