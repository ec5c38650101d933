"""Taking personal data out of a request and putting it back into its answer.

Each value becomes a placeholder, ``<EMAIL_1>``, the same one wherever it stands in the request, and
the model works with that. What stands for what is known to this object alone, which lives as long
as its request: it has no form in which it could be logged or stored. Texts that hold something that
looks like a placeholder keep it: its number is not given away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cloudlm.security.guardrails.patterns import parse
from cloudlm.security.guardrails.scanner import Match, Rule, Scanner

_PLACEHOLDER = "<[A-Z][A-Z_]{1,30}_[1-9][0-9]{0,5}>"
_LOOKS_LIKE = re.compile(_PLACEHOLDER)
PLACEHOLDERS = Scanner([Rule("placeholder", parse(_PLACEHOLDER))])
"""Finds placeholders, those that a request's mapping knows and others."""


class Mapping:
    """What stands for what in one request."""

    def __init__(self, texts: Iterable[str]) -> None:
        """``texts`` are all that will be redacted: what looks like a placeholder there is none."""
        self._taken = {found for text in texts for found in placeholders_in(text)}
        self._placeholders: dict[tuple[str, str], str] = {}
        self._originals: dict[str, str] = {}
        self._last: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<mapping of {len(self._originals)} values>"

    def __len__(self) -> int:
        return len(self._originals)

    def __reduce__(self) -> str:
        raise TypeError("what stands for what lives as long as its request, and nowhere else")

    def placeholder(self, kind: str, original: str) -> str:
        """What stands for a value of a kind."""
        known = self._placeholders.get((kind, original))
        if known is not None:
            return known
        name = kind.upper()
        while True:
            self._last[name] = number = self._last.get(name, 0) + 1
            made = f"<{name}_{number}>"
            if made not in self._taken:
                break
        self._placeholders[kind, original] = made
        self._originals[made] = original
        return made

    def original(self, placeholder: str) -> str:
        """What a placeholder stands for; one that is none stands for itself."""
        return self._originals.get(placeholder, placeholder)

    def hide(self, match: Match) -> str:
        """A match's placeholder: an ``Act``."""
        return self.placeholder(match.rule.name, match.text)

    def restore(self, match: Match) -> str:
        """What a match of PLACEHOLDERS stands for: an ``Act``."""
        return self.original(match.text)


def placeholders_in(text: str) -> set[str]:
    """All that looks like a placeholder."""
    return {text[start:end] for start, end in placeholder_spans(text)}


def placeholder_spans(text: str) -> list[tuple[int, int]]:
    """Where something looks like a placeholder, in characters."""
    if "<" not in text:
        return []
    return [found.span() for found in _LOOKS_LIKE.finditer(text)]
