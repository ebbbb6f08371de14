"""Writes docs/metrics.md from the metrics themselves; with --check, says if it is stale."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from exportd_server.platform import metrics, metrics_exports, metrics_service

TARGET = Path(__file__).resolve().parent.parent / "docs/metrics.md"

_MODULES = {
    "Jobs, work and leases": metrics_exports,
    "Calls, downloads, store, ledger and process": metrics_service,
    "Sinks and audit": metrics,
}

HEAD = """\
# Metrics

With `EXPORTD_METRICS__LISTEN=127.0.0.1:9464`, every process serves them at `/metrics` for
Prometheus. [The dashboard](../deploy/grafana/exportd.json) and
[the alerts](../deploy/prometheus/alerts.yaml) use them, and [the runbook](runbook.md) says
what to do about each alert.

Labels are few and bounded: datasets, sinks and connections that the operator configured,
and words of exportd's own. None is a tenant, a job or an address. Series whose labels are
known beforehand are there, at 0, from the start.

A counter counts in the process that did the work: sum it over the processes. A figure of
the ledger is the same in all of them: take the `max`. Every process asks the ledger every
5 s, and the more seldom the longer the answer takes, up to a minute.

A histogram has `_bucket`, with the label `le`, `_sum` and `_count`. On Linux there are
also the `process_*` of Prometheus' own library: memory, CPU, open files, start. This page
is made from the metrics themselves by `tools/metrics.py`.
"""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric, with its name as Prometheus has it."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str

    def series(self) -> dict[str, frozenset[str]]:
        """The labels of its series, by their names."""
        labels = frozenset(self.labels)
        if self.type != "histogram":
            return {self.name: labels}
        return {
            f"{self.name}_bucket": labels | {"le"},
            f"{self.name}_sum": labels,
            f"{self.name}_count": labels,
        }


def families() -> dict[str, list[Family]]:
    """All of them, by what they are about."""
    return {
        title: [
            _family(value)
            for value in vars(module).values()
            if isinstance(value, MetricWrapperBase)
            # And no child of one, which stands for one series.
            and not value._labelvalues  # noqa: SLF001 - told nowhere else
        ]
        for title, module in _MODULES.items()
    }


def _family(metric: MetricWrapperBase) -> Family:
    (described,) = metric.describe()
    total = "_total" if described.type == "counter" else ""
    return Family(
        described.name + total,
        described.type,
        tuple(metric._labelnames),  # noqa: SLF001 - told nowhere else
        described.documentation,
    )


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, members in families().items():
        lines += [
            f"## {title}\n",
            "| Name | Type | Labels | Meaning |",
            "|---|---|---|---|",
        ]
        for family in members:
            labels = ", ".join(f"`{label}`" for label in family.labels) or "none"
            meaning = family.help.replace("|", "\\|")
            lines.append(f"| `{family.name}` | {family.type} | {labels} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write or check; returns the exit code."""
    if sys.argv[1:] != ["--check"]:
        TARGET.write_text(page(), encoding="utf-8")
        return 0
    if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != page():
        print("docs/metrics.md is not current: run make gen")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
