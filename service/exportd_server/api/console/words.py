"""Figures and moments as people read them."""

from __future__ import annotations

from datetime import datetime, timedelta

from markupsafe import Markup

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_THIN = "\u202f"


def number(value: float) -> str:
    """A whole number, in groups of three."""
    return f"{round(value):,}".replace(",", _THIN)


def size(count: int) -> str:
    """Bytes in the largest unit that keeps the figure above 1."""
    value, unit = float(count), _UNITS[0]
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{number(count)} bytes" if unit == _UNITS[0] else f"{value:.1f} {unit}"


def span(length: timedelta) -> str:
    """A length of time in its two largest units."""
    seconds = max(0, round(length.total_seconds()))
    parts = [
        f"{value} {unit}"
        for value, unit in (
            (seconds // 86_400, "d"),
            (seconds // 3600 % 24, "h"),
            (seconds // 60 % 60, "min"),
            (seconds % 60, "s"),
        )
        if value
    ]
    return " ".join(parts[:2]) or "0 s"


def moment(when: datetime) -> Markup:
    """A moment in UTC, to the second; machines read it, too."""
    return Markup('<time datetime="{}">{}</time>').format(
        when.isoformat(timespec="seconds"), when.strftime("%Y-%m-%d %H:%M:%S")
    )


def words(name: str) -> str:
    """A name of the contract in plain words: DEAD_LETTERED, RUNNING."""
    return name.replace("_", " ").lower()
