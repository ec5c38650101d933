"""Plug-ins are found by entry points; a broken one is an error with its name."""

from importlib.metadata import EntryPoint

import pytest

from cloudlm.core import plugins
from cloudlm.core.errors import InvalidRequest, NotSupported


def test_our_drivers_come_through_the_same_door() -> None:
    names = {plugin.name: plugin.package for plugin in plugins.installed("cloudlm.drivers")}
    assert names["process"] == "cloudlm"
    assert names["memory"] == "cloudlm"


def test_an_unknown_name_lists_those_installed() -> None:
    with pytest.raises(InvalidRequest, match="memory, process"):
        plugins.load("cloudlm.drivers", "nowhere")


@pytest.mark.parametrize("target", ["no_such_module:Driver", "os:no_such_name"])
def test_a_broken_one_is_named(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("broken", target, "cloudlm.drivers")
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: [point])
    with pytest.raises(NotSupported, match="'broken' cannot be loaded"):
        plugins.load("cloudlm.drivers", "broken")
