"""Compiling constraints: what they allow, what is refused, and that nobody can hold anybody up."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
import weakref
from collections.abc import Sequence

import pytest

from cloudlm.core.chat import Constraint, ConstraintKind, Sampling
from cloudlm.core.errors import (
    InternalError,
    InvalidRequest,
    MissingExtra,
    NotSupported,
    Overloaded,
)
from cloudlm.engine import compiling
from cloudlm.engine import constraint as module
from cloudlm.engine.api import GenerateRequest
from cloudlm.engine.compiling import MAX_COMPILING, Compiling
from cloudlm.engine.constraint import Constrainer, TokenGuide, guide_of
from cloudlm.engine.lark import lark_of

EOS = 256
SIZE = 260


class Bytes:
    """A token per byte, an end token, and three ids without a token."""

    special_token_ids = frozenset({EOS})

    def __init__(self, known: Sequence[int] = range(256)) -> None:
        self.known = frozenset(known)

    def vocabulary(self, size: int) -> list[bytes] | None:
        return [
            bytes([i]) if i in self.known else b"<end>" if i == EOS else b"" for i in range(size)
        ]

    def encode(self, text: str) -> list[int]:
        return [byte for byte in text.encode() if byte in self.known]


class NoBytes(Bytes):
    def vocabulary(self, size: int) -> list[bytes] | None:
        return None


def of(kind: str, text: str) -> Constraint:
    return Constraint(ConstraintKind(kind), text)


def allowed(guide: TokenGuide) -> set[int]:
    return set(guide.mask().nonzero()[0].tolist())


async def guide(
    kind: str, text: str, given: bytes = b"", ends: Sequence[int] = (EOS,)
) -> TokenGuide:
    made = Constrainer(Bytes(), SIZE, ends)
    try:
        return await made.guide(of(kind, text), list(given))
    finally:
        made.close()


async def test_a_regex_token_by_token() -> None:
    one = await guide("regex", "ab|cd?")
    assert allowed(one) == set(b"ac")
    one.accept(b"c")
    assert allowed(one) == {ord("d"), EOS}
    assert not one.finished
    one.accept(b"d")
    assert one.finished
    assert one.fault is None


async def test_an_end_token_ends_where_the_constraint_may() -> None:
    one = await guide("regex", "cd?", b"c")
    one.accept([EOS])
    assert one.finished


async def test_a_model_without_an_end_token() -> None:
    one = await guide("regex", "a+", b"aa", ends=())
    assert allowed(one) == set(b"a")
    assert not one.finished
    other = await guide("choice", '["yes", "no"]', b"ye", ends=())
    assert allowed(other) == set(b"s")
    other.accept(b"s")
    assert other.finished


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        (
            "choice",
            '["a\\nb", "\\"q\\\\", "é/", "x\u007f"]',
            ["a\nb", '"q\\', "é/", "x\x7f"],
            ["a", "b"],
        ),
        ("regex", r"a/b\/c\d{2}", ["a/b/c12"], ["a/b/c1", "a/b/c1x"]),
        ("regex", "^ab$", ["ab"], ["b"]),
        ("grammar", 'start: "a" x\nx: /[0-9]+/', ["a1", "a123"], ["a", "b1"]),
        ("json_schema", '{"type":"object"}', ['{"a": [1, null]}', "{}"], ["[]", '{"a"}']),
        ("json_schema", '{"enum":[1,"é"]}', ["1", '"é"'], ["2"]),
        (
            "json_schema",
            '{"type":"object","properties":{"a":{"$ref":"#/$defs/n"}},"required":["a"],'
            '"additionalProperties":false,"$defs":{"n":{"type":"integer","maximum":9}}}',
            ['{"a": 7}', '{ "a":7 }'],
            ['{"a": 77}', '{"b": 1}', '{"a": 7, "b": 1}'],
        ),
    ],
)
async def test_what_fits_and_what_does_not(
    kind: str, text: str, good: list[str], bad: list[str]
) -> None:
    for answer in good:
        one = await guide(kind, text, answer.encode())
        assert one.finished or EOS in allowed(one)
    for answer in bad:
        try:
            one = await guide(kind, text, answer.encode())
        except InvalidRequest:
            continue
        assert not one.finished
        assert EOS not in allowed(one)


async def test_blanks_in_json_come_to_an_end() -> None:
    one = await guide("json_schema", '{"type":"object"}', b"{" + b" " * 32)
    assert ord(" ") not in allowed(one)
    assert ord("}") in allowed(one)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "(a", "regex"),
        ("regex", "(?=a)b", "look"),
        ("regex", "(" * 5000 + "a" + ")" * 5000, "cannot be followed"),
        ("grammar", "start: nowhere", "nowhere"),
        ("grammar", "no grammar at all", "cannot be followed"),
        ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested"),
        ("json_schema", '{"type":"strng"}', "strng"),
        ("json_schema", '{"not":{}}', "not"),
        ("json_schema", '{"$ref":"http://example.org/x"}', "example.org"),
        ("json_schema", '{"type":"string","pattern":"(?<=a)b"}', "look"),
        ("json_schema", '{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/a"}}}', "cannot"),
    ],
)
async def test_what_cannot_be_followed_is_refused(kind: str, text: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await guide(kind, text)
    assert words in caught.value.message
    assert "x-guidance" not in caught.value.message
    assert len(caught.value.message) < 500


HOSTILE = [
    ("regex", "((a{0,100}){0,100}){0,100}"),
    ("regex", r"(\w{1,5000}\d){1,50}"),
    ("regex", "(a|aa|a?a?a?a?)+b"),
    ("regex", "a{1,100000}"),
    ("grammar", 'start: e\ne: e e | e e e | "a" | ""'),
    ("grammar", "start: A\nA: " + " & ".join(f"~/(.*){'a' * i}(.*)/" for i in range(1, 60))),
    (
        "json_schema",
        json.dumps(
            {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {f"p{i}": {"type": "string", "pattern": "a{1,200}b"}},
                    }
                    for i in range(500)
                ]
            }
        ),
    ),
    (
        "json_schema",
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(4)]}
                    for i in range(12)
                ]
            }
        ),
    ),
    (
        "json_schema",
        json.dumps(
            {
                "$ref": "#/$defs/a0",
                "$defs": {
                    f"a{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/a{i + 1}"}] * 9}
                    for i in range(12)
                }
                | {"a12": {"type": "integer"}},
            }
        ),
    ),
    ("json_schema", json.dumps({"type": "array", "minItems": 10**6, "maxItems": 10**7})),
]


@pytest.mark.promise(18)
@pytest.mark.parametrize(("kind", "text"), HOSTILE)
async def test_hostile_constraints_are_refused_or_cheap(kind: str, text: str) -> None:
    """Whatever is accepted must stay cheap at every token: 50 ms are far beyond llguidance's own
    budget and far below what would hold up others for long."""
    began = time.monotonic()
    try:
        one = await guide(kind, text)
    except InvalidRequest:
        assert time.monotonic() - began < 60.0
        return
    for _ in range(40):
        began = time.thread_time()
        choices = sorted(allowed(one) - {EOS})
        one.accept(choices[:1])
        assert time.thread_time() - began < 0.5
        if one.fault is not None or one.finished or not choices:
            break


@pytest.mark.promise(18)
async def test_the_loop_goes_on_and_the_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(constraint: Constraint) -> str:
        release.wait(10)
        return "start: /a/"

    monkeypatch.setattr(module, "lark_of", slow)
    made = Constrainer(
        Bytes(), SIZE, (EOS,), compiling=Compiling(timeout_s=0.05, turn_timeout_s=600)
    )
    try:
        with pytest.raises(InvalidRequest, match="too complex"):
            await made.guide(of("regex", "a"), ())
        monkeypatch.setattr(compiling, "MAX_COMPILING", 1)
        with pytest.raises(Overloaded):
            await made.guide(of("regex", "b"), ())
        release.set()
        while made._compiling.waiting:
            await asyncio.sleep(0.01)
        made._compiling.timeout_s = 600
        assert not (await made.guide(of("regex", "a"), ())).finished
    finally:
        release.set()
        made.close()


async def test_who_only_waited_behind_others_may_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow constraint of somebody else is no fault of this one: 503 and not 400."""
    release, compiled = threading.Event(), []

    def slow(constraint: Constraint) -> str:
        compiled.append(constraint.text)
        release.wait(600)
        return "start: /a/"

    monkeypatch.setattr(module, "lark_of", slow)
    made = Constrainer(
        Bytes(), SIZE, (EOS,), compiling=Compiling(timeout_s=600, turn_timeout_s=600)
    )
    try:
        first = asyncio.ensure_future(made.guide(of("regex", "a"), ()))
        while not compiled:
            await asyncio.sleep(0)
        made._compiling.turn_timeout_s = 0.01
        with pytest.raises(Overloaded, match="constraints are being compiled"):
            await made.guide(of("regex", "b"), ())
        made._compiling.turn_timeout_s = 600
        gone, closed = (
            asyncio.ensure_future(made.guide(of("regex", letter), ())) for letter in "cd"
        )
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        made.close()
        with pytest.raises(InternalError, match="closed"):
            await closed
        release.set()
        assert not (await first).finished
        assert compiled == ["a"], "nobody waits for the others any more"
    finally:
        release.set()
        made.close()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_nothing_is_kept_of_those_who_gave_up_behind_a_slow_one(cancelled: bool) -> None:
    class Make:
        """What a caller's constraint holds on to."""

        def __call__(self) -> None:
            raise AssertionError("nobody waits for it")

    begun, release = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        release.wait(600)
        return "slow"

    line = Compiling(timeout_s=600, turn_timeout_s=600)
    kept: list[weakref.ref[Make]] = []

    async def give_up() -> None:
        make = Make()
        kept.append(weakref.ref(make))
        asked = asyncio.ensure_future(line.run(make))
        if cancelled:
            await asyncio.sleep(0)
            asked.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else Overloaded):
            await asked

    try:
        first = asyncio.ensure_future(line.run(slow))
        while not begun.is_set():
            await asyncio.sleep(0)
        line.turn_timeout_s = 0.0
        for _ in range(20):
            await asyncio.gather(*(give_up() for _ in range(50)))
        gc.collect()
        assert len(kept) == 1000
        assert sum(one() is not None for one in kept) < MAX_COMPILING
        assert line.waiting == 1
        release.set()
        assert await first == "slow"
    finally:
        release.set()
        line.close()


