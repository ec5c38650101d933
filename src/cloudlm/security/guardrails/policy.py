"""A policy made ready: its scanners compiled, and what each kind of rule does to a text.

Shared by all requests of its models; what belongs to one request (its mapping, its findings, its
streams) is handed in or made anew. Must not know requests' forms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import msgspec

from cloudlm.core.errors import BadSetting
from cloudlm.security.guardrails.config import Blocklist, Direction, Mode, Policy
from cloudlm.security.guardrails.detectors import ORDER, Kind, rules_of
from cloudlm.security.guardrails.patterns import checked, phrase
from cloudlm.security.guardrails.places import after, before, word_goes_on
from cloudlm.security.guardrails.presidio import Analyzer
from cloudlm.security.guardrails.redaction import PLACEHOLDERS, Mapping
from cloudlm.security.guardrails.scanner import (
    NO_MATCH,
    Act,
    Match,
    Rule,
    Scanner,
    Stream,
)

REDACTED = "[REDACTED]"
Note = Callable[[str, Direction, Mode], None]
"""Told of each match: the rule's name, the direction, what is done."""


class Pipe:
    """One text of an answer on its way out, through one stage after the other."""

    def __init__(self, stages: Iterable[tuple[Stream, bool]]) -> None:
        """``stages``: each with whether it only watches."""
        self._stages = tuple(stages)
        self.stopped = False

    def feed(self, text: str) -> str:
        """More text; what may be sent of it and of what was held back."""
        return self._run(text, final=False)

    def finish(self) -> str:
        """The text is complete: what may be sent of the rest."""
        return self._run("", final=True)

    def _run(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        for stream, watches in self._stages:
            out = stream.feed(text)
            if final:
                out += stream.finish()
            if stream.stopped:  # for what follows this is the end
                self.stopped = final = True
            text = text if watches else out
        return text


class Ruleset:
    """One policy, compiled. Raises BadSetting and MissingExtra."""

    def __init__(self, name: str, policy: Policy) -> None:
        self.name = name
        self.policy = policy
        self.fingerprint = hashlib.blake2b(msgspec.json.encode(policy), digest_size=16).hexdigest()
        pii = policy.pii
        self.pii = None if pii.inward is None and pii.out is None else _detectors(pii.kinds)
        self.presidio = None if pii.presidio is None else Analyzer(pii.presidio)
        self._lists = {
            (direction, mode): _blocklists(name, policy.blocklists, direction, mode)
            for direction in Direction
            for mode in Mode
        }

    def lists(self, direction: Direction, mode: Mode) -> Scanner | None:
        """The blocklists of one mode for one direction."""
        return self._lists[direction, mode]

    @property
    def reads_input(self) -> bool:
        """Whether anything on the way in needs to read texts and acts on them."""
        acts = (Mode.BLOCK, Mode.REDACT)
        injection = self.policy.injection
        return (
            self.policy.pii.inward in acts
            or any(self.lists(Direction.IN, mode) for mode in acts)
            or (injection is not None and injection.mode == "block")
        )

    @property
    def filters_output(self) -> bool:
        """Whether an answer may be sent otherwise than it was written."""
        acts = (Mode.BLOCK, Mode.REDACT)
        return self.policy.pii.out in acts or any(self.lists(Direction.OUT, m) for m in acts)

    @property
    def watches_output(self) -> bool:
        """Whether answers are looked at at all."""
        log = self.lists(Direction.OUT, Mode.LOG) is not None or self.policy.pii.out is Mode.LOG
        return self.filters_output or log

    def pipe(self, mapping: Mapping | None, note: Note, written: Callable[[str], str]) -> Pipe:
        """The way out for one text. Personal data that the model made up is looked for before the
        asker's own is put back; blocklists see what the client would see. ``written`` makes a text
        fit where it is put."""
        stages: list[tuple[Stream, bool]] = []
        mode = self.policy.pii.out
        if self.pii is not None and mode is not None:
            stages.append(_stage(self.pii, mode, note, lambda m: f"[{m.rule.name.upper()}]"))
        if mapping:
            stages.append((Stream(PLACEHOLDERS, lambda m: written(mapping.restore(m))), False))
        for mode in (Mode.LOG, Mode.BLOCK, Mode.REDACT):
            scanner = self.lists(Direction.OUT, mode)
            if scanner is not None:
                stages.append(_stage(scanner, mode, note, lambda _: REDACTED))
        return Pipe(stages)


def acting(mode: Mode, direction: Direction, note: Note, instead: Callable[[Match], str]) -> Act:
    """What is done about matches in a mode."""

    def act(match: Match) -> str | None:
        note(match.rule.name, direction, mode)
        if mode is Mode.BLOCK:
            return None
        return instead(match) if mode is Mode.REDACT else match.text

    return act


def _stage(
    scanner: Scanner, mode: Mode, note: Note, instead: Callable[[Match], str]
) -> tuple[Stream, bool]:
    return Stream(scanner, acting(mode, Direction.OUT, note, instead)), mode is Mode.LOG


def _detectors(kinds: Iterable[Kind]) -> Scanner:
    wanted = set(kinds)
    return Scanner([rule for kind in ORDER if kind in wanted for rule in rules_of(kind)])


def _blocklists(
    policy: str, lists: Iterable[Blocklist], direction: Direction, mode: Mode
) -> Scanner | None:
    rules: list[Rule] = []
    for one in lists:
        if direction not in one.on or one.mode is not mode:
            continue
        try:
            rules += [Rule(one.name, checked(source)) for source in one.regex]
            rules += [Rule(one.name, phrase(word), _whole_word) for word in one.words]
        except BadSetting as error:
            where = f"policy {policy!r}, blocklist {one.name!r}"
            raise BadSetting(f"guardrails, {where}: {error.message}") from None
    return Scanner(rules) if rules else None


def _whole_word(data: bytes, start: int, end: int) -> int:
    first, last = after(data, start), before(data, end)
    if word_goes_on(first, before(data, start)) or word_goes_on(last, after(data, end)):
        return NO_MATCH
    return end
