"""Which commands there are, and where; each module is imported when its command is asked for.

To import all of them takes several times as long as ``cloudlm status`` itself: so the names and
summaries that ``--help`` shows stand here (a test compares them with the commands' own), and
nothing of a command's module is read before somebody types its name. Must not import one.

Options that were not given are not read either: typer imports pydantic for the first value that it
reads, be it none, which takes a quarter of ``cloudlm status``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import typer
from typer.core import TyperGroup

_NEGATIVE = re.compile(r"-\d[\d:.]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Noun:
    """A command: ``home`` is ``module:attribute`` below ``cloudlm.cli``, a function or an
    application with commands of its own; ``summary`` is one line."""

    name: str
    home: str
    summary: str


NOUNS = (
    Noun("up", "up:up", "Run gateway and control with the starter model until Ctrl-C."),
    Noun("demo", "demo:demo", "Start everything, ask five questions, show how to go on."),
    Noun("serve", "serve:serve", "Serve one model over the OpenAI API until Ctrl-C."),
    Noun("run", "run:run", "Chat with a model in the terminal."),
    Noun("deploy", "deployments:deploy", "Deploy a model under a name."),
    Noun("apply", "deployments:apply", "Make the deployments in a file exist as they stand there."),
    Noun("status", "deployments:status", "Show deployments and their replicas."),
    Noun("logs", "deployments:logs", "Print what a deployment's replicas said."),
    Noun("scale", "deployments:scale", "Change how many replicas a deployment may have."),
    Noun("sleep", "deployments:sleep", "Give the memory of a deployment's replicas back."),
    Noun("wake", "deployments:wake", "Load the model of a sleeping deployment again."),
    Noun("delete", "deployments:delete", "Stop a deployment's replicas and forget it."),
    Noun("plan", "plan:plan", "Choose machines for the deployments in a file, and say why."),
    Noun("whoami", "principals:whoami", "Show whom your key speaks for, and its role."),
    Noun("login", "login:login", "Sign in through the issuer of the control API."),
    Noun("logout", "login:logout", "Forget your sign-in, here and at the issuer."),
    Noun("usage", "usage:show", "Show tokens and costs."),
    Noun("simulate", "simulate:simulate", "Compare policies on traffic without running anything."),
    Noun("config", "config:show", "Show every setting and where its value comes from."),
    Noun("drivers", "drivers:show", "List the drivers and their abilities."),
    Noun("catalogue", "catalogue:app", "Offers of machines for plans: list, check, import."),
    Noun("rollout", "rollouts:app", "Roll-outs: status, history, pause, promote, undo, score."),
    Noun(
        "models",
        "models:app",
        "Model versions: list, show, pull, import, alias, unalias, rm, perplexity.",
    ),
    Noun("tenants", "tenants:tenants", "Tenants: create, list, change, remove."),
    Noun("projects", "tenants:projects", "Projects of a tenant: create, list, remove."),
    Noun("principals", "principals:app", "People and services: create, list, change, remove."),
    Noun("roles", "roles:app", "Roles: list, create, remove, matrix."),
    Noun("policies", "policies:app", "Cedar policies beside roles: check, schema."),
    Noun("keys", "keys:app", "API keys: create, list, change, rotate, revoke."),
    Noun("audit", "audit:app", "The audit log: list, export, verify."),
    Noun("cache", "cache:app", "The semantic cache: calibrate, show."),
    Noun("certificates", "certificates:app", "Certificates of gateways and workers."),
    Noun("secrets", "secrets:app", "Keys of external endpoints: keep, list, remove."),
)


class Commands(Mapping[str, Any]):
    """The commands by name, each made from its module when it is first asked for."""

    def __init__(self, nouns: tuple[Noun, ...]) -> None:
        self._nouns = {noun.name: noun for noun in nouns}
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _command(self._nouns[name])
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._nouns

    def __iter__(self) -> Iterator[str]:
        return iter(self._nouns)

    def __len__(self) -> int:
        return len(self._nouns)

    def summaries(self) -> list[tuple[str, str]]:
        """Names with one line each; imports nothing."""
        return [(noun.name, noun.summary) for noun in self._nouns.values()]


class Root(TyperGroup):
    """The group of ``cloudlm`` itself, over ``NOUNS``."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._nouns = Commands(NOUNS)
        self.commands = cast(MutableMapping[str, Any], self._nouns)

    def get_params(self, ctx: Any) -> list[Any]:
        """The options of ``cloudlm`` itself."""
        return _spared(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name; None where there is none."""
        return self._nouns.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The section *Commands* of ``--help``."""
        with formatter.section("Commands"):
            formatter.write_dl(self._nouns.summaries())


def _command(noun: Noun) -> Any:
    module, _, attribute = noun.home.partition(":")
    found = getattr(import_module(f"cloudlm.cli.{module}"), attribute)
    holder = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=noun.name)
    else:
        holder.command(noun.name)(found)
    made = typer.main.get_group(holder).commands[noun.name]
    for command in _with_all_below(made):
        command.get_params = _sparing(command.get_params)
        command.parse_args = _minding(command.parse_args)
    return made


def _with_all_below(command: Any) -> Iterable[Any]:
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from _with_all_below(one)


def _minding(parse_args: Callable[[Any, list[str]], Any]) -> Callable[[Any, list[str]], Any]:
    """Have a command take ``-1`` for a number that it may refuse in its own words, not for an
    option that nobody knows. No option of ours is a digit."""

    def parse(ctx: Any, args: list[str]) -> Any:
        if any(_NEGATIVE.fullmatch(one) for one in args):
            ctx.ignore_unknown_options = True
        return parse_args(ctx, args)

    return parse


def _sparing(get_params: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    return lambda ctx: _spared(get_params(ctx))


def _spared(parameters: list[Any]) -> list[Any]:
    """Have a command read only what it was given: none is none without reading, unless it is
    missed or means an empty list."""
    for one in parameters:
        plain = not (one.required or one.multiple or one.nargs != 1)
        if plain and not isinstance(one.process_value, _Spared):
            one.process_value = _Spared(one)
    return parameters


class _Spared:
    """Processes the values of one parameter."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter
        self._usual = parameter.process_value

    def __call__(self, ctx: Any, value: Any) -> Any:
        if value is not None:
            return self._usual(ctx, value)
        callback = self._parameter.callback
        return None if callback is None else callback(ctx, self._parameter, None)
