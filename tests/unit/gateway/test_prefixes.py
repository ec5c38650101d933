"""The default route: a prompt goes to who has its beginning, unless that one is too busy."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import Endpoint
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.policies import REQUEST_BLOCKS
from cloudlm.gateway.prefixes import BLOCK_BYTES, Prefixes, block_keys
from cloudlm.gateway.router import choose

LONG = random.Random(1).randbytes(40 * BLOCK_BYTES)


def fleet(count: int) -> list[Endpoint]:
    return [Endpoint("m", f"r{n}", f"http://{n}", 1) for n in range(count)]


def sent(loads: Loads, endpoints: list[Endpoint], body: bytes, now: float = 0.0) -> str:
    """Where ``body`` goes, and is answered at once."""
    keys = block_keys(body, "t")
    found = choose(endpoints, loads, now, keys=keys)
    assert found is not None
    loads.end(found.replica, loads.begin(found.replica, keys, now))
    return found.replica


@given(st.binary(max_size=5000), st.binary(max_size=5000), st.integers(0, 5000))
def test_equal_beginnings_have_equal_keys(first: bytes, second: bytes, cut: int) -> None:
    joined = first[:cut] + second
    mine, other = block_keys(first, "t"), block_keys(joined, "t")
    common = next((n for n, (a, b) in enumerate(zip(first, joined, strict=False)) if a != b), None)
    common = min(len(first), len(joined)) if common is None else common
    for block in range(min(len(mine), len(other))):
        assert (mine[block] == other[block]) == ((block + 1) * BLOCK_BYTES <= common)


@pytest.mark.promise(7)
@pytest.mark.known_failure("CVE-2025-25183")
def test_tenants_share_no_keys() -> None:
    assert not set(block_keys(LONG, "a")) & set(block_keys(LONG, "b"))


@pytest.mark.known_failure("sglang#26263")
def test_a_conversation_stays_where_it_is() -> None:
    loads, endpoints = Loads(), fleet(4)
    home = sent(loads, endpoints, LONG)
    for turn in range(5):
        sent(loads, endpoints, random.Random(turn).randbytes(9000))  # others come between
        assert sent(loads, endpoints, LONG + b"x" * 3000 * turn) == home


def test_cold_prompts_go_round() -> None:
    loads, endpoints = Loads(), fleet(4)
    prompts = [random.Random(n).randbytes(9000) for n in range(8)]
    given_to = [sent(loads, endpoints, prompt) for prompt in prompts]
    assert given_to[:4] == given_to[4:]
    assert len(set(given_to)) == 4


@pytest.mark.known_failure("sglang#21199")
def test_a_shared_beginning_does_not_pile_up() -> None:
    """Everybody sends the same long prompt at once: the others take their part."""
    loads, endpoints = Loads(), fleet(3)
    keys = block_keys(LONG, "t")
    for _ in range(60):
        found = choose(endpoints, loads, 0.0, keys=keys)
        assert found is not None
        loads.begin(found.replica, keys, 0.0)
    ongoing = [loads.of(one.replica).ongoing for one in endpoints]
    slack = len(keys) / REQUEST_BLOCKS + 1
    assert max(ongoing) - min(ongoing) <= slack


def test_a_failed_replica_has_an_empty_cache() -> None:
    loads, endpoints = Loads(), fleet(2)
    home = sent(loads, endpoints, LONG)
    loads.failed(home, 0.0)
    assert loads.prefixes.known(home, block_keys(LONG, "t"), 0.0) == 0


def test_blocks_are_forgotten_in_time() -> None:
    prefixes, keys = Prefixes(kept_s=10.0), block_keys(LONG, "t")
    prefixes.note("r", keys, 0.0)
    assert prefixes.known("r", keys, 9.0) == len(keys)
    assert prefixes.known("r", keys, 11.0) == 0


@pytest.mark.promise(40)
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 50))
def test_the_index_is_bounded_and_keeps_beginnings(lengths: list[int], kept: int) -> None:
    prefixes = Prefixes(kept_blocks=kept)
    for number, length in enumerate(lengths):
        keys = block_keys(bytes([number]) * (length * BLOCK_BYTES), "t")
        prefixes.note("r", keys, float(number))
        assert prefixes.known("r", keys, float(number)) == min(len(keys), kept)
        assert len(prefixes._seen.get("r", ())) <= kept


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_work_in_flight_is_given_back(steps: list[tuple[int, bool]]) -> None:
    loads, endpoints, running = Loads(), fleet(3), []  # type: Any
    for which, ends in steps:
        if ends and running:
            loads.end(*running.pop())
        else:
            keys = block_keys(LONG[: which * 7000], "t")
            found = choose(endpoints, loads, 0.0, keys=keys)
            assert found is not None
            running.append((found.replica, loads.begin(found.replica, keys, 0.0)))
    for one in running:
        loads.end(*one)
    assert all(loads.of(e.replica).blocks == loads.of(e.replica).ongoing == 0 for e in endpoints)


def test_what_is_too_old_to_be_believed_takes_no_memory() -> None:
    prefixes = Prefixes(kept_s=10.0)
    for second in range(100):
        prefixes.note("r", [bytes([second, number]) for number in range(4)], float(second))
    assert len(prefixes._seen["r"]) == 11 * 4
    assert len(prefixes._holders) == 11
    assert prefixes.known("r", [bytes([89, number]) for number in range(4)], 99.0) == 4
    assert prefixes.known("r", [bytes([88, 0])], 99.0) == 0
    assert not prefixes.holders(bytes([88, 0]))


def test_a_huge_prompt_is_decided_quickly() -> None:
    """100,000 tokens in 400,000 bytes; the goal of 3 ms is measured by the bench."""
    loads, endpoints = Loads(), fleet(8)
    body = random.Random(2).randbytes(400_000)
    sent(loads, endpoints, body)
    best = min(_timed(loads, endpoints, body) for _ in range(5))
    assert best < 1.0


def _timed(loads: Loads, endpoints: list[Endpoint], body: bytes) -> float:
    began = time.perf_counter()
    sent(loads, endpoints, body)
    return time.perf_counter() - began


async def test_the_answer_says_how_it_was_routed(kit: Any) -> None:
    async with kit.open_rig(replicas=3) as rig:
        text = "word " * 3000
        body = kit.chat_body(messages=[{"role": "user", "content": text}])
        first = await rig.ask(body)
        assert first.headers["x-cloudlm-route"] == "least-cost; known=0"
        await rig.ask(kit.chat_body())  # a short one goes to another
        again = await rig.ask(body)
        assert again.headers["x-cloudlm-replica"] == first.headers["x-cloudlm-replica"]
        assert again.headers["x-cloudlm-route"] == "least-cost; known=14"
        rig.assert_nothing_open()


def test_a_prompt_that_is_computed_is_no_longer_in_the_way() -> None:
    """A replica that writes an answer to a long prompt is as free as one that wrote to a short
    one; until its answer begins it is not."""
    loads, endpoints = Loads(), fleet(2)
    keys = block_keys(LONG, "t")
    turn = loads.begin("r0", keys, 0.0)
    for _ in range(2):
        loads.begin("r1", (), 0.0)
    found = choose(endpoints, loads, 0.0)
    assert found is not None and found.replica == "r1"
    loads.computed("r0", turn)
    found = choose(endpoints, loads, 0.0)
    assert found is not None and found.replica == "r0"
    loads.computed("r0", turn)  # once is enough
    loads.end("r0", turn)
    assert loads.of("r0").blocks == loads.of("r0").ongoing == 0


async def test_a_stream_that_has_begun_has_no_prompt_to_be_computed(kit: Any) -> None:
    async with kit.open_rig(replicas=1) as rig:
        rig.replicas[0].default = kit.Plan(tokens=3, stall_at=2)
        messages = [{"role": "user", "content": "word " * 3000}]
        body = kit.chat_body(messages=messages, stream=True)
        response = await rig.gateway.handler.handle(rig.request(body))
        load = next(iter(rig.gateway.handler._rooms.loads._loads.values()))
        assert (load.ongoing, load.blocks) == (1, 0)
        await response.body.aclose()
        rig.assert_nothing_open()


def test_who_holds_a_beginning_is_known() -> None:
    prefixes, keys = Prefixes(kept_blocks=4), block_keys(LONG, "t")[:3]
    prefixes.note("a", keys, 0.0)
    prefixes.note("b", keys, 0.0)
    assert prefixes.holders(keys[0]) == ("a", "b")
    assert prefixes.holders(keys[1]) == ()  # it begins no prompt
    prefixes.note("a", [b"1", b"2", b"3", b"4"], 1.0)  # pushes the others out
    assert prefixes.holders(keys[0]) == ("b",)
    prefixes.keep_only({"a"})
    assert prefixes.holders(keys[0]) == ()
    assert prefixes._holders.keys() == {b"1"}
    prefixes.forget("a")
    assert not prefixes._holders
