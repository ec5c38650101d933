"""How much a text looks like an attempt to take a model over: a score from 0 to 1.

Phrases and signs, each with a weight; the score is ``1 - Π(1 - weight)`` over those that are found.
A heuristic: it knows the ways that many attempts share, in English and a few of them in German,
French and Spanish, and whoever knows it can get around it. It lowers the number of attempts that
reach a model; it is no reason to give a model rights that its users must not have.
``bench/guardrails`` measures it. Must not be used on what the operator wrote.
"""

# ruff: noqa: E501 - an expression is read best in one line
from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

from cloudlm.security.guardrails.patterns import Pattern, automaton, parse

LONGEST_CHARACTERS = 100_000
"""More of one text is not read: the score of the beginning stands."""
_INVISIBLE = dict.fromkeys(
    [0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF]
)
_TAGS = re.compile("[\U000e0000-\U000e007f]")
_BEFORE = "(?:previous|prior|preceding|above|earlier|former|initial|original|existing|foregoing)"
_ORDERS = "(?:instructions?|prompts?|rules?|directives?|guidelines?|commands?|orders|constraints?|polic(?:y|ies)|restrictions?|safeguards?|programming|training)"
_DROP = "(?:ignore|disregard|forget|override|bypass|discard|neglect|skip|drop|cancel|void|disobey|circumvent)"
_TELL = "(?:reveal|show|print|repeat|output|display|disclose|leak|dump|tell me|give me|expose|recite|quote|write out|share|return|echo)"
_SIGNS: tuple[tuple[float, str], ...] = (
    (
        0.75,
        rf"\b{_DROP}\b.{{0,30}}\b(?:{_BEFORE}|all|any|your|every|these|those|system|safety)\b.{{0,25}}\b{_ORDERS}\b",
    ),
    (
        0.6,
        rf"\b(?:{_DROP})\b.{{0,20}}\b(?:everything|all|anything)\b.{{0,25}}\b(?:above|before|previously|prior|said|told|until now|so far)\b",
    ),
    (
        0.55,
        rf"\b(?:do not|don't|stop|never|no longer)\b.{{0,12}}\b(?:follow|following|obey|obeying|comply with|adhere to)\b.{{0,30}}\b{_ORDERS}\b",
    ),
    (
        0.6,
        rf"\b{_TELL}\b.{{0,40}}\b(?:system|hidden|initial|original|secret|internal|developer|your)\b.{{0,12}}\b(?:prompt|instructions?|message|directives?|guidelines)\b",
    ),
    (
        0.5,
        r"\bwhat (?:is|are|was|were) (?:your|the) (?:system|hidden|initial|original|secret|exact) (?:prompt|instructions?|message)",
    ),
    (
        0.5,
        r"\b(?:repeat|print|output|copy)\b.{0,20}\b(?:words|text|everything|all)\b.{0,20}\babove\b",
    ),
    (
        0.5,
        r"\b(?:do anything now|dan mode|jailbroken|jailbreak mode|developer mode|god mode|sudo mode|debug mode|unrestricted mode|evil mode)\b",
    ),
    (
        0.35,
        r"\byou are (?:now )?(?:dan|stan|dude|aim|evilbot|freegpt|an? (?:unrestricted|unfiltered|uncensored|amoral|jailbroken|evil))\b",
    ),
    (
        0.5,
        r"\b(?:without|no|free of|free from|remove|lift|disable|turn off|deactivate)\b.{0,15}\b(?:any |all |your |its |the )?(?:ethical|moral|safety|content|usual)?\s?(?:restrictions?|limitations?|filters?|guardrails?|guidelines|censorship|safeguards?)\b",
    ),
    (
        0.25,
        r"\b(?:pretend|act|behave|roleplay|role-play|imagine|simulate)\b.{0,30}\b(?:no|without|not bound|unrestricted|unfiltered|freed?)\b",
    ),
    (
        0.25,
        r"\b(?:from now on|henceforth|starting now|new instructions?:|updated instructions?:|real instructions?)\b",
    ),
    (
        0.45,
        r"\b(?:new|updated|real|actual|revised|important) (?:system )?(?:instructions?|prompt|directive|task) ?(?:follow|:|for the (?:ai|assistant|model))",
    ),
    (
        0.5,
        r"<\|(?:im_start|im_end|system|assistant|user|endoftext|eot_id|start_header_id|begin_of_text)\|?>?|\[/?inst\]|<</?sys>>|<(?:start|end)_of_turn>",
    ),
    (
        0.45,
        r"(?:#{2,}|\[|<|\n) ?(?:system|admin|developer|root)(?: (?:prompt|message|override|note|instructions?))? ?(?::|\]|>|#{2,})",
    ),
    (
        0.5,
        r"\b(?:end|begin|start) of (?:the )?(?:system |user |developer )?(?:prompt|instructions?|input|document|message)\b",
    ),
    (
        0.3,
        r"\b(?:decode|base64|rot13|hex|morse)\b.{0,40}\b(?:execute|follow|obey|do what|carry out|instructions?|and answer)\b",
    ),
    (
        0.4,
        r"\b(?:assistant|ai|llm|language model|chatbot|agent|gpt)s?\b.{0,20}\b(?:reading|processing|summari[sz]ing|that reads?|must now|should now|you must)\b",
    ),
    (
        0.35,
        r"\b(?:send|forward|post|exfiltrate|upload|append|leak|email|transmit)\b.{0,50}\b(?:api keys?|passwords?|credentials|secrets?|conversation|chat history|system prompt)\b",
    ),
    (0.35, r"!\[[^\]]{0,40}\]\(https?://[^)\s]{1,200}[?&][^)]{0,40}(?:=|\{)"),
    (
        0.3,
        r"\b(?:do not|don't|never) (?:tell|inform|mention|reveal|alert)\b.{0,25}\b(?:the )?user\b",
    ),
    (
        0.3,
        r"\b(?:i am|i'm|this is|as) (?:your |the )?(?:developer|creator|administrator|admin|openai|anthropic|root)\b.{0,60}\b(?:authori[sz]e|override|grant|permission|must|unlock|test)",
    ),
    (
        0.3,
        r"\byou (?:must|will|shall|have to) (?:always )?(?:comply|obey|answer (?:everything|any)|never refuse|not refuse)\b|\bnever (?:say no|refuse)\b|\bcannot refuse\b",
    ),
    (
        0.7,
        r"\b(?:ignoriere|vergiss|missachte|umgehe|übergehe)\b.{0,40}\b(?:anweisung(?:en)?|regeln?|vorgaben?|instruktion(?:en)?|befehle?|einschränkung(?:en)?)\b",
    ),
    (
        0.7,
        r"\b(?:ignore[zrs]?|oublie[zrs]?|contourne[zr]?)\b.{0,40}\b(?:consignes?|instructions?|règles?|directives?)\b",
    ),
    (
        0.7,
        r"\b(?:ignora|olvida|omite|desobedece)\b.{0,40}\b(?:instrucci(?:ón|ones)|reglas?|órdenes|indicaciones)\b",
    ),
    (
        0.5,
        r"\b(?:zeige?|nenne|verrate?|montre|affiche|révèle|muestra|revela|dime)\b.{0,40}\b(?:system-?prompt|systemanweisung(?:en)?|prompt système|invite système|prompt del sistema)\b",
    ),
)


@lru_cache(1)
def _signs() -> tuple[tuple[float, Any], ...]:
    """Made when they are first needed."""
    return tuple((weight, automaton(_folded(source).whole)) for weight, source in _SIGNS)


def _folded(source: str) -> Pattern:
    return parse(source, "is")


def score(text: str) -> float:
    """How much ``text`` looks like an attempt, 0 to 1."""
    hidden = bool(_TAGS.search(text))
    plain = unicodedata.normalize("NFKC", text[:LONGEST_CHARACTERS]).translate(_INVISIBLE)
    spread = _joined(" ".join(plain.split(" ")))
    data = spread.encode("utf-8", "replace")
    left = 0.4 if hidden else 1.0  # tags that no screen shows carry text that only models read
    for weight, sign in _signs():
        if sign.search(data) is not None:
            left *= 1 - weight
    return round(1 - left, 3)


_SPACED = re.compile(r"(?<!\w)(?:\w[ .\-_*]){5,}\w(?!\w)")


def _joined(text: str) -> str:
    """``i g n o r e`` as a word."""
    return _SPACED.sub(lambda found: re.sub(r"[ .\-_*]", "", found[0]), text)
