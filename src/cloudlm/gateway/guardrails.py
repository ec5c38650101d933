"""Guardrails in the path of a request: one step in, and a rendering on the way out.

``screen`` looks at a request before anything else is done with it, has it refused, changes it or
lets it be, and puts a ``FilteredRendering`` before the client's dialect where answers are looked at
too. What was found is told in numbers: in one log line for each request, in the metrics and in
``x-cloudlm-guardrails``; never in words of the text. Must not know a dialect, route or account.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloudlm.core.errors import ContentFiltered, InvalidRequest, NotSupported, PayloadTooLarge
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.moderations import MODERATED
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import header_safe
from cloudlm.gateway.filtered import FilteredRendering
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.texts import Text, texts_of, token_ids_in
from cloudlm.gateway.view import ServedModel
from cloudlm.security.access import covers_name
from cloudlm.security.guardrails import config
from cloudlm.security.guardrails.config import Direction, Mode
from cloudlm.security.guardrails.injection import score
from cloudlm.security.guardrails.policy import REDACTED, Ruleset, acting
from cloudlm.security.guardrails.redaction import Mapping
from cloudlm.security.guardrails.scanner import Scanner, scan
from cloudlm.telemetry.logs import get_logger

HEADER = "x-cloudlm-guardrails"
ON_THE_LOOP_BYTES = 16 * 1024
"""Larger requests are read in a thread, so that they hold up nobody else."""
READERS = 2
_READ = frozenset({Operation.CHAT, Operation.COMPLETION, Operation.EMBEDDING, Operation.TOKENIZE})
_FOREIGN_ROLES = frozenset({"user", "tool", "function"})
"""Who writes a message that may try to take over: not the operator."""

_log = get_logger(__name__)


class Findings:
    """What was found in one request and its answer, in numbers."""

    def __init__(self, exchange: Exchange, meter: Meter) -> None:
        self._exchange = exchange
        self._meter = meter
        self._counts: Counter[tuple[str, Direction, Mode]] = Counter()
        exchange.at_end(self._tell)

    def note(self, rule: str, direction: Direction, mode: Mode) -> None:
        """One more."""
        self._counts[rule, direction, mode] += 1

    def said(self) -> str:
        """For a header: what was done, about which rules."""
        return ", ".join(sorted({f"{mode}:{rule}" for rule, _, mode in self._counts}))

    def _tell(self) -> None:
        model = self._exchange.model
        for (rule, direction, mode), count in self._counts.items():
            self._meter.guarded(model, rule, direction, mode, count)
        if self._counts:
            found = [f"{d}:{m}:{rule}={n}" for (rule, d, m), n in self._counts.items()]
            fields = {"model": model, "found": sorted(found)}
            _log.info("guardrails_matched", extra={"fields": fields})


class Guardrails:
    """The policies of one gateway."""

    def __init__(self, wanted: config.Guardrails, meter: Meter) -> None:
        self.moderation = wanted.moderation
        self._meter = meter
        self._sets = [Ruleset(name, policy) for name, policy in wanted.policies.items()]
        self._of: dict[tuple[str, str | None], Ruleset | None] = {}
        self._readers = ThreadPoolExecutor(READERS, "guardrails")

    async def screen(self, exchange: Exchange, call: Call, model: ServedModel) -> Call:
        """``call`` as it may go on. Raises ContentFiltered, PayloadTooLarge, and NotSupported for
        what cannot be looked at."""
        rules = self._rules(model)
        if rules is None or call.policy == MODERATED or call.operation not in _READ:
            return call
        findings = Findings(exchange, self._meter)
        try:
            if len(call.body) <= ON_THE_LOOP_BYTES and rules.presidio is None:
                call, mapping = _inward(rules, call, findings)
            else:
                loop = asyncio.get_running_loop()
                with exchange.interrupt:
                    call, mapping = await loop.run_in_executor(
                        self._readers, _inward, rules, call, findings
                    )
        finally:
            said = findings.said()
            if said:
                exchange.headers[HEADER] = ", ".join(map(header_safe, said.split(", ")))
        if not call.generates or not (mapping or rules.watches_output):
            return call
        return _outward(rules, call, mapping, findings)

    def close(self) -> None:
        """Take no more requests; those that are being read are read to their end."""
        self._readers.shutdown(wait=False)

    def _rules(self, model: ServedModel) -> Ruleset | None:
        """The first policy that names the model or, for an adapter, what it belongs to."""
        name = (model.name, model.parent)
        if name not in self._of:
            if len(self._of) > 10_000:  # models come and go
                self._of.clear()
            found = (r for r in self._sets if _names(r.policy.models, name))
            self._of[name] = next(found, None)
        return self._of[name]


def open_guardrails(path: Path, meter: Meter) -> Guardrails:
    """The guardrails of a file. Raises BadSetting and MissingExtra."""
    return Guardrails(config.read(path), meter)


def _names(patterns: Iterable[str], names: Iterable[str | None]) -> bool:
    known = [name for name in names if name is not None]
    return any(covers_name(pattern, name) for pattern in patterns for name in known)


def _outward(rules: Ruleset, call: Call, mapping: Mapping | None, findings: Findings) -> Call:
    def translate(model: str) -> FilteredRendering:
        return FilteredRendering(
            openai.rendering(replace(call, model=model)),
            lambda written: rules.pipe(mapping, findings.note, written),
            call.choices,
            bare=rules.filters_output,
        )

    return replace(call, translate=translate)


def _inward(rules: Ruleset, call: Call, findings: Findings) -> tuple[Call, Mapping | None]:
    """The call with what is hidden hidden, and what stands for what, if anything does."""
    body = openai.decode(call.body)
    assert body is not None
    reader = _Reader(rules, body, call, findings)
    reader.check_sizes()
    reader.check_readable()
    reader.block_and_log()
    mapping = reader.redact()
    call = replace(call, policy=call.policy + rules.fingerprint)  # two after a fallback
    if reader.changed:
        call = replace(call, body=openai.encode(body))
    limit = rules.policy.sizes.answer_tokens
    if reader.bounded:
        call = replace(call, max_tokens=limit)
    return replace(call, private=True) if mapping else call, mapping


class _Reader:
    """One request being read."""

    def __init__(
        self, rules: Ruleset, body: dict[str, Any], call: Call, findings: Findings
    ) -> None:
        self._rules = rules
        self._body = body
        self._call = call
        self._findings = findings
        self._texts = texts_of(body)
        self.changed = False
        self.bounded = False

    def check_sizes(self) -> None:
        sizes, call = self._rules.policy.sizes, self._call
        characters = sum(len(text.value) for text in self._texts)
        messages = self._body.get("messages")
        count = len(messages) if isinstance(messages, list) else 0
        limits = (
            ("characters", characters, sizes.input_characters, None),
            ("messages", count, sizes.messages, "messages"),
            ("max_tokens", call.max_tokens, sizes.answer_tokens, "max_tokens"),
        )
        for what, found, most, param in limits:
            if most and found > most:
                mode = Mode(sizes.mode)
                self._findings.note(f"size of {what}", Direction.IN, mode)
                if mode is Mode.BLOCK:
                    told = f"this model takes at most {most} {what} in a request, not {found}"
                    small = what == "max_tokens"
                    raise (InvalidRequest if small else PayloadTooLarge)(told, param=param)
        if sizes.answer_tokens and not call.max_tokens and call.generates:
            self._body["max_tokens"] = sizes.answer_tokens
            self.changed = self.bounded = True

    def check_readable(self) -> None:
        """What could carry a text past the rules is refused."""
        field = token_ids_in(self._body)
        if field is not None and self._rules.reads_input:
            raise InvalidRequest(
                f"{field} must be text: this model's guardrails cannot read token ids", param=field
            )
        if not (self._call.generates and self._rules.filters_output):
            return
        for name in (
            "logprobs",
            "prompt_logprobs",
            "return_token_ids",
            "return_tokens_as_token_ids",
        ):
            if self._body.get(name) not in (None, False):
                raise NotSupported(
                    f"{name} is not supported here: it would show what this model's guardrails "
                    "take out of answers",
                    param=name,
                )

    def block_and_log(self) -> None:
        rules = self._rules
        for mode in (Mode.LOG, Mode.BLOCK):
            scanner = rules.lists(Direction.IN, mode)
            if scanner is not None:
                self._scan(scanner, mode)
            if rules.pii is not None and rules.policy.pii.inward is mode:
                self._scan(rules.pii, mode)
                self._ask_presidio(mode, None)
        injection = rules.policy.injection
        if injection is not None and self._call.generates:
            for text in self._texts:
                if text.role in _FOREIGN_ROLES and score(text.value) >= injection.threshold:
                    self._findings.note("injection", Direction.IN, Mode(injection.mode))
                    if injection.mode == "block":
                        raise self._refusal("injection", text)

    def redact(self) -> Mapping | None:
        rules = self._rules
        scanner = rules.lists(Direction.IN, Mode.REDACT)
        if scanner is not None:
            act = acting(Mode.REDACT, Direction.IN, self._findings.note, lambda _: REDACTED)
            for text in self._texts:
                self._put(text, scan(scanner, text.value, act))
        if rules.pii is None or rules.policy.pii.inward is not Mode.REDACT:
            return None
        mapping = Mapping(text.value for text in self._texts)
        act = acting(Mode.REDACT, Direction.IN, self._findings.note, mapping.hide)
        for text in self._texts:
            self._put(text, scan(rules.pii, text.value, act))
        self._ask_presidio(Mode.REDACT, mapping)
        return mapping if len(mapping) else None

    def _scan(self, scanner: Scanner, mode: Mode) -> None:
        act = acting(mode, Direction.IN, self._findings.note, lambda match: match.text)
        for text in self._texts:
            if scan(scanner, text.value, act) is None:
                raise self._refusal("", text)

    def _ask_presidio(self, mode: Mode, mapping: Mapping | None) -> None:
        presidio = self._rules.presidio
        if presidio is None:
            return
        for text in self._texts:
            found = presidio.find(text.value)
            for entity, _, _ in found:
                self._findings.note(entity.lower(), Direction.IN, mode)
            if found and mode is Mode.BLOCK:
                raise self._refusal("", text)
            if found and mapping is not None:
                self._put(text, presidio.hide(text.value, found, mapping))

    def _put(self, text: Text, value: str | None) -> None:
        if value is not None and value != text.value:
            text.put(value)
            self.changed = True

    def _refusal(self, rule: str, text: Text) -> ContentFiltered:
        said = self._findings.said().split(", ")
        blocked = [name.removeprefix("block:") for name in said if name.startswith("block:")]
        rule = rule or ", ".join(blocked)
        own = self._call.translate is None  # other dialects name their fields otherwise
        return ContentFiltered(
            f"the request was refused by the rule {rule!r} of this model's guardrails",
            param=text.place if own else None,
        )
