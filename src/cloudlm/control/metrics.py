"""Control's own metrics. Labels are bounded: deployments that exist, nothing a caller sends."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class ControlMetrics:
    """All metrics of one control process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._passes = Histogram(
            "cloudlm_control_pass_seconds",
            "Duration of one reconciliation, seconds.",
            registry=self._registry,
        )
        self._failed = Counter(
            "cloudlm_control_failed_passes", "Reconciliations that failed.", registry=self._registry
        )
        self._stalled = Counter(
            "cloudlm_control_stalled_replicas",
            "Replicas restarted because they stood still.",
            registry=self._registry,
        )
        self._wanted = Gauge(
            "cloudlm_deployment_wanted_replicas",
            "Replicas a deployment should have.",
            ["deployment"],
            registry=self._registry,
        )
        self._ready = Gauge(
            "cloudlm_deployment_ready_replicas",
            "Replicas of a deployment that answer.",
            ["deployment"],
            registry=self._registry,
        )
        self._leads = Gauge(
            "cloudlm_control_leads",
            "1 while this control leads, 0 while another does.",
            registry=self._registry,
        )
        self._token = Gauge(
            "cloudlm_control_lease_token",
            "Token of the lease while this control leads; grows with each new leader.",
            registry=self._registry,
        )
        self._budget = Gauge(
            "cloudlm_control_memory_budget_bytes",
            "Memory that the models of this machine may take together; 0: there is no budget.",
            registry=self._registry,
        )
        self._held = Gauge(
            "cloudlm_control_memory_held_bytes",
            "Memory of the budget that replicas take, as estimated, bytes.",
            registry=self._registry,
        )
        self._unloaded = Counter(
            "cloudlm_control_unloads",
            "Deployments that had to give their memory to others.",
            registry=self._registry,
        )
        self._memory = Gauge(
            "cloudlm_deployment_memory_bytes",
            "Memory of the budget that a deployment's replicas take, bytes.",
            ["deployment"],
            registry=self._registry,
        )
        self._shown: set[str] = set()

    def passed(self, duration_s: float) -> None:
        self._passes.observe(duration_s)

    def failed(self) -> None:
        self._failed.inc()

    def stalled(self) -> None:
        self._stalled.inc()

    def leads(self, token: int) -> None:
        """With the lease of this token; 0: not any more."""
        self._leads.set(int(token > 0))
        self._token.set(token)

    def memory(self, budget_bytes: int, held_bytes: int) -> None:
        self._budget.set(budget_bytes)
        self._held.set(held_bytes)

    def unloaded(self) -> None:
        self._unloaded.inc()

    def deployment(self, name: str, wanted: int, ready: int, memory_bytes: int = 0) -> None:
        self._shown.add(name)
        self._memory.labels(name).set(memory_bytes)
        self._wanted.labels(name).set(wanted)
        self._ready.labels(name).set(ready)

    def forget(self, name: str) -> None:
        if name in self._shown:
            self._shown.discard(name)
            self._wanted.remove(name)
            self._ready.remove(name)
            self._memory.remove(name)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
