"""Logs: one JSON object per line, with the request id, and never a key."""

import io
import json
import sys

import pytest

from cloudlm.core.settings import LogSettings
from cloudlm.core.tenant import Role
from cloudlm.security.keys import mint
from cloudlm.telemetry.logs import get_logger, request_id_var, setup_logging

pytestmark = pytest.mark.usefixtures("restored_logging")


def test_an_event_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings(format="json"), "gateway")
    token = request_id_var.set("req-1")
    get_logger("cloudlm.x").info("done", extra={"fields": {"tokens": 3, "text": "a\nb"}})
    request_id_var.reset(token)
    line = json.loads(capsys.readouterr().err)
    assert line["event"] == "done"
    assert line["process"] == "gateway"
    assert (line["tokens"], line["text"], line["request_id"]) == (3, "a\nb", "req-1")


def test_a_line_goes_to_what_standard_error_is_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_logging(LogSettings(format="text"), "serve")
    other = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", other)  # as a bar does while it is drawn
        get_logger("x").warning("above_the_bar")
    get_logger("x").warning("below_it")
    assert "above_the_bar" in other.getvalue()
    printed = capsys.readouterr().err
    assert "above_the_bar" not in printed
    assert "below_it" in printed


@pytest.mark.promise(32)
@pytest.mark.parametrize("form", ["json", "text"])
def test_a_key_never_appears(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings(format=form), "gateway")
    key = mint("k", Role.USER, b"p" * 32, now=0.0).text
    try:
        raise RuntimeError(f"header was {key}")
    except RuntimeError:
        get_logger("x").exception("failed %s", key, extra={"fields": {"header": f"Bearer {key}"}})
    printed = capsys.readouterr().err
    assert key.split("_")[3] not in printed
    assert key.split("_")[2] in printed


@pytest.mark.promise(32)
@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("header Authorization: Bearer abcdefghijklmnop-qrstuvwxyz", "qrstuvwxyz"),
        ("cannot reach postgresql+psycopg://ann:pa55word@db/cloudlm", "pa55word"),
    ],
)
def test_tokens_and_passwords_never_appear(
    form: str, text: str, secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(LogSettings(format=form), "x")
    get_logger("x").warning("failed", extra={"fields": {"reason": text}})
    printed = capsys.readouterr().err
    assert secret not in printed
    assert "***" in printed


def test_a_line_is_json_whatever_the_fields_are(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings(format="json"), "x")
    fields = {"event": "mine", "level": "mine", "ratio": float("nan")}
    get_logger("x").warning("odd", extra={"fields": fields})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    line = json.loads(capsys.readouterr().err, parse_constant=refuse)
    assert (line["event"], line["level"], line["ratio"]) == ("odd", "warning", "nan")


def test_a_long_trace_keeps_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings(format="json"), "x")
    try:
        raise RuntimeError("a" * 100_000 + " the reason")
    except RuntimeError:
        get_logger("x").exception("failed")
    line = json.loads(capsys.readouterr().err)
    assert line["error"].endswith("the reason")
    assert len(line["error"]) < 3000


def test_long_fields_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings(format="json"), "x")
    get_logger("x").warning("big", extra={"fields": {"text": "a" * 100_000}})
    assert len(capsys.readouterr().err) < 3000
