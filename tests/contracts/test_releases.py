"""The part of the state contract that holds revisions and roll-outs, for every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import Conflict, NotFound
from cloudlm.core.rollout import HISTORY_KEPT, Kind, Order, Outcome, Rollout, Step, Strategy
from cloudlm.core.tenant import LedgerRow
from cloudlm.core.tenant import Outcome as Ended
from cloudlm.state.base import State
from cloudlm.state.open import open_state

SPEC = DeploymentSpec(
    "bank", "models:/bank/1", rollout=Strategy(Kind.CANARY, steps=(Step(5.0, 60.0),), min_score=0.5)
)
ODD = "odd \0 \\u0041 \\ \ud800 ü 猫 '; DROP TABLE revisions; --"


@pytest.fixture
async def state(state_url: str) -> AsyncIterator[State]:
    opened = await open_state(state_url)
    yield opened
    await opened.close()


def version(number: int) -> DeploymentSpec:
    return replace(SPEC, model=f"models:/bank/{number}")


async def numbers(state: State) -> list[int]:
    return [one.number for one in await state.list_revisions("bank")]


class TestRevisions:
    async def test_each_is_noted_by_the_write_that_makes_it(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0, by="ada")
        await state.put_deployment(replace(SPEC, max_replicas=4), now=2.0, by="bob")
        await state.put_deployment(version(2), now=3.0, by=ODD)
        newest, oldest = await state.list_revisions("bank")
        assert (oldest.number, oldest.by, oldest.created_at) == (1, "ada", 1.0)
        assert oldest.spec == replace(SPEC, max_replicas=4), "as it was asked for last"
        assert (newest.number, newest.spec, newest.by) == (2, version(2), ODD)
        assert newest.outcome is Outcome.PENDING
        assert await state.list_revisions("other") == []

    async def test_the_newest_are_kept_and_those_that_are_needed(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        await state.put_rollout(Rollout("bank", stable=1, target=1), replaces=None)
        for number in range(2, HISTORY_KEPT + 6):
            await state.put_deployment(version(number), now=float(number))
        last = HISTORY_KEPT + 5
        assert await numbers(state) == [*range(last, last - HISTORY_KEPT, -1), 1]

    async def test_fixed_versions_stay(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        await state.fix_revision("bank", 1, model="models:/bank/7", adapters={"a": "models:/a/1"})
        await state.fix_revision("bank", 1, model="models:/bank/8", adapters={})
        await state.fix_revision("bank", 9, model="models:/bank/8", adapters={})
        (found,) = await state.list_revisions("bank")
        assert (found.model, found.adapters) == ("models:/bank/7", {"a": "models:/a/1"})

    async def test_outcomes_and_scores(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        await state.end_revision("bank", 1, Outcome.PROMOTED, reason=ODD, now=5.0)
        await state.end_revision("bank", 2, Outcome.PROMOTED, reason="", now=5.0)
        assert await state.add_scores("bank", 2, count=1, total=1.0) is None
        await asyncio.gather(*(state.add_scores("bank", 1, count=2, total=0.5) for _ in range(5)))
        (found,) = await state.list_revisions("bank")
        assert (found.outcome, found.reason, found.ended_at) == (Outcome.PROMOTED, ODD, 5.0)
        assert (found.scores, found.score_total) == (10, 2.5)

    async def test_all_goes_with_the_deployment(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        await state.put_rollout(Rollout("bank"), replaces=None)
        await state.mark_deleting("bank", now=2.0)
        assert await state.remove_deployment("bank", generation=2)
        assert await state.list_revisions("bank") == []
        assert await state.list_rollouts() == []
        again = await state.put_deployment(SPEC, now=3.0)
        assert again.revision == 1
        assert await numbers(state) == [1]


class TestReturning:
    async def test_it_runs_what_ran_and_notes_why(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        await state.end_revision("bank", 1, Outcome.PROMOTED, reason="", now=1.5)
        await state.put_deployment(replace(version(2), max_replicas=4), now=2.0)
        before = await state.version()
        found = await state.return_to("bank", 1, reason="bad", now=3.0, expected_generation=2)
        assert (found.revision, found.generation, found.last_revision) == (1, 3, 2)
        assert found.spec == replace(SPEC, max_replicas=4)
        assert await state.get_deployment("bank") == found
        assert await state.version() > before
        bad, good = await state.list_revisions("bank")
        assert (bad.outcome, bad.reason, bad.ended_at) == (Outcome.ROLLED_BACK, "bad", 3.0)
        assert (good.outcome, good.ended_at) == (Outcome.PROMOTED, 1.5)
        assert (await state.put_deployment(version(3), now=4.0)).revision == 3

    async def test_a_rejected_one_is_tried_again(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        await state.put_deployment(version(2), now=2.0)
        await state.return_to("bank", 1, reason="bad", now=3.0)
        await state.return_to("bank", 2, reason="it was not", now=4.0)
        second, first = await state.list_revisions("bank")
        assert (second.outcome, second.reason) == (Outcome.PENDING, "")
        assert first.outcome is Outcome.ROLLED_BACK

    async def test_what_is_asked_already_changes_nothing(self, state: State) -> None:
        asked = await state.put_deployment(SPEC, now=1.0)
        version = await state.version()
        assert await state.return_to("bank", 1, reason="", now=2.0) == asked
        assert await state.version() == version

    async def test_what_cannot_be_changes_nothing(self, state: State) -> None:
        with pytest.raises(NotFound):
            await state.return_to("bank", 1, reason="", now=1.0)
        asked = await state.put_deployment(SPEC, now=1.0)
        with pytest.raises(NotFound, match="no revision 7"):
            await state.return_to("bank", 7, reason="", now=1.0)
        with pytest.raises(Conflict, match="generation"):
            await state.return_to("bank", 1, reason="", now=1.0, expected_generation=5)
        assert await state.get_deployment("bank") == asked
        await state.mark_deleting("bank", now=2.0)
        with pytest.raises(Conflict, match="deleted"):
            await state.return_to("bank", 1, reason="", now=1.0)


class TestRollouts:
    async def test_what_was_put_is_read_back(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        assert await state.get_rollout("bank") is None
        first = Rollout("bank", 1, 2, 3, 1, 10.5, 11.5, True, 12.5, Order.PROMOTE, ODD)
        await state.put_rollout(first, replaces=None)
        assert await state.get_rollout("bank") == first
        assert await state.list_rollouts() == [first]

    async def test_nobody_overwrites_what_he_has_not_read(self, state: State) -> None:
        await state.put_deployment(SPEC, now=1.0)
        first = Rollout("bank")
        await state.put_rollout(first, replaces=None)
        tries = [
            state.put_rollout(replace(first, paused_at=float(n)), replaces=first)
            for n in range(1, 6)
        ]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert [type(one) for one in results].count(Conflict) == 4
        with pytest.raises(Conflict):
            await state.put_rollout(first, replaces=None)
        with pytest.raises(Conflict, match="does not exist"):
            await state.put_rollout(Rollout("other"), replaces=None)

    async def test_a_split_is_written_with_the_endpoints(self, state: State) -> None:
        split = [
            Endpoint("bank", "bank-r1-0", "http://a", 1, share=0.9),
            Endpoint("bank", "bank-r2-0", "http://b", 2, share=0.1, mirror=0.25),
        ]
        await state.put_endpoints("bank", split)
        assert await state.list_endpoints() == split
        version = await state.version()
        await state.put_endpoints("bank", [replace(split[0], share=None), split[1]])
        assert await state.version() > version


class TestLatestAttempts:
    async def test_of_one_group_newest_first(self, state: State) -> None:
        replicas = [
            "bank-r1-0",
            "bank-r1-11",
            "bank-r11-0",
            "bank-r1",
            "bank-r1-r2-0",
            "a-bank-r1-0",
        ]
        await state.append_ledger(
            [row(f"{n}-{replica}", replica, float(n)) for n in range(4) for replica in replicas]
        )
        found = await state.latest_attempts("bank-r1", since=1.0, limit=5)
        assert [(one.started_at, one.replica) for one in found] == [
            (3.0, "bank-r1-11"),
            (3.0, "bank-r1-0"),
            (2.0, "bank-r1-11"),
            (2.0, "bank-r1-0"),
            (1.0, "bank-r1-11"),
        ]
        assert await state.latest_attempts("bank", since=0.0, limit=5) == []


def row(row_id: str, replica: str, started_at: float) -> LedgerRow:
    return LedgerRow(
        row_id,
        "r",
        1,
        "t",
        "k",
        "bank",
        replica,
        Ended.FINISHED,
        200,
        1,
        1,
        0,
        started_at,
        0.5,
        0.1,
    )
