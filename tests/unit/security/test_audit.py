"""The audit log shows every tampering, at its place."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.audit import AuditEvent, AuditHead, AuditOutcome, AuditRecord, chained
from cloudlm.core.errors import InvalidRequest
from cloudlm.security.audit import (
    Checker,
    Flood,
    checkpoint_line,
    is_signed,
    public_key,
    read_checkpoint,
    sign,
)

SEED = b"s" * 32
PUBLIC = public_key(SEED)


def event(number):
    return AuditEvent(
        float(number),
        "control",
        "root",
        "k",
        "default",
        "create keys",
        "POST /x",
        "::1",
        AuditOutcome.DONE,
        201,
        f"req-{number}",
        "",
    )


def log(count):
    return chained(AuditHead(), [event(number) for number in range(count)])


def head_of(records):
    return AuditHead(records[-1].seq, records[-1].hash) if records else AuditHead()


def verdict(records, head, checkpoints=()):
    checker = Checker(checkpoints, PUBLIC)
    checker.see(records)
    return checker.end(head)


@given(st.integers(0, 30))
def test_a_whole_log_is_whole(count):
    records = log(count)
    marks = [sign(AuditHead(one.seq, one.hash), 1.0, SEED) for one in records[::3]]
    assert verdict(records, head_of(records), marks) is None


@pytest.mark.promise(31)
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_tampering_is_found_at_its_place(data):
    records = log(data.draw(st.integers(2, 20)))
    place = data.draw(st.integers(0, len(records) - 1))
    names = [one.name for one in fields(AuditEvent)]
    how = data.draw(st.sampled_from(["remove", "swap", "repeat", "hash", "previous", *names]))
    head, changed = head_of(records), list(records)
    if how == "remove":
        del changed[place]
    elif how == "swap":
        place = min(place, len(records) - 2)
        changed[place : place + 2] = changed[place + 1], changed[place]
    elif how == "repeat":
        changed.insert(place, changed[place])
        place += 1
    elif how in ("hash", "previous"):
        changed[place] = replace(changed[place], **{how: "f" * 64})
    else:
        old = changed[place].event
        value = getattr(old, how)
        other = "x" if isinstance(value, str) else value + 1
        changed[place] = replace(changed[place], event=replace(old, **{how: other}))
    finding = verdict(changed, head)
    assert finding is not None
    assert finding.seq == place + 1


@pytest.mark.promise(31)
@given(st.integers(1, 10), st.integers(1, 10))
def test_a_cut_tail_is_noticed_also_when_the_noted_end_is_cut_too(kept, cut):
    records = log(kept + cut)
    mark = sign(head_of(records), 1.0, SEED)
    left = records[:kept]
    for head in (head_of(records), head_of(left)):
        finding = verdict(left, head, [mark])
        assert finding is not None
        assert (finding.seq, "tail is cut" in finding.problem) == (kept + 1, True)
    assert verdict(left, head_of(left)) is None  # what only a checkpoint can know


@pytest.mark.promise(31)
@given(st.integers(1, 10), st.integers(0, 9))
def test_a_log_written_anew_does_not_fit_its_checkpoints(count, place):
    records = log(count)
    place %= count
    events = [one.event for one in records]
    events[place] = replace(events[place], actor="somebody else")
    forged = chained(AuditHead(), events)
    mark = sign(head_of(records), 1.0, SEED)
    finding = verdict(forged, head_of(forged), [mark])
    assert finding is not None
    assert "written anew" in finding.problem


def test_only_the_installations_key_signs():
    records = log(3)
    other = sign(head_of(records), 1.0, b"o" * 32)
    good = sign(head_of(records), 1.0, SEED)
    assert is_signed(good, PUBLIC)
    for bad in (other, replace(good, at=2.0), replace(good, seq=2), replace(good, signature="zz")):
        assert not is_signed(bad, PUBLIC)
    finding = verdict(records, head_of(records), [other])
    assert finding is not None
    assert "wrong signature" in finding.problem
    with pytest.raises(InvalidRequest, match="64 hex digits"):
        is_signed(good, "nonsense")


def test_a_checkpoint_is_a_line():
    mark = sign(AuditHead(3, "a" * 64), 1.5, SEED)
    assert read_checkpoint(checkpoint_line(mark)) == mark
    for bad in ("", "{", "[]", "{}", '{"seq": -1}'):
        with pytest.raises(InvalidRequest):
            read_checkpoint(bad)


def test_a_flood_is_bounded_and_counted():
    flood = Flood(per_s=2.0, burst=3.0)
    assert [flood.take(10.0) for _ in range(6)] == [0, 0, 0, None, None, None]
    assert flood.take(11.0) == 3
    assert flood.take(11.0) == 0
    assert flood.take(11.0) is None
    assert flood.take(5.0) is None  # a clock that goes back gives nothing


def test_a_record_cannot_be_mistaken_for_another():
    one = chained(AuditHead(), [replace(event(1), actor="ab", key_id="c")])[0]
    two = chained(AuditHead(), [replace(event(1), actor="a", key_id="bc")])[0]
    assert isinstance(one, AuditRecord)
    assert one.hash != two.hash
