"""A deployment's scaling on the wire: what is read, what is refused and how it is said."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.errors import InvalidRequest, UnprocessableRequest
from cloudlm.core.scaling import Algorithm, Scaling, check_scaling, scaling_from_body
from cloudlm.core.schedule import Schedule, check_schedule, holds
from cloudlm.core.wire import spec_body, spec_from_body
from cloudlm.state.documents import dump_spec, load_spec

OFFICE = Schedule("0 8 * * mon-fri", 10 * 3600.0, 2, 6, "Europe/Zurich")
FULL = Scaling(Algorithm.HPA, 400.0, 40.0, 0.8, 30.0, 5.0, 90.0, 600.0, (OFFICE,), 0.05)


def test_a_spec_keeps_its_scaling_on_the_wire_and_in_the_state() -> None:
    spec = DeploymentSpec("bank", "models:/bank/1", scaling=FULL)
    assert spec_from_body(spec_body(spec)) == spec
    assert load_spec(dump_spec(spec)) == spec
    assert scaling_from_body({}) == Scaling()


def test_changing_it_makes_no_new_revision() -> None:
    before = Deployment(DeploymentSpec("bank", "models:/bank/1"))
    after = before.changed(DeploymentSpec("bank", "models:/bank/1", scaling=FULL), 1.0)
    assert (after.generation, after.revision) == (2, 1)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"algorithm": "magic"}, "tokens, hpa, kpa"),
        ({"target_ttft_ms": -1}, "scaling.target_ttft_ms"),
        ({"utilization": 1.5}, "scaling.utilization"),
        ({"late_share": 0.9}, "scaling.late_share"),
        ({"down_window_s": -1}, "scaling.down_window_s"),
        ({"idle_s": "5m"}, "scaling.idle_s"),
        ({"algorithm": "kpa", "target_ttft_ms": 100}, "tokens or hpa"),
        ({"schedules": [{"cron": "0 8 * *", "duration_s": 60, "min_replicas": 1}]}, "five fields"),
        ({"schedules": [{"cron": "61 8 * * *", "duration_s": 60, "min_replicas": 1}]}, "minute"),
        ({"schedules": [{"cron": "0 8 * * *", "duration_s": 60}]}, "changes nothing"),
        ({"schedules": [{"cron": "0 8 * * *", "duration_s": 5, "min_replicas": 1}]}, "duration_s"),
        (
            {
                "schedules": [
                    {"cron": "0 8 * * *", "duration_s": 60, "min_replicas": 1, "timezone": "Mars"}
                ]
            },
            "time zone",
        ),
        (
            {
                "schedules": [
                    {"cron": "0 8 * * *", "duration_s": 60, "min_replicas": 3, "max_replicas": 2}
                ]
            },
            "above max_replicas",
        ),
    ],
)
def test_bad_values_are_named(body: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        check_scaling(scaling_from_body(body))


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(UnprocessableRequest, match=r"scaling\.speed"):
        scaling_from_body({"speed": 3})


# Schedules ----------------------------------------------------------------------------------------


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("cron", "duration_s", "moment", "expected"),
    [
        ("0 8 * * *", 3600.0, "2024-03-01T08:00:00", True),
        ("0 8 * * *", 3600.0, "2024-03-01T08:59:59", True),
        ("0 8 * * *", 3600.0, "2024-03-01T09:00:00", False),
        ("0 8 * * *", 3600.0, "2024-03-01T07:59:59", False),
        ("0 8 * * mon-fri", 3600.0, "2024-03-02T08:30:00", False),  # a Saturday
        ("0 22 * * fri", 10 * 3600.0, "2024-03-02T07:30:00", True),  # over midnight
        ("0 22 * * 5", 10 * 3600.0, "2024-03-02T08:30:00", False),
        ("*/15 * * * *", 300.0, "2024-03-02T08:34:00", True),
        ("*/15 * * * *", 300.0, "2024-03-02T08:36:00", False),
        ("0 0 1 * *", 86_400.0, "2024-03-01T23:00:00", True),
        ("0 0 1 jan,jul *", 86_400.0, "2024-03-01T23:00:00", False),
        ("0 0 13 * fri", 86_400.0, "2024-03-01T12:00:00", True),  # either day will do
        ("0 0 13 * fri", 86_400.0, "2024-03-13T12:00:00", True),
        ("0 0 13 * fri", 86_400.0, "2024-03-14T12:00:00", False),
        ("0 0 * * 7", 86_400.0, "2024-03-03T12:00:00", True),  # Sunday
        ("0 0 * * sun", 7 * 86_400.0, "2024-03-09T23:59:59", True),
        ("30-40/5 9 * * *", 60.0, "2024-03-09T09:35:30", True),
        ("30-40/5 9 * * *", 60.0, "2024-03-09T09:36:30", False),
    ],
)
def test_when_a_schedule_holds(cron: str, duration_s: float, moment: str, expected: bool) -> None:
    schedule = check_schedule(Schedule(cron, duration_s, 1))
    assert holds(schedule, at(moment)) is expected


def test_the_time_of_day_is_the_zones_also_in_summer() -> None:
    for month in ("01", "07"):
        morning = at(f"2024-{month}-10T08:30:00", "Europe/Zurich")
        assert holds(OFFICE, morning)
        assert not holds(OFFICE, morning - 3600.0)


@given(st.integers(0, 59), st.integers(0, 23), st.integers(60, 7 * 86_400), st.integers(0, 2**31))
def test_a_daily_schedule_holds_for_its_length_after_each_begin(
    minute: int, hour: int, duration_s: int, moment: int
) -> None:
    schedule = Schedule(f"{minute} {hour} * * *", float(duration_s), 1)
    begin = datetime.fromtimestamp(moment, UTC).replace(hour=hour, minute=minute, second=0)
    passed_s = (moment - begin.timestamp()) % 86_400
    assert holds(schedule, float(moment)) is (passed_s < duration_s)
