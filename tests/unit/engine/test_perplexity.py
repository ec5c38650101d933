"""Perplexity is that of transformers' own loss, and every token is scored once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat_model import save_tiny_chat_model

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.load import load_engine
from cloudlm.engine.perplexity import _windows, score_text

SETTINGS = EngineSettings(device="cpu", kv_cache_mb=4, threads=1, dtype="float32")


@given(st.integers(0, 200), st.integers(2, 40))
def test_windows_score_every_token_once(count: int, length: int) -> None:
    scored: list[int] = []
    for part, known in _windows(range(count), length):
        assert len(part) <= length
        assert known == 0 or known >= min(length // 2, 1)
        scored += part[known:]
    assert scored == list(range(count))


async def test_the_figure_is_that_of_transformers(tmp_path: Path) -> None:
    import torch
    import transformers

    folder = save_tiny_chat_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    engine = load_engine(folder, SETTINGS, max_waiting=64)
    try:
        ids = engine.tokenizer.encode("A text, once more, that is not long. " * 3)
        whole = await score_text(engine, ids)
        cut = await score_text(engine, ids, window_tokens=20)
        with pytest.raises(InvalidRequest, match="too short"):
            await score_text(engine, ids[:1])
    finally:
        await engine.close()
    with torch.inference_mode():
        loss = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
        parts = [(torch.tensor([part]), known) for part, known in _windows(ids, 20)]
        sums = [
            model(part).logits[0, :-1].log_softmax(-1).gather(1, part[0, 1:, None])[known - 1 :]
            if known
            else model(part).logits[0, :-1].log_softmax(-1).gather(1, part[0, 1:, None])
            for part, known in parts
        ]
    assert whole.tokens == cut.tokens == len(ids) - 1
    assert whole.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert cut.perplexity == pytest.approx(math.exp(-float(torch.cat(sums).mean())), rel=1e-4)
