"""The gateway's numbers for Prometheus. Labels are bounded: models that are deployed, outcomes,
statuses; never anything that a client made up. Must not be asked for a decision."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from cloudlm.core.tenant import Outcome

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
NO_MODEL = ""


class Meter:
    """Counters of one gateway, in a registry of its own."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "cloudlm_gateway_requests",
            "Requests that ended; model is empty if it is not deployed here.",
            ["model", "outcome", "status"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "cloudlm_gateway_request_duration_seconds",
            "From the whole request to the end of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._ttft = Histogram(
            "cloudlm_gateway_time_to_first_token_seconds",
            "From the whole request to the first content of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._ongoing = Gauge(
            "cloudlm_gateway_requests_ongoing",
            "Requests admitted and not ended.",
            ["model"],
            registry=self.registry,
        )
        self._attempts = Counter(
            "cloudlm_gateway_attempts",
            "Requests sent to replicas.",
            ["model", "outcome"],
            registry=self.registry,
        )
        self._retries = Counter(
            "cloudlm_gateway_retries",
            "Attempts after the first.",
            ["model"],
            registry=self.registry,
        )
        self._tokens = Counter(
            "cloudlm_gateway_tokens",
            "Tokens accounted for.",
            ["model", "kind"],
            registry=self.registry,
        )
        # Finding a child costs more than counting in it, and the sets are small.
        self._request_child = lru_cache(4096)(self._requests.labels)
        self._model_children = lru_cache(1024)(self._children_of)

    def _children_of(self, model: str) -> _ModelChildren:
        return _ModelChildren(
            self._duration.labels(model),
            self._ttft.labels(model),
            self._ongoing.labels(model),
            self._retries.labels(model),
            self._tokens.labels(model, "prompt"),
            self._tokens.labels(model, "completion"),
            {outcome: self._attempts.labels(model, outcome.value) for outcome in Outcome},
        )

    def watch(self, name: str, doc: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, doc, registry=self.registry).set_function(value)

    def entered(self, model: str) -> None:
        """A request was admitted."""
        self._model_children(model).ongoing.inc()

    def left(self, model: str) -> None:
        """A request that was admitted ended."""
        self._model_children(model).ongoing.dec()

    def retried(self, model: str) -> None:
        """A request goes to another replica."""
        self._model_children(model).retries.inc()

    def first_token(self, model: str, seconds: float) -> None:
        """The first content of an answer is about to be sent."""
        self._model_children(model).ttft.observe(seconds)

    def attempt_ended(
        self, model: str, outcome: Outcome, prompt_tokens: int, completion_tokens: int
    ) -> None:
        """One attempt was accounted for."""
        children = self._model_children(model)
        children.attempts[outcome].inc()
        if prompt_tokens:
            children.prompt_tokens.inc(prompt_tokens)
        if completion_tokens:
            children.completion_tokens.inc(completion_tokens)

    def request_ended(self, model: str, outcome: Outcome, status: int, seconds: float) -> None:
        """One request has its answer; ``model`` is NO_MODEL unless it is deployed."""
        self._request_child(model, outcome.value, str(status)).inc()
        self._model_children(model).duration.observe(seconds)

    def exposition(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)


class _ModelChildren:
    __slots__ = (
        "attempts",
        "completion_tokens",
        "duration",
        "ongoing",
        "prompt_tokens",
        "retries",
        "ttft",
    )

    def __init__(
        self,
        duration: Histogram,
        ttft: Histogram,
        ongoing: Gauge,
        retries: Counter,
        prompt_tokens: Counter,
        completion_tokens: Counter,
        attempts: dict[Outcome, Counter],
    ) -> None:
        self.duration = duration
        self.ttft = ttft
        self.ongoing = ongoing
        self.retries = retries
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.attempts = attempts
