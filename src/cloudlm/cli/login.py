"""``cloudlm login``, ``logout``: signing in at the issuer that a control API names."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from cloudlm.cli.connect import addresses, trusted
from cloudlm.cli.options import Json, date_text, grants_text
from cloudlm.cli.screen import out, print_json, say
from cloudlm.cli.session import Session, Sessions
from cloudlm.core.errors import CloudlmError
from cloudlm.core.wire_access import principal_body
from cloudlm.state.home import Home, load_settings


def login(
    device: Annotated[
        bool, typer.Option("--device", help="Type a code on another machine: no browser here.")
    ] = False,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the browser, or only say where.")
    ] = True,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Loopback port; 0 takes a free one.")
    ] = 0,
    json_output: Json = False,
) -> None:
    """Sign in through the issuer of the control API. No key is needed."""
    from cloudlm.client import Client
    from cloudlm.client.signin import DeviceCode, SignIn

    settings, _ = load_settings()
    where = addresses(settings)

    def show(address: str) -> None:
        say(f"sign in here: {address}")
        if browser:
            webbrowser.open(address)

    def show_code(code: DeviceCode) -> None:
        say(f"open {code.address} on any machine and type {code.code}")
        say(f"or open {code.address_with_code}")

    ca = trusted(Home(settings.home))
    with Client(None, where.control_url, where.gateway_url, ca=ca) as client:
        place = client.signin_place()
    with SignIn(place, client_secret=settings.oidc.client_secret) as signin:
        tokens = signin.on_device(show_code) if device else signin.in_browser(show, port=port)
    with Client(tokens.id_token, where.control_url, where.gateway_url, ca=ca) as client:
        principal = client.whoami().principal
    sessions = Sessions(Home(settings.home).path)
    with sessions.locked():
        sessions.keep(where.control_url, Session(place, tokens))
    if json_output:
        expires = {"expires_at": tokens.expires_at, "control_url": where.control_url}
        print_json({"principal": principal_body(principal), **expires})
        return
    out.print(f"signed in as {principal.name} ({principal.id}), tenant {principal.tenant}")
    out.print(f"may: {grants_text(principal.grants) or 'nothing yet'}")
    say(f"until {date_text(tokens.expires_at)}" + (", then again" if tokens.refresh_token else ""))


def logout(json_output: Json = False) -> None:
    """Forget your sign-in, here and at the issuer."""
    from cloudlm.client.signin import SignIn

    settings, _ = load_settings()
    control_url = addresses(settings).control_url
    sessions = Sessions(Home(settings.home).path)
    with sessions.locked():
        session = sessions.find(control_url)
        sessions.keep(control_url, None)
    if session is None:
        if json_output:
            print_json({"control_url": control_url, "signed_out": False, "issuer_told": False})
        else:
            say(f"nobody is signed in at {control_url}")
        return
    try:
        with SignIn(session.place, client_secret=settings.oidc.client_secret) as signin:
            told = signin.revoke(session.tokens)
    except CloudlmError as error:
        say(f"the issuer could not be told: {error.message}")
        told = False
    if json_output:
        print_json({"control_url": control_url, "signed_out": True, "issuer_told": told})
        return
    note = "" if told else "; the issuer's own session goes on until it ends there"
    out.print(f"signed out of {control_url}{note}")
