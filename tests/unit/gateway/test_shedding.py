"""Who is turned away at the door: whom the gate would turn away, at a fraction of its cost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served_gateway import close, connect, served, talk, wire

from cloudlm.core.access import Grant, Principal, PrincipalKind, Project, Tenant
from cloudlm.core.errors import Overloaded
from cloudlm.core.tenant import Role
from cloudlm.gateway.admission import Admission, Criticality, Ticket
from cloudlm.security.keys import mint

STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("enter"),
            st.sampled_from("ab"),
            st.sampled_from(["quiet", "noisy", "other"]),
            st.sampled_from(list(Criticality)),
            st.integers(1, 50),
        ),
        st.tuples(st.just("leave"), st.integers(0, 60)),
    ),
    max_size=120,
)


@given(STEPS, st.integers(0, 3), st.integers(0, 4), st.integers(1, 8))
def test_the_door_says_what_the_gate_would_say(
    steps: list[Any], capacity: int, max_queued: int, max_ongoing: int
) -> None:
    admission, inside = Admission(max_ongoing, max_queued), []
    for now, step in enumerate(steps):
        if step[0] == "leave":
            if inside:
                admission.leave(inside.pop(step[1] % len(inside)), capacity, float(now))
            continue
        _, model, tenant, criticality, cost = step
        ticket = Ticket(model, tenant, float(cost), criticality=criticality)
        said = admission.turned_away(model, tenant, criticality, capacity)
        assert said is None or admission.crowded
        try:
            victim = admission.enter(ticket, capacity, float(now))
        except Overloaded as error:
            assert said is not None
            assert (said.message, said.retry_after_s) == (error.message, error.retry_after_s)
        else:
            assert said is None
            inside.append(ticket)
            if victim is not None:
                inside.remove(victim)
    waiting = sum(one.waits for one in inside)
    assert waiting == sum(admission.queued(model) for model in "ab")
    assert admission.crowded == (waiting >= max_queued or admission.total >= max_ongoing)


class Crowd:
    """As many requests as a gateway takes, which end when they are told to."""

    def __init__(self, rig: Any, kit: Any) -> None:
        self.rig, self.kit, self.asking = rig, kit, []
        (self.replica,) = rig.replicas

    async def __aenter__(self) -> Crowd:
        self.replica.default = self.kit.Plan(pause_s=3600.0)
        rig = self.rig
        body = self.kit.chat_body(stream=True)
        await talk(rig, wire(rig, self.kit.chat_body(model="no such")))  # the key is known now
        self.asking = [asyncio.create_task(talk(rig, wire(rig, body))) for _ in range(2)]
        await self.kit.until(lambda: rig.gateway.gate.waiting == 1)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.asking:
            task.cancel()
        await asyncio.gather(*self.asking, return_exceptions=True)


def handled(rig: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that went the whole way from now on."""
    seen: list[Any] = []
    whole = rig.server._site.answer

    def answer(request: Any) -> Any:
        seen.append(request)
        return whole(request)

    monkeypatch.setattr(rig.server._site, "answer", answer)
    return seen


LONG = {"first_token_timeout_s": 3600.0, "queue_timeout_s": 3600.0, "replica_capacity": 1}
FULL = {**LONG, "max_queued_requests": 1}


