"""Endpoints of services that are not ours, behind the handler (promises 1, 4, 8, 15, 28, 32)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudlm.core.clock import Clock, ManualClock, SystemClock
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.errors import CloudlmError, NotSupported, UpstreamFailed
from cloudlm.core.external import ExternalEndpoint, origin_of
from cloudlm.core.price import Price
from cloudlm.core.settings import ExternalSettings
from cloudlm.gateway import retry
from cloudlm.gateway.foreign import Foreign, foreign_body, hidden
from cloudlm.gateway.loads import DECLINED_TO_DISTRUST
from cloudlm.gateway.upstream import ReplicaRefused
from cloudlm.security.credentials import Credential, Credentials
from cloudlm.security.outside import Outside
from cloudlm.security.tls import LiveContext, client_context
from cloudlm.state.home import Home
from cloudlm.telemetry.damping import INTERVAL_S

KEY = "sk-provider-canary-0815"
SERVICE = "big-model-2"
HERE = "127.0.0.0/8"


def endpoint(kit: Any, mock: Any, **more: Any) -> Endpoint:
    facts = {"upstream_model": SERVICE, "secret": "provider"}
    return Endpoint(kit.MODEL, mock.name, mock.url + "/v1", 1, **{**facts, **more})


def keep(home: Home, *mocks: Any, name: str = "provider", value: str = KEY) -> None:
    for mock in mocks:
        Credentials(home.credentials, {}).put(Credential(name, origin_of(mock.url), value))


@contextlib.asynccontextmanager
async def foreign_rig(
    kit: Any, tmp_path: Any, count: int = 1, **options: Any
) -> AsyncIterator[Any]:
    """A gateway whose endpoints are all another's: mock n has a secret of its own."""
    more = {"networks": HERE, **options}
    async with kit.open_rig(replicas=count, home=tmp_path, **more) as rig:
        found = []
        for number, mock in enumerate(rig.replicas):
            keep(Home(tmp_path), mock, name=f"provider-{number}")
            found.append(endpoint(kit, mock, secret=f"provider-{number}"))
        external = tuple(ExternalEndpoint(e.url, SERVICE, e.secret) for e in found)
        spec = DeploymentSpec(
            kit.MODEL,
            SERVICE,
            driver="external",
            min_replicas=count,
            max_replicas=count,
            prices=Price(1000, 500, 2000),
            endpoints=external,
        )
        await rig.state.put_deployment(spec, now=1.0)
        await rig.state.put_endpoints(kit.MODEL, found)
        await rig.gateway.view.refresh()
        yield rig


def reasons(caplog: Any) -> list[str]:
    return [r.fields.get("reason", "") for r in caplog.records if hasattr(r, "fields")]