async def test_no_more_wait_than_may_whatever_their_number() -> None:
    release = threading.Event()
    line = Compiling(timeout_s=600, turn_timeout_s=600)
    try:
        asked = [asyncio.ensure_future(line.run(lambda: release.wait(600))) for _ in range(1000)]
        await asyncio.sleep(0)
        assert line.waiting == MAX_COMPILING
        release.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
    finally:
        release.set()
        line.close()
    assert answers[:MAX_COMPILING] == [True] * MAX_COMPILING
    assert all(isinstance(one, Overloaded) for one in answers[MAX_COMPILING:])


@pytest.mark.parametrize("begun", [False, True])
async def test_nothing_is_begun_after_the_end(begun: bool) -> None:
    line = Compiling()
    if begun:
        assert await line.run(lambda: 1) == 1
    line.close()
    threads = threading.active_count()
    with pytest.raises(InternalError, match="closed"):
        await line.run(lambda: 2)
    assert threading.active_count() <= threads
    line.close()  # more than once is no fault


async def test_one_compiled_constraint_serves_many_apart() -> None:
    made = Constrainer(Bytes(), SIZE, (EOS,))
    try:
        first, second = [await made.guide(of("regex", "abc"), ()) for _ in range(2)]
    finally:
        made.close()
    first.accept(b"ab")
    assert allowed(first) == set(b"c")
    assert allowed(second) == set(b"a")


