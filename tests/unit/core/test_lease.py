"""When a lease may be taken: by the watcher's own clock, whatever other clocks say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import CloudlmError
from cloudlm.core.lease import Leader, Lease, leader_body, leader_from_body, may_take, watched

HELD = Lease("control", "a", 3, 0, 10.0)


def test_what_is_free_or_ones_own_is_taken_at_once():
    for lease in (Lease("control"), replace(HELD, holder="")):
        assert may_take(watched(None, lease, 5.0), "b", 5.0)
    assert may_take(watched(None, HELD, 5.0), "a", 5.0)
    assert not may_take(watched(None, HELD, 5.0), "b", 5.0)


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.booleans()), max_size=40), st.floats(-1e9, 1e9))
def test_it_is_taken_only_after_so_long_a_silence(steps, start):
    """Silence is what the watcher saw between two looks; each renewal begins it anew."""
    lease, now = HELD, start
    watch = watched(None, lease, now)
    since = now
    for pause_s, renews in steps:
        now += pause_s
        if renews:
            lease = replace(lease, renewals=lease.renewals + 1)
            since = now
        watch = watched(watch, lease, now)
        assert may_take(watch, "b", now) == (now - since >= lease.lasts_s)
        assert not (watch.lives and now - since >= lease.lasts_s)
        assert not renews or watch.lives


def test_a_leader_goes_over_the_wire():
    leader = Leader("host:/home#1", 7, True)
    assert leader_from_body(leader_body(leader)) == leader
    with pytest.raises(CloudlmError):
        leader_from_body({"holder": 1})
