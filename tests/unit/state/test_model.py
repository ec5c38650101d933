"""The memory twin is the model: random operations give equal answers on SQLite."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlm.core.access import (
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
from cloudlm.core.deployment import (
    Demand,
    DeploymentPhase,
    DeploymentSpec,
    DeploymentStatus,
    Endpoint,
    Replica,
    ReplicaState,
)
from cloudlm.core.errors import CloudlmError
from cloudlm.core.job import Job, JobState
from cloudlm.core.pace import Pace
from cloudlm.core.tenant import KeyRecord, LedgerRow, Outcome, Role
from cloudlm.state.base import State
from cloudlm.state.memory import MemoryState
from cloudlm.state.open import open_state

Call = tuple[str, tuple[Any, ...], dict[str, Any]]

names = st.sampled_from(["a", "b", "b-1", "B\0\\"])
texts = st.text(max_size=8)
small = st.integers(0, 4)
times = st.floats(0, 1e4, allow_nan=False) | st.sampled_from([1.0, 2.0, 9000.0])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(texts, json_values, max_size=2)
specs = st.builds(
    DeploymentSpec,
    name=names,
    model=st.sampled_from(["models:/a/1", "models:/a/2"]),
    min_replicas=st.integers(0, 1),
    max_replicas=st.integers(1, 2),
    options=st.dictionaries(st.just("dtype"), texts | st.booleans() | st.floats(0, 1), max_size=1),
)
statuses = st.builds(
    DeploymentStatus,
    name=names,
    phase=st.sampled_from(DeploymentPhase),
    observed_generation=small,
    wanted_replicas=small,
    ready_replicas=small,
    replicas=st.lists(
        st.builds(Replica, id=texts, state=st.sampled_from(ReplicaState), url=st.none() | texts),
        max_size=2,
    ).map(tuple),
    message=texts,
    updated_at=times,
)
demands = st.builds(Demand, names, names, small, small, times, times, times, ttft_s=times)
paces = st.builds(Pace, names, texts, times, weight=times)
roles = st.sampled_from([role.value for role in Role])
words = st.sampled_from(["default", "acme", "web"])
ids = st.sampled_from(["root", "p-1", "p-2"])
limits = st.builds(Limits, st.none() | small, spend_per_month=st.none() | times)
keys = st.builds(
    KeyRecord,
    names,
    texts,
    roles | words,
    texts,
    texts,
    words,
    times,
    st.none() | times,
    project=words,
    principal=ids,
    scope=words,
    models=st.lists(texts, max_size=2).map(tuple),
    limits=limits,
    expires_at=st.none() | times,
    made_with=names,
)
grants = st.builds(Grant, roles | words, words | st.just("*"), ids | st.just(""))
rules = st.builds(
    Rule,
    st.lists(texts, max_size=2).map(tuple),
    st.lists(texts, max_size=2).map(tuple),
    st.sampled_from(Effect),
)
tenants = st.builds(Tenant, words, texts, limits, times, st.none() | times)
projects = st.builds(Project, words, words, texts, limits, times)
custom_roles = st.builds(CustomRole, words | st.just("*"), words, st.tuples(rules), times)
principals = st.builds(
    Principal,
    ids,
    texts,
    st.sampled_from(PrincipalKind),
    words,
    words,
    st.lists(grants, max_size=2).map(tuple),
    texts,
    limits,
    times,
    st.none() | times,
)
identities = tenants | projects | custom_roles | principals
jobs = st.builds(
    Job,
    id=names,
    kind=texts,
    arguments=objects,
    state=st.sampled_from(JobState),
    progress=times,
    result=objects,
    error=st.none() | objects,
    created_at=times,
)
rows = st.builds(
    LedgerRow,
    id=names | texts,
    request_id=names,
    attempt=small,
    tenant=texts,
    key_id=texts,
    model=texts,
    replica=texts,
    outcome=st.sampled_from(Outcome),
    status=small,
    prompt_tokens=small,
    completion_tokens=small,
    cached_tokens=small,
    started_at=times,
    duration_s=times,
    first_token_s=st.none() | times,
)


@st.composite
def endpoint_calls(draw: st.DrawFn) -> Call:
    model = draw(names)
    endpoints = draw(
        st.lists(st.builds(Endpoint, st.just(model), names, texts, small, times), max_size=3)
    )
    return "put_endpoints", (model, endpoints), {}


def calls(method: str, *args: st.SearchStrategy[Any], **named: Any) -> st.SearchStrategy[Call]:
    return st.tuples(st.just(method), st.tuples(*args), st.fixed_dictionaries(named))


operations = st.one_of(
    calls("put_deployment", specs, now=times, expected_generation=st.none() | small),
    calls("put_deployment", specs, now=times),
    calls("get_deployment", names),
    calls("mark_deleting", names, now=times),
    calls("remove_deployment", names, generation=st.integers(1, 4)),
    calls("put_status", statuses),
    calls("get_status", names),
    endpoint_calls(),
    calls("put_demand", st.lists(demands, max_size=3)),
    calls("list_demand", since=times),
    calls("drop_demand", st.lists(demands, max_size=3)),
    calls("demand_mark"),
    calls("put_pace", paces),
    calls("list_paces"),
    calls("put_key", keys),
    calls("get_key", names),
    calls("revoke_key", names, now=times),
    calls("change_key", keys, replaces=keys, successor=st.none() | keys),
    calls("touch_keys", st.dictionaries(names, times, max_size=2)),
    calls("put_identity", identities),
    calls("put_identity", identities, replaces=st.none() | identities),
    calls("remove_identity", tenants | projects | custom_roles),
    calls("remove_principal", ids, heir=ids, heir_key=names, now=times),
    calls("put_job", jobs),
    calls("get_job", names),
    calls("list_jobs", limit=st.integers(-1, 3)),
    calls("list_unfinished_jobs", limit=st.integers(-1, 3)),
    calls("append_ledger", st.lists(rows, max_size=4)),
    calls("list_ledger", since=times, request_id=st.none() | names, limit=st.integers(-1, 4)),
)
EVERYTHING = (
    "list_deployments",
    "list_statuses",
    "list_endpoints",
    "list_keys",
    "list_identities",
    "last_uses",
    "list_jobs",
    "list_ledger",
    "version",
)


async def answer(state: State, call: Call) -> Any:
    method, args, named = call
    try:
        return await getattr(state, method)(*args, **named)
    except CloudlmError as error:
        return type(error), error.message


async def compare(template: Path, history: list[Call]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copy(template, Path(folder) / "state.db")
        memory: State = MemoryState()
        sql = await open_state(f"sqlite:///{path}")
        try:
            for call in history:
                assert await answer(sql, call) == await answer(memory, call), call
            for method in EVERYTHING:
                assert await getattr(sql, method)() == await getattr(memory, method)(), method
            assert await sql.list_demand(since=0.0) == await memory.list_demand(since=0.0)
            assert await sql.list_paces() == await memory.list_paces()
        finally:
            await sql.close()


@given(history=st.lists(operations, max_size=25))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_both_twins_answer_alike(sqlite_template: Path, history: list[Call]) -> None:
    asyncio.run(compare(sqlite_template, history))
