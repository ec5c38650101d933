"""Microsoft's presidio beside the built-in detectors: names, places and whatever else its
recognisers know. The extra ``pii``; imported when a policy asks for it.

It reads a text as a whole, with a language model of spaCy if one is named. Nothing is ever
downloaded: without a model the recognisers that work by form alone are used. Must not decide.
"""

from __future__ import annotations

from typing import Any

from cloudlm.core.errors import BadSetting, MissingExtra
from cloudlm.security.guardrails.config import Presidio
from cloudlm.security.guardrails.redaction import Mapping, placeholder_spans

_BY_MODEL = frozenset({"PERSON", "LOCATION", "NRP", "ORGANIZATION"})


class Analyzer:
    """Finds what presidio finds. Raises MissingExtra and BadSetting when it is made."""

    def __init__(self, wanted: Presidio) -> None:
        try:
            import presidio_analyzer
            from presidio_analyzer.nlp_engine import SpacyNlpEngine
        except ImportError:
            raise MissingExtra("pii", "pii.presidio") from None
        self._wanted = wanted
        language = wanted.language
        engine = SpacyNlpEngine([{"lang_code": language, "model_name": wanted.spacy_model}])
        engine.nlp = {language: _pipeline(wanted)}
        registry = presidio_analyzer.RecognizerRegistry(supported_languages=[language])
        registry.load_predefined_recognizers(
            languages=[language], nlp_engine=engine if wanted.spacy_model else None
        )
        registry.remove_recognizer("EmailRecognizer")  # it asks the network for a list of domains
        self._engine = presidio_analyzer.AnalyzerEngine(
            registry=registry, nlp_engine=engine, supported_languages=[language]
        )
        self._check_entities()

    def _check_entities(self) -> None:
        known = set(self._engine.get_supported_entities(self._wanted.language))
        if not self._wanted.spacy_model:
            known -= _BY_MODEL
        for entity in self._wanted.entities:
            if entity not in known:
                more = "; it needs pii.presidio.spacy_model" if entity in _BY_MODEL else ""
                raise BadSetting(
                    f"presidio cannot find {entity!r} in {self._wanted.language!r} here{more}. It "
                    f"finds: {', '.join(sorted(known))}"
                )

    def find(self, text: str) -> list[tuple[str, int, int]]:
        """Entity, start and end of what was found, in order, none overlapping another; the
        surer one where two do."""
        found = self._engine.analyze(
            text=text,
            language=self._wanted.language,
            entities=list(self._wanted.entities) or None,
            score_threshold=self._wanted.min_score,
        )
        taken = placeholder_spans(text)
        kept: list[tuple[str, int, int]] = []
        for one in sorted(found, key=lambda r: (-r.score, -(r.end - r.start), r.start)):
            if all(one.end <= start or end <= one.start for start, end in taken):
                taken.append((one.start, one.end))
                kept.append((one.entity_type, one.start, one.end))
        return sorted(kept, key=lambda span: span[1])

    def hide(self, text: str, found: list[tuple[str, int, int]], mapping: Mapping) -> str:
        """``text`` with placeholders for what was found."""
        out, at = [], 0
        for entity, start, end in found:
            out += [text[at:start], mapping.placeholder(entity, text[start:end])]
            at = end
        return "".join([*out, text[at:]])


def _pipeline(wanted: Presidio) -> Any:
    import spacy

    if not wanted.spacy_model:
        return spacy.blank(wanted.language)
    try:
        return spacy.load(wanted.spacy_model)
    except OSError:
        raise BadSetting(
            f"pii.presidio.spacy_model {wanted.spacy_model!r} is not installed here; install it "
            f"(python -m spacy download {wanted.spacy_model}) or leave it out, then names and "
            "places are not found"
        ) from None
