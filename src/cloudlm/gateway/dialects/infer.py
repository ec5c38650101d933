"""KServe's V2 protocol (Open Inference Protocol) over HTTP: ``/v2/models/{name}/infer`` and what it
tells of server and models.

A language model has one input tensor of texts (datatype BYTES, shape [n]) and one output tensor of
as many; with ``parameters.task`` embed, the output holds vectors (FP32, shape [n, d]). Tensors as
binary data are refused. Written after the protocol's public text. Must not do I/O.
"""

from __future__ import annotations

import functools
from typing import Any

from cloudlm import __version__
from cloudlm.core.errors import InvalidRequest, NoReplica, NotFound, NotSupported
from cloudlm.core.fields import Fields, shown
from cloudlm.core.requests import MAX_PROMPTS, decode_body
from cloudlm.gateway.dialects.base import Asker, Dialect
from cloudlm.gateway.dialects.generation import parameters, texts_call, vectors_call, wants_vectors
from cloudlm.gateway.dialects.heard import Heard
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.sleeping import asleep

DIALECT = Dialect("KServe V2", lambda error: {"error": error.message})
INPUT, OUTPUT = "text_input", "text_output"


def parse(request: GatewayRequest, name: str, asker: Asker) -> Call:
    """A call out of an infer request. Raises InvalidRequest and NotSupported."""
    if "inference-header-content-length" in request.headers:
        raise NotSupported("tensors as binary data are not supported: send them as JSON")
    fields = Fields(decode_body(request.body), "an infer request")
    request_id = fields.optional_text("id")
    given = dict(fields.mapping("parameters", {}))
    inputs, outputs = fields.items("inputs"), fields.items("outputs", ())
    fields.end()
    if len(inputs) != 1:
        raise InvalidRequest(
            f"inputs must hold one tensor of texts, not {len(inputs)}", param="inputs"
        )
    for number, output in enumerate(outputs):
        if not isinstance(output, dict) or output.get("name") != OUTPUT:
            where = f"outputs[{number}]"
            raise InvalidRequest(f"{where} must be named {OUTPUT}", param=where)
    texts = _texts(Fields(inputs[0], "inputs[0]", path="inputs[0]."))
    embeds = wants_vectors(given.pop("task", None), "parameters.task")
    sampling = parameters(given, "parameters")
    head = {"model_name": name} | ({} if request_id is None else {"id": request_id})
    if embeds:
        return vectors_call(name, texts, asker, functools.partial(_vectors, head), "inputs[0].data")
    said = functools.partial(_outputs, head)
    return texts_call(name, texts, sampling, asker, said, "inputs[0].data")


def read_server(request: GatewayRequest, _: str, asker: Asker) -> dict[str, Any]:
    """``GET /v2``."""
    return {"name": "cloudlm", "version": __version__, "extensions": []}


def read_model(request: GatewayRequest, name: str, asker: Asker) -> dict[str, Any]:
    """``GET /v2/models/{name}``: its versions are the revisions that serve."""
    model = asker.model(name)
    versions = sorted({endpoint.revision for endpoint in model.endpoints})
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": "cloudlm",
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": OUTPUT, "datatype": "BYTES", "shape": [-1]}],
    }


def read_ready(request: GatewayRequest, name: str, asker: Asker) -> dict[str, Any]:
    """``GET /v2/models/{name}/ready``. Raises NoReplica while none is, ModelAsleep."""
    model = asker.model(name)
    if model.asleep:
        raise asleep(model)
    if not model.endpoints:
        raise NoReplica(f"none of the replicas of {name!r} is ready yet", retry_after_s=2.0)
    return {"name": name, "ready": True}


def nothing_there(path: str) -> NotFound | NotSupported:
    """Why the rest of the protocol is not here."""
    if "/versions/" in path:
        return NotSupported("a model's version is chosen by its deployment, not by the path")
    return NotFound(f"there is nothing at {path[:120]!r} in the V2 protocol")


def _texts(tensor: Fields) -> list[Any]:
    tensor.text("name", low=1)
    datatype, shape = tensor.raw("datatype"), tensor.raw("shape")
    if datatype != "BYTES":
        param = tensor.param("datatype")
        raise InvalidRequest(f"{param} must be BYTES (texts), not {shown(datatype)}", param=param)
    data = tensor.items("data", max_entries=MAX_PROMPTS)
    tensor.raw("parameters", None)
    tensor.end()
    if shape not in ([len(data)], [len(data), 1], [1, len(data)]):
        param = tensor.param("shape")
        raise InvalidRequest(
            f"{param} must be [{len(data)}], as many as data holds, not {shown(shape)}", param=param
        )
    return data


def _outputs(head: dict[str, Any], choices: list[Heard]) -> dict[str, Any]:
    tensor = {"name": OUTPUT, "datatype": "BYTES", "shape": [len(choices)]}
    reasons = {"name": "finish_reason", "datatype": "BYTES", "shape": [len(choices)]}
    texts = {**tensor, "data": [one.text for one in choices]}
    return {**head, "outputs": [texts, {**reasons, "data": [one.finish for one in choices]}]}


def _vectors(head: dict[str, Any], vectors: list[Any]) -> dict[str, Any]:
    width = len(vectors[0]) if isinstance(vectors[0], list) else 0
    tensor = {"name": "embedding", "datatype": "FP32", "shape": [len(vectors), width]}
    flat = [number for vector in vectors for number in vector]
    return {**head, "outputs": [{**tensor, "data": flat}]}
