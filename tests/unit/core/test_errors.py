"""The error tree: every class has a distinct verdict, bodies are OpenAI's, and survive the wire."""

import pytest

from cloudlm.core import errors
from cloudlm.core.errors import CloudlmError, MissingExtra, Retry, error_from_body


def every_class() -> list[type[CloudlmError]]:
    """Those of the tree; other modules may have private kinds of their own."""
    found = [CloudlmError]
    for cls in found:
        found.extend(one for one in cls.__subclasses__() if one.__module__ == errors.__name__)
    return found


def test_every_class_is_in_the_drawn_tree() -> None:
    drawn = errors.__doc__ or ""
    assert [cls.__name__ for cls in every_class() if cls.__name__ not in drawn] == []


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in every_class() if cls.code is not None]
    own = [cls.code for cls in every_class() if "code" in vars(cls) and cls.code is not None]
    assert len(own) == len(set(own))
    assert codes


@pytest.mark.parametrize("cls", [c for c in every_class() if c not in (CloudlmError, MissingExtra)])
def test_an_error_survives_the_wire(cls: type[CloudlmError]) -> None:
    error = cls("what was wrong", param="field")
    again = error_from_body(error.status, error.body())
    assert (type(again), again.message, again.param) == (cls, "what was wrong", "field")


@pytest.mark.parametrize("body", [None, [], "x", {}, {"error": "text"}, {"error": {"code": 7}}])
def test_a_strange_body_becomes_the_class_of_its_status(body: object) -> None:
    assert error_from_body(503, body).status == 503
    assert error_from_body(418, body).status == 500


def test_a_code_of_another_status_is_not_believed() -> None:
    body = {"error": {"message": "m", "code": "invalid_api_key"}}
    assert error_from_body(500, body).status == 500


def test_retry_advice() -> None:
    assert errors.UpstreamFailed("x").retry is Retry.ELSEWHERE
    assert errors.LimitExceeded("x").retry is Retry.LATER
    assert errors.InvalidRequest("x").retry is Retry.NEVER
    assert "pip install 'cloudlm[engine]'" in MissingExtra("engine", "serving").message