@pytest.mark.promise(18, 40)
@pytest.mark.known_failure("CVE-2025-29770")
async def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 2)
    made = Constrainer(Bytes(), SIZE, (EOS,))
    try:
        for letter in "abcd":
            await made.guide(of("regex", letter), ())
    finally:
        made.close()
    assert [one.text for one in made._compiled] == ["c", "d"]


async def test_what_was_refused_is_refused_again_without_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []

    def counted(constraint: Constraint) -> str:
        compiled.append(constraint.text)
        return lark_of(constraint)

    monkeypatch.setattr(module, "lark_of", counted)
    monkeypatch.setattr(module, "_KEPT", 2)
    made = Constrainer(Bytes(), SIZE, (EOS,))
    said: list[str] = []
    try:
        for text in ("(a", "(a", "(b", "(c", "(a"):
            with pytest.raises(InvalidRequest, match="regex cannot be followed") as caught:
                await made.guide(of("regex", text), ())
            said.append(caught.value.message)
    finally:
        made.close()
    assert compiled == ["(a", "(b", "(c", "(a"]
    assert said[0] == said[1] == said[4]


async def test_the_vocabulary_is_read_outside_of_every_limit() -> None:
    """The first constraints are neither too complex nor too many because a machine is slow."""
    begun, release = threading.Event(), threading.Event()

    class Slow(Bytes):
        def vocabulary(self, size: int) -> list[bytes] | None:
            begun.set()
            release.wait(600)
            return super().vocabulary(size)

    line = Compiling(timeout_s=0.0, turn_timeout_s=0.0)
    made = Constrainer(Slow(), SIZE, (EOS,), compiling=line)
    try:
        asked = [asyncio.ensure_future(made.guide(of("regex", text), ())) for text in "ab"]
        while not begun.is_set():
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not any(one.done() for one in asked)
        line.timeout_s = line.turn_timeout_s = 600.0
        release.set()
        assert [allowed(one) for one in await asyncio.gather(*asked)] == [{97}, {98}]
    finally:
        release.set()
        made.close()


async def test_tokens_to_resume_from_must_follow() -> None:
    with pytest.raises(InvalidRequest) as caught:
        await guide("regex", "abc", b"ax")
    assert caught.value.param == "output_token_ids"


async def test_a_vocabulary_that_cannot_write_it() -> None:
    made = Constrainer(Bytes(list(b"abc")), SIZE, (EOS,))
    try:
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await made.guide(of("regex", "x+"), ())
        late = await made.guide(of("regex", "ax"), ())
    finally:
        made.close()
    late.accept(b"a")
    assert late.mask().all()  # the step goes on, the sequence does not
    assert late.fault is not None
    assert not late.finished


async def test_tokens_that_are_no_bytes() -> None:
    made = Constrainer(NoBytes(), SIZE, (EOS,))
    try:
        with pytest.raises(NotSupported, match="tokenizer"):
            await made.guide(of("regex", "x+"), ())
    finally:
        made.close()


async def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"cloudlm\[engine\]"):
        await guide("regex", "a")


def test_no_constraint_is_forgotten() -> None:
    plain = GenerateRequest("r", (1,), Sampling())
    assert guide_of(plain) is None
    constrained = GenerateRequest("r", (1,), Sampling(constraint=of("regex", "a")))
    with pytest.raises(InternalError):
        guide_of(constrained)
