"""The conversation of ``cloudlm run`` with a fake of the official client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace, TracebackType
from typing import Any

import httpx2
import pytest
from openai import APIConnectionError, APIError, BadRequestError

from cloudlm.cli import run as run_command
from cloudlm.cli.run import Chat
from cloudlm.core.errors import ContextLengthExceeded, InternalError, UpstreamFailed

REQUEST = httpx2.Request("POST", "http://test/v1/chat/completions")


class Stream:
    """An answer in pieces; an exception among them is raised."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = pieces

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            delta = SimpleNamespace(content=piece)
            yield SimpleNamespace(choices=[SimpleNamespace(delta=delta)])
        yield SimpleNamespace(choices=[])


class FakeOpenAI:
    """Answers with the number of messages; refuses more than ``context`` of them."""

    def __init__(self, context: int = 100, pieces: list[Any] | None = None) -> None:
        self.context = context
        self.pieces = pieces
        self.asked: list[list[dict[str, str]]] = []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, *, messages: list[dict[str, str]], **_: Any) -> Stream:
        if len(messages) > self.context:
            body = {"message": "too long: 9 of 8", "code": "context_length_exceeded"}
            response = httpx2.Response(400, request=REQUEST)
            raise BadRequestError("too long", response=response, body=body)
        self.asked.append(messages)
        return Stream(self.pieces or ["answer ", str(len(messages))])

    def __enter__(self) -> FakeOpenAI:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def make_chat(client: FakeOpenAI, *, system: str | None = None, json_output: bool = False) -> Chat:
    return Chat(client, "m", system, 0.0, json_output)  # type: ignore[arg-type]


def test_the_conversation_grows_and_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeOpenAI()
    chat = make_chat(client, system="be kind")
    chat.ask("one")
    chat.ask("two")
    assert [message["content"] for message in client.asked[-1]] == [
        "be kind",
        "one",
        "answer 2",
        "two",
    ]
    chat.clear()
    chat.ask("three")
    assert [message["content"] for message in client.asked[-1]] == ["be kind", "three"]
    assert capsys.readouterr().out == "answer 2\nanswer 4\nanswer 2\n"


def test_the_oldest_turns_go_when_the_context_is_full() -> None:
    client = FakeOpenAI(context=4)
    chat = make_chat(client, system="be kind")
    for question in ("one", "two", "three", "four"):
        chat.ask(question)
    assert [message["role"] for message in client.asked[-1]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert [message["content"] for message in client.asked[-1]][1::2] == ["three", "four"]


def test_a_question_that_is_too_long_alone_is_refused_and_forgotten() -> None:
    client = FakeOpenAI(context=0)
    chat = make_chat(client)
    with pytest.raises(ContextLengthExceeded, match="9 of 8"):
        chat.ask("long")
    client.context = 1
    chat.ask("short")
    assert [message["content"] for message in client.asked[-1]] == ["short"]


def test_an_interrupted_answer_is_not_part_of_the_conversation() -> None:
    client = FakeOpenAI(pieces=["so far", KeyboardInterrupt()])
    chat = make_chat(client)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("one")
    client.pieces = None
    chat.ask("two")
    assert [message["content"] for message in client.asked[-1]] == ["two"]


@pytest.mark.parametrize(
    ("error", "verdict", "words"),
    [
        (APIConnectionError(request=REQUEST), UpstreamFailed, "broke off"),
        (
            APIError("x", REQUEST, body={"message": "engine died", "code": "internal_error"}),
            InternalError,
            "engine died",
        ),
    ],
)
def test_a_stream_that_breaks(error: Exception, verdict: type[Exception], words: str) -> None:
    with pytest.raises(verdict, match=words):
        make_chat(FakeOpenAI(pieces=["so far", error])).ask("one")


def test_an_answer_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    make_chat(FakeOpenAI(pieces=["[bold]a[/x] :smile:\n", "\x1b[2Jb"])).ask("one")
    assert capsys.readouterr().out == "[bold]a[/x] :smile:\n [2Jb\n"


def test_piped_questions_give_a_line_of_json_each(
    ok: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    import openai

    started: list[tuple[object, ...]] = []

    @contextlib.contextmanager
    def worker(*given: object) -> Iterator[tuple[str, str]]:
        started.append(given)
        yield "http://127.0.0.1:1", "key"

    client = FakeOpenAI()
    monkeypatch.setattr(run_command, "private_worker", worker)
    monkeypatch.setattr(openai, "OpenAI", lambda **_: client)
    result = ok("run", "bank", "--json", input="one\n\n/clear\ntwo\n")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == [
        {"question": "one", "answer": "answer 1"},
        {"question": "two", "answer": "answer 1"},
    ]
    assert ok("run", "bank", "hi", "--precision", "int8").stdout == "answer 1\n"
    assert started == [("bank", []), ("bank", ["precision=int8"])]
