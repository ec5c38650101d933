"""Lines that come again and again: one for each reason now and then, and none lost in the count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloudlm.telemetry.damping import INTERVAL_S, MOST_REASONS, Damper

moments = st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 8.0)), max_size=60)


@given(moments)
def test_every_event_is_written_or_counted_and_none_too_soon(events):
    damper, now = Damper(), 0.0
    written, counted, happened = {}, dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    for reason, later_s in events:
        now += later_s
        happened[reason] += 1
        count = damper.take(reason, now)
        if count is None:
            assert now - written[reason] < INTERVAL_S
            continue
        assert reason not in written or now - written[reason] >= INTERVAL_S
        written[reason] = now
        counted[reason] += count
        assert counted[reason] == happened[reason]


def test_a_flood_of_reasons_takes_no_memory():
    damper = Damper()
    for number in range(3 * MOST_REASONS):
        assert damper.take(number, 0.0) == 1
    assert len(damper._written) == MOST_REASONS
