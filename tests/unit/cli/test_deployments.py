"""deploy, apply, status, logs, scale, delete: what is sent, what is shown, how it ends."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.cli import connect, deployments
from cloudlm.cli.specs import read_options, read_replicas, read_specs
from cloudlm.cli.stack import Addresses, Stack
from cloudlm.client import Client
from cloudlm.client.connection import Connection
from cloudlm.core.errors import InvalidRequest, NotFound, Unavailable
from cloudlm.core.spec import MAX_REPLICAS
from cloudlm.state.home import Home

PATH = "/deployments/helper"
Ok = Callable[..., Any]


@pytest.mark.parametrize(
    ("text", "numbers"), [("2", (2, 2)), ("1:3", (1, 3)), ("0:1", (0, 1)), (" 1 : 2 ", (1, 2))]
)
def test_replicas(text: str, numbers: tuple[int, int]) -> None:
    assert read_replicas(text) == numbers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "neither a whole number nor MIN:MAX") for text in ("", "x", "1:", ":2", "1.5")),
        ("1:2:3", "neither a whole number nor MIN:MAX"),
        ("3:1", "did you mean 1:3?"),
        *((text, "fewer than 0") for text in ("-1", "-2:1", "1:-1")),
        *((text, "0:1 to have the last replica go when nobody asks") for text in ("0", "0:0")),
        ("1:1001", "at most 1000"),
    ],
)
def test_bad_replicas(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_replicas(text)
    for word in (f"replicas {text!r}", "MIN:MAX", words):
        assert word in caught.value.message


@given(low=st.integers(-3, 1003), high=st.integers(-3, 1003))
def test_bounds_are_taken_or_the_fault_is_told(low: int, high: int) -> None:
    if 0 <= low <= high and 1 <= high <= MAX_REPLICAS:
        assert read_replicas(f"{low}:{high}") == (low, high)
    else:
        with pytest.raises(InvalidRequest, match="MIN:MAX"):
            read_replicas(f"{low}:{high}")


def test_options_are_scalars() -> None:
    assert read_options(["a=1", "b=0.5", "c=true", "d=bfloat16", "e='007'", "f=x=y"]) == {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": "bfloat16",
        "e": "007",
        "f": "x=y",
    }


@pytest.mark.parametrize("pair", ["a", "=1", "a=", "a=[1]", "a=[1", "a={b", "a=2024-01-01", "a=\0"])
def test_a_bad_option(pair: str) -> None:
    with pytest.raises(InvalidRequest, match="KEY=VALUE"):
        read_options([pair])


def test_several_documents(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("name: a\nmodel: models:/x/1\n---\n---\nname: b\nmodel: models:/x@champion\n")
    assert [spec.name for spec in read_specs(file)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", ["not valid YAML", "line 1"]),
        ("name: a\nnote: 2024-02-30", ["not valid YAML", "line 2"]),
        ("\x01", ["not valid YAML"]),
        ("", ["no deployment"]),
        ("- a\n- b", ["JSON object"]),
        ("name: a\nmodel: models:/x/1\nreplcas: 2", ["replcas"]),
        ("name: a\nmodel: models:/x/1\n---\nname: b", ["document 2", "model"]),
        ("name: a\nmodel: models:/x/1\nmin_replicas: 2.5", ["min_replicas", "2.5"]),
    ],
)
def test_a_bad_file(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        read_specs(file)
    for word in [str(file), *words]:
        assert word in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        read_specs(tmp_path / "none.yaml")
    with pytest.raises(InvalidRequest, match="directory"):
        read_specs(tmp_path)


def test_deploy_a_registered_model(control: Any, ok: Ok, deployment: Any) -> None:
    control.answers = {f"PUT {PATH}": deployment(), f"GET {PATH}": deployment()}
    result = ok("deploy", "bank@champion", "--name", "helper", "--replicas", "1:2", "--option=a=1")
    sent = control.sent(f"PUT {PATH}")
    assert sent["model"] == "models:/bank@champion"
    assert (sent["min_replicas"], sent["max_replicas"], sent["options"]) == (1, 2, {"a": 1})
    assert result.stdout == ""
    assert "helper is ready (models:/bank/1)" in result.stderr


def test_deploy_says_how_to_scale(control: Any, ok: Ok, deployment: Any) -> None:
    control.answers = {f"PUT {PATH}": deployment(), f"GET {PATH}": deployment()}
    said = ["--autoscaler", "hpa", "--target-ongoing-requests", "4", "--target-ttft-ms", "500"]
    ok("deploy", "bank@champion", "--name", "helper", "--replicas", "0:3", "--idle-s", "60", *said)
    sent = control.sent(f"PUT {PATH}")
    assert (sent["min_replicas"], sent["target_ongoing_requests"]) == (0, 4.0)
    scaling = sent["scaling"]
    assert (scaling["algorithm"], scaling["target_ttft_ms"]) == ("hpa", 500.0)
    assert scaling["idle_s"] == 60.0


def test_deploy_says_what_stays_in_memory(control: Any, ok: Ok, deployment: Any) -> None:
    control.answers = {f"PUT {PATH}": deployment(), f"GET {PATH}": deployment()}
    ok("deploy", "bank@champion", "--name", "helper", "--pinned", "--memory-mb", "900")
    sent = control.sent(f"PUT {PATH}")
    assert (sent["pinned"], sent["memory_mb"]) == (True, 900)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--precision", "int8-a8"), {"precision": "int8-a8"}),
        (("--precision", "float32", "--option", "precision=int4"), {"precision": "float32"}),
        (("--precision", "bfloat16", "--engine", "vllm"), {"dtype": "bfloat16"}),
        ((), {}),
    ],
)
def test_deploy_at_a_precision(
    control: Any, ok: Ok, deployment: Any, arguments: tuple[str, ...], options: dict[str, str]
) -> None:
    control.answers = {f"PUT {PATH}": deployment(), f"GET {PATH}": deployment()}
    ok("deploy", "bank", "--name", "helper", *arguments)
    assert control.sent(f"PUT {PATH}").get("options", {}) == options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--precision", "int3"), "--precision = 'int3' is not known; there is: auto, float32"),
        (("--precision", "int8", "--engine", "vllm"), "vllm takes float32, bfloat16, float16"),
    ],
)
def test_a_precision_that_is_not_known(
    control: Any, cli: Ok, arguments: tuple[str, ...], words: str
) -> None:
    result = cli("deploy", "bank", "--name", "helper", *arguments)
    assert isinstance(result.exception, InvalidRequest)
    assert words in result.exception.message
    assert not control.requests


def test_deploy_says_how_requests_are_spread(control: Any, ok: Ok, deployment: Any) -> None:
    control.answers = {f"PUT {PATH}": deployment(), f"GET {PATH}": deployment()}
    ok("deploy", "models:/bank/1", "--name", "helper", "--policy", "session_affinity")
    assert control.sent(f"PUT {PATH}")["routing"]["policy"] == "session_affinity"


def test_deploy_waits_until_it_is_ready(control: Any, ok: Ok, deployment: Any) -> None:
    starting, ready = deployment(phase="starting", message="loading"), deployment()
    control.answers = {f"PUT {PATH}": starting, f"GET {PATH}": deque([starting, ready])}
    result = ok("deploy", "models:/bank/1", "--name", "helper", "--json")
    assert json.loads(result.stdout)[0]["status"]["phase"] == "ready"


def test_deploy_that_may_sleep_is_done_when_it_sleeps(
    control: Any, ok: Ok, deployment: Any
) -> None:
    asleep = deployment(phase="sleeping", low=0)
    control.answers = {f"PUT {PATH}": asleep, f"GET {PATH}": asleep}
    result = ok("deploy", "models:/bank/1", "--name", "helper", "--replicas", "0:1")
    assert "helper is sleeping" in result.stderr


def test_deploy_without_waiting(control: Any, ok: Ok, deployment: Any) -> None:
    new = deployment(phase=None)
    control.answers = {f"PUT {PATH}": new, f"GET {PATH}": new}
    said = ok("deploy", "bank", "--name", "helper", "--no-wait").stderr
    assert "helper is asked for" in said, "what it was before the change says nothing"
    assert "cloudlm status helper" in said


def test_a_deployment_that_fails(control: Any, cli: Ok, deployment: Any) -> None:
    broken = deployment(phase="failed", message="out of memory")
    control.answers = {f"PUT {PATH}": broken, f"GET {PATH}": broken}
    result = cli("deploy", "models:/bank/1", "--name", "helper")
    assert isinstance(result.exception, Unavailable)
    assert "out of memory" in result.exception.message
    assert "cloudlm logs helper" in result.exception.message


def test_a_model_from_outside_is_imported_first(
    control: Any, ok: Ok, deployment: Any, tmp_path: Path
) -> None:
    job = {"id": "j1", "kind": "import", "state": "running", "progress": 0.5, "message": "[/x]"}
    done = {**job, "state": "succeeded", "result": {"model": "models:/helper/7"}}
    control.answers = {
        "POST /models": job,
        "GET /jobs/j1": deque([job, done]),
        f"PUT {PATH}": deployment(),
        f"GET {PATH}": deployment(),
    }
    ok("deploy", str(tmp_path), "--name", "helper")
    assert control.sent("POST /models") == {"source": str(tmp_path), "name": "helper"}
    assert control.sent(f"PUT {PATH}")["model"] == "models:/helper/7"


def test_an_import_that_fails_deploys_nothing(control: Any, cli: Ok, tmp_path: Path) -> None:
    error = {"error": {"message": "config.json is missing", "code": "broken_model"}}
    job = {"id": "j1", "kind": "import", "state": "failed", "error": error}
    control.answers = {"POST /models": job, "GET /jobs/j1": job}
    result = cli("deploy", str(tmp_path), "--name", "helper")
    assert isinstance(result.exception, InvalidRequest)
    assert "failed: config.json is missing" in result.exception.message
    assert not [what for what, _ in control.requests if what.startswith("PUT")]


def test_apply_from_a_file_and_from_standard_input(
    control: Any, ok: Ok, deployment: Any, tmp_path: Path
) -> None:
    control.answers = {f"PUT {PATH}": deployment(), f"GET {PATH}": deployment()}
    text = "name: helper\nmodel: models:/bank/1\n"
    file = tmp_path / "d.yaml"
    file.write_text(text)
    from_file = ok("apply", "-f", str(file), "--json").stdout
    assert ok("apply", "-f", "-", "--json", input=text).stdout == from_file
    assert json.loads(from_file)[0]["spec"]["name"] == "helper"


def test_status_of_all_and_of_one(control: Any, ok: Ok, deployment: Any) -> None:
    hostile = deployment(message="[/red] [bold] \x1b[2J :warning: \n x" + "y" * 200)
    control.answers = {
        "GET /deployments": {"data": [hostile, deployment("new", phase=None)]},
        f"GET {PATH}": hostile,
    }
    lines = ok("status").stdout.splitlines()
    columns = ["NAME", "PHASE", "READY", "BOUNDS", "MODEL", "REVISION", "MESSAGE"]
    assert lines[0].split() == columns
    assert lines[1].split()[:6] == ["helper", "ready", "1/1", "1:1", "models:/bank/1", "1"]
    assert "[/red] [bold]  [2J :warning:" in lines[1]
    assert "y" * 200 in lines[1]
    assert lines[2].split()[:3] == ["new", "pending", "0"]
    assert "http://127.0.0.1:8100" in ok("status", "helper").stdout
    rows = json.loads(ok("status", "--json").stdout)
    assert [row["status"] and row["status"]["phase"] for row in rows] == ["ready", None]


def test_status_says_between_which_numbers_replicas_go(
    control: Any, ok: Ok, deployment: Any
) -> None:
    always = {"cron": "* * * * *", "duration_s": 120.0, "timezone": "UTC", "min_replicas": 4}
    never = {**always, "cron": "0 0 31 2 *"}
    found = [deployment("plain", low=0), deployment("held"), deployment("free")]
    for one, schedules in zip(found, ([], [always], [never]), strict=True):
        one["spec"] |= {"max_replicas": 3, "scaling": {"schedules": schedules}}
    control.answers = {"GET /deployments": {"data": found}}
    rows = [line.split() for line in ok("status").stdout.splitlines()[1:]]
    assert [row[3] for row in rows] == ["0:3", "4:4", "1:3"]
    assert rows[1][4:6] == ["by", "schedule"]
    specs = [row["spec"] for row in json.loads(ok("status", "--json").stdout)]
    assert [(spec["min_replicas"], spec["max_replicas"]) for spec in specs] == [
        (0, 3),
        (1, 3),
        (1, 3),
    ]


def test_status_says_who_is_in_memory(control: Any, ok: Ok, deployment: Any) -> None:
    found = [deployment(), deployment("kept"), deployment("away", phase="idle")]
    for one, residence, size in zip(
        found, ("resident", "resident", "unloaded"), (2**29, 2**29, 0), strict=True
    ):
        one["status"] |= {"residence": residence, "memory_bytes": size}
    found[1]["spec"]["pinned"] = True
    control.answers = {"GET /deployments": {"data": found, "memory_budget_bytes": 2**31}}
    lines = ok("status").stdout.splitlines()
    assert "MEMORY" in lines[0]
    assert "512 MiB, resident" in lines[1]
    assert "resident, pinned" in lines[2]
    assert "unloaded" in lines[3]
    assert lines[-1] == "memory: 1.0 GiB of 2.0 GiB held; 2 resident, 1 unloaded"


def test_no_deployments(control: Any, ok: Ok) -> None:
    control.answers = {"GET /deployments": {"data": []}}
    result = ok("status")
    assert result.stdout == ""
    assert "cloudlm deploy" in result.stderr
    assert json.loads(ok("status", "--json").stdout) == []


def test_a_name_that_does_not_exist(control: Any, cli: Ok) -> None:
    result = cli("status", "nobody")
    assert isinstance(result.exception, NotFound)
    assert result.stdout == ""


def test_logs_as_text_and_as_lines_of_json(control: Any, ok: Ok) -> None:
    control.answers = {f"GET {PATH}/logs": httpx2.Response(200, text="one\n\x1b[31mtwo\n")}
    assert ok("logs", "helper").stdout == "one\n [31mtwo\n"
    lines = ok("logs", "helper", "--json").stdout.splitlines()
    assert [json.loads(line)["line"] for line in lines] == ["one", "\x1b[31mtwo"]


def test_scale(control: Any, ok: Ok, deployment: Any) -> None:
    control.answers = {f"POST {PATH}/scale": deployment(), f"GET {PATH}": deployment()}
    ok("scale", "helper", "0:4")
    assert control.sent(f"POST {PATH}/scale") == {"min_replicas": 0, "max_replicas": 4}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("helper", "0"), "'cloudlm sleep NAME'"),
        (("helper", "-1"), "fewer than 0"),
        (("helper", "-2:3", "--no-wait"), "fewer than 0"),
        (("--json", "helper", "-1.5"), "neither a whole number"),
        (("helper", "many"), "neither a whole number"),
    ],
)
def test_scale_to_what_cannot_be_sends_nothing(
    control: Any, cli: Ok, words: tuple[str, ...], fault: str
) -> None:
    result = cli("scale", *words)
    assert isinstance(result.exception, InvalidRequest)
    assert fault in result.exception.message
    assert not control.requests


def test_an_option_that_nobody_knows_is_misuse_also_beside_a_negative_number(cli: Ok) -> None:
    for words in (("helper", "2", "--nonsense"), ("helper", "-1", "--nonsense")):
        assert cli("scale", *words).exit_code == 2


def test_delete_waits_until_it_is_gone(control: Any, ok: Ok, deployment: Any) -> None:
    gone = refusal(404, "gone", "not_found")
    control.answers = {
        f"DELETE {PATH}": httpx2.Response(202),
        f"GET {PATH}": deque([deployment(), gone]),
    }
    assert json.loads(ok("delete", "helper", "--json").stdout) == {"deleted": "helper"}
    assert [what for what, _ in control.requests].count(f"GET {PATH}") == 2


def refusal(status: int, message: str, code: str) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"message": message, "code": code}})


def test_what_the_gateway_has_to_say_stands_below_the_table(
    control: Any, ok: Ok, deployment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def notes(connection: Any) -> list[str]:
        asked.append(connection.gateway_url)
        return ["the settings file changed and was refused"]

    monkeypatch.setattr(deployments, "gateway_notes", notes)
    control.answers = {"GET /deployments": {"data": [deployment()]}, f"GET {PATH}": deployment()}
    shown = ok("status").stdout
    assert shown.splitlines()[-1] == "gateway: the settings file changed and was refused"
    assert "gateway:" not in ok("status", "helper").stdout
    assert "gateway:" not in ok("status", "--json").stdout
    assert len(asked) == 1


@pytest.mark.parametrize(("gateway", "named"), [("http://g:1", True), ("http://other:1", False)])
def test_the_log_of_a_gateway_that_runs_here_is_named(
    control: Any,
    ok: Ok,
    deployment: Any,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    gateway: str,
    named: bool,
) -> None:
    def client() -> Client:
        made: Client = control.client()
        made.connection = replace(made.connection, gateway_url="http://g:1")
        return made

    monkeypatch.setattr(deployments, "control_client", client)
    monkeypatch.setattr(deployments, "gateway_notes", lambda _connection: ["a file was refused"])
    control.answers = {"GET /deployments": {"data": [deployment()]}}
    with Stack(Home(home).ensure(), {}) as stack:
        stack.announce(Addresses(gateway, "http://c:1"))
        shown = ok("status").stdout
    assert "gateway: a file was refused" in shown
    line = f"gateway: its log is {home / 'logs' / 'gateway.log'}"
    assert (line in shown.splitlines()) == named
    monkeypatch.setattr(deployments, "gateway_notes", lambda _connection: [])
    assert "its log" not in ok("status").stdout


@pytest.mark.parametrize("body", [b"", b"ok", b"[]", b'{"notes": 3}', b'{"ready": true}'])
def test_a_gateway_that_says_nothing_of_the_kind(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if not body:
            raise httpx2.ConnectError("nobody is there")
        assert str(request.url) == "http://127.0.0.1:7000/readyz"
        assert "authorization" not in request.headers
        return httpx2.Response(200, content=body)

    made = httpx2.Client

    def client(**options: Any) -> httpx2.Client:
        return made(**{**options, "transport": httpx2.MockTransport(answer)})

    monkeypatch.setattr(httpx2, "Client", client)
    where = Connection("http://127.0.0.1:7001", "http://127.0.0.1:7000", "clm_live_x")
    assert connect.gateway_notes(where) == []
