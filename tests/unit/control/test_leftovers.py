"""What an earlier revision may still run on a driver that is away is not forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.leftovers import Leftovers
from cloudlm.control.observe import Seen, SeenGroup
from cloudlm.core.deployment import DeploymentPhase, GroupObservation, GroupSpec
from cloudlm.core.errors import BadSetting, InvalidRequest, Unavailable
from cloudlm.core.plugins import NotInstalled

DRAINED = 80
"""Passes after which replicas of whose requests nobody knows are stopped all the same."""
DRIVERS = ("cloud", "cluster", "process")


def breaks(plane, error, driver="memory"):
    """From the next restart on, this driver cannot begin: its settings are bad."""

    def build(context):
        raise error

    plane.drivers._build = {**plane.drivers._build, driver: build}


async def left_behind(plane, monkeypatch):
    """Revision 2 ran on a driver that went away; revision 3 answers on the first one."""
    await plane.ask()
    await plane.steps(3)
    await plane.ask(driver="memory")
    await plane.steps(1)
    assert "bank-r2-0" in plane.running()
    goes_away(plane, monkeypatch)
    await plane.steps(1)
    await plane.ask(env={"MARK": "3"})
    await plane.steps(8)
    kept = await plane.state.get_rollout("bank")
    assert (kept.stable, kept.target) == (3, 3), "it is promoted"
    assert await plane.serving() == ["bank-r3-0"]


def goes_away(plane, monkeypatch):
    async def away():
        raise Unavailable("the cluster is away")

    monkeypatch.setattr(plane.drivers.get("memory"), "groups", away)


@pytest.mark.parametrize("restarted", ["", "before", "while deleting", "twice"])
async def test_a_deletion_waits_for_what_a_driver_that_is_away_may_run(
    plane, monkeypatch, restarted
):
    await left_behind(plane, monkeypatch)
    if restarted in ("before", "twice"):
        plane.restart()
        goes_away(plane, monkeypatch)
        await plane.steps(1)
    await plane.state.mark_deleting("bank", now=plane.clock.now())
    await plane.steps(5)
    if restarted in ("while deleting", "twice"):
        plane.restart()
        goes_away(plane, monkeypatch)
        await plane.steps(5)
    status = await plane.state.get_status("bank")
    assert (status.phase, "away" in status.message) == (DeploymentPhase.DELETING, True)
    assert "bank-r2-0" in plane.running()
    monkeypatch.undo()
    await plane.steps(DRAINED)
    assert plane.running() == []
    assert await plane.state.list_deployments() == []


async def test_a_deletion_waits_for_no_driver_that_was_heard_and_runs_nothing(plane, monkeypatch):
    await plane.ask(driver="memory")
    await plane.steps(3)
    await plane.ask(driver="process")
    await plane.steps(DRAINED)
    assert plane.running() == ["bank-r2-0"]
    goes_away(plane, monkeypatch)
    await plane.steps(1)
    await plane.state.mark_deleting("bank", now=plane.clock.now())
    await plane.steps(8)
    assert await plane.state.list_deployments() == []


@pytest.mark.parametrize("error", [BadSetting, InvalidRequest, RuntimeError])
async def test_a_driver_with_bad_settings_is_installed_and_what_it_runs_is_ended(plane, error):
    await plane.ask(driver="memory")
    await plane.ask("other")
    await plane.steps(3)
    plane.restart()
    breaks(plane, error("the region is not set"))
    await plane.steps(3)
    assert await plane.serving() == ["bank-r1-0", "other-r1-0"]
    await plane.state.mark_deleting("bank", now=plane.clock.now())
    await plane.steps(8)
    status = await plane.state.get_status("bank")
    assert status.phase is DeploymentPhase.DELETING
    assert "region" in status.message
    assert plane.running() == ["bank-r1-0", "other-r1-0"]
    plane.restart()  # its settings are mended
    await plane.steps(DRAINED)
    assert plane.running() == ["other-r1-0"]
    assert [one.spec.name for one in await plane.state.list_deployments()] == ["other"]


LOOKS = st.lists(
    st.fixed_dictionaries(
        {
            "asked": st.sets(st.sampled_from(DRIVERS), min_size=1),
            "runs": st.sets(st.sampled_from(DRIVERS)),
            "away": st.sets(st.sampled_from(DRIVERS)),
        }
    ),
    max_size=8,
)


@given(ran=st.sets(st.sampled_from(DRIVERS)), looks=LOOKS)
def test_a_driver_is_done_with_only_once_it_was_heard_without_a_replica(ran, looks):
    leftovers, may = Leftovers(), None
    group = GroupObservation("bank-r1", GroupSpec("bank-r1", "bank", 1, "models:/bank/1", 1))
    for look in looks:
        may = (ran if may is None else may) | look["asked"]
        assert leftovers.expect({"bank": look["asked"]}, {"bank": ran}) == may
        heard = look["runs"] - look["away"]
        faults = {one: Unavailable("away") for one in look["away"]}
        leftovers.note(Seen(tuple(SeenGroup(one, group) for one in sorted(heard)), faults=faults))
        may = {one for one in may if one in look["away"] | look["asked"]} | heard
        assert leftovers.of("bank") == may


def test_who_is_not_installed_runs_nothing():
    leftovers = Leftovers()
    leftovers.expect({"bank": ["process"]}, {"bank": ["gone"]})
    leftovers.note(Seen(faults={"gone": NotInstalled("unknown plug-in")}))
    assert leftovers.of("bank") == {"process"}
    leftovers.expect({}, {})
    assert leftovers.of("bank") == frozenset(), "the deployment is gone"
