"""The gateway's numbers for Prometheus. Labels are bounded: models that are deployed, outcomes,
statuses; never anything that a client made up. Must not be asked for a decision.

Counting happens some ten times per request, reading once in many seconds; so counts are plain
numbers, and take Prometheus' form only when they are read. Everything runs in one thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from cloudlm.core.tenant import Outcome

_SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
)
_LIMITS = [*(str(limit) for limit in _SECONDS), "+Inf"]
NO_MODEL = ""


class _Spread:
    """How many durations fell into each bucket."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * len(_LIMITS)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts, as Prometheus wants them."""
        so_far = 0
        found: list[tuple[str, float]] = []
        for limit, count in zip(_LIMITS, self.counts, strict=True):
            so_far += count
            found.append((limit, so_far))
        return found


class _ModelNumbers:
    """What is counted for one model."""

    __slots__ = (
        "attempts",
        "completion_tokens",
        "duration",
        "ended",
        "fallbacks",
        "hedges",
        "mirrored",
        "not_mirrored",
        "ongoing",
        "prompt_tokens",
        "resumes",
        "retries",
        "ttft",
    )

    def __init__(self) -> None:
        self.duration = _Spread()
        self.ttft = _Spread()
        self.ongoing = 0
        self.retries = 0
        self.resumes = 0
        self.hedges = 0
        self.fallbacks = 0
        self.mirrored = 0
        self.not_mirrored = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.attempts: dict[Outcome, int] = {}
        self.ended: dict[int, dict[Outcome, int]] = {}  # requests, by status


