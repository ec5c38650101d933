"""The official ``openai`` Python client against the gateway, as a user writes it."""

from __future__ import annotations

import openai
import pytest
from installations import MODEL, QUESTION, Installation

pytestmark = pytest.mark.flow


def test_models_are_listed(installation: Installation) -> None:
    with installation.openai() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "cloudlm"


def test_a_question_is_answered(installation: Installation) -> None:
    with installation.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
    assert answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].message.content or "") > 20
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_a_stream_says_the_same_and_its_usage(installation: Installation) -> None:
    with installation.openai() as client:
        whole = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": QUESTION}],
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_is_not_sent_unasked(installation: Installation) -> None:
    with installation.openai() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], stream=True
        )
        assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_n_choices_differ_and_a_seed_repeats_them(installation: Installation) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            n=4,
            seed=seed,
            temperature=2.0,
            max_tokens=24,
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in answer.choices]

    with installation.openai() as client:
        first = ask(7)
        assert len(set(first)) > 1
        assert ask(7) == first
        assert ask(8) != first


def test_stop_ends_before_the_word(installation: Installation) -> None:
    with installation.openai() as client:
        whole = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
        text = whole.choices[0].message.content or ""
        word = text.split()[4]
        stopped = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, stop=word
        )
    assert stopped.choices[0].message.content == text[: text.index(word)]
    assert stopped.choices[0].finish_reason == "stop"


def test_max_tokens_ends_with_length(installation: Installation) -> None:
    with installation.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=3,
        )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_logprobs(installation: Installation) -> None:
    with installation.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=5,
            logprobs=True,
            top_logprobs=3,
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy takes the likeliest
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content


def test_completions(installation: Installation) -> None:
    with installation.openai() as client:
        answer = client.completions.create(
            model=MODEL, prompt=["My card", "I need"], max_tokens=6, echo=True, logprobs=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].text.startswith("My card")
        streamed = client.completions.create(
            model=MODEL, prompt="My card", max_tokens=6, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in streamed)


def test_errors_have_the_clients_types(installation: Installation) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    with installation.openai() as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="nobody", messages=messages)  # type: ignore[arg-type]
        assert MODEL in str(unknown.value)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=messages, temperature=9)  # type: ignore[arg-type]
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "card " * 2000}]
            )
        assert long.value.code == "context_length_exceeded"
        assert "512" in str(long.value)
        stranger = client.with_options(api_key="clm_live_wrong")
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]
