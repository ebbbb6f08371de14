"""Which types of sinks there are, and which need a connection."""

from __future__ import annotations

from exportd_server.sinks.registry import SinkTypes
from tests.support.scripted_sink import ScriptedSink


def test_who_asks_which_types_need_no_connection_loads_none_of_ours() -> None:
    types = SinkTypes.installed()
    assert types.without_connection() == ["webhook"]
    assert not types._loaded, "their libraries take a while"


def test_what_is_told_without_loading_is_what_the_types_say() -> None:
    types = SinkTypes.installed()
    said = [
        name
        for name in types.names()
        if (found := types.get(name)) is not None and not found.needs_connection
    ]
    assert types.without_connection() == said


def test_a_type_that_is_installed_beside_is_asked() -> None:
    assert SinkTypes({}).with_type(ScriptedSink()).without_connection() == ["scripted"]
