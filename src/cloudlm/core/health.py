"""When a replica that does not answer is not waited for any more. Pure: facts in, a verdict out.

The plan gives its place to another, a roll-out is blamed for it, the autoscaler counts on others,
and people are told that it failed: all by this one rule. Must not know who asks, or whether the
replica answers.
"""

from __future__ import annotations

from cloudlm.core.deployment import Replica, ReplicaState

RESTARTS_TO_FAIL = 2
"""One crash may be bad luck; a replica that crashes again and again will not come up by itself."""
MISSES_TO_FAIL = 2
"""Nor does one look at another's endpoint, or one start that did not come about, say much: a second
one follows seconds later."""


def is_hopeless(replica: Replica) -> bool:
    """Whether a replica that does not answer is not likely to by itself."""
    doubtful = 0 < replica.misses < MISSES_TO_FAIL
    failed = replica.state is ReplicaState.FAILED and not doubtful
    return failed or replica.restarts >= RESTARTS_TO_FAIL
