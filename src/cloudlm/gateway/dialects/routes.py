"""Which dialect speaks at a path.

The paths of inference are found in one look-up; what has a model's name in it, or is not there at
all, may take longer. Must not read bodies.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudlm.core.errors import CloudlmError, NotSupported
from cloudlm.gateway.dialects import (
    anthropic,
    infer,
    moderations,
    ollama,
    openai,
    openai_get,
    predict,
    responses,
    sagemaker,
    tgi,
    torchserve,
)
from cloudlm.gateway.dialects.base import Dialect, Route, nothing_there
from cloudlm.gateway.dialects.openai import Operation
from cloudlm.gateway.exchange import GatewayRequest

_SPOKEN = "this server speaks OpenAI's API under /v1, and others: see the guide to dialects"
_KNOWN_ELSEWHERE = (
    "/v1/assistants",
    "/v1/audio",
    "/v1/batches",
    "/v1/containers",
    "/v1/conversations",
    "/v1/evals",
    "/v1/files",
    "/v1/fine_tuning",
    "/v1/images",
    "/v1/realtime",
    "/v1/threads",
    "/v1/uploads",
    "/v1/vector_stores",
)


def _is_under(path: str, known: str) -> bool:
    return path == known or path.startswith(known + "/")


def _openai_fault(path: str) -> CloudlmError:
    if _is_under(path, "/v1/responses"):
        return NotSupported("responses are not stored here, so there is nothing to read or change")
    if path.startswith("/v1/models/") and "/versions/" in path:
        return predict.no_such_verb(path)
    if any(_is_under(path, known) for known in _KNOWN_ELSEWHERE):
        return NotSupported(f"{path[:80]} is part of OpenAI's API that this server does not offer")
    return nothing_there(_SPOKEN)(path)


def _anthropic_fault(path: str) -> CloudlmError:
    return NotSupported(f"{path[:80]} is part of Anthropic's API that this server does not offer")


_EXACT = {
    operation.value: Route(openai.DIALECT, parse=openai.parser(operation))
    for operation in Operation
} | {
    "/v1/moderations": Route(
        openai.DIALECT,
        read=moderations.read,
        perhaps=moderations.parser,
        counted_as=moderations.BUILT_IN,
    ),
    "/v1/models": Route(openai.DIALECT, "GET", read=openai.read_models),
    "/v1/responses": Route(openai.DIALECT, parse=responses.parse),
    "/v1/messages": Route(anthropic.DIALECT, parse=anthropic.parse_messages),
    "/v1/messages/count_tokens": Route(anthropic.DIALECT, parse=anthropic.parse_count),
    "/api/chat": Route(ollama.DIALECT, parse=ollama.parse_chat),
    "/api/generate": Route(ollama.DIALECT, parse=ollama.parse_generate),
    "/api/embed": Route(ollama.DIALECT, parse=ollama.parse_embed),
    "/api/embeddings": Route(ollama.DIALECT, parse=ollama.parse_embed),
    "/api/show": Route(ollama.DIALECT, read=ollama.read_show),
    "/api/tags": Route(ollama.DIALECT, "GET", read=ollama.read_tags),
    "/api/version": Route(ollama.DIALECT, "GET", read=ollama.read_version),
    "/": Route(tgi.DIALECT, parse=tgi.parse_either),
    "/generate": Route(tgi.DIALECT, parse=tgi.parse_generate),
    "/generate_stream": Route(tgi.DIALECT, parse=tgi.parse_stream),
    "/info": Route(tgi.DIALECT, "GET", read=tgi.read_info),
    "/invocations": Route(sagemaker.DIALECT, parse=sagemaker.parse),
    "/v2": Route(infer.DIALECT, "GET", read=infer.read_server),
}
_GET = {path: openai_get.route(operation) for path, operation in openai_get.OPERATIONS.items()}
_NAMED = (  # what stands before the model's name and after it
    ("/v1/models/", ":predict", Route(predict.DIALECT, parse=predict.parse)),
    ("/v1/models/", ":classify", Route(predict.DIALECT, fault=predict.no_such_verb)),
    ("/v1/models/", ":regress", Route(predict.DIALECT, fault=predict.no_such_verb)),
    ("/v1/models/", ":explain", Route(predict.DIALECT, fault=predict.no_such_verb)),
    ("/v2/models/", "/infer", Route(infer.DIALECT, parse=infer.parse)),
    ("/v2/models/", "/ready", Route(infer.DIALECT, "GET", read=infer.read_ready)),
    ("/v2/models/", "", Route(infer.DIALECT, "GET", read=infer.read_model)),
    ("/predictions/", "", Route(torchserve.DIALECT, parse=torchserve.parse)),
    ("/v1/models/", "", Route(openai.DIALECT, "GET", read=openai.read_model)),
)
_ANTHROPIC_MODELS = Route(anthropic.DIALECT, "GET", read=anthropic.read_models)
_ANTHROPIC_MODEL = Route(anthropic.DIALECT, "GET", read=anthropic.read_model)
_FAULTS: tuple[tuple[str, Dialect, Callable[[str], CloudlmError]], ...] = (
    ("/api/v1", openai.DIALECT, _openai_fault),  # cloudlm's own API, which control serves
    ("/api", ollama.DIALECT, ollama.refused),
    ("/v1/messages", anthropic.DIALECT, _anthropic_fault),
    ("/v2", infer.DIALECT, infer.nothing_there),
    ("", openai.DIALECT, _openai_fault),
)


def served() -> set[tuple[str, str]]:
    """All methods and paths; ``{name}`` stands for a model's name."""
    exact = {(route.method, path) for routes in (_EXACT, _GET) for path, route in routes.items()}
    named = {
        (route.method, f"{before}{{name}}{after}")
        for before, after, route in _NAMED
        if route.fault is None
    }
    return exact | named


def find(request: GatewayRequest) -> tuple[Route, str]:
    """The route of a request, and the model's name where the path holds one. What is not there has
    a route too, whose ``check`` raises."""
    path = request.path
    route = _EXACT.get(path)
    if request.method == "GET" and request.query and path in _GET:
        return _GET[path], ""
    if route is not None and (route.read is None or "anthropic-version" not in request.headers):
        return route, ""
    return _search(path, "anthropic-version" in request.headers)


def _search(path: str, for_anthropic: bool) -> tuple[Route, str]:
    if for_anthropic and path == "/v1/models":
        return _ANTHROPIC_MODELS, ""
    if path in _EXACT:
        return _EXACT[path], ""
    for before, after, route in _NAMED:
        name = path[len(before) : len(path) - len(after)]
        if path.startswith(before) and path.endswith(after) and name and "/" not in name:
            if for_anthropic and route.read is openai.read_model:
                return _ANTHROPIC_MODEL, name
            return route, name
    dialect, fault = next((d, f) for under, d, f in _FAULTS if _is_under(path, under) or not under)
    return Route(dialect, fault=fault), ""
