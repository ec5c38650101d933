"""What a deployment's spec may hold: the rules, apart from how it is written (``core.wire``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import BadSetting, InvalidRequest
from cloudlm.core.external import EXTERNAL, check_endpoints
from cloudlm.core.fields import check_text, kind_of
from cloudlm.core.model import AddressKind, address_kind, check_name, parse_ref
from cloudlm.core.rollout import check_strategy
from cloudlm.core.routing import check_routing
from cloudlm.core.scaling import check_scaling
from cloudlm.core.settings import check_precision
from cloudlm.core.vllm import read_vllm_options

CLOUDLM = "cloudlm"
VLLM = "vllm"
ENGINES = (CLOUDLM, VLLM)
MAX_REPLICAS = 1000
MAX_ENTRIES = 64
MAX_ADAPTERS = 64
MAX_ADDRESS_LENGTH = 512
MAX_MEMORY_MB = 2**27
_OPTION_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
# Names that would run other code than ours in the replica, or that control itself sets.
_RUNS_OTHER_CODE = ("PATH", "LD_PRELOAD", "LD_AUDIT", "BASH_ENV", "ENV")
_RUNS_OTHER_PYTHON = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE")
_RESERVED_ENV = frozenset((*_RUNS_OTHER_CODE, *_RUNS_OTHER_PYTHON))
_RESERVED_ENV_PREFIX = "CLOUDLM_"


def check_spec(spec: DeploymentSpec) -> DeploymentSpec:
    """Return ``spec`` if control may accept it. Raises InvalidRequest naming the field."""
    check_name(spec.name)
    check_text(spec.model, "model", low=1, max_length=MAX_ADDRESS_LENGTH)
    check_name(spec.driver, "driver")
    if spec.driver == EXTERNAL or spec.endpoints:
        spec = _check_external(spec)
    elif address_kind(spec.model) is AddressKind.REGISTRY:
        parse_ref(spec.model)
    check_name(spec.engine, "engine")
    check_replicas(spec.min_replicas, spec.max_replicas)
    if not 0 < spec.target_ongoing_requests <= 1e6:
        raise InvalidRequest(
            "target_ongoing_requests must be greater than 0 and at most 1000000, "
            f"not {spec.target_ongoing_requests}",
            param="target_ongoing_requests",
        )
    if not 0 <= spec.max_surge <= MAX_REPLICAS:
        raise InvalidRequest(
            f"max_surge must be from 0 to {MAX_REPLICAS}, not {spec.max_surge}", param="max_surge"
        )
    if spec.tenant:
        check_name(spec.tenant, "tenant")
    _check_memory(spec)
    _check_adapters(spec)
    _check_options(spec.options)
    if spec.engine == VLLM:
        read_vllm_options(spec.options)
    elif "precision" in spec.options:
        _check_precision(spec.options["precision"])
    _check_env(spec.env)
    check_routing(spec.routing)
    check_strategy(spec.rollout)
    check_scaling(spec.scaling)
    return spec


def _check_external(spec: DeploymentSpec) -> DeploymentSpec:
    """The spec with as many replicas as it has endpoints. Raises InvalidRequest for what only a
    replica of ours can have."""
    if spec.driver != EXTERNAL:
        raise InvalidRequest(
            f"endpoints are for driver {EXTERNAL!r}, not for {spec.driver!r}", param="driver"
        )
    check_endpoints(spec.endpoints)
    count = len(spec.endpoints)
    if (spec.min_replicas, spec.max_replicas) not in ((1, 1), (count, count)):
        raise InvalidRequest(
            f"a deployment of driver {EXTERNAL!r} has a replica for each of its endpoints ({count} "
            "here): leave min_replicas and max_replicas out, and change its endpoints instead",
            param="min_replicas",
        )
    for name in ("options", "env", "adapters", "asleep", "pinned", "memory_mb"):
        if getattr(spec, name):
            raise InvalidRequest(
                f"{name} is for replicas that this installation starts; driver {EXTERNAL!r} starts "
                "none",
                param=name,
            )
    return replace(spec, min_replicas=count, max_replicas=count)


def check_replicas(min_replicas: int, max_replicas: int) -> None:
    """Raise InvalidRequest unless 0 <= min <= max <= MAX_REPLICAS and max >= 1."""
    if not 1 <= max_replicas <= MAX_REPLICAS:
        raise InvalidRequest(
            f"max_replicas must be from 1 to {MAX_REPLICAS}, not {max_replicas}",
            param="max_replicas",
        )
    if not 0 <= min_replicas <= max_replicas:
        raise InvalidRequest(
            f"min_replicas must be from 0 to max_replicas ({max_replicas}), not {min_replicas}",
            param="min_replicas",
        )


def _check_memory(spec: DeploymentSpec) -> None:
    if not 0 <= spec.memory_mb <= MAX_MEMORY_MB:
        raise InvalidRequest(
            f"memory_mb must be from 1 to {MAX_MEMORY_MB} MiB for a replica, or 0 to have it "
            f"estimated, not {spec.memory_mb}",
            param="memory_mb",
        )
    if spec.pinned and spec.may_be_none:
        raise InvalidRequest(
            "pinned keeps a replica in memory, and min_replicas 0 (or that of a schedule) lets the "
            "last one go: give one of them up",
            param="pinned",
        )


def _check_adapters(spec: DeploymentSpec) -> None:
    for name, address in spec.adapters.items():
        check_name(name, "adapters")
        check_text(address, "adapters", low=1, max_length=MAX_ADDRESS_LENGTH)
        if name == spec.name:
            raise InvalidRequest(
                f"adapter {name!r} has the deployment's own name; clients could not tell them "
                "apart",
                param="adapters",
            )
        if not address.startswith("models:/"):
            raise InvalidRequest(
                f"adapter {name!r}: {address[:80]!r} is not in the registry: import it first "
                "('cloudlm models import FOLDER'), then name models:/name/version",
                param="adapters",
            )
        parse_ref(address)


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if not _OPTION_NAME.fullmatch(name):
            raise InvalidRequest(
                f"options: the name {name[:80]!r} is not valid: use a-z, 0-9 and '_'",
                param="options",
            )
        param = f"options.{name}"
        if isinstance(value, str):
            check_text(value, param, max_length=1024)
        elif not isinstance(value, bool | int | float):
            raise InvalidRequest(
                f"{param} must be a text, a number, true or false, not {kind_of(value)}",
                param=param,
            )
        elif not -(2**53) <= value <= 2**53:  # NaN and the infinities fail here too
            raise InvalidRequest(f"{param} is not a number that can be used", param=param)


def _check_precision(value: Any) -> None:
    try:
        check_precision(value, "options.precision")
    except BadSetting as error:
        raise InvalidRequest(error.message, param="options.precision") from None


def _check_env(env: Mapping[str, Any]) -> None:
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name):
            raise InvalidRequest(
                f"env: the name {name[:80]!r} is not valid: use letters, digits and '_'",
                param="env",
            )
        if name in _RESERVED_ENV or name.startswith(_RESERVED_ENV_PREFIX):
            raise InvalidRequest(
                f"environment variable {name} is reserved; engine settings go into 'options'",
                param=f"env.{name}",
            )
        check_text(value, f"env.{name}", max_length=4096)