class Meter:
    """Counters of one gateway, in a registry of its own."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._models: defaultdict[str, _ModelNumbers] = defaultdict(_ModelNumbers)
        self._guarded: Counter[tuple[str, str, str, str]] = Counter()
        self.registry.register(self)

    def watch(self, name: str, doc: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, doc, registry=self.registry).set_function(value)

    def entered(self, model: str) -> None:
        """A request was admitted."""
        self._models[model].ongoing += 1

    def left(self, model: str) -> None:
        """A request that was admitted ended."""
        self._models[model].ongoing -= 1

    def retried(self, model: str) -> None:
        """A request goes to another replica."""
        self._models[model].retries += 1

    def resumed(self, model: str) -> None:
        """A stream goes on at another replica."""
        self._models[model].resumes += 1

    def hedged(self, model: str) -> None:
        """A second attempt begins beside a slow one."""
        self._models[model].hedges += 1

    def fell_back(self, model: str) -> None:
        """A request leaves a model that cannot answer it for another."""
        self._models[model].fallbacks += 1

    def mirrored(self, model: str) -> None:
        """A copy of a request goes to a revision that is tried out."""
        self._models[model].mirrored += 1

    def not_mirrored(self, model: str) -> None:
        """A copy was left out because too many are under way."""
        self._models[model].not_mirrored += 1

    def first_token(self, model: str, seconds: float) -> None:
        """The first content of an answer is about to be sent."""
        self._models[model].ttft.observe(seconds)

    def attempt_ended(
        self, model: str, outcome: Outcome, prompt_tokens: int, completion_tokens: int
    ) -> None:
        """One attempt was accounted for."""
        numbers = self._models[model]
        numbers.attempts[outcome] = numbers.attempts.get(outcome, 0) + 1
        numbers.prompt_tokens += prompt_tokens
        numbers.completion_tokens += completion_tokens

    def guarded(self, model: str, rule: str, direction: str, mode: str, count: int) -> None:
        """A guardrail's rule matched; all four words come from the guardrails' file."""
        self._guarded[model, rule, direction, mode] += count

    def request_ended(self, model: str, outcome: Outcome, status: int, seconds: float) -> None:
        """One request has its answer; ``model`` is NO_MODEL unless it is deployed."""
        numbers = self._models[model]
        of_status = numbers.ended.get(status)
        if of_status is None:
            of_status = numbers.ended[status] = {}
        of_status[outcome] = of_status.get(outcome, 0) + 1
        numbers.duration.observe(seconds)

    def exposition(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All numbers in Prometheus' terms; called by the registry."""
        yield self._request_counts()
        yield self._spread(
            "cloudlm_gateway_request_duration_seconds",
            "From the whole request to the end of its answer.",
            lambda numbers: numbers.duration,
        )
        yield self._spread(
            "cloudlm_gateway_time_to_first_token_seconds",
            "From the whole request to the first content of its answer.",
            lambda numbers: numbers.ttft,
        )
        ongoing = GaugeMetricFamily(
            "cloudlm_gateway_requests_ongoing", "Requests admitted and not ended.", labels=["model"]
        )
        retries = CounterMetricFamily(
            "cloudlm_gateway_retries", "Attempts after the first.", labels=["model"]
        )
        resumes = CounterMetricFamily(
            "cloudlm_gateway_resumes",
            "Attempts to go on with a broken stream.",
            labels=["model"],
        )
        hedges = CounterMetricFamily(
            "cloudlm_gateway_hedges", "Attempts beside a slow one.", labels=["model"]
        )
        fallbacks = CounterMetricFamily(
            "cloudlm_gateway_fallbacks",
            "Requests that left a model for another of their route.",
            labels=["model"],
        )
        mirrored = CounterMetricFamily(
            "cloudlm_gateway_mirrored",
            "Copies of requests for a revision that is tried out; left out where too many were "
            "under way.",
            labels=["model", "left_out"],
        )
        for model, numbers in self._models.items():
            if numbers.mirrored or numbers.not_mirrored:
                mirrored.add_metric([model, "false"], numbers.mirrored)
                mirrored.add_metric([model, "true"], numbers.not_mirrored)
            hedges.add_metric([model], numbers.hedges)
            fallbacks.add_metric([model], numbers.fallbacks)
            ongoing.add_metric([model], numbers.ongoing)
            resumes.add_metric([model], numbers.resumes)
            retries.add_metric([model], numbers.retries)
        yield ongoing
        yield self._attempt_counts()
        yield retries
        yield resumes
        yield hedges
        yield fallbacks
        yield mirrored
        yield self._token_counts()
        if self._guarded:
            yield self._guarded_counts()

    def _request_counts(self) -> Metric:
        family = CounterMetricFamily(
            "cloudlm_gateway_requests",
            "Requests that ended; model is empty if it is not deployed here.",
            labels=["model", "outcome", "status"],
        )
        for model, numbers in self._models.items():
            for status, outcomes in numbers.ended.items():
                for outcome, count in outcomes.items():
                    family.add_metric([model, outcome.value, str(status)], count)
        return family

    def _attempt_counts(self) -> Metric:
        family = CounterMetricFamily(
            "cloudlm_gateway_attempts", "Requests sent to replicas.", labels=["model", "outcome"]
        )
        for model, numbers in self._models.items():
            for outcome in Outcome:
                family.add_metric([model, outcome.value], numbers.attempts.get(outcome, 0))
        return family

    def _guarded_counts(self) -> Metric:
        family = CounterMetricFamily(
            "cloudlm_gateway_guardrail_matches",
            "Matches of guardrails' rules, and what was done about them.",
            labels=["model", "rule", "direction", "mode"],
        )
        for labels, count in self._guarded.items():
            family.add_metric(list(labels), count)
        return family

    def _token_counts(self) -> Metric:
        family = CounterMetricFamily(
            "cloudlm_gateway_tokens", "Tokens accounted for.", labels=["model", "kind"]
        )
        for model, numbers in self._models.items():
            family.add_metric([model, "prompt"], numbers.prompt_tokens)
            family.add_metric([model, "completion"], numbers.completion_tokens)
        return family

    def _spread(self, name: str, doc: str, of: Callable[[_ModelNumbers], _Spread]) -> Metric:
        family = HistogramMetricFamily(name, doc, labels=["model"])
        for model, numbers in self._models.items():
            spread = of(numbers)
            family.add_metric([model], spread.buckets(), spread.total_s)
        return family
