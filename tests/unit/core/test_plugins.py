"""Plug-ins are found by entry points; a broken one is an error with its name."""

import pytest

from cloudlm.core import plugins
from cloudlm.core.errors import InvalidRequest


def test_our_drivers_come_through_the_same_door() -> None:
    names = {plugin.name: plugin.package for plugin in plugins.installed("cloudlm.drivers")}
    assert names["process"] == "cloudlm"
    assert names["memory"] == "cloudlm"


def test_an_unknown_name_lists_those_installed() -> None:
    with pytest.raises(InvalidRequest, match="memory, process"):
        plugins.load("cloudlm.drivers", "nowhere")
