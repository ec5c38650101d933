"""How long a refusal takes does not say what was wrong with the key.

Shown by construction, not by a clock: every refused key that has the form of one costs the same
digests over the same number of bytes and the same comparisons of the same lengths, at the gateway
and at control, whether id, secret or state of the record is wrong.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cloudlm.control.api.caller import Callers
from cloudlm.core.access import Principal, PrincipalKind
from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import AuthenticationFailed
from cloudlm.security import keys
from cloudlm.security.keys import mint
from cloudlm.state.memory import MemoryState

PEPPER = b"p" * 32
NOW = ManualClock().now()


class Work:
    """Counts what a check does that takes time: digests by bytes, comparisons by length."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: Counter[Any] = Counter()
        new, compare = hmac.new, hmac.compare_digest

        def counted_new(key: bytes, message: Any = None, digestmod: Any = "") -> Any:
            self.done["digest", len(message), digestmod is hashlib.sha256] += 1
            return new(key, message, digestmod)

        def counted_compare(one: Any, other: Any) -> bool:
            self.done["compare", len(one), len(other)] += 1
            return compare(one, other)

        monkeypatch.setattr(keys.hmac, "new", counted_new)
        monkeypatch.setattr(keys.hmac, "compare_digest", counted_compare)

    def of(self, action: Callable[[], Any]) -> Counter[Any]:
        self.done = Counter()
        with pytest.raises(AuthenticationFailed):
            action()
        return self.done


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def changed(text: str, place: int) -> str:
    """Another key with a good checksum that differs in one character."""
    import zlib

    body = text.rpartition("_")[0]
    other = "3" if body[place] != "3" else "4"
    body = body[:place] + other + body[place + 1 :]
    return f"{body}_{zlib.crc32(body.encode()):08x}"


def wrong_keys() -> dict[str, tuple[str, Any]]:
    """Every way in which a key of the right form can be wrong, with the record found for it."""
    secret_at = len("clm_live_") + 13
    one, two, three, four, five, six = (mint("k", "user", PEPPER, NOW) for _ in range(6))
    return {
        "unknown id": (mint("k", "user", PEPPER, NOW).text, None),
        "first character of the secret": (changed(one.text, secret_at), one.record),
        "last character of the secret": (changed(two.text, secret_at + 31), two.record),
        "another key's record": (mint("k", "user", PEPPER, NOW).text, three.record),
        "revoked": (four.text, replace(four.record, revoked_at=1.0)),
        "expired": (five.text, replace(five.record, expires_at=1.0)),
        "wrong and revoked": (changed(six.text, secret_at), replace(six.record, revoked_at=1.0)),
    }


@pytest.mark.promise(39)
@pytest.mark.known_failure("CVE-2025-59425")
def test_every_wrong_key_costs_the_same_work(work: Work) -> None:
    costs = {
        name: work.of(lambda text=text, found=found: keys.verify(text, found, PEPPER, NOW))
        for name, (text, found) in wrong_keys().items()
    }
    expected = Counter({("digest", 63, True): 1, ("compare", 64, 64): 1})
    assert costs == dict.fromkeys(costs, expected)


@pytest.mark.promise(39)
def test_the_whole_way_from_text_to_refusal_costs_the_same(work: Work) -> None:
    """With the checksum, which needs no secret to compute and is compared whole too."""
    for name, (text, found) in wrong_keys().items():

        def way(text: str = text, found: Any = found) -> None:
            assert keys.key_id(text) is not None
            keys.verify(text, found, PEPPER, NOW)

        cost = work.of(way)
        assert cost == Counter(
            {("digest", 63, True): 1, ("compare", 64, 64): 1, ("compare", 8, 8): 1}
        ), name


@pytest.mark.promise(39)
async def test_control_does_the_same_work_for_every_wrong_key(work: Work) -> None:
    """Also for a good key whose principal is disabled, which is found out after the digest."""
    state = MemoryState()
    stopped = Principal("p-off", "off", PrincipalKind.SERVICE, disabled_at=1.0)
    await state.put_identity(stopped)
    texts = {}
    for name, (text, record) in wrong_keys().items():
        if record is not None:
            found = keys.key_id(text)
            await state.put_key(replace(record, id=found))
        texts[name] = text
    orphan = mint("k", "user", PEPPER, NOW, principal="p-off")
    await state.put_key(orphan.record)
    texts["disabled principal"] = orphan.text
    callers = Callers(state, PEPPER, ManualClock())
    await callers.directory()
    costs = {}
    for name, text in texts.items():
        work.done = Counter()
        with pytest.raises(AuthenticationFailed) as caught:
            await callers.of(f"Bearer {text}", None)
        assert caught.value.message == keys.invalid_key().message
        costs[name] = work.done
    assert len({tuple(sorted(cost.items())) for cost in costs.values()}) == 1, costs


@pytest.mark.promise(39)
@pytest.mark.known_failure("CVE-2025-59425")
def test_an_unknown_key_is_compared_with_something_of_full_length(work: Work) -> None:
    """Not with an empty text, which would be refused sooner."""
    cost = work.of(lambda: keys.verify("clm_live_x", None, PEPPER, NOW))
    assert cost["compare", 64, 64] == 1
