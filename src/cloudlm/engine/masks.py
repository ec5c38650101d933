"""Computes which tokens may come next while the network computes the logits.

One thread of its own: llguidance lets others run meanwhile, so the masks of a step cost its forward
pass next to nothing. The engine's thread touches no guide from ``begin`` to the step's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cloudlm.engine.constraint import TokenGuide


class StepMasks:
    """The masks of one step, which may still be in the making."""

    def __init__(self, made: Future[dict[int, NDArray[np.bool_]]]) -> None:
        self._made = made

    def by_sequence(self) -> Mapping[int, NDArray[np.bool_]]:
        """Allowed tokens [vocabulary] of each constrained sequence; waits for them."""
        return self._made.result()


class MaskThread:
    """Started by the first constrained sequence. ``begin`` and ``close`` are for one thread."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, guides: Mapping[int, TokenGuide]) -> StepMasks:
        """Start on the masks of the next tokens; ``guides`` are by sequence id."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudlm-masks")
        return StepMasks(self._pool.submit(_masks, guides))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _masks(guides: Mapping[int, TokenGuide]) -> dict[int, NDArray[np.bool_]]:
    return {sequence_id: guide.mask() for sequence_id, guide in guides.items()}
