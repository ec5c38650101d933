"""The command line against a running installation, and the commands that need none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from installations import MODEL, QUESTION, Installation, processes_of, wait_for

from cloudlm import Client
from cloudlm.registry.bundled import bundled_folder

pytestmark = pytest.mark.flow


def test_a_model_of_ones_own_from_folder_to_answer_and_away(
    installation: Installation, tmp_path: Path
) -> None:
    folder = tmp_path / "own-model"
    shutil.copytree(bundled_folder(), folder)
    installation.cli("deploy", str(folder), "--name", "own", "--replicas", "1:2")
    status = json.loads(installation.cli("status", "own", "--json").stdout)[0]
    assert status["status"]["phase"] == "ready"
    assert status["spec"]["model"].startswith("models:/")
    with installation.openai() as client:
        names = wait_for(
            "the gateway to know it",
            lambda: "own" in (found := [m.id for m in client.models.list()]) and found,
            5,
        )
        assert names == [MODEL, "own"]
        answer = client.chat.completions.create(
            model="own", messages=[{"role": "user", "content": QUESTION}]
        )
        assert answer.choices[0].message.content
    assert "own" in installation.cli("status").stdout
    assert installation.cli("logs", "own").stdout.strip()
    installation.cli("scale", "own", "2")
    assert len(installation.replicas("own")) == 2
    installation.cli("scale", "own", "1")
    wait_for("one replica", lambda: len(installation.replicas("own")) == 1, 150)
    installation.cli("delete", "own")
    missing = installation.cli("status", "own", check=False)
    assert missing.returncode == 1
    assert "own" in missing.stderr
    assert not any("own" in command for command in processes_of(installation.home).values())


def test_apply_a_file(installation: Installation, tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "name: filed\nmodel: models:/bank-helper@champion\nmin_replicas: 1\nmax_replicas: 1\n"
        "options:\n  max_model_len: 256\n"
    )
    installation.cli("apply", "-f", str(file))
    again = json.loads(installation.cli("apply", "-f", str(file), "--json").stdout)
    assert again[0]["generation"] == 1
    with installation.http() as client:
        body = {"model": "filed", "prompt": "card " * 400}
        message = wait_for(
            "the refusal of a prompt that is too long for the file's limit",
            lambda: client.post("/v1/completions", json=body).json()["error"]["message"],
        )
        assert "256" in message
    installation.cli("delete", "filed")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "not valid YAML"),
        ("name: x", "model"),
        ("name: X Y\nmodel: models:/a/1", "X Y"),
        ("name: x\nmodel: models:/a/1\nreplcas: 3", "replcas"),
        ("", "no deployment"),
    ],
)
def test_a_bad_file_changes_nothing(
    installation: Installation, tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    done = installation.cli("apply", "-f", str(file), check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert [
        row["spec"]["name"] for row in json.loads(installation.cli("status", "--json").stdout)
    ] == [MODEL]


def test_a_version_that_does_not_exist_is_refused(installation: Installation) -> None:
    done = installation.cli("deploy", "models:/nobody/1", "--name", "nobody", check=False)
    assert done.returncode == 1
    assert "bank-helper" in done.stderr  # names those that exist
    installation.cli("delete", "nobody", check=False)


def test_models_list_show_import_rm(installation: Installation, tmp_path: Path) -> None:
    listed = json.loads(installation.cli("models", "list", "--json").stdout)
    assert any(row["name"] == MODEL and "champion" in row["aliases"] for row in listed)
    assert MODEL in installation.cli("models", "list").stdout
    shown = json.loads(installation.cli("models", "show", f"{MODEL}@champion", "--json").stdout)
    assert shown["architecture"] == "LlamaForCausalLM"
    assert "LlamaForCausalLM" in installation.cli("models", "show", MODEL).stdout
    folder = tmp_path / "copy"
    shutil.copytree(bundled_folder(), folder)
    imported = json.loads(
        installation.cli("models", "import", str(folder), "--name", "copy", "--json").stdout
    )
    assert (imported["name"], imported["version"]) == ("copy", 1)
    installation.cli("models", "rm", "copy/1")
    used = installation.cli("models", "rm", MODEL, check=False)
    assert used.returncode == 1


def test_a_broken_folder_registers_nothing(installation: Installation, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(bundled_folder(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = installation.cli("models", "import", str(folder), check=False)
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "broken" not in installation.cli("models", "list").stdout


def test_a_hub_id_without_network_says_so(installation: Installation) -> None:
    environment = {**installation.environment, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cloudlm.cli.main", "models", "pull", "some/model"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "some/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_and_drivers_need_no_server(tmp_path: Path) -> None:
    def cli(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cloudlm.cli.main", *arguments],
            env={**os.environ, "CLOUDLM_HOME": str(tmp_path), **extra},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    rows = json.loads(cli("config", "--json", CLOUDLM_GATEWAY_PORT="9").stdout)
    port = next(row for row in rows if row["name"] == "gateway.port")
    assert (port["value"], port["source"]) == (9, "CLOUDLM_GATEWAY_PORT")
    assert "CLOUDLM_GATEWAY_PORT" in cli("config", CLOUDLM_GATEWAY_PORT="x").stderr
    assert {"memory", "process"} <= {
        row["name"] for row in json.loads(cli("drivers", "--json").stdout)
    }
    assert "process" in cli("drivers").stdout
    assert cli("--version").stdout.startswith("cloudlm ")
    assert cli("nonsense").returncode == 2
    assert cli("deploy").returncode == 2
    for command in ("status", "keys list"):
        done = cli(*command.split())
        assert done.returncode == 1
        assert "CLOUDLM_API_KEY" in done.stderr


def test_a_port_in_use_and_a_home_in_use(installation: Installation, tmp_path: Path) -> None:
    port = installation.gateway.rpartition(":")[2]
    environment = {**installation.environment, "CLOUDLM_HOME": str(tmp_path / "other")}
    for extra, words in (
        ({**environment, "CLOUDLM_GATEWAY_PORT": port}, ["in use", port]),
        (installation.environment, ["already", str(installation.home)]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cloudlm.cli.main", "up"],
            env=extra,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        for word in words:
            assert word in done.stderr
        assert "Traceback" not in done.stderr


def test_an_unwritable_home(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "cloudlm.cli.main", "up"],
        env={**os.environ, "CLOUDLM_HOME": str(tmp_path / "file" / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "CLOUDLM_HOME" in done.stderr


def test_serve_is_used_as_vllm_serve_is(tmp_path: Path) -> None:
    environment = {**os.environ, "CLOUDLM_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cloudlm.cli.main", "serve", str(bundled_folder())]
    command += ["--port", "0", "--api-key", "secret", "--served-model-name", "mine", "--json"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("}"):
                break
        url = json.loads("".join(lines))["openai_base_url"]
        body = {"model": "mine", "messages": [{"role": "user", "content": QUESTION}]}
        assert httpx2.post(f"{url}/chat/completions", json=body, timeout=60).status_code == 401
        headers = {"authorization": "Bearer secret"}
        answer = httpx2.post(f"{url}/chat/completions", json=body, headers=headers, timeout=30)
        assert answer.json()["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
    finally:
        process.kill()
        process.communicate()


def test_serve_elsewhere_than_loopback_needs_a_key(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cloudlm.cli.main",
            "serve",
            str(bundled_folder()),
            "--host",
            "0.0.0.0",
        ],
        env={**os.environ, "CLOUDLM_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "--api-key" in done.stderr


def test_run_answers_and_leaves_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {**os.environ, "CLOUDLM_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cloudlm.cli.main", "run", str(bundled_folder())]
    once = subprocess.run(
        [*command, QUESTION],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert once.returncode == 0, once.stderr
    assert len(once.stdout.strip()) > 20
    piped = subprocess.run(
        [*command, "--json", "--temperature", "0"],
        input=f"{QUESTION}\n/clear\n{QUESTION}\n",
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    answers = [
        json.loads(part + "}")["answer"] for part in piped.stdout.split("}\n") if part.strip()
    ]
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert processes_of(home) == {}


def test_the_sdk(installation: Installation) -> None:
    with Client(
        api_key=installation.key,
        control_url=installation.control,
        gateway_url=installation.gateway,
    ) as client:
        (found,) = client.deployments.list()
        assert found[0].spec.name == MODEL
        with client.openai() as inference:
            assert [model.id for model in inference.models.list()] == [MODEL]


def test_the_demo_ends_by_itself_with_right_answers() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cloudlm.cli.main", "demo"],
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 answers are the right reply" in done.stdout
    assert "'cloudlm up'" in done.stdout  # nothing that is stopped is offered
    assert not any(gone in done.stdout for gone in ("clm_live_", "http://127.0.0.1", "curl"))


def test_up_without_the_starter(own_installation: Callable[..., Installation]) -> None:
    running = own_installation("--no-starter")
    assert json.loads(running.cli("status", "--json").stdout) == []
    assert running.facts["model"] is None
