"""External endpoints in a deployment: what may be said of them, and what becomes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest, UnprocessableRequest
from cloudlm.core.external import ExternalEndpoint, check_url, origin_of
from cloudlm.core.routing import Policy
from cloudlm.core.spec import check_spec
from cloudlm.core.wire import spec_body, spec_from_body
from cloudlm.state.documents import dump_spec, load_spec

URL = "https://api.example.com/v1"


def body(*endpoints: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "chat", "model": "gpt-small", "endpoints": list(endpoints), **more}


@pytest.mark.parametrize(
    "url",
    [
        "http://0x7f.1/v1",  # promise 15: other ways to write 127.0.0.1
        "http://2130706433/v1",
        "http://127.1/v1",
        "http://0177.0.0.1/v1",
        "http://localhost.0x7f/v1",
        "http://[::1%25lo]/v1",
        "ftp://h/v1",
        "https://user@h/v1",
        "https://user:key@h/v1",
        "https://h/v1?key=1",
        "https://h/v1#x",
        "https://h/v1/",
        "https://h/v1/chat/completions",
        "https://h:0/v1",
        "https://h:/v1",
        "https://h:99999/v1",
        "https:///v1",
        "https://a..b/v1",
        "https://h/v1 x",
        "https://h/v1\r\nx: y",
        "https://h/a/../b",
        "https://h\\@evil/v1",
        "https://é.example/v1",
        "h/v1",
        "",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_url(url, "endpoints.0.url")
    assert refused.value.param == "endpoints.0.url"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        (URL, "https://api.example.com:443"),
        ("https://API.example.com:443/other", "https://api.example.com:443"),
        ("http://127.0.0.1:11434/v1", "http://127.0.0.1:11434"),
        ("http://[::1]/v1", "http://[::1]:80"),
        ("https://x-1.a_b.example:8443", "https://x-1.a_b.example:8443"),
    ],
)
def test_an_origin_is_scheme_host_and_port(url: str, origin: str) -> None:
    assert origin_of(check_url(url)) == origin


def test_a_spec_of_endpoints_has_a_replica_for_each() -> None:
    other = {"url": URL + "/", "model": "other", "secret": "key-2", "weight": 3, "priority": 1}
    spec = spec_from_body(body({"url": URL}, other))
    assert spec.driver == "external"
    assert (spec.min_replicas, spec.max_replicas) == (2, 2)
    assert spec.routing.policy is Policy.WEIGHTED
    assert spec.endpoints == (
        ExternalEndpoint(URL, "gpt-small"),
        ExternalEndpoint(URL, "other", "key-2", 3.0, 1),
    )
    assert spec_from_body(spec_body(spec)) == spec
    assert load_spec(dump_spec(spec)) == spec


def test_another_policy_may_be_asked_for() -> None:
    spec = spec_from_body(body({"url": URL}, routing={"policy": "least_load"}))
    assert spec.routing.policy is Policy.LEAST_LOAD


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (body(driver="external"), "endpoints"),
        (body({"url": URL}, driver="process"), "driver"),
        (body({"url": URL}, min_replicas=0, max_replicas=3), "min_replicas"),
        (body({"url": URL}, options={"dtype": "auto"}), "options"),
        (body({"url": URL}, env={"A": "b"}), "env"),
        (body({"url": URL}, adapters=[{"name": "a", "model": "models:/a/1"}]), "adapters"),
        (body({"url": URL}, asleep=True), "asleep"),
        (body({"url": URL, "weight": 0}), "endpoints.0.weight"),
        (body({"url": URL, "weight": float("nan")}), "endpoints.0.weight"),
        (body({"url": URL}, {"url": URL, "priority": -1}), "endpoints.1.priority"),
        (body({"url": URL, "secret": "sk-Live KEY"}), "endpoints.0.secret"),
        (body({"url": URL, "model": ""}), "endpoints.0.model"),
        (body({"url": "https://h/v1?x"}), "endpoints.0.url"),
        (body(*[{"url": URL}] * 65), "endpoints"),
    ],
)
def test_what_cannot_be_is_named(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        spec_from_body(wrong)
    assert refused.value.param == param


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(UnprocessableRequest):
        spec_from_body(body({"url": URL, "api_key": "sk-1"}))


def test_changed_endpoints_are_a_new_revision() -> None:
    from cloudlm.core.deployment import Deployment

    spec = check_spec(
        DeploymentSpec("chat", "m", driver="external", endpoints=(ExternalEndpoint(URL, "m"),))
    )
    before = Deployment(spec)
    weighed = replace(spec, endpoints=(ExternalEndpoint(URL, "m", weight=2.0),))
    assert before.changed(weighed, 1.0).revision == 2
