"""People at the gateway: their token is as good as a key of theirs, for as long as they are."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from signing_issuer import CLIENT, ISSUER, SigningIssuer

from cloudlm.core.access import Grant, Limits, Principal, PrincipalKind
from cloudlm.core.clock import SystemClock
from cloudlm.core.settings import OidcSettings
from cloudlm.security.issuer import Issuer, expectation_of

ANN = Principal(
    "p-ann",
    "Ann",
    PrincipalKind.PERSON,
    grants=(Grant("user", "default"),),
    subject=f"{ISSUER}#ann",
)


@pytest.fixture
def signing() -> SigningIssuer:
    return SigningIssuer()


@pytest.fixture
async def signed(kit: Any, signing: SigningIssuer, tmp_path: Path) -> Any:
    expected = expectation_of(OidcSettings(issuer=ISSUER, client_id=CLIENT))
    issuer = Issuer(expected, SystemClock(), signing.fetch)
    async with kit.open_rig(home=tmp_path, issuer=issuer) as rig:
        await rig.state.put_identity(ANN)
        yield rig


def bearer(signing: SigningIssuer, **changes: Any) -> dict[str, str]:
    now = time.time()
    said = {"iat": now, "exp": now + 60, **changes}
    return {"authorization": f"Bearer {signing.token(**said)}"}


async def test_a_token_asks_and_pays_as_its_person(signed: Any, kit: Any, signing: Any) -> None:
    headers = bearer(signing)
    for _ in range(2):
        assert (await signed.ask(kit.chat_body(), headers=headers)).status == 200
    rows = await signed.rows()
    assert {(row.key_id, row.tenant, row.project) for row in rows} == {
        ("@p-ann", "default", "default")
    }
    assert len(signing.fetched) == 2


async def test_bad_tokens_and_unknown_people_are_401(signed: Any, kit: Any, signing: Any) -> None:
    answers = set()
    for headers in (
        bearer(signing, aud="other"),
        bearer(signing, exp=1.0),
        bearer(signing, sub="stranger"),
        bearer(SigningIssuer()),
    ):
        refused = await signed.ask(kit.chat_body(), headers=headers)
        assert refused.status == 401
        answers.add(refused.json["error"]["message"])
    assert len(answers) == 1
    assert signed.replicas[0].requests == []


@pytest.mark.promise(33)
async def test_a_change_elsewhere_does_not_cut_people_and_their_own_does(
    signed: Any, kit: Any, signing: Any
) -> None:
    """Within a second, a running stream too."""
    signed.replicas[0].default = kit.Plan(tokens=200, pause_s=0.02)
    running = await signed.gateway.handler.handle(
        signed.request(kit.chat_body(stream=True), headers=bearer(signing))
    )
    other = Principal("p-other", "o", PrincipalKind.SERVICE)
    await signed.state.put_identity(other)
    await signed.gateway.view.refresh()
    exchange = next(iter(signed.gateway.handler._open))
    assert exchange.interrupt.error is None
    await signed.state.put_identity(replace(ANN, disabled_at=1.0), replaces=ANN)
    began = time.monotonic()
    result = await signed.finish(running)
    assert time.monotonic() - began < 3.0
    assert result.error is not None
    assert (await signed.ask(kit.chat_body(), headers=bearer(signing))).status == 401


async def test_limits_of_a_person_hold_though_they_have_no_key(
    signed: Any, kit: Any, signing: Any
) -> None:
    limited = replace(ANN, limits=Limits(requests_per_minute=2))
    await signed.state.put_identity(limited, replaces=ANN)
    await signed.gateway.view.refresh()
    statuses = []
    for number in range(3):
        answer = await signed.ask(kit.chat_body(), headers=bearer(signing))
        statuses.append(answer.status)
        await signed.state.put_identity(Principal(f"p-{number}", "x", PrincipalKind.SERVICE))
        await signed.gateway.view.refresh()  # a change elsewhere forgets nothing
    assert statuses == [200, 200, 429]
