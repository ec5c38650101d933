"""Long work that answers 202: an import, a pull, later training and compression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class JobState(StrEnum):
    """A job ends exactly once, in one of the last three."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of long work. ``progress`` runs from 0 to 1; ``result`` and ``error`` are small
    JSON objects (``error`` in OpenAI's shape)."""

    id: str
    kind: str
    arguments: Mapping[str, object]
    state: JobState = JobState.QUEUED
    progress: float = 0.0
    message: str = ""
    result: Mapping[str, object] = field(default_factory=dict)
    error: Mapping[str, object] | None = None
    created_at: float = 0.0
    updated_at: float = 0.0
