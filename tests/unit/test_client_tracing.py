"""What the Python client finds of a trace never fails a call."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from opentelemetry.trace.propagation import tracecontext

from exportd._tracing import current_trace

PLACE = "opentelemetry.trace.propagation.tracecontext"


def test_a_library_that_has_no_propagator_where_it_should_be_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, PLACE, ModuleType(PLACE))
    assert current_trace() == ()


def test_a_library_that_is_not_there_as_a_whole_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, PLACE, None)
    assert current_trace() == ()


def test_a_propagator_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(tracecontext.TraceContextTextMapPropagator, "inject", fail)
    assert current_trace() == ()
