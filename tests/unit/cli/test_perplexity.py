"""``cloudlm models perplexity`` on a tiny model, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_chat_model import save_tiny_chat_model

from cloudlm.cli import perplexity
from cloudlm.core.errors import BadSetting, InvalidRequest

Ok = Callable[..., Any]


def test_a_table_by_precision_and_what_could_not_be_had(ok: Ok, cli: Ok, tmp_path: Path) -> None:
    """The kernels cannot run heads of 16, so that the model has no quantised form."""
    folder = str(save_tiny_chat_model(tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text("Some words to be foretold, and some more of them. " * 4)
    found = json.loads(ok("models", "perplexity", folder, "--text", str(text), "--json").stdout)
    (row,) = found["results"]
    assert (row["precision"], row["held_in"], row["ratio"]) == ("bfloat16", "bfloat16", 1.0)
    assert row["perplexity"] > 1
    assert row["tokens"] > 50
    assert set(found["refused"]) == {"int8", "int4"}
    result = cli("models", "perplexity", folder, "--text", str(text), "--precision", "int4")
    assert isinstance(result.exception, BadSetting)
    assert "head size" in str(result.exception)
    text.write_bytes(b"\xff\xfe")
    result = cli("models", "perplexity", folder, "--text", str(text))
    assert isinstance(result.exception, InvalidRequest)


def test_the_built_in_text_is_there_with_its_licence() -> None:
    text = perplexity._OWN_TEXT.read_text(encoding="utf-8")
    assert 10_000 < len(text) < 200_000
    assert "Apache-2.0" in perplexity._OWN_TEXT.with_suffix(".md").read_text(encoding="utf-8")
