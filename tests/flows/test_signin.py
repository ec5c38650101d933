"""People sign in: at an issuer that somebody else wrote, through real processes; and at one made of
authlib's server classes, which demands PKCE and knows device codes."""

from __future__ import annotations

import json
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
from installations import MODEL, QUESTION, Installation, start_installation, stop_installation

from cloudlm.client.access_calls import Place
from cloudlm.client.signin import DeviceCode, SignIn, Tokens
from cloudlm.core.errors import AuthenticationFailed, CloudlmError, NotSupported, UpstreamTimeout

SUPPORT = Path(__file__).parent.parent / "support"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def serving(command: list[str], url: str) -> Iterator[str]:
    """Run an issuer until the tests are over; its address."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert process.poll() is None, f"{command} ended with {process.poll()}"
            try:
                httpx2.get(f"{url}/.well-known/openid-configuration", trust_env=False, timeout=60)
                break
            except httpx2.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def foreign_issuer() -> Iterator[str]:
    """oidc-provider-mock."""
    port = free_port()
    command = ["-m", "oidc_provider_mock", "--port", str(port), "--require-nonce"]
    yield from serving(command, f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def strict_issuer() -> Iterator[str]:
    port = free_port()
    command = [str(SUPPORT / "strict_issuer.py"), str(port)]
    yield from serving(command, f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: Any, foreign_issuer: str) -> Iterator[Installation]:
    """An installation with the starter model, whose people sign in at the foreign issuer."""
    home = tmp_path_factory.mktemp("signin") / "home"
    home.mkdir(mode=0o700)
    rules = home / "people.yaml"
    rules.write_text(
        "- {claims: {groups: bank}, role: developer, scope: default}\n"
        "- {claims: {groups: chiefs}, role: admin, scope: default}\n"
    )
    settings = {"issuer": foreign_issuer, "client_id": "cloudlm", "mapping": str(rules)}
    (home / "config.yaml").write_text(json.dumps({"oidc": settings}))
    running = start_installation(home)
    yield running
    assert stop_installation(running) == 0


def person_of(installation: Installation, tmp_path: Path) -> dict[str, str]:
    """The environment of somebody on another machine: an empty home, no key."""
    environment = {**installation.environment, "CLOUDLM_HOME": str(tmp_path / "own")}
    environment.pop("CLOUDLM_API_KEY")
    # This issuer demands a secret of every client, and takes any.
    environment["CLOUDLM_OIDC_CLIENT_SECRET"] = "any"
    return environment


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cloudlm.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def log_in(environment: dict[str, str], sub: str) -> tuple[int, str]:
    """``cloudlm login`` with a test for a browser; exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cloudlm.cli.main", "login", "--no-browser"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = ""
    while "sign in here" not in line:
        line = process.stderr.readline()
        assert line, process.communicate()
    address = re.sub(r"\s", "", line.partition("here:")[2])
    with httpx2.Client(trust_env=False, follow_redirects=True, timeout=60) as browser:
        answer = browser.post(address, data={"sub": sub})
    out, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        assert answer.text == "You are signed in. You can close this page."
    return process.returncode, out + errors


def describe(issuer: str, sub: str, **claims: Any) -> None:
    done = httpx2.put(f"{issuer}/users/{sub}", json=claims, trust_env=False)
    assert done.status_code == 204


def test_a_person_signs_in_works_and_signs_out(
    signed: Installation, foreign_issuer: str, tmp_path: Path
) -> None:
    describe(foreign_issuer, "ann", groups=["bank"], name="Ann")
    me = person_of(signed, tmp_path)
    refused = run(me, "whoami")
    assert refused.returncode == 1
    assert "cloudlm login" in refused.stderr
    code, said = log_in(me, "ann")
    assert code == 0, said
    assert "developer@default" in said
    kept = tmp_path / "own" / "login.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert "signed in until" in run(me, "whoami").stdout
    made = run(me, "keys", "create", "--name", "mine", "--json")
    assert made.returncode == 0, made.stderr
    assert run(me, "tenants", "create", "more").returncode == 1
    token = json.loads(kept.read_text())[signed.control]["tokens"]["id_token"]
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
    for key in (token, json.loads(made.stdout)["key"]):
        answer = ask(signed, key, body)
        assert answer.status_code == 200, answer.text
    kept.chmod(0o644)
    assert "chmod 600" in run(me, "whoami").stderr
    kept.chmod(0o600)
    elsewhere = {**me, "CLOUDLM_CONTROL_URL": "http://127.0.0.1:9"}
    assert "no API key" in run(elsewhere, "whoami").stderr  # the token is not for that address
    done = run(me, "logout")
    assert "signed out" in done.stdout
    assert json.loads(kept.read_text()) == {}
    assert run(me, "whoami").returncode == 1


