"""What flags and files say of a deployment: replicas, options, adapters, strategy, whole specs.

Text in, facts out. Must not ask control.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import CloudlmError, InvalidRequest
from cloudlm.core.rollout import Kind, Step, Strategy
from cloudlm.core.spec import ENGINES, MAX_REPLICAS
from cloudlm.core.wire import spec_from_body
from cloudlm.core.yaml_text import NotYaml, parse_documents, parse_yaml

ENGINE_HELP = f"What generates: {' or '.join(ENGINES)}."


def read_replicas(text: str) -> tuple[int, int]:
    """``2`` or ``1:3`` as (minimum, maximum). Raises InvalidRequest."""
    first, colon, second = text.partition(":")
    try:
        low = int(first)
        high = int(second) if colon else low
    except ValueError:
        raise InvalidRequest(
            f"replicas {text[:40]!r} is neither a whole number nor MIN:MAX, such as 2 or 1:3"
        ) from None
    if fault := _replicas_fault(low, high):
        raise InvalidRequest(f"replicas {text[:40]!r}: {fault}")
    return low, high


def _replicas_fault(low: int, high: int) -> str:
    """What is wrong with the bounds and what to write instead; empty if nothing is."""
    if low < 0 or high < 0:
        return "nothing can run fewer than 0 times; write a number or MIN:MAX, such as 2 or 1:3"
    if high == 0:
        return (
            "with a MAX of 0 nothing could ever answer. Write MIN:MAX as 0:1 to have the last "
            "replica go when nobody asks and come back with a request; 'cloudlm sleep NAME' gives "
            "the memory back at once, 'cloudlm delete NAME' stops everything"
        )
    if low > high:
        return f"MIN:MAX begins with the smaller number; did you mean {high}:{low}?"
    if high > MAX_REPLICAS:
        return f"MAX in MIN:MAX is at most {MAX_REPLICAS}"
    return ""


def read_options(pairs: list[str]) -> dict[str, str | int | float | bool]:
    """``key=value`` pairs; values are read as YAML scalars. Raises InvalidRequest."""
    options: dict[str, str | int | float | bool] = {}
    for pair in pairs:
        key, equals, raw = pair.partition("=")
        try:
            value = parse_yaml(raw) if equals else None
        except NotYaml:
            value = None
        if not key or not isinstance(value, str | int | float | bool):
            raise InvalidRequest(f"option {pair!r} must be KEY=VALUE, such as max_model_len=512")
        options[key] = value
    return options


def read_adapters(pairs: list[str]) -> dict[str, str]:
    """``name=models:/name/3`` pairs. Raises InvalidRequest."""
    adapters: dict[str, str] = {}
    for pair in pairs:
        name, equals, address = pair.partition("=")
        if not name or not equals or name in adapters:
            raise InvalidRequest(
                f"adapter {pair!r} must be NAME=ADDRESS, such as polite=models:/polite/1, each "
                "name once"
            )
        adapters[name] = address
    return adapters


def read_strategy(kind: Kind, steps: str | None) -> Strategy:
    """The strategy of the flags: ``5:300,50:600`` are percent and seconds of a canary's steps,
    and mean one. Raises InvalidRequest."""
    if steps is None:
        return Strategy(kind)
    if kind not in (Kind.ROLLING, Kind.CANARY):
        raise InvalidRequest(f"--canary has nothing to say to --strategy {kind}")
    found = []
    for step in steps.split(","):
        percent, _, seconds = step.partition(":")
        try:
            found.append(Step(float(percent), float(seconds)))
        except ValueError:
            raise InvalidRequest(
                f"--canary {steps!r} must be PERCENT:SECONDS,…, such as 5:300,50:600"
            ) from None
    return Strategy(Kind.CANARY, steps=tuple(found))


def read_specs(file: Path) -> list[DeploymentSpec]:
    """The deployments in a YAML file, ``-`` for standard input. Raises InvalidRequest naming the
    file and the fault."""
    try:
        text = sys.stdin.read() if file == Path("-") else file.read_bytes()
        documents = [doc for doc in parse_documents(text) if doc is not None]
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:  # of standard input
        raise InvalidRequest(f"{file} is not valid YAML: {error.reason}") from None
    except NotYaml as error:
        raise InvalidRequest(f"{file} is not valid YAML: {error}") from None
    if not documents:
        raise InvalidRequest(f"{file} holds no deployment")
    specs = []
    for number, document in enumerate(documents, 1):
        try:
            specs.append(spec_from_body(document))
        except CloudlmError as error:
            where = f"{file}, document {number}" if len(documents) > 1 else str(file)
            raise InvalidRequest(f"{where}: {error.message}", param=error.param) from None
    return specs