@pytest.mark.promise(9)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_while_the_line_is_full_who_comes_is_turned_away_at_the_door(
    kit: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async with served(kit, **FULL) as rig, Crowd(rig, kit):
        seen = handled(rig, monkeypatch)
        rig.gateway.demand.measure()
        request = wire(rig, kit.chat_body(), path=path, x_request_id="mine")
        status, headers, body = await talk(rig, request)
        assert (status, seen) == (503, [])
        assert headers["x-request-id"] == "mine"
        assert headers["x-cloudlm-model"] == kit.MODEL
        assert int(headers["retry-after"]) >= 1
        error = json.loads(body)["error"]
        assert error.get("code", error["type"]) in ("overloaded", "overloaded_error")
        (demand,) = rig.gateway.demand.measure()
        assert demand.requests_per_s > 0  # replicas are started for those who are refused, too
        numbers = rig.gateway.meter.exposition().decode()
        assert 'outcome="refused",status="503"} 1.0' in numbers


async def test_a_connection_goes_on_after_it_was_turned_away(kit: Any) -> None:
    async with served(kit, **FULL) as rig, Crowd(rig, kit):
        reader, writer = await connect(rig)
        request = wire(rig, kit.chat_body())
        writer.write(request * 3 + request[:50])  # three at once, and the beginning of one
        found = b""
        while found.count(b"HTTP/1.1 503") < 3:
            found += await asyncio.wait_for(reader.read(65536), 60)
        writer.write(request[50:])
        while found.count(b"HTTP/1.1 503") < 4:
            found += await asyncio.wait_for(reader.read(65536), 60)
        assert found.count(b"HTTP/1.1") == 4
        await close(writer)


async def test_others_go_the_whole_way(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad keys, unknown models, what is critical or of another tenant, and what cannot be read."""
    async with served(kit, **FULL) as rig, Crowd(rig, kit):
        seen = handled(rig, monkeypatch)
        asked = {
            401: wire(rig, kit.chat_body(), authorization="Bearer nobody"),
            404: wire(rig, kit.chat_body(model="unknown")),
            405: wire(rig, method="GET"),
            400: wire(rig, kit.chat_body(), x_request_priority="very"),
        }
        for status, request in asked.items():
            assert (await talk(rig, request))[0] == status
        critical = wire(rig, kit.chat_body(), x_request_priority="critical")
        assert (await talk(rig, critical))[0] == 503  # this key may not lead
        assert len(seen) == len(asked) + 1
        sheddable = wire(rig, kit.chat_body(), x_request_priority="Sheddable")
        assert (await talk(rig, sheddable))[0] == 503
        assert len(seen) == len(asked) + 1


@pytest.mark.promise(22)
async def test_who_may_not_is_told_nothing_at_the_door(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known keys that were revoked, have expired, or have no right to the model (any more)."""
    async with served(kit, **FULL) as rig:
        holder = Principal("p", "p", PrincipalKind.SERVICE, "t", grants=(Grant("user", "t"),))
        for fact in (Tenant("t"), Project("t", "default"), holder):
            await rig.state.put_identity(fact)
        made = {}
        for name in ("revoked", "stranger"):
            models = ("another",) if name == "stranger" else ()
            made[name] = mint(
                name, Role.USER, kit.PEPPER, 1.0, tenant="t", principal="p", models=models
            )
            await rig.state.put_key(made[name].record)
        async with Crowd(rig, kit):
            seen = handled(rig, monkeypatch)
            asked = {
                name: wire(rig, kit.chat_body(), authorization=f"Bearer {one.text}")
                for name, one in made.items()
            }
            for request in asked.values():
                await talk(rig, request)  # known now
            await rig.state.revoke_key(made["revoked"].record.id, now=2.0)
            await rig.gateway.view.reread()
            seen.clear()
            for name, status in (("revoked", 401), ("stranger", 404)):
                answered, headers, _ = await talk(rig, asked[name])
                assert answered == status
                assert "x-cloudlm-model" not in headers
            assert len(seen) == 2


async def test_a_moderation_is_not_taken_for_the_model_that_it_names(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(kit, **FULL) as rig, Crowd(rig, kit):
        seen = handled(rig, monkeypatch)
        await talk(rig, wire(rig, {"model": kit.MODEL, "input": "x"}, path="/v1/moderations"))
        assert len(seen) == 1


async def test_a_fault_of_the_door_is_not_the_clients(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(kit, **FULL) as rig, Crowd(rig, kit):
        monkeypatch.setattr(rig.gateway.gate, "turned_away", lambda *_: {}["no such thing"])
        seen = handled(rig, monkeypatch)
        assert (await talk(rig, wire(rig, kit.chat_body())))[0] == 503
        assert len(seen) == 1


async def test_who_does_not_read_is_not_answered_at_the_door(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(kit, **FULL) as rig, Crowd(rig, kit):
        seen = handled(rig, monkeypatch)
        reader, writer = await connect(rig)
        writer.write(wire(rig, kit.chat_body()))
        assert b"503" in await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)
        assert seen == []
        (mine,) = (one for one in rig.server._site.connections if one._turn is None)
        mine.pause_writing()
        writer.write(wire(rig, kit.chat_body()))
        await kit.until(lambda: len(seen) == 1)
        mine.resume_writing()
        await close(writer)


async def test_who_goes_first_is_not_turned_away(kit: Any) -> None:
    """Another tenant's first request takes the place of a later one of who floods the line."""
    async with served(kit, **LONG, max_queued_requests=2) as rig:
        async with Crowd(rig, kit) as crowd:
            more = asyncio.create_task(talk(rig, wire(rig, kit.chat_body(stream=True))))
            await kit.until(lambda: rig.gateway.gate.waiting == 2)
            grants = (Grant("user", "quiet"),)
            holder = Principal("p", "p", PrincipalKind.SERVICE, "quiet", grants=grants)
            for fact in (Tenant("quiet"), Project("quiet", "default"), holder):
                await rig.state.put_identity(fact)
            minted = mint("q", Role.USER, kit.PEPPER, 1.0, tenant="quiet", principal="p")
            await rig.state.put_key(minted.record)
            quiet = {"authorization": f"Bearer {minted.text}"}
            first = talk(rig, wire(rig, kit.chat_body(), **quiet))
            crowd.asking.append(asyncio.create_task(first))
            assert (await asyncio.wait_for(more, 60))[0] == 503
            assert not crowd.asking[-1].done()


async def test_what_may_be_known_is_never_turned_away_at_the_door(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(kit, **FULL, cache_models="*") as rig, Crowd(rig, kit):
        seen = handled(rig, monkeypatch)
        assert (await talk(rig, wire(rig, kit.chat_body())))[0] == 503
        assert len(seen) == 1
