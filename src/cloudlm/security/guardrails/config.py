"""The guardrails' file: which models stand under which policy, read once and strictly.

A policy is for the models it names; the first that names a model holds for it. Must not compile or
act.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import msgspec

from cloudlm.core.errors import BadSetting
from cloudlm.core.yaml_text import NotYaml, parse_yaml
from cloudlm.security.guardrails.detectors import ORDER, Kind

MAX_INPUT_CHARACTERS = 200_000


class Mode(StrEnum):
    """What is done about a match."""

    BLOCK = "block"
    REDACT = "redact"
    LOG = "log"


class Direction(StrEnum):
    """Which way a text goes, seen from the model."""

    IN = "in"
    OUT = "out"


class Form(StrEnum):
    """How a deployment that moderates is asked."""

    OPENAI = "openai"
    LLAMA_GUARD = "llama-guard"


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Unknown fields are faults."""


class Presidio(_Strict, frozen=True):
    """Microsoft's presidio, asked besides the built-in detectors, on the way in."""

    language: str = "en"
    entities: tuple[str, ...] = ()
    min_score: float = 0.5
    spacy_model: str = ""


class Pii(_Strict, frozen=True):
    """Personal and secret data: what is done on the way in and on the way out."""

    inward: Mode | None = msgspec.field(default=None, name="in")
    out: Mode | None = None
    kinds: tuple[Kind, ...] = ORDER
    presidio: Presidio | None = None


class Blocklist(_Strict, frozen=True):
    """Words and expressions under a name."""

    name: str
    words: tuple[str, ...] = ()
    regex: tuple[str, ...] = ()
    on: tuple[Direction, ...] = (Direction.IN, Direction.OUT)
    mode: Mode = Mode.BLOCK


class Sizes(_Strict, frozen=True):
    """The most that is taken."""

    input_characters: int = MAX_INPUT_CHARACTERS
    messages: int = 0
    answer_tokens: int = 0
    mode: Literal["block", "log"] = "block"


class Injection(_Strict, frozen=True):
    """What is done about prompts that try to take over, from a score on."""

    mode: Literal["block", "log"] = "block"
    threshold: float = 0.5


class Policy(_Strict, frozen=True):
    """What holds for some models."""

    models: tuple[str, ...]
    pii: Pii = Pii()
    blocklists: tuple[Blocklist, ...] = ()
    sizes: Sizes = Sizes()
    injection: Injection | None = None


class Moderation(_Strict, frozen=True):
    """Deployments that moderate, and which is asked when a request names none."""

    models: dict[str, Form] = {}
    default: str = ""


class Guardrails(_Strict, frozen=True):
    """The whole file."""

    policies: dict[str, Policy] = {}
    moderation: Moderation = Moderation()


def read(path: Path) -> Guardrails:
    """The file's content. Raises BadSetting that says where it is wrong."""
    where = f"the guardrails file {path}"
    try:
        tree = parse_yaml(path.read_bytes())
    except OSError as error:
        raise BadSetting(f"{where} cannot be read: {error.strerror}") from None
    except NotYaml as error:
        raise BadSetting(f"{where} is not YAML: {error}") from None
    return convert(tree if tree is not None else {}, where)


def convert(tree: Any, where: str) -> Guardrails:
    """A file's content, checked. ``where`` begins the error. Raises BadSetting."""
    try:
        found = msgspec.convert(tree, Guardrails)
    except msgspec.ValidationError as error:
        raise BadSetting(f"{where} is wrong: {error}") from None
    for name, policy in found.policies.items():
        _check(policy, f"{where} is wrong: policy {name!r}")
    default = found.moderation.default
    if default and default not in found.moderation.models:
        raise BadSetting(f"{where} is wrong: moderation.default {default!r} is not in its models")
    return found


def _check(policy: Policy, where: str) -> None:
    if not policy.models:
        raise BadSetting(f"{where} names no models; '*' names all")
    names = [one.name for one in policy.blocklists]
    if len(set(names)) < len(names):
        raise BadSetting(f"{where} has two blocklists of one name")
    for one in policy.blocklists:
        if not (one.words or one.regex):
            raise BadSetting(f"{where}: blocklist {one.name!r} has neither words nor regex")
        if not one.on:
            raise BadSetting(f"{where}: blocklist {one.name!r} looks neither 'in' nor 'out'")
    if policy.pii.presidio is not None and policy.pii.inward is None:
        raise BadSetting(f"{where}: pii.presidio works on the way in, and pii.in is not set")
    sizes = policy.sizes
    if min(sizes.input_characters, sizes.messages, sizes.answer_tokens) < 0:
        raise BadSetting(f"{where}: sizes cannot be negative; 0 sets none")
    if policy.injection is not None and not 0 < policy.injection.threshold <= 1:
        raise BadSetting(f"{where}: injection.threshold must be above 0 and at most 1")
