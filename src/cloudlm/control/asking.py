"""What placement is asked for a deployment: its wishes, and its engine's limits of a step. Pure.

Must not look a model up: who asks knows its figures, or where to find them.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudlm.control.needs import Batch
from cloudlm.control.offers import Asked
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.figures import ModelFigures
from cloudlm.core.spec import VLLM

# Tokens and sequences of a step where the deployment's options do not say: our engine's, and
# vLLM's own defaults.
_BATCH = {VLLM: (2048, 256)}
_OWN_BATCH = (1024, 64)


def asked_of(spec: DeploymentSpec, look_up: Callable[[DeploymentSpec], ModelFigures]) -> Asked:
    """What placement is asked for a deployment; ``look_up`` tells the figures of a model that has
    none in its placement. Raises InvalidRequest naming what is missing."""
    if spec.placement is None or spec.placement.traffic is None:
        raise InvalidRequest(
            f"{spec.name}: placement.traffic is missing; say for how much to plan, such as "
            "placement: {traffic: {requests_per_s: 2, prompt_tokens: 800, output_tokens: 200}}",
            param="placement.traffic",
        )
    traffic = spec.placement.traffic
    figures = spec.placement.figures or look_up(spec)
    longest = traffic.prompt_tokens + traffic.output_tokens
    if 0 < figures.context_length < longest:
        raise InvalidRequest(
            f"{spec.name}: requests of {longest} tokens are longer than the model's "
            f"{figures.context_length}; lower placement.traffic.prompt_tokens or output_tokens",
            param="placement.traffic",
        )
    return Asked(
        figures=figures,
        placement=spec.placement,
        traffic=traffic,
        batch=_batch(spec),
        min_replicas=spec.min_replicas,
    )


def _batch(spec: DeploymentSpec) -> Batch:
    tokens, sequences = _BATCH.get(spec.engine, _OWN_BATCH)
    names = ("max_batch_tokens", "max_batch_sequences")
    if spec.engine == VLLM:
        names = ("max_num_batched_tokens", "max_num_seqs")
    return Batch(_whole(spec, names[0], tokens), _whole(spec, names[1], sequences))


def _whole(spec: DeploymentSpec, option: str, default: int) -> int:
    value = spec.options.get(option, default)
    if type(value) is not int or value < 1:
        raise InvalidRequest(
            f"{spec.name}: option {option} must be a whole number above 0, not {value!r}",
            param=f"options.{option}",
        )
    return value
