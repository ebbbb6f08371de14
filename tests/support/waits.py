"""How long tests wait for what comes soon."""

from __future__ import annotations

ENOUGH = 60.0
"""Seconds. Only what hangs takes as long: that a machine is busy is no fault of what is
tested. What a test must not wait for is made to last much longer."""
