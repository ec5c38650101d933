"""When a replica on its way out may be stopped."""

from __future__ import annotations

import pytest

from cloudlm.control.drain import GATEWAYS_NOTICE_S, Drains


def test_one_that_served_nobody_may_stop_at_once():
    drains = Drains(30.0)
    drains.note({"a"}, {"a"}, set(), 0.0)
    assert drains.done({"a"}, {}, 0.0)


@pytest.mark.promise(20)
def test_one_that_served_waits_for_gateways_and_requests():
    drains = Drains(30.0)
    drains.note({"a"}, {"a"}, {"a"}, 0.0)
    assert not drains.done({"a"}, {"a": 0}, 0.0)
    assert not drains.done({"a"}, {"a": 1}, GATEWAYS_NOTICE_S)
    assert drains.done({"a"}, {"a": 0}, GATEWAYS_NOTICE_S)
    assert drains.done({"a"}, {"a": 1}, 30.0)


def test_one_that_does_not_answer_waits_for_the_limit():
    drains = Drains(30.0)
    drains.note({"a"}, {"a"}, {"a"}, 0.0)
    assert not drains.done({"a"}, {}, 29.0)
    assert drains.done({"a"}, {}, 30.0)


def test_all_of_a_group_must_be_done():
    drains = Drains(30.0)
    drains.note({"a", "b"}, {"a", "b"}, {"b"}, 0.0)
    assert not drains.done({"a", "b"}, {"b": 1}, 5.0)
    assert drains.done(set(), {}, 0.0)


@pytest.mark.promise(20)
def test_nobody_is_done_who_was_not_told_to_leave():
    assert not Drains(30.0).done({"a"}, {"a": 0}, 100.0)


def test_one_that_may_stay_after_all_begins_anew_next_time():
    drains = Drains(30.0)
    drains.note({"a"}, {"a"}, {"a"}, 0.0)
    drains.note({"a"}, set(), set(), 5.0)
    drains.note({"a"}, {"a"}, {"a"}, 40.0)
    assert not drains.done({"a"}, {"a": 1}, 45.0)
    drains.keep_only(set())
    assert not drains.done({"a"}, {}, 1000.0)
