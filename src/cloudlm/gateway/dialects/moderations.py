"""OpenAI's moderations: by the built-in classifiers, or by a deployment that moderates.

Which is asked is said by ``model``: one of the deployments that the guardrails' file names, else
its default, else the built-in ones. A deployment is asked in OpenAI's own form, or as Llama Guard
is: a chat whose answer is ``safe``, or ``unsafe`` and the codes of the categories (its model card
names them). Must not do I/O.
"""

from __future__ import annotations

from typing import Any

from cloudlm.core.errors import InvalidRequest, NotSupported, PayloadTooLarge, UpstreamFailed
from cloudlm.core.requests import decode_body
from cloudlm.gateway.dialects import openai
from cloudlm.gateway.dialects.base import Asker, Parse, WholeRendering
from cloudlm.gateway.dialects.heard import heard, objects, part_text
from cloudlm.gateway.dialects.openai import Call, Operation
from cloudlm.gateway.exchange import GatewayRequest, unique

BUILT_IN = "cloudlm-moderation"
MAX_INPUTS = 64
MAX_CHARACTERS = 100_000
_OPENAI_NAMES = ("omni-moderation", "text-moderation")
MODERATED = "moderation"
_LLAMA_GUARD = {
    "S1": ("violence", "illicit/violent"),
    "S2": ("illicit",),
    "S3": ("sexual",),
    "S4": ("sexual/minors", "sexual"),
    "S5": ("harassment",),
    "S9": ("illicit/violent",),
    "S10": ("hate",),
    "S11": ("self-harm",),
    "S12": ("sexual",),
}


def parser(request: GatewayRequest, asker: Asker) -> Parse | None:
    """What makes a call for the deployment that is asked; None if the built-in ones are."""
    name = _model(decode_body(request.body), asker)
    return None if name is None else parse


def parse(request: GatewayRequest, _: str, asker: Asker) -> Call:
    """A request for a deployment. Raises InvalidRequest and NotSupported."""
    body = decode_body(request.body)
    name = _model(body, asker)
    assert name is not None and asker.moderation is not None
    texts = _inputs(body)
    if asker.moderation.models[name] == "openai":
        sent = openai.encode({"model": name, "input": texts})
        return Call(Operation.MODERATION, name, sent, policy=MODERATED)
    if len(texts) != 1:
        raise NotSupported(
            f"{name} moderates one text in a request; send each by itself", param="input"
        )
    chat = {
        "model": name,
        "messages": [{"role": "user", "content": texts[0]}],
        "temperature": 0,
        "max_tokens": 32,
        "cache_salt": asker.salted(""),
    }
    return Call(
        Operation.CHAT,
        name,
        openai.encode(chat),
        max_tokens=32,
        translate=lambda _: WholeRendering(lambda answer: _of_llama_guard(name, answer)),
        policy=MODERATED,
    )


def read(request: GatewayRequest, _: str, asker: Asker) -> dict[str, Any]:
    """What the built-in classifiers say."""
    from cloudlm.security.guardrails.moderation import scores  # RE2 is for those who want it

    texts = _inputs(decode_body(request.body))
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise PayloadTooLarge(
            f"the built-in classifiers read at most {MAX_CHARACTERS} characters in a request",
            param="input",
        )
    return _answer(BUILT_IN, [_result(scores(text)) for text in texts])


def _model(body: dict[str, Any], asker: Asker) -> str | None:
    """The deployment that is asked, None for the built-in classifiers. Raises ModelNotFound."""
    named, configured = body.get("model"), asker.moderation
    if named is not None and not isinstance(named, str):
        raise InvalidRequest("model must be a text", param="model")
    if named and configured is not None and named in configured.models:
        return named
    if named and named != BUILT_IN and not named.startswith(_OPENAI_NAMES):
        asker.model(named)  # so that an unknown one is told as everywhere
        raise InvalidRequest(
            f"{named[:80]!r} is not among the models that moderate here; the operator names them "
            "in the guardrails' file under moderation.models",
            param="model",
        )
    if named == BUILT_IN or configured is None:
        return None
    return configured.default or None


def _inputs(body: dict[str, Any]) -> list[str]:
    """The texts of ``input``: a text, several, or parts of one."""
    given = body.get("input")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise InvalidRequest("input is required: a text or a list of texts", param="input")
    if len(given) > MAX_INPUTS:
        raise InvalidRequest(f"input has more than {MAX_INPUTS} texts", param="input")
    if all(isinstance(text, str) for text in given):
        return given
    parts = objects(given, "input")
    return ["".join(part_text(part, f"input[{n}]", ("text",)) for n, part in enumerate(parts))]


def _answer(model: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"modr-{unique()}", "model": model, "results": results}


def _result(scores: dict[str, float]) -> dict[str, Any]:
    from cloudlm.security.guardrails.moderation import FLAGGED_FROM

    flags = {category: score >= FLAGGED_FROM for category, score in scores.items()}
    return {
        "flagged": any(flags.values()),
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": {category: ["text"] for category in scores},
    }


def _of_llama_guard(model: str, answer: dict[str, Any]) -> dict[str, Any]:
    """A Llama Guard's verdict; codes that OpenAI has no category for keep their own name."""
    from cloudlm.security.guardrails.moderation import OPENAI_CATEGORIES

    words = heard(answer).text.replace(",", " ").split()
    if not words or words[0].lower() not in ("safe", "unsafe"):
        raise UpstreamFailed(f"{model} did not answer as a Llama Guard does: safe or unsafe")
    scores = dict.fromkeys(OPENAI_CATEGORIES, 0.0)
    if words[0].lower() == "unsafe":
        for code in words[1:] or ["unsafe"]:
            for category in _LLAMA_GUARD.get(code.upper(), (f"llama-guard/{code[:8]}",)):
                scores[category] = 1.0
    return _answer(model, [_result(scores)])
