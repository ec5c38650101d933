"""What a replica tells Prometheus: our ``cloudlm_*`` names and those that vLLM's routers scrape.

Counts and times are taken here; gauges and the engine's counters are read at the scrape. Labels
have few values: the model, a route of the table, a status, a finish reason. Never a prompt or key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cloudlm import __version__
from cloudlm.core.chat import FinishReason
from cloudlm.core.clock import Clock
from cloudlm.engine.api import EngineInfo, EngineStats, TokenEvent

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Buckets = tuple[float, ...]
_FIRST_TOKEN_S: Buckets = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_BETWEEN_TOKENS_S: Buckets = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S: Buckets = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)

Snapshot = Callable[[], tuple[EngineInfo, EngineStats] | None]


class Metrics:
    """The registry of one worker; ``snapshot`` gives the engine's facts, None before loading."""

    def __init__(self, model: str, clock: Clock, snapshot: Snapshot) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self._model = model
        self._lag_s = 0.0
        self.http_requests = Counter(
            "cloudlm_http_requests",
            "Requests answered, by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.http_seconds = Histogram(
            "cloudlm_http_request_seconds",
            "Time from the request's head to the answer's last byte, seconds.",
            ["route"],
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self.first_token = self._histogram(
            "time_to_first_token", "Time to the first token, seconds.", _FIRST_TOKEN_S
        )
        self.between_tokens = self._histogram(
            "inter_token_latency",
            "Time between two tokens of a sequence, seconds.",
            _BETWEEN_TOKENS_S,
        )
        self.end_to_end = self._histogram(
            "e2e_request_latency", "Time from arrival to the last token, seconds.", _REQUEST_S
        )
        self.queue_time = self._histogram(
            "request_queue_time", "Time from arrival to the first step, seconds.", _REQUEST_S
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.finished = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in FinishReason:
            self.finished.labels(model, reason.value)
        self.registry.register(_EngineCollector(model, snapshot, self.take_lag))

    def _histogram(self, name: str, doc: str, buckets: Buckets) -> Histogram:
        made = Histogram(
            f"vllm:{name}_seconds", doc, ["model_name"], buckets=buckets, registry=self.registry
        )
        return made.labels(self._model)

    def _counter(self, name: str, doc: str) -> Counter:
        made = Counter(f"vllm:{name}", doc, ["model_name"], registry=self.registry)
        return made.labels(self._model)

    def note_lag(self, seconds: float) -> None:
        """The event loop came back ``seconds`` late."""
        self._lag_s = max(self._lag_s, seconds)

    def take_lag(self) -> float:
        """The longest stall of the event loop since the last scrape, seconds."""
        lag_s, self._lag_s = self._lag_s, 0.0
        return lag_s

    def ended(self, reason: str) -> None:
        self.finished.labels(self._model, reason).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestWatch:
    """Takes the times of one API request's sequences, from its arrival (monotonic seconds) on."""

    def __init__(
        self, metrics: Metrics, arrived: float, sequences: int, prompt_tokens: int
    ) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last: list[float | None] = [None] * sequences
        self._open = set(range(sequences))
        self._prompt_tokens = prompt_tokens

    @property
    def unfinished(self) -> bool:
        return bool(self._open)

    def on_event(self, number: int, event: TokenEvent) -> None:
        """One event of sequence ``number``."""
        now = self._metrics.clock.monotonic()
        if self._prompt_tokens:
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
            self._prompt_tokens = 0
        if event.queued_s is not None:
            self._metrics.queue_time.observe(event.queued_s)
        if event.token_ids:
            self._metrics.generation_tokens.inc(len(event.token_ids))
            last = self._last[number]
            if last is None:
                self._metrics.first_token.observe(now - self._arrived)
            else:
                self._metrics.between_tokens.observe(now - last)
            self._last[number] = now
        if event.finish_reason is not None:
            self._open.discard(number)
            self._metrics.ended(event.finish_reason.value)
            if event.finish_reason is not FinishReason.ABORT:
                self._metrics.end_to_end.observe(now - self._arrived)

    def close(self) -> None:
        """What has not ended by now was broken off."""
        for _ in self._open:
            self._metrics.ended(FinishReason.ABORT.value)
        self._open.clear()


class _EngineCollector(Collector):
    """The engine's own counters, read when somebody asks."""

    def __init__(self, model: str, snapshot: Snapshot, take_lag: Callable[[], float]) -> None:
        self._model = model
        self._snapshot = snapshot
        self._take_lag = take_lag

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        facts = self._snapshot()
        yield _gauge(
            "cloudlm_worker_ready", "1 when the model is loaded.", float(facts is not None)
        )
        yield _gauge(
            "cloudlm_event_loop_lag_seconds",
            "Longest stall of the event loop since the last scrape.",
            self._take_lag(),
        )
        if facts is None:
            return
        info, stats = facts
        yield from _infos(self._model, info)
        for name, doc, value in _gauges(stats):
            yield self._labelled(GaugeMetricFamily, name, doc, value)
        for name, doc, value in _counters(stats):
            yield self._labelled(CounterMetricFamily, name, doc, value)

    def _labelled(
        self,
        family: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        doc: str,
        value: float,
    ) -> CounterMetricFamily | GaugeMetricFamily:
        made = family(name, doc, labels=["model_name"])
        made.add_metric([self._model], value)
        return made


def _gauges(stats: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("vllm:num_requests_running", "Sequences in the running batch.", stats.running),
        ("vllm:num_requests_waiting", "Sequences waiting to run.", stats.waiting),
        ("vllm:kv_cache_usage_perc", "Used share of the key-value cache, 0 to 1.", stats.kv_usage),
        ("cloudlm_engine_alive", "1 while the engine's thread lives.", float(stats.alive)),
    ]


def _counters(stats: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
        ("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits),
        ("vllm:num_preemptions", "Sequences put back to make room.", stats.preemptions),
        ("vllm:spec_decode_num_drafts", "Guesses of several tokens.", stats.drafts),
        (
            "vllm:spec_decode_num_draft_tokens",
            "Tokens guessed ahead.",
            stats.drafted_tokens,
        ),
        (
            "vllm:spec_decode_num_accepted_tokens",
            "Guessed tokens that were right.",
            stats.accepted_tokens,
        ),
        ("cloudlm_engine_steps", "Steps that the engine has done.", stats.steps),
    ]


def _gauge(name: str, doc: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, doc, value=value)


def _infos(model: str, info: EngineInfo) -> Iterator[GaugeMetricFamily]:
    cache = GaugeMetricFamily(
        "vllm:cache_config_info",
        "The key-value cache.",
        labels=["model_name", "block_size", "num_gpu_blocks", "cache_dtype"],
    )
    cache.add_metric([model, str(info.block_size), str(info.blocks_total), info.dtype], 1.0)
    yield cache
    about = GaugeMetricFamily(
        "cloudlm_model_info",
        "The loaded model.",
        labels=[
            "model_name",
            "architecture",
            "parameters",
            "dtype",
            "device",
            "max_model_len",
            "version",
        ],
    )
    facts = (info.architecture, info.parameters, info.dtype, info.device, info.max_model_len)
    about.add_metric([model, *map(str, facts), __version__], 1.0)
    yield about
