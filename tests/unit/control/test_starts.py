"""How long a start takes: once per life, whatever the replica and the wall clock do later."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.observe import Seen
from cloudlm.control.starts import LONGEST_UNSEEN_S, Starts
from cloudlm.core.deployment import Replica, ReplicaState

WALL = 1_000_000.0


def replica(began_at=WALL, restarts=0):
    return Replica("r0", ReplicaState.STARTING, started_at=began_at, restarts=restarts)


def seen(ready=False, sleeping=False):
    ids = frozenset({"r0"})
    return Seen(ready=ids if ready else frozenset(), sleeping=ids if sleeping else frozenset())


def at(starts, now, one=None, *, jump_s=0.0, **how):
    """What a look at ``now`` seconds after the replica's beginning measures."""
    return starts.look([one or replica()], seen(**how), now, WALL + now + jump_s).get("r0")


def test_from_the_beginning_of_the_process_to_the_first_answer():
    starts = Starts()
    assert at(starts, 2.0) is None
    assert at(starts, 30.0) is None
    assert at(starts, 40.0, ready=True) == 40.0
    assert at(starts, 41.0, ready=True) is None


def test_what_was_never_seen_starting_is_not_measured():
    assert at(Starts(), 40.0, ready=True) is None


@pytest.mark.parametrize("how", [{}, {"sleeping": True}])
def test_who_answered_once_does_not_start_again(how):
    starts = Starts()
    at(starts, 1.0)
    assert at(starts, 5.0, ready=True) == 5.0
    at(starts, 86_000.0, **how)
    assert at(starts, 86_400.0, ready=True) is None


def test_who_was_asleep_when_first_seen_does_not_start():
    starts = Starts()
    at(starts, 10.0, sleeping=True)
    at(starts, 11.0)
    assert at(starts, 12.0, ready=True) is None


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_wall_clock_that_is_set_makes_no_start_longer(jump_s):
    starts = Starts()
    at(starts, 1.0)
    assert at(starts, 20.0, jump_s=jump_s, ready=True) == 20.0


def test_of_an_old_silent_one_it_is_not_known_whether_it_served():
    starts = Starts()
    at(starts, LONGEST_UNSEEN_S + 1.0)
    assert at(starts, LONGEST_UNSEEN_S + 5.0, ready=True) is None


def test_what_served_under_an_earlier_control_is_not_measured():
    starts = Starts()
    starts.recall(["r0"])
    at(starts, 100.0)
    assert at(starts, 110.0, ready=True) is None
    starts.keep_only(())
    later = replica(WALL + 200.0)
    at(starts, 201.0, later)
    assert at(starts, 230.0, later, ready=True) == 30.0


def test_a_crash_on_the_way_is_no_measure():
    starts = Starts()
    at(starts, 1.0)
    again = replica(WALL + 10.0, restarts=1)
    at(starts, 11.0, again)
    assert at(starts, 20.0, again, ready=True) is None


def test_a_driver_that_cannot_tell_for_a_moment_begins_no_new_life():
    starts = Starts()
    at(starts, 1.0)
    at(starts, 5.0, ready=True)
    at(starts, 6.0, replica(0.0))
    assert at(starts, 7.0, ready=True) is None


looks = st.lists(
    st.tuples(
        st.sampled_from(["silent", "ready", "sleeping"]),
        st.floats(0.1, 100_000.0),
        st.floats(-1e6, 1e6),
    ),
    max_size=30,
)


@given(looks)
def test_one_life_is_measured_once_at_most_and_never_longer_than_it_took(found):
    starts, now, measured = Starts(), 0.5, []
    at(starts, now)
    for how, step_s, jump_s in found:
        now += step_s
        told = at(starts, now, jump_s=jump_s, **({} if how == "silent" else {how: True}))
        if told is not None:
            measured.append(told)
            assert told == pytest.approx(now)
    answers = [how for how, _, _ in found if how != "silent"]
    assert len(measured) == (answers[:1] == ["ready"])
