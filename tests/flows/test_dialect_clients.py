"""Official clients of other APIs against the gateway, as users write them.

LangChain, LlamaIndex and Ollama's client run in an environment of their own, whose Python is named
by CLOUDLM_TEST_CLIENTS_PYTHON; without it they are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import anthropic
import httpx2
import pytest
from installations import MODEL, QUESTION, Installation

pytestmark = pytest.mark.flow

SCRIPT = Path(__file__).with_name("clients.py.txt")
ASKED = [{"role": "user", "content": QUESTION}]


def client_of(installation: Installation) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=installation.gateway, api_key=installation.key, max_retries=0
    )


def test_anthropic_messages(installation: Installation) -> None:
    asked = {"model": MODEL, "max_tokens": 60, "messages": ASKED, "system": "Be short."}
    asked["extra_body"] = {"temperature": 0}  # not in the client any more, but still understood
    with client_of(installation) as client:
        whole = client.messages.create(**asked)
        text = whole.content[0].text
        assert len(text) > 10
        assert whole.stop_reason in ("end_turn", "max_tokens")
        assert whole.usage.output_tokens > 3
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == text
            final = stream.get_final_message()
        assert final.usage.output_tokens == whole.usage.output_tokens
        assert final.stop_reason == whole.stop_reason
        word = text.split()[3]
        stopped = client.messages.create(**asked, stop_sequences=[word])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
        older = client.messages.create(**asked, extra_headers={"anthropic-version": "2023-06-01"})
        assert older.content[0].text == text


def test_anthropic_counts_and_lists(installation: Installation) -> None:
    with client_of(installation) as client:
        counted = client.messages.count_tokens(model=MODEL, messages=ASKED)
        answer = client.messages.create(model=MODEL, max_tokens=1, messages=ASKED)
        usage = answer.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        assert [model.id for model in client.models.list()] == [MODEL]


def test_anthropic_errors(installation: Installation) -> None:
    with client_of(installation) as client:
        with pytest.raises(anthropic.NotFoundError) as unknown:
            client.messages.create(model="nobody", max_tokens=1, messages=ASKED)
        assert MODEL in str(unknown.value)
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(
                model=MODEL, max_tokens=1, messages=ASKED, extra_body={"temperature": 9}
            )
    with (
        anthropic.Anthropic(base_url=installation.gateway, api_key="no", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(model=MODEL, max_tokens=1, messages=ASKED)


def test_openai_responses(installation: Installation) -> None:
    with installation.openai() as client:
        whole = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
        assert len(whole.output_text) > 10
        assert whole.status == "completed"
        with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
            kinds = [one.type for one in stream]
            final = stream.get_final_response()
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        assert final.output_text == whole.output_text
        assert final.usage is not None and whole.usage is not None
        assert final.usage.output_tokens == whole.usage.output_tokens


def test_prediction_protocols(installation: Installation) -> None:
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["My card", "I need"]}
    with installation.http() as http:

        def ask(path: str, body: object) -> httpx2.Response:
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer

        sampling = {"max_tokens": 8, "temperature": 0}
        predicted = ask(
            f"/v1/models/{MODEL}:predict",
            {"instances": ["My card", "I need"], "parameters": sampling},
        ).json()["predictions"]
        inferred = ask(
            f"/v2/models/{MODEL}/infer", {"inputs": [tensor], "parameters": sampling}
        ).json()["outputs"][0]["data"]
        assert [one["generated_text"] for one in predicted] == inferred
        first = ask("/generate", {"inputs": "My card", "parameters": {"max_new_tokens": 8}}).json()
        assert first["generated_text"] == inferred[0]
        told = ask(f"/predictions/{MODEL}", {"prompt": "My card", **sampling}).json()
        assert told["text"] == inferred[0]
        invoked = ask("/invocations", {"prompt": "My card", **sampling}).json()
        assert invoked["choices"][0]["text"] == inferred[0]
        raw = ask("/generate_stream", {"inputs": "My card", "parameters": {"max_new_tokens": 8}})
        pieces = [json.loads(line[5:]) for line in raw.text.splitlines() if line]
        assert "".join(one["token"]["text"] for one in pieces) == inferred[0]
        assert pieces[-1]["generated_text"] == inferred[0]
        vectors = ask("/api/embed", {"model": MODEL, "input": ["a", "b"]}).json()["embeddings"]
        assert len(vectors) == 2
    for path in ("/ping", "/v2/health/live", "/v2/health/ready"):  # probes have no key
        assert httpx2.get(installation.gateway + path, timeout=60).status_code == 200


def test_langchain_llamaindex_and_ollama(installation: Installation) -> None:
    python = os.environ.get("CLOUDLM_TEST_CLIENTS_PYTHON")
    if not python:
        pytest.skip("CLOUDLM_TEST_CLIENTS_PYTHON names no Python that has these clients")
    done = subprocess.run(
        [python, "-c", SCRIPT.read_text()],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(installation.home),
            "BASE_URL": installation.gateway,
            "API_KEY": installation.key,
            "MODEL": MODEL,
            "QUESTION": QUESTION,
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert set(facts) == {"langchain_openai", "langchain_anthropic", "langchain_ollama"} | {
        "llama_index",
        "ollama",
    }
    for name, (whole, streamed) in facts.items():
        assert len(whole) > 10, name
        assert streamed == whole, name