def ask(signed: Installation, key: str, body: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"}
    url = f"{signed.gateway}/v1/chat/completions"
    return httpx2.post(url, json=body, headers=headers, timeout=60, trust_env=False)


def test_who_fits_no_rule_is_not_let_in(
    signed: Installation, foreign_issuer: str, tmp_path: Path
) -> None:
    describe(foreign_issuer, "eve", groups=["others"])
    me = person_of(signed, tmp_path)
    code, said = log_in(me, "eve")
    assert code == 1
    assert "no rule" in said
    assert not (tmp_path / "own" / "login.json").exists()


@pytest.mark.promise(33)
def test_a_disabled_person_is_refused_everywhere_within_a_second(
    signed: Installation, foreign_issuer: str, tmp_path: Path
) -> None:
    """Through real processes."""
    describe(foreign_issuer, "bob", groups=["bank"])
    me = person_of(signed, tmp_path)
    assert log_in(me, "bob")[0] == 0
    principal = json.loads(run(me, "whoami", "--json").stdout)["principal"]["id"]
    token = json.loads((tmp_path / "own" / "login.json").read_text())
    token = token[signed.control]["tokens"]["id_token"]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert ask(signed, token, body).status_code == 200
    change = httpx2.patch(
        f"{signed.control}/api/v1/principals/{principal}",
        json={"disabled": True},
        headers={"authorization": f"Bearer {signed.key}"},
        trust_env=False,
    )
    assert change.status_code == 200
    time.sleep(1.0)
    assert ask(signed, token, body).status_code == 401
    assert run(me, "whoami").returncode == 1


# Against the strict issuer ----------------------------------------------------------------------


@pytest.fixture
def sign_in(strict_issuer: str) -> Iterator[Callable[..., SignIn]]:
    opened: list[SignIn] = []

    def make(**more: Any) -> SignIn:
        place = Place(strict_issuer, "cloudlm-cli", "openid profile")
        opened.append(SignIn(place, **more))
        return opened[-1]

    yield make
    for one in opened:
        one.__exit__()


def browse(
    change: Callable[[dict[str, str]], None] = lambda _: None, sub: str = "ann", **how: Any
) -> tuple[Callable[[str], None], list[Any]]:
    """A browser in a thread: signs in, lets ``change`` alter what it was asked, goes back."""
    seen: list[Any] = []

    def visit(address: str) -> None:
        parts = urlsplit(address)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        seen.append(dict(asked))
        change(asked)
        url = f"{parts.scheme}://{parts.netloc}{parts.path}?{urlencode({**asked, 'sub': sub})}"
        with httpx2.Client(trust_env=False, timeout=60) as browser:
            back = browser.get(url).headers.get("location", "")
            for after in how.get("after", [lambda location: location]):
                try:
                    seen.append(browser.get(after(back)).status_code)
                except httpx2.HTTPError as error:
                    seen.append(type(error).__name__)

    def show(address: str) -> None:
        thread = threading.Thread(target=visit, args=(address,), daemon=True)
        thread.start()
        seen.append(thread)

    return show, seen


def test_code_with_pkce_refresh_and_revocation(
    sign_in: Callable[..., SignIn], strict_issuer: str
) -> None:
    show, seen = browse()
    signin = sign_in()
    tokens = signin.in_browser(show, timeout_s=20)
    assert (tokens.subject, bool(tokens.refresh_token)) == ("ann", True)
    asked = next(one for one in seen if isinstance(one, dict))
    assert asked["code_challenge_method"] == "S256"
    assert asked["redirect_uri"].startswith("http://127.0.0.1:")
    assert tokens.id_token not in repr(tokens)
    fresh = signin.refresh(tokens)
    assert fresh.refresh_token != tokens.refresh_token
    with pytest.raises(AuthenticationFailed):
        signin.refresh(tokens)  # a refresh token is good once
    before = httpx2.get(f"{strict_issuer}/state", trust_env=False, timeout=60).json()[
        "refresh_tokens"
    ]
    assert signin.revoke(fresh)
    after = httpx2.get(f"{strict_issuer}/state", trust_env=False, timeout=60).json()[
        "refresh_tokens"
    ]
    assert after == before - 1


def test_a_code_without_our_verifier_is_worth_nothing(
    sign_in: Callable[..., SignIn], strict_issuer: str
) -> None:
    """Somebody who saw the redirect, or put their own challenge in, gets no token."""

    def other_challenge(asked: dict[str, str]) -> None:
        asked["code_challenge"] = "A" * 43

    show, _ = browse(other_challenge)
    with pytest.raises(AuthenticationFailed, match="invalid_grant"):
        sign_in().in_browser(show, timeout_s=20)


def test_a_replayed_nonce_is_refused(sign_in: Callable[..., SignIn]) -> None:
    def other_nonce(asked: dict[str, str]) -> None:
        asked["nonce"] = "of-another-sign-in"

    show, _ = browse(other_nonce)
    with pytest.raises(AuthenticationFailed, match="another sign-in"):
        sign_in().in_browser(show, timeout_s=20)


def test_only_the_right_state_counts_and_only_once(sign_in: Callable[..., SignIn]) -> None:
    def wrong(location: str) -> str:
        return re.sub(r"state=[^&]*", "state=guessed", location)

    def elsewhere(location: str) -> str:
        return location.replace("/callback", "/other")

    show, seen = browse(
        after=[wrong, elsewhere, lambda location: location, lambda location: location]
    )
    assert sign_in().in_browser(show, timeout_s=20).subject == "ann"
    thread = next(one for one in seen if isinstance(one, threading.Thread))
    thread.join(10)
    *first, last = [one for one in seen if isinstance(one, int | str)]
    assert first == [400, 404, 200]
    assert last in ("ConnectError", "RemoteProtocolError", "ReadError")  # nobody listens any more


def test_an_issuer_that_is_another_is_refused(sign_in: Callable[..., SignIn]) -> None:
    """Mix-up (RFC 9207)."""
    show, _ = browse(after=[lambda location: location + "&iss=https%3A%2F%2Fevil.example"])
    with pytest.raises(AuthenticationFailed, match="another issuer"):
        sign_in().in_browser(show, timeout_s=20)


def test_nobody_comes_back(sign_in: Callable[..., SignIn]) -> None:
    with pytest.raises(UpstreamTimeout):
        sign_in().in_browser(lambda _: None, timeout_s=0.2)


def test_a_device_signs_in_by_a_code(sign_in: Callable[..., SignIn], strict_issuer: str) -> None:
    waits: list[float] = []
    shown: list[DeviceCode] = []

    def approve(sub: str) -> Callable[[float], None]:
        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) % 3 == 0:  # two polls find nobody
                query = urlencode({"user_code": shown[-1].code, "sub": sub})
                httpx2.get(f"{strict_issuer}/approve?{query}", trust_env=False, timeout=60)

        return sleep

    tokens = sign_in(sleep=approve("dora")).on_device(shown.append)
    assert isinstance(tokens, Tokens)
    assert tokens.subject == "dora"
    assert len(waits) == 3
    with pytest.raises(CloudlmError, match="access_denied"):
        sign_in(sleep=approve("nobody")).on_device(shown.append)


def test_an_issuer_without_devices_says_so(foreign_issuer: str) -> None:
    place = Place(foreign_issuer, "cloudlm", "openid")
    with SignIn(place) as signin, pytest.raises(NotSupported, match="a browser"):
        signin.on_device(lambda _: None)