class TestTheRequest:
    async def test_it_says_nothing_of_the_client(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            (mock,) = rig.replicas
            headers = {**rig.headers, "cookie": "c=client", "x-forwarded-for": "9.9.9.9"}
            headers |= {"x-request-id": "client-told-id", "openai-organization": "org-client"}
            body = kit.chat_body(temperature=0.5, seed=3, user="u1")
            result = await rig.ask(body, headers=headers)
            assert result.status == 200
            assert result.json["model"] == kit.MODEL
            assert SERVICE not in result.body.decode()
            (sent,), (head,) = mock.requests, mock.heads
            assert sent == {**body, "model": SERVICE}
            assert head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
            lines = {line.split(":")[0].lower() for line in head.strip().split("\r\n")[1:]}
            assert lines == {
                "host",
                "content-length",
                "content-type",
                "accept-encoding",
                "user-agent",
                "authorization",
            }
            assert f"authorization: Bearer {KEY}" in head
            for secret in (rig.key, "client", "worker-token-for-tests", "9.9.9.9"):
                assert secret not in head

    async def test_a_stream_has_our_name_and_is_accounted(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            (mock,) = rig.replicas
            result = await rig.ask(kit.chat_body(stream=True))
            assert result.tokens == 5
            assert result.events[-1] == "[DONE]"
            chunks = [event for event in result.events if isinstance(event, dict)]
            assert {chunk["model"] for chunk in chunks} == {kit.MODEL}
            assert mock.requests[0]["stream_options"] == {"include_usage": True}
            assert "x-cloudlm-resumable" not in mock.heads[0].lower()
            (row,) = await rig.rows()
            assert (row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (7, 5, 2)
            assert row.cost == 5 * 1000 + 2 * 500 + 5 * 2000

    async def test_other_dialects_come_as_openais(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            body = {**kit.chat_body(), "max_tokens": 9}
            result = await rig.ask(body, path="/v1/messages")
            assert result.status == 200
            assert result.json["type"] == "message"
            assert rig.replicas[0].heads[0].startswith("POST /v1/chat/completions ")

    async def test_what_only_our_workers_know_is_refused(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            result = await rig.ask({"model": kit.MODEL, "prompt": "x"}, path="/tokenize")
            assert (result.status, result.json["error"]["code"]) == (501, "not_supported")
            assert rig.replicas[0].requests == []

    def test_a_body_keeps_its_bytes(self) -> None:
        body = b'{"model":"m","messages":[{"n":1.50}],"cache_salt":"s","priority":0,"x":"\\u00e9"}'
        told = foreign_body(body, 'a"b')
        assert told == b'{"model":"a\\"b","messages":[{"n":1.50}],"x":"\\u00e9"}'

    @given(st.dictionaries(st.text(), st.text() | st.integers(-(2**53), 2**53) | st.none()))
    def test_only_what_is_ours_goes(self, body: dict[str, Any]) -> None:
        body = {**body, "model": "m", "cache_salt": "s"}
        told = json.loads(foreign_body(json.dumps(body).encode(), "other"))
        ours = {"cache_salt", "priority", "stream_options", "model"}
        assert told["model"] == "other"
        assert {k: v for k, v in told.items() if k not in ours} == {
            k: v for k, v in body.items() if k not in ours
        }


class TestRefusals:
    async def test_a_request_that_is_declined_goes_elsewhere_and_ejects_nobody(
        self, kit, tmp_path, caplog
    ) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            first, second = rig.replicas
            error = {"error": {"message": f"flagged by moderation {KEY}"}}
            first.default = kit.Plan("status", status=403, error=error)
            for _ in range(2):
                assert (await rig.ask(kit.chat_body(stream=True))).tokens == 5
            assert first.requests
            assert rig.gateway.loads.of(first.name).failures == 0
            assert "it answered 403: flagged by moderation ***" in reasons(caplog)
            second.default = first.default
            result = await rig.ask(kit.chat_body())
            assert (result.status, result.json["error"]["code"]) == (502, "upstream_failed")
            assert "declined" in result.json["error"]["message"]
            assert "moderation" not in result.body.decode()

    async def test_one_that_declines_what_others_answer_is_ejected(
        self, kit, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setattr(retry, "BUDGET_SHARE", 1.0)
        async with foreign_rig(kit, tmp_path, 2) as rig:
            first, second = rig.replicas
            known = rig.gateway.loads.of

            async def ask_until(condition) -> None:
                for _ in range(60):
                    if condition():
                        return
                    assert (await rig.ask(kit.chat_body(stream=True))).tokens == 5
                raise AssertionError("it never came true")

            first.plans.extend([kit.Plan("status", status=403)] * (DECLINED_TO_DISTRUST - 1))
            await ask_until(lambda: not first.plans)
            assert known(first.name).declined == DECLINED_TO_DISTRUST - 1
            await ask_until(lambda: not known(first.name).declined)  # so it was not in a row
            first.default = kit.Plan("status", status=403)
            before = len(first.requests)
            await ask_until(lambda: known(first.name).failures)
            assert len(first.requests) - before == DECLINED_TO_DISTRUST
            assert not known(second.name).failures

    @pytest.mark.parametrize("count", [1, 2])
    async def test_one_client_whom_nobody_answers_ejects_nobody(
        self, kit, tmp_path, monkeypatch, count
    ) -> None:
        """A prompt that every moderation flags is its sender's matter."""
        monkeypatch.setattr(retry, "BUDGET_SHARE", 1.0)
        async with foreign_rig(kit, tmp_path, count) as rig:
            for mock in rig.replicas:
                mock.default = kit.Plan("status", status=403)
            for _ in range(2 * DECLINED_TO_DISTRUST):
                assert (await rig.ask(kit.chat_body())).status == 502
            for mock in rig.replicas:
                assert len(mock.requests) >= DECLINED_TO_DISTRUST
                load = rig.gateway.loads.of(mock.name)
                assert (load.failures, load.declined) == (0, 0)

    async def test_a_second_cause_is_said_at_once(self, kit, tmp_path, caplog) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            plans = rig.replicas[0].plans
            spent = {"error": {"message": "spent", "code": "insufficient_quota"}}
            for status, error in ((401, None), (402, None), (429, spent), (401, None)):
                plans.append(kit.Plan("status", status=status, error=error))
                assert (await rig.ask(kit.chat_body())).status == 502
            lines = [r for r in caplog.records if r.message == "external_endpoint_unusable"]
            said = [line.fields["reason"].partition(":")[0] for line in lines]
            assert said[:3] == ["it answered 401", "it answered 402", "it answered 429"]

    async def test_refusals_without_end_are_few_lines_that_say_how_many(
        self, kit, tmp_path, caplog
    ) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            rig.replicas[0].default = kit.Plan("status", status=401)
            for _ in range(20):
                assert (await rig.ask(kit.chat_body())).status >= 500
            for event in ("request_not_answered", "external_endpoint_unusable"):
                lines = [one for one in caplog.records if one.message == event]
                assert 1 <= len(lines) < 20
                assert lines[0].fields["count"] == 1

    @pytest.mark.parametrize("status", [401, 402, 404, 405])
    async def test_our_fault_is_not_the_clients(self, kit, tmp_path, caplog, status) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            error = {"message": f"bad key {KEY}", "type": "x", "code": "invalid_api_key"}
            rig.replicas[0].default = kit.Plan("status", status=status, error={"error": error})
            result = await rig.ask(kit.chat_body())
            assert (result.status, result.json["error"]["code"]) == (502, "upstream_failed")
            assert "log" in result.json["error"]["message"]
            assert f"it answered {status}: bad key ***" in reasons(caplog)
            rig.assert_nothing_open()

    @pytest.mark.parametrize("status", [404, 405])
    async def test_what_it_does_not_offer_says_nothing_of_it(self, kit, tmp_path, status) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            for mock in rig.replicas:
                mock.default = kit.Plan("status", status=status, error={"error": {"message": "?"}})
            body = {"model": kit.MODEL, "input": "hi"}
            result = await rig.ask(body, path="/v1/embeddings")
            assert result.status == 501
            assert "not offered" in result.json["error"]["message"]
            assert sum(len(mock.requests) for mock in rig.replicas) == 1
            assert not any(rig.gateway.loads.of(mock.name).failures for mock in rig.replicas)
            rig.assert_nothing_open()

    async def test_another_endpoint_answers_instead(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            first, second = rig.replicas
            first.default = kit.Plan("status", status=401)
            for _ in range(6):
                assert (await rig.ask(kit.chat_body(stream=True))).tokens == 5
            assert len(first.requests) <= 2  # ejected after the first failure
            assert len(second.requests) == 6

    async def test_no_money_is_our_fault_too(self, kit, tmp_path, caplog) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            error = {"message": "You exceeded your quota", "code": "insufficient_quota"}
            rig.replicas[0].default = kit.Plan("status", status=429, error={"error": error})
            assert (await rig.ask(kit.chat_body())).status == 502
            assert "it answered 429: You exceeded your quota" in reasons(caplog)

    @pytest.mark.parametrize(("headers", "wait_s"), [({"Retry-After": "17"}, 17), ({}, 2)])
    async def test_too_many_requests_gives_it_time(self, kit, tmp_path, headers, wait_s) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            first, second = rig.replicas
            error = {"error": {"message": "Rate limit of org-9 reached", "type": "requests"}}
            busy = kit.Plan("status", status=429, headers=headers, error=error)
            first.default = second.default = busy
            result = await rig.ask(kit.chat_body())
            assert (result.status, result.headers["retry-after"]) == (429, str(wait_s))
            assert "org-9" not in result.body.decode()
            now = rig.gateway.view._clock.monotonic()
            for mock in rig.replicas:
                left_s = rig.gateway.loads.of(mock.name).cooling_until - now
                assert left_s == pytest.approx(wait_s, abs=1.5)

    @pytest.mark.promise(28)
    async def test_a_later_failure_only_extends_the_time(self, kit, tmp_path) -> None:
        """Promise 28: the longest ``Retry-After`` holds."""
        async with foreign_rig(kit, tmp_path) as rig:
            mock = rig.replicas[0]
            for seconds in (60, 1, 30):
                busy = kit.Plan("status", status=429, headers={"Retry-After": str(seconds)})
                mock.plans.append(busy)
                await rig.ask(kit.chat_body())
            now = rig.gateway.view._clock.monotonic()
            assert rig.gateway.loads.of(mock.name).cooling_until - now > 50

    @pytest.mark.parametrize("status", [500, 502, 504, 520, 408])
    async def test_its_failure_is_a_502(self, kit, tmp_path, status) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            error = {"error": {"message": "stack trace of ours"}}
            rig.replicas[0].default = kit.Plan("status", status=status, error=error)
            result = await rig.ask(kit.chat_body())
            assert result.status == 502
            assert "stack trace" not in result.body.decode()

    async def test_overload_is_a_503(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            plan = kit.Plan("status", status=529, headers={"Retry-After": "3"})
            rig.replicas[0].default = plan
            result = await rig.ask(kit.chat_body())
            assert (result.status, result.headers["retry-after"]) == (503, "3")

    async def test_the_clients_own_fault_is_told_in_our_names(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            error = {
                "message": f"{SERVICE} takes no images, {KEY}",
                "type": "invalid_request_error",
                "param": "messages",
                "code": {"odd": 1},
                "internal": "x",
            }
            for mock in rig.replicas:
                mock.default = kit.Plan("status", status=400, error={"error": error})
            result = await rig.ask(kit.chat_body())
            assert result.status == 400
            assert result.json["error"] == {
                "message": f"{kit.MODEL} takes no images, ***",
                "type": "invalid_request_error",
                "param": "messages",
                "code": None,
            }
            assert sum(len(mock.requests) for mock in rig.replicas) == 1

    @pytest.mark.promise(15)
    async def test_a_redirect_is_not_followed(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            first, second = rig.replicas
            where = {"Location": f"{second.url}/v1/chat/completions"}
            for mock in rig.replicas:
                mock.default = kit.Plan("status", status=307, headers=where)
            assert (await rig.ask(kit.chat_body())).status == 502
            assert len(first.requests) + len(second.requests) == 2  # one attempt each

    @pytest.mark.promise(8)
    async def test_a_total_outage_multiplies_nothing(self, kit, tmp_path) -> None:
        """Promise 8: at most 1.2 attempts per request."""
        async with foreign_rig(kit, tmp_path, 3) as rig:
            for mock in rig.replicas:
                mock.default = kit.Plan("status", status=503)
            for _ in range(100):
                assert (await rig.ask(kit.chat_body())).status == 503
            assert len(await rig.rows()) <= 120


class TestStreams:
    @pytest.mark.promise(1)
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cut=st.integers(0, 2500))
    async def test_a_broken_stream_says_so_and_is_never_done(self, kit, tmp_path, cut) -> None:
        """Promise 1: an explicit error event, no ``[DONE]``, no ``stop``, no token twice."""
        async with foreign_rig(kit, tmp_path, 2) as rig:
            for mock in rig.replicas:  # notes of ours from a stranger must change nothing
                mock.default = kit.Plan(cut_byte=cut, notes=True, tokens=8)
            result = await rig.ask(kit.chat_body(stream=True))
            if result.status != 200:  # nothing was shown: a true status (promise 4)
                assert result.status == 502
                assert sum(len(mock.requests) for mock in rig.replicas) == 2
                return
            events = result.events
            texts = [
                event["choices"][0]["delta"].get("content")
                for event in events
                if isinstance(event, dict) and event.get("choices")
            ]
            told = [text.strip() for text in texts if text]
            assert told == [f"t{n}" for n in range(len(told))]
            if events[-1] != "[DONE]":
                assert result.error is not None
                assert "[DONE]" not in events
                assert not any(
                    choice.get("finish_reason")
                    for event in events
                    for choice in event.get("choices") or ()
                    if len(told) < 8
                )

    @pytest.mark.promise(1)
    async def test_nobody_is_asked_to_go_on(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            for mock in rig.replicas:
                mock.default = kit.Plan(cut_byte=900, tokens=20)
            result = await rig.ask(kit.chat_body(stream=True))
            assert result.error is not None
            assert result.error["code"] == "upstream_failed"
            assert sum(len(mock.requests) for mock in rig.replicas) == 1
            (row,) = await rig.rows()
            assert row.outcome == "failed"
            assert row.completion_tokens == result.tokens
            rig.assert_nothing_open()

    @pytest.mark.promise(4)
    async def test_an_error_before_the_first_word_is_unseen(self, kit, tmp_path) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            error = {"error": {"message": f"oops {KEY}", "code": 429}}
            for mock in rig.replicas:
                mock.plans.append(kit.Plan(error=error))
            results = [await rig.ask(kit.chat_body(stream=True)) for _ in range(2)]
            assert {result.tokens for result in results if result.status == 200} <= {5}
            assert KEY not in "".join(result.body.decode() for result in results)


class TestWhereTheKeyGoes:
    @pytest.mark.promise(15)
    async def test_not_to_another_address(self, kit, tmp_path, caplog) -> None:
        async with foreign_rig(kit, tmp_path, 2) as rig:
            first, second = rig.replicas
            stolen = [endpoint(kit, second, secret="provider-0")]  # the key of the first
            await rig.state.put_endpoints(kit.MODEL, stolen)
            await rig.gateway.view.refresh()
            result = await rig.ask(kit.chat_body())
            assert result.status == 502
            assert origin_of(first.url) not in result.body.decode()
            assert second.requests == []
            assert any("is for" in reason for reason in reasons(caplog))

    async def test_a_key_that_is_not_there(self, kit, tmp_path, caplog) -> None:
        async with foreign_rig(kit, tmp_path) as rig:
            Credentials(Home(tmp_path).credentials, {}).remove("provider-0")
            assert (await rig.ask(kit.chat_body())).status == 502
            assert rig.replicas[0].requests == []
            assert any("cloudlm secrets set provider-0" in reason for reason in reasons(caplog))
            keep(Home(tmp_path), rig.replicas[0], name="provider-0", value="sk-next")
            assert (await rig.ask(kit.chat_body())).status == 200  # no restart
            assert "Bearer sk-next" in rig.replicas[0].heads[0]

    async def test_this_machine_is_not_reached_unless_it_may_be(
        self, kit, tmp_path, caplog
    ) -> None:
        async with foreign_rig(kit, tmp_path, networks="") as rig:
            result = await rig.ask(kit.chat_body())
            assert result.status == 502
            assert "127.0.0.1" not in result.body.decode()
            assert rig.replicas[0].requests == []
            assert any("external.networks" in reason for reason in reasons(caplog))

    @pytest.mark.promise(32)
    async def test_the_key_is_found_nowhere_else(self, kit, tmp_path, caplog) -> None:
        """Promise 32: state, logs, metrics and answers hold no key."""
        caplog.set_level("DEBUG")
        async with foreign_rig(kit, tmp_path, 2) as rig:
            echo = {"error": {"message": KEY, "code": KEY, "type": KEY, "param": KEY}}
            seen = []
            for status in (400, 401, 404, 422, 429, 500, 503):
                for mock in rig.replicas:
                    mock.default = kit.Plan("status", status=status, error=echo)
                seen.append((await rig.ask(kit.chat_body())).body.decode())
            for mock in rig.replicas:
                mock.default = kit.Plan(error=echo)
            seen.append((await rig.ask(kit.chat_body(stream=True))).body.decode())
            seen.append((await rig.gateway.exposition()).decode())
            seen += [repr(row) for row in await rig.rows()]
            seen += [repr(one) for one in await rig.state.list_deployments()]
            seen += [repr(one) for one in await rig.state.list_endpoints()]
        seen += [f"{vars(record)} {record.getMessage()}" for record in caplog.records]
        assert len(seen) > 20
        assert not [text for text in seen if KEY in text]


class TestPinning:
    """DNS rebinding: the address that was judged is the one that is connected to."""

    def make(
        self, tmp_path: Any, answers: list[Sequence[str]], clock: Clock | None = None
    ) -> tuple[Foreign, list[str]]:
        asked: list[str] = []

        async def resolve(host: str, port: int) -> Sequence[str]:
            asked.append(host)
            return answers.pop(0) if len(answers) > 1 else answers[0]

        foreign = Foreign(
            credentials=Credentials(Home(tmp_path).credentials, {}),
            outside=Outside(ExternalSettings(networks=HERE), resolve),
            tls=LiveContext(lambda: client_context((), None), ()),
            connect_timeout_s=2.0,
            clock=SystemClock() if clock is None else clock,
        )
        return foreign, asked

    async def send(self, foreign: Foreign, one: Endpoint) -> int:
        body = b'{"model":"m","messages":[]}'
        answer = await foreign.send(one, "/v1/chat/completions", body, timeout_s=5.0, now=0.0)
        await answer.whole(5.0)
        answer.headers["connection"] = "close"
        answer._line._keep = False  # so that the next request connects anew
        answer.close()
        return answer.status

    async def test_what_every_request_runs_into_is_told_by_the_gateways_clock(
        self, tmp_path, caplog
    ) -> None:
        clock = ManualClock()
        foreign, _ = self.make(tmp_path, [["127.0.0.1"]], clock)
        keyless = Endpoint("m", "r", "https://a.example/v1", 1, secret="nowhere")
        counts = []
        for wait_s in (0.0, 0.0, INTERVAL_S - 0.1, 0.2, 0.0):
            await clock.advance(wait_s)
            with pytest.raises(UpstreamFailed):
                await foreign.send(keyless, "/v1/chat/completions", b"{}", timeout_s=1.0, now=0.0)
            lines = [r for r in caplog.records if r.message == "external_endpoint_unusable"]
            counts.append([line.fields["count"] for line in lines])
        assert counts == [[1], [1], [1], [1, 3], [1, 3]]

    @pytest.mark.promise(15)
    async def test_a_name_that_flips(self, kit, tmp_path) -> None:
        mock = kit.MockReplica("x")
        await mock.start()
        port = mock.url.rpartition(":")[2]
        flips: list[Sequence[str]] = [["127.0.0.1"], ["169.254.169.254"], ["10.0.0.1", "127.0.0.1"]]
        foreign, asked = self.make(tmp_path, flips)
        one = Endpoint("m", "x", f"http://flips.invalid:{port}/v1", 1, upstream_model="m")
        await foreign.open()
        try:
            assert await self.send(foreign, one) == 200
            with pytest.raises(UpstreamFailed) as refused:
                await self.send(foreign, one)
            assert "169.254" not in refused.value.message
            assert await self.send(foreign, one) == 200  # by the one address that may be reached
        finally:
            await foreign.close()
            await mock.stop()
        assert asked == ["flips.invalid"] * 3
        assert len(mock.requests) == 2
        assert f"host: flips.invalid:{port}" in mock.heads[0]

    async def test_the_first_address_that_accepts_is_taken(self, kit, tmp_path) -> None:
        mock = kit.MockReplica("x")
        await mock.start()
        port = mock.url.rpartition(":")[2]
        foreign, _ = self.make(tmp_path, [["127.0.0.2", "127.0.0.1"]])
        one = Endpoint("m", "x", f"http://two.invalid:{port}/v1", 1, upstream_model="m")
        await foreign.open()
        try:
            assert await self.send(foreign, one) == 200
        finally:
            await foreign.close()
            await mock.stop()

    async def test_errors_are_ours(self, tmp_path) -> None:
        foreign, _ = self.make(tmp_path, [["127.0.0.1"]])
        one = Endpoint("m", "x", "http://127.0.0.1:1/v1", 1, upstream_model="m")
        await foreign.open()
        try:
            with pytest.raises(CloudlmError):
                await self.send(foreign, one)
            with pytest.raises(NotSupported):
                await foreign.send(one, "/internal/resume", b"{}", timeout_s=1.0, now=0.0)
        finally:
            await foreign.close()


def test_a_refusal_without_an_error_object_is_read(kit) -> None:
    assert ReplicaRefused(500, {}, None).body()["error"]
    assert hidden("a key b", "key") == "a *** b"
    assert hidden("text", "") == "text"
    assert dataclasses.is_dataclass(Endpoint)
