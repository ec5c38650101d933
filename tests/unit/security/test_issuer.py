"""Keys of an issuer: fetched seldom, whatever arrives; kept while it is away."""

from __future__ import annotations

import asyncio

import pytest
from signing_issuer import CLIENT, ISSUER, SigningIssuer

from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import AuthenticationFailed, BadSetting, Unavailable, UpstreamFailed
from cloudlm.core.settings import OidcSettings
from cloudlm.security.issuer import (
    Issuer,
    endpoint_of,
    expectation_of,
    is_safe_address,
    open_issuer,
)

SETTINGS = OidcSettings(issuer=ISSUER, client_id=CLIENT)


@pytest.fixture
def signing() -> SigningIssuer:
    return SigningIssuer()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def issuer(signing: SigningIssuer, clock: ManualClock) -> Issuer:
    return Issuer(expectation_of(SETTINGS), clock, signing.fetch)


async def test_keys_are_fetched_once_for_all_who_wait(issuer: Issuer, signing) -> None:
    text = signing.token()
    found = await asyncio.gather(*(issuer.claims(text) for _ in range(20)))
    assert {one["sub"] for one in found} == {"ann"}
    assert signing.fetched == [f"{ISSUER}/.well-known/openid-configuration", f"{ISSUER}/keys"]


async def test_a_flood_of_unknown_keys_fetches_once_in_half_a_minute(
    issuer: Issuer, signing, clock
) -> None:
    await issuer.claims(signing.token())
    await clock.advance(60)
    signing.fetched.clear()
    stranger = SigningIssuer()
    for number in range(200):
        text = stranger.token(header={"kid": f"flood-{number}"})
        with pytest.raises(AuthenticationFailed):
            await issuer.claims(text)
    assert len(signing.fetched) == 2  # one try: the document and the keys
    await issuer.claims(signing.token())  # and good tokens go on being good


async def test_a_new_key_of_the_issuer_is_found(issuer: Issuer, signing, clock) -> None:
    await issuer.claims(signing.token())
    signing.turn()
    with pytest.raises(AuthenticationFailed):
        await issuer.claims(signing.token())  # fetched a moment ago
    await clock.advance(31)
    assert (await issuer.claims(signing.token()))["sub"] == "ann"


async def test_a_key_taken_back_ends_its_tokens(issuer: Issuer, signing, clock) -> None:
    text = signing.token(exp=signing.claims()["exp"] + 7200)
    await issuer.claims(text)
    signing.turn()
    del signing.keys[0]
    await clock.advance(3601)
    with pytest.raises(AuthenticationFailed):
        await issuer.claims(text)


async def test_a_token_seen_before_ends_at_its_time(issuer: Issuer, signing, clock) -> None:
    text = signing.token()
    await issuer.claims(text)
    await clock.advance(600 + 30)
    with pytest.raises(AuthenticationFailed):
        await issuer.claims(text)


async def test_a_token_seen_before_ends_at_its_greatest_age(signing, clock) -> None:
    settings = OidcSettings(issuer=ISSUER, client_id=CLIENT, max_token_age_s=600)
    issuer = Issuer(expectation_of(settings), clock, signing.fetch)
    text = signing.token(exp=signing.claims()["exp"] + 7200)
    await issuer.claims(text)
    await clock.advance(700)
    with pytest.raises(AuthenticationFailed):
        await issuer.claims(text)


async def test_an_issuer_that_hangs_holds_nobody_up(issuer: Issuer, signing, clock) -> None:
    text = signing.token(exp=signing.claims()["exp"] + 7200)
    await issuer.claims(text)
    await clock.advance(3601)
    fetch, asked = issuer._fetch, asyncio.Event()

    async def hang(address: str) -> None:
        asked.set()
        await asyncio.Event().wait()

    issuer._fetch = hang
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await issuer.claims(text)
    assert asked.is_set()
    assert loop.time() - began < 5  # of the 10 that a fetch may take
    await clock.advance(1)
    async with asyncio.timeout(5):  # and the next waits for nothing
        assert await issuer.claims(text)
    issuer._renewal.cancel()
    issuer._fetch = fetch


async def test_while_the_issuer_is_away_the_last_keys_serve_for_a_day(
    issuer: Issuer, signing, clock
) -> None:
    await issuer.claims(signing.token())
    signing.away = UpstreamFailed("away")
    await clock.advance(20 * 3600)
    said = signing.token(iat=clock.now(), exp=clock.now() + 10 * 3600)
    assert await issuer.claims(said)
    await clock.advance(5 * 3600)
    with pytest.raises(Unavailable, match="API keys work on"):
        await issuer.claims(said)


async def test_without_any_keys_the_answer_is_503_and_tries_are_bounded(
    issuer: Issuer, signing, clock
) -> None:
    signing.away = OSError("refused")
    for _ in range(50):
        with pytest.raises(Unavailable):
            await issuer.claims(signing.token())
    assert len(signing.fetched) == 1
    signing.away = None
    await clock.advance(30)
    assert await issuer.claims(signing.token())


def test_an_issuer_must_be_who_it_says() -> None:
    good = {"issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys"}
    assert endpoint_of(good, "jwks_uri", ISSUER) == f"{ISSUER}/keys"
    for change in (
        {"issuer": ISSUER + "/"},
        {"issuer": None},
        {"jwks_uri": "http://login.example/keys"},
        {"jwks_uri": "http://169.254.169.254/latest"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": "https://user:pw@login.example/keys"},
        {"jwks_uri": None},
    ):
        with pytest.raises(UpstreamFailed):
            endpoint_of({**good, **change}, "jwks_uri", ISSUER)
    with pytest.raises(UpstreamFailed):
        endpoint_of([], "jwks_uri", ISSUER)


@pytest.mark.promise(15)
def test_what_is_safe() -> None:
    for good in ("https://a.example", "http://127.0.0.1:5", "http://localhost:5", "http://[::1]"):
        assert is_safe_address(good), good
    for bad in ("http://a.example", "http://localhost.evil.example", "https://", "x", "http://[:"):
        assert not is_safe_address(bad), bad


def test_settings_that_cannot_be() -> None:
    assert open_issuer(OidcSettings(), ManualClock()) is None
    for change, param in (
        ({"issuer": "login.example"}, "oidc.issuer"),
        ({"issuer": "http://login.example"}, "oidc.issuer"),
        ({"issuer": "https://login.example?x=1"}, "oidc.issuer"),
        ({"client_id": ""}, "oidc.client_id"),
        ({"algorithms": "HS256"}, "oidc.algorithms"),
    ):
        given = {"issuer": ISSUER, "client_id": CLIENT, **change}
        with pytest.raises(BadSetting) as caught:
            open_issuer(OidcSettings(**given), ManualClock())
        assert caught.value.param == param
