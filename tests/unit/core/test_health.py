"""One rule of what is not waited for, for all who ask."""

from __future__ import annotations

import pytest

from cloudlm.core.deployment import Replica, ReplicaState
from cloudlm.core.health import MISSES_TO_FAIL, RESTARTS_TO_FAIL, is_hopeless


@pytest.mark.parametrize(
    ("replica", "hopeless"),
    [
        (Replica("r", ReplicaState.STARTING), False),
        (Replica("r", ReplicaState.BACKOFF, restarts=RESTARTS_TO_FAIL - 1), False),
        (Replica("r", ReplicaState.BACKOFF, restarts=RESTARTS_TO_FAIL), True),
        (Replica("r", ReplicaState.STARTING, restarts=RESTARTS_TO_FAIL), True),
        (Replica("r", ReplicaState.FAILED), True),
        (Replica("r", ReplicaState.FAILED, misses=MISSES_TO_FAIL - 1), False),
        (Replica("r", ReplicaState.FAILED, misses=MISSES_TO_FAIL), True),
        (Replica("r", ReplicaState.READY, misses=1), False),
    ],
)
def test_what_is_given_up(replica: Replica, hopeless: bool) -> None:
    assert is_hopeless(replica) is hopeless
