"""What both clients send and return; the same tests drive them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import pytest

import cloudlm
from cloudlm.client import asynchronous, sync
from cloudlm.core import wire, wire_access
from cloudlm.core.access import (
    CustomRole,
    Grant,
    Limits,
    Principal,
    PrincipalKind,
    Project,
    Tenant,
)
from cloudlm.core.deployment import (
    Deployment,
    DeploymentPhase,
    DeploymentSpec,
    DeploymentStatus,
)
from cloudlm.core.errors import (
    AuthenticationFailed,
    CloudlmError,
    Conflict,
    LimitExceeded,
    NotFound,
    Unavailable,
    UpstreamFailed,
    UpstreamTimeout,
)
from cloudlm.core.job import Job, JobState
from cloudlm.core.model import Manifest
from cloudlm.core.tenant import KeyRecord, Role

SPEC = DeploymentSpec("bank", "models:/starter/1", options={"dtype": "float32"})
DEPLOYMENT = Deployment(SPEC, generation=2, created_at=1.0, updated_at=2.0)
STATUS = DeploymentStatus("bank", DeploymentPhase.READY, 2, 1, 1, message="fine")
MANIFEST = Manifest("starter", 1, (), "generate", "llama", "float32", 10, 256)
MODEL = wire.ModelEntry("starter", (MANIFEST,), {"champion": 1})
JOB = Job("j1", "import", {"source": "/m"}, created_at=1.0)
RECORD = KeyRecord("k1", "laptop", "user", "", "wxyz", created_at=1.0)
PRINCIPAL = Principal("p-1", "ci", PrincipalKind.SERVICE)
DRIVER = wire.DriverEntry("process", "cloudlm", ("logs",))
SHOWN = wire.deployment_body(DEPLOYMENT, STATUS)
VIEW = wire.DeploymentView(DEPLOYMENT, STATUS)
SPEC_BODY = wire.spec_body(SPEC)


def at(phase: DeploymentPhase, generation: int = 2, message: str = "") -> dict[str, Any]:
    status = replace(STATUS, phase=phase, observed_generation=generation, message=message)
    return wire.deployment_body(DEPLOYMENT, replace(status, ready_replicas=0))


@pytest.mark.parametrize(
    ("what", "sent", "answer", "result"),
    [
        (
            lambda c: c.models.list(),
            ("GET", "/api/v1/models", None),
            {"data": [wire.model_body(MODEL)]},
            [MODEL],
        ),
        (
            lambda c: c.models.get("a/b"),
            ("GET", "/api/v1/models/a%2Fb", None),
            wire.model_body(MODEL),
            MODEL,
        ),
        (
            lambda c: c.models.version("starter", 1),
            ("GET", "/api/v1/models/starter/versions/1", None),
            MANIFEST.body(),
            MANIFEST,
        ),
        (
            lambda c: c.models.pull("/m"),
            ("POST", "/api/v1/models", {"source": "/m"}),
            {"job": wire.job_body(JOB)},
            JOB,
        ),
        (
            lambda c: c.models.pull("/m", name="n", alias="champion"),
            ("POST", "/api/v1/models", {"source": "/m", "name": "n", "alias": "champion"}),
            {"job": wire.job_body(JOB)},
            JOB,
        ),
        (
            lambda c: c.models.remove("starter", 1),
            ("DELETE", "/api/v1/models/starter/versions/1", None),
            httpx2.Response(204),
            None,
        ),
        (
            lambda c: c.models.set_alias("starter", "champion", 3),
            ("PUT", "/api/v1/models/starter/aliases/champion", {"version": 3}),
            {},
            None,
        ),
        (
            lambda c: c.models.remove_alias("starter", "champion"),
            ("DELETE", "/api/v1/models/starter/aliases/champion", None),
            httpx2.Response(204),
            None,
        ),
        (
            lambda c: c.deployments.list(),
            ("GET", "/api/v1/deployments", None),
            {"data": [SHOWN]},
            [VIEW],
        ),
        (
            lambda c: c.deployments.get("bank"),
            ("GET", "/api/v1/deployments/bank", None),
            SHOWN,
            VIEW,
        ),
        (
            lambda c: c.deployments.create(SPEC),
            ("POST", "/api/v1/deployments", SPEC_BODY),
            httpx2.Response(202, json=SHOWN),
            VIEW,
        ),
        (
            lambda c: c.deployments.apply(SPEC),
            ("PUT", "/api/v1/deployments/bank", SPEC_BODY),
            httpx2.Response(202, json=SHOWN),
            VIEW,
        ),
        (
            lambda c: c.deployments.scale("bank", 0, 3),
            (
                "POST",
                "/api/v1/deployments/bank/scale",
                {"min_replicas": 0, "max_replicas": 3},
            ),
            SHOWN,
            VIEW,
        ),
        (
            lambda c: c.deployments.delete("bank"),
            ("DELETE", "/api/v1/deployments/bank", None),
            httpx2.Response(202, json=SHOWN),
            None,
        ),
        (
            lambda c: c.deployments.logs("bank", tail=5, follow=True, replica="bank-r1-0"),
            (
                "GET",
                "/api/v1/deployments/bank/logs?tail=5&follow=true&replica=bank-r1-0",
                None,
            ),
            httpx2.Response(200, text="one\ntwö\n"),
            ["one", "twö"],
        ),
        (
            lambda c: c.keys.list(),
            ("GET", "/api/v1/keys", None),
            {"data": [wire_access.key_body(RECORD)]},
            [RECORD],
        ),
        (
            lambda c: c.keys.create("laptop", Role.ADMIN),
            ("POST", "/api/v1/keys", {"name": "laptop", "role": "admin"}),
            httpx2.Response(201, json={"key": "clm_x", "record": wire_access.key_body(RECORD)}),
            ("clm_x", RECORD),
        ),
        (
            lambda c: c.jobs.list(),
            ("GET", "/api/v1/jobs", None),
            {"data": [wire.job_body(JOB)]},
            [JOB],
        ),
        (lambda c: c.jobs.get("j1"), ("GET", "/api/v1/jobs/j1", None), wire.job_body(JOB), JOB),
        (
            lambda c: c.jobs.start("import", {"source": "/m"}),
            ("POST", "/api/v1/jobs", {"kind": "import", "arguments": {"source": "/m"}}),
            httpx2.Response(202, json={"job": wire.job_body(JOB)}),
            JOB,
        ),
        (
            lambda c: c.jobs.cancel("j1"),
            ("DELETE", "/api/v1/jobs/j1", None),
            httpx2.Response(202, json=wire.job_body(JOB)),
            JOB,
        ),
        (
            lambda c: c.keys.revoke("k1"),
            ("DELETE", "/api/v1/keys/k1", None),
            wire_access.key_body(replace(RECORD, revoked_at=9.0)),
            replace(RECORD, revoked_at=9.0),
        ),
        (
            lambda c: c.keys.change("k1", models=("bank",), limits=Limits(3)),
            (
                "PATCH",
                "/api/v1/keys/k1",
                {"models": ["bank"], "limits": wire_access.limits_body(Limits(3))},
            ),
            wire_access.key_body(RECORD),
            RECORD,
        ),
        (
            lambda c: c.keys.rotate("k1", overlap_s=60.0),
            ("POST", "/api/v1/keys/k1/rotate", {"overlap_s": 60.0}),
            httpx2.Response(
                201,
                json={
                    "key": "clm_y",
                    "record": wire_access.key_body(RECORD),
                    "replaced": wire_access.key_body(replace(RECORD, expires_at=9.0)),
                },
            ),
            ("clm_y", RECORD, replace(RECORD, expires_at=9.0)),
        ),
        (
            lambda c: c.keys.rotate("k1"),
            ("POST", "/api/v1/keys/k1/rotate", {"overlap_s": 0.0}),
            httpx2.Response(201, json={"key": "clm_y", "record": wire_access.key_body(RECORD)}),
            ("clm_y", RECORD, None),
        ),
        (
            lambda c: c.keys.revoke("k1", descendants=True),
            ("DELETE", "/api/v1/keys/k1?descendants=true", None),
            wire_access.key_body(RECORD),
            RECORD,
        ),
        (
            lambda c: c.tenants.change("acme", disabled=True),
            ("PATCH", "/api/v1/tenants/acme", {"disabled": True}),
            wire_access.tenant_body(Tenant("acme")),
            Tenant("acme"),
        ),
        (
            lambda c: c.projects.create("web", tenant="acme"),
            ("POST", "/api/v1/projects", {"name": "web", "title": "", "tenant": "acme"}),
            wire_access.project_body(Project("acme", "web")),
            Project("acme", "web"),
        ),
        (
            lambda c: c.principals.change("p-1", grants=(Grant("user", "acme"),)),
            ("PATCH", "/api/v1/principals/p-1", {"grants": [{"role": "user", "scope": "acme"}]}),
            wire_access.principal_body(PRINCIPAL),
            PRINCIPAL,
        ),
        (
            lambda c: c.roles.change("r", [], scope="acme"),
            ("PUT", "/api/v1/roles/r?scope=acme", {"rules": []}),
            wire_access.role_body(CustomRole("acme", "r", ())),
            CustomRole("acme", "r", ()),
        ),
        (
            lambda c: c.audit(after=3, limit=2, tenant="acme"),
            ("GET", "/api/v1/audit?after=3&limit=2&tenant=acme", None),
            {"data": [{"seq": 4, "outcome": "done"}]},
            [{"seq": 4, "outcome": "done"}],
        ),
        (
            lambda c: c.whoami(),
            ("GET", "/api/v1/whoami", None),
            {
                "key": wire_access.key_body(RECORD),
                "principal": wire_access.principal_body(PRINCIPAL),
            },
            (RECORD, PRINCIPAL),
        ),
        (
            lambda c: c.drivers.list(),
            ("GET", "/api/v1/drivers", None),
            {"data": [wire.driver_body(DRIVER)]},
            [DRIVER],
        ),
    ],
)
def test_requests_and_results(
    control: Any, what: Callable[[Any], Any], sent: tuple[Any, ...], answer: Any, result: Any
) -> None:
    assert control.ask(what, answer) == result
    assert control.sent == sent
    assert control.requests[-1].headers["authorization"] == "Bearer clm_live_abc"
    assert str(control.requests[-1].url).startswith("http://127.0.0.1:8001/")


def test_an_expected_generation_is_a_precondition(control: Any) -> None:
    control.ask(lambda c: c.deployments.apply(SPEC, expected_generation=0), SHOWN)
    assert control.requests[-1].headers["if-match"] == "0"
    control.ask(lambda c: c.deployments.apply(SPEC), SHOWN)
    assert "if-match" not in control.requests[-1].headers


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "kind"), [(401, AuthenticationFailed), (404, NotFound), (409, Conflict)]
    )
    def test_the_servers_error_is_raised(
        self, control: Any, status: int, kind: type[CloudlmError]
    ) -> None:
        error = kind("no such thing", param="name")
        answer = httpx2.Response(status, json=error.body())
        with pytest.raises(kind, match="no such thing") as caught:
            control.ask(lambda c: c.deployments.get("bank"), answer)
        assert caught.value.param == "name"

    def test_advice_on_waiting_is_kept(self, control: Any) -> None:
        for text, seconds in (("7", 7.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)):
            answer = httpx2.Response(429, headers={"retry-after": text}, text="busy")
            with pytest.raises(LimitExceeded) as caught:
                control.ask(lambda c: c.models.list(), answer)
            assert caught.value.retry_after_s == seconds

    def test_nothing_listening_names_the_address_and_the_remedy(self, control: Any) -> None:
        with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9.*'cloudlm up'"):
            control.ask(
                lambda c: c.models.list(),
                httpx2.ConnectError("refused"),
                control_url="http://127.0.0.1:9/",
            )

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            (httpx2.ConnectTimeout("x"), Unavailable),
            (httpx2.ReadTimeout("x"), UpstreamTimeout),
            (httpx2.RemoteProtocolError("x"), UpstreamFailed),
        ],
    )
    def test_transport_errors_are_ours(self, control: Any, fault: Exception, kind: Any) -> None:
        with pytest.raises(kind) as caught:
            control.ask(lambda c: c.models.list(), fault)
        assert type(caught.value) is kind
        with pytest.raises(kind):
            control.ask(lambda c: c.deployments.logs("bank"), fault)

    @pytest.mark.parametrize(
        "answer",
        [
            httpx2.Response(200, text="<html>hello</html>"),
            httpx2.Response(200),
            httpx2.Response(200, text="[" * 100_000),
            httpx2.Response(302, headers={"location": "http://elsewhere/"}),
            {"data": [{"name": "x"}]},
            {"data": 7},
            [1],
        ],
    )
    def test_something_else_at_the_address_is_said(self, control: Any, answer: Any) -> None:
        with pytest.raises(UpstreamFailed, match="is not a control API of this version"):
            control.ask(lambda c: c.deployments.list(), answer)
        assert len(control.requests) == 1, "the key follows no redirect"

    def test_logs_raise_before_the_first_line(self, control: Any) -> None:
        answer = httpx2.Response(404, json=NotFound("no deployment 'x'").body())
        with pytest.raises(NotFound, match="no deployment 'x'"):
            control.ask(lambda c: c.deployments.logs("x"), answer)

    def test_no_key_is_said_before_anything_is_sent(self, control: Any) -> None:
        with pytest.raises(AuthenticationFailed, match="set CLOUDLM_API_KEY"):
            control.ask(lambda c: c.models.list(), {}, api_key=None)
        assert control.requests == []


class TestWaiting:
    def test_until_the_newest_generation_is_ready(self, control: Any) -> None:
        seen: list[DeploymentPhase] = []
        answers = [
            wire.deployment_body(DEPLOYMENT),
            at(DeploymentPhase.READY, generation=1),
            at(DeploymentPhase.STARTING),
            SHOWN,
        ]
        view = control.ask(
            lambda c: c.deployments.wait_ready(
                "bank", timeout_s=60, on_status=lambda status: seen.append(status.phase)
            ),
            *answers,
        )
        assert view == VIEW
        assert seen == [DeploymentPhase.READY, DeploymentPhase.STARTING, DeploymentPhase.READY]

    def test_asleep_is_as_ready_as_was_asked(self, control: Any) -> None:
        answer = at(DeploymentPhase.SLEEPING)
        view = control.ask(lambda c: c.deployments.wait_ready("bank"), answer)
        assert view.phase is DeploymentPhase.SLEEPING

    def test_a_failure_ends_it(self, control: Any) -> None:
        answers = at(DeploymentPhase.FAILED, 1, "old"), at(DeploymentPhase.FAILED, 2, "no memory")
        with pytest.raises(Unavailable, match="failed: no memory; see 'cloudlm logs bank'"):
            control.ask(lambda c: c.deployments.wait_ready("bank"), *answers)
        assert len(control.requests) == 2

    def test_a_deletion_ends_it(self, control: Any) -> None:
        answer = wire.deployment_body(replace(DEPLOYMENT, deleting=True))
        with pytest.raises(Unavailable, match="is being deleted"):
            control.ask(lambda c: c.deployments.wait_ready("bank"), answer)

    def test_it_ends_in_time_and_says_how_far_it_came(self, control: Any) -> None:
        answer = at(DeploymentPhase.STARTING, message="loading")
        with pytest.raises(
            UpstreamTimeout, match=r"not ready after 5 s: starting, 0 of 1 replicas ready: loading"
        ):
            control.ask(lambda c: c.deployments.wait_ready("bank", timeout_s=5.0), answer)
        assert control.time.seconds == pytest.approx(5.0)
        assert max(control.time.slept) <= 1.0
        assert 5 < len(control.requests) < 20

    def test_until_it_is_gone(self, control: Any) -> None:
        gone = httpx2.Response(404, json=NotFound("no deployment").body())
        deleting = at(DeploymentPhase.DELETING)
        assert control.ask(lambda c: c.deployments.wait_gone("bank"), deleting, gone) is None
        assert len(control.requests) == 2
        with pytest.raises(UpstreamTimeout, match="still exists after 1 s"):
            control.ask(lambda c: c.deployments.wait_gone("bank", timeout_s=1.0), deleting)

    @pytest.mark.parametrize("end", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
    def test_until_a_job_has_ended(self, control: Any, end: JobState) -> None:
        running = replace(JOB, state=JobState.RUNNING, progress=0.5)
        seen: list[float] = []
        job = control.ask(
            lambda c: c.jobs.wait("j1", on_progress=lambda job: seen.append(job.progress)),
            wire.job_body(running),
            {"job": wire.job_body(replace(running, state=end, progress=1.0))},
        )
        assert job.state is end
        assert seen == [0.5, 1.0]

    def test_a_job_that_takes_too_long(self, control: Any) -> None:
        running = replace(JOB, state=JobState.RUNNING, progress=0.5, message="fetching")
        with pytest.raises(UpstreamTimeout, match="not ended after 2 s: running, 50% fetching"):
            control.ask(lambda c: c.jobs.wait("j1", timeout_s=2.0), wire.job_body(running))


class TestOpenAI:
    def test_it_is_pointed_at_the_gateway(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        with cloudlm.Client("clm_a", gateway_url="http://localhost:8000/") as client:
            with client.openai() as openai:
                assert str(openai.base_url) == "http://localhost:8000/v1/"
                assert openai.api_key == "clm_a"
                assert openai.max_retries == 2
            with client.openai(max_retries=0, api_key="clm_b") as openai:
                assert (openai.max_retries, openai.api_key) == (0, "clm_b")

    async def test_the_async_one_too(self) -> None:
        async with cloudlm.AsyncClient("clm_a", gateway_url="https://lm.example") as client:
            async with client.openai() as openai:
                assert str(openai.base_url) == "https://lm.example/v1/"
                assert openai.api_key == "clm_a"

    def test_it_needs_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("CLOUDLM_API_KEY", "OPENAI_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        with cloudlm.Client() as client, pytest.raises(AuthenticationFailed):
            client.openai()


def _signatures(cls: type[Any]) -> dict[str, list[str]]:
    return {
        name: list(inspect.signature(method).parameters)
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


@pytest.mark.parametrize("name", ["Client", "Models", "Deployments", "Keys", "Jobs", "Drivers"])
def test_both_clients_offer_the_same(name: str) -> None:
    one, other = getattr(sync, name), getattr(asynchronous, f"Async{name}")
    assert _signatures(one) == _signatures(other)
    assert one.__doc__.replace("``with``", "").replace("in a ", "in an ") == other.__doc__.replace(
        "``async with``", ""
    )


def test_the_package_imports_nothing_before_it_is_asked() -> None:
    script = (
        "import sys, cloudlm, cloudlm.client\n"
        "heavy = {'httpx2', 'openai', 'cloudlm.core.errors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert 'Client' in dir(cloudlm)\n"
        "from cloudlm import AsyncClient, Client, CloudlmError, DeploymentSpec\n"
        "from cloudlm.client import AsyncClient as A, Client as C\n"
        "assert (A, C) == (AsyncClient, Client)\n"
        "assert 'openai' not in sys.modules\n"
        "try: cloudlm.Klient\n"
        "except AttributeError: pass\n"
        "else: raise SystemExit('no such name')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
