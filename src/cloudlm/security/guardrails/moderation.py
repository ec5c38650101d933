"""The built-in classifiers of ``/v1/moderations``: lists of phrases with weights, by category.

They find what is said in plain English words and no more: they know no context, irony, quotation,
picture or other language, miss what is paraphrased and flag what only names a thing. Good for tests,
for development and as a coarse first net; to moderate people, route to a model that was trained for
it. The score of a category is ``1 - Π(1 - weight)`` over the phrases found; from 0.5 on it is
flagged. Personal data and injection come from the guardrails' own detectors.
"""

# ruff: noqa: E501 - an expression is read best in one line
from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

from cloudlm.security.guardrails.detectors import ORDER, rules_of
from cloudlm.security.guardrails.injection import score as injection_score
from cloudlm.security.guardrails.patterns import automaton, parse
from cloudlm.security.guardrails.scanner import Match, Scanner, scan

FLAGGED_FROM = 0.5
PERSONAL, INJECTION = "cloudlm/personal-data", "cloudlm/prompt-injection"
OPENAI_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
_GROUP = r"(?:jews?|muslims?|christians?|blacks?|whites?|asians?|arabs?|immigrants?|refugees?|gays?|lesbians?|homosexuals?|trans(?:gender)? people|women|disabled people|gypsies|roma)"
_KILL = r"(?:kill|murder|shoot|stab|strangle|slaughter|behead|execute|burn|bomb|beat)"
_MINOR = r"(?:child(?:ren)?|kids?|minors?|underage|teen(?:ager)?s?|preteens?|toddlers?|(?:little|young|school) ?(?:girls?|boys?)|1[0-7][- ]?years?[- ]?old)"
_SEX = r"(?:sex(?:ual(?:ly)?)?|porn(?:o(?:graphy|graphic)?)?|nudes?|naked|erotic|orgasms?|blow ?jobs?|masturbat(?:e|es|ing|ion)|intercourse|fuck(?:s|ed|ing)? (?:me|her|him|you))"
_WEAPON = r"(?:pipe bombs?|bombs?|explosives?|molotov cocktails?|nerve (?:gas|agents?)|sarin|ricin|chemical weapons?|ghost guns?|silencers?|napalm|thermite)"
_DRUG = r"(?:meth(?:amphetamine)?|crack|heroin|fentanyl|cocaine|lsd|mdma|ecstasy)"
_MAKE = r"(?:make|build|cook|produce|synthesi[sz]e|manufacture|assemble|construct|create)"
_PHRASES: tuple[tuple[str, float, str], ...] = (
    (
        "harassment",
        0.6,
        r"\byou(?:'re| are)? (?:a |an |such an? |all )?(?:\w+ )?(?:idiots?|morons?|stupid|worthless|pathetic|losers?|disgusting|scum|trash|garbage|bitch|bastard|asshole|cunt|whore|slut|retards?|imbecile)\b",
    ),
    (
        "harassment",
        0.6,
        r"\b(?:nobody|no one|everyone) (?:likes|loves|wants|hates) you\b|\bfuck (?:off|you)\b|\bshut (?:the fuck )?up\b|\bgo to hell\b",
    ),
    ("harassment", 0.6, r"\b(?:kill yourself|kys|go die|drop dead|you should (?:just )?die)\b"),
    (
        "harassment/threatening",
        0.7,
        rf"\b(?:i'll|i will|i'm going to|i am going to|we will|we'll|gonna) (?:\w+ )?(?:{_KILL}|hurt|find|destroy|rape) (?:you|u|your)\b",
    ),
    (
        "harassment/threatening",
        0.6,
        r"\byou(?:'re| are) (?:going to die|dead meat|a dead (?:man|woman))\b|\bwatch your back\b|\bi know where you live\b",
    ),
    (
        "hate",
        0.7,
        rf"\b{_GROUP} (?:are|is) (?:all |just |nothing but |a |so )*(?:\w+ )?(?:subhuman|inferior|vermin|animals|parasites|criminals|scum|filth|disease|stupid|terrorists|evil|disgusting|rats)\b",
    ),
    (
        "hate",
        0.6,
        rf"\b(?:i )?(?:hate|despise|loathe) (?:all |these |those |the )?{_GROUP}\b|\b(?:deport|get rid of|ban) all (?:the )?{_GROUP}\b",
    ),
    (
        "hate",
        0.6,
        r"\bwhite (?:power|supremacy forever)\b|\bheil hitler\b|\bsieg heil\b|\brace traitors?\b|\bgas the\b",
    ),
    (
        "hate/threatening",
        0.8,
        rf"\b(?:{_KILL}|exterminate|gas|lynch|hang|wipe out|eradicate) (?:all |every |the |those |these )*{_GROUP}\b|\ball {_GROUP} (?:should|must|deserve to) (?:die|be (?:killed|shot|exterminated))\b",
    ),
    ("illicit", 0.6, rf"\b{_MAKE}\b.{{0,25}}\b{_DRUG}\b|\bbuy {_DRUG}\b"),
    (
        "illicit",
        0.6,
        r"\bhow (?:to|do i|can i|would i|do you)\b.{0,25}\b(?:pick a lock|hotwire|shoplift|launder money|counterfeit|forge|hack into|steal|break into|evade taxes|smuggle|scam|phish|clone a (?:credit )?card|fake (?:id|passport|prescription))",
    ),
    (
        "illicit",
        0.55,
        r"\b(?:write|create|code|make)\b.{0,20}\b(?:ransomware|keylogger|malware|phishing (?:e-?mail|page|site)|computer virus|botnet)\b",
    ),
    (
        "illicit/violent",
        0.7,
        rf"\b{_MAKE}\b.{{0,25}}\b{_WEAPON}\b|\binstructions? for (?:an? )?{_WEAPON}\b",
    ),
    (
        "illicit/violent",
        0.6,
        r"\b(?:plan|carry out|commit|get away with)\b.{0,20}\b(?:mass shooting|terror(?:ist)? attack|murder|bombing|assassination|kidnapping)\b|\bhire a (?:hitman|killer)\b",
    ),
    (
        "self-harm",
        0.6,
        r"\b(?:suicid(?:e|al)|self-?harm|cut(?:ting)? (?:myself|yourself)|overdose on|hang (?:myself|yourself)|slit (?:my|your) wrists?|starv(?:e|ing) myself)\b",
    ),
    (
        "self-harm/intent",
        0.75,
        r"\b(?:i (?:want|wish|need|plan|intend|am going|'m going|will)|i'm gonna|i've decided|i have decided|thinking (?:about|of)|i might)\b.{0,15}\b(?:kill(?:ing)? myself|end(?:ing)? (?:my life|it all)|die|hang(?:ing)? myself|cut(?:ting)? myself|hurt(?:ing)? myself|suicide|be dead)\b|\bi (?:don't|do not) want to (?:live|be alive|exist)\b",
    ),
    (
        "self-harm/instructions",
        0.75,
        r"\b(?:how (?:to|do i|can i)|best way to|easiest way to|painless(?:ly)? way to|tell me how to|ways to)\b.{0,20}\b(?:kill myself|kill yourself|commit suicide|hang myself|hang yourself|end my life|overdose|cut myself|die painlessly|self-?harm|hide (?:my )?(?:cuts|scars))\b",
    ),
    (
        "sexual",
        0.6,
        rf"\b(?:write|tell|describe|show|send|give|want|watch|have|having|had|like|free|explicit|hot|hardcore)\b.{{0,30}}\b{_SEX}\b",
    ),
    (
        "sexual",
        0.6,
        r"\b(?:dick|cock|pussy|tits|clit|cum|penis|vagina)\b.{0,25}\b(?:suck|lick|hard|wet|inside|fuck|ride|throbbing|deep)|\b(?:suck|lick|ride|stroke)\b.{0,20}\b(?:dick|cock|pussy|tits|clit|penis)\b|\bhorny\b",
    ),
    (
        "sexual/minors",
        0.8,
        rf"\b{_MINOR}\b.{{0,40}}\b{_SEX}\b|\b{_SEX}\b.{{0,40}}\b(?:with|of|involving|between|to|about|and|by) (?:an? |the |my |his |her |their )?(?:\w+ )?{_MINOR}\b|\bchild porn(?:ography)?\b",
    ),
    (
        "violence",
        0.6,
        rf"\b(?:i'll|i will|i'm going to|i am going to|i want to|we should|let's|they should|gonna|someone should) (?:\w+ )?{_KILL} (?:you|u|him|her|them|my|your|his|the|every|all|people|someone|that)\b",
    ),
    (
        "violence",
        0.55,
        r"\b(?:stabbed|shot|beat|tortured|slaughtered|strangled|murdered|beheaded|massacred) (?:him|her|them|the|his|my|a) ?(?:\w+ )?(?:to death|to pieces|in the (?:face|head|chest|neck)|repeatedly|again and again)\b",
    ),
    (
        "violence/graphic",
        0.65,
        r"\b(?:blood|guts|intestines|brains|entrails|organs|flesh|limbs?|skull|bones?)\b.{0,30}\b(?:spilled|spilling|splattered|spurting|gushing|sprayed|ripped|torn|oozing|everywhere|crushed|shattered|exposed)\b|\b(?:ripped|tore|cut|hacked|sawed) (?:off|out|open) (?:his|her|their|its|the|my) (?:\w+ )?(?:head|arms?|legs?|throat|eyes?|heart|fingers?|limbs?|guts|stomach|tongue)\b|\b(?:disembowel|dismember|decapitat|eviscerat|mutilat)(?:e|ed|ing|ment|ion)\b",
    ),
)
_IMPLIED = {
    "harassment/threatening": "harassment",
    "hate/threatening": "hate",
    "illicit/violent": "illicit",
    "self-harm/intent": "self-harm",
    "self-harm/instructions": "self-harm",
    "sexual/minors": "sexual",
    "violence/graphic": "violence",
}


@lru_cache(1)
def _phrases() -> tuple[tuple[str, float, Any], ...]:
    return tuple((c, w, automaton(parse(source, "is").whole)) for c, w, source in _PHRASES)


@lru_cache(1)
def _detectors() -> Scanner:
    return Scanner([rule for kind in ORDER for rule in rules_of(kind)])


def scores(text: str) -> dict[str, float]:
    """The score of each category for ``text``, 0 to 1."""
    plain = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    data = plain.encode("utf-8", "replace")
    left = dict.fromkeys(OPENAI_CATEGORIES, 1.0)
    for category, weight, phrase in _phrases():
        if phrase.search(data) is not None:
            left[category] *= 1 - weight
            if category in _IMPLIED:
                left[_IMPLIED[category]] *= 1 - weight
    found = {category: round(1 - rest, 4) for category, rest in left.items()}
    return found | {PERSONAL: _personal(text), INJECTION: injection_score(text)}


def _personal(text: str) -> float:
    def stop(_: Match) -> None:
        return None

    return 1.0 if scan(_detectors(), text, stop) is None else 0.0
