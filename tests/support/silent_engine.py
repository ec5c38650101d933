"""A real engine around a runner for tests that read token ids only: no text is made."""

from __future__ import annotations

from typing import Any

from cloudlm.engine.engine import LocalEngine


class NoText:
    """A tokenizer that is its own detokenizer and says nothing."""

    def detokenizer(self, prompt_ids: Any) -> Any:
        return self

    def push(self, token_ids: Any) -> str:
        return ""

    def flush(self) -> str:
        return ""


def started(runner: Any) -> LocalEngine:
    """The engine; the test closes it."""
    return LocalEngine.start(
        runner,
        NoText(),  # type: ignore[arg-type]
        max_batch_tokens=16,
        max_batch_sequences=8,
        max_waiting=1000,
    )
