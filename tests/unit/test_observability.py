"""The dashboard, the alerts, the runbook and whatever is deployed name metrics that there
are, with labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from exportd_server.jobs.ledger.base import TaskKind
from exportd_server.jobs.ledger.tables import TaskState
from exportd_server.jobs.model import JobState
from exportd_server.platform import metrics_exports as metrics
from tests.support.promql import named
from tools.metrics import TARGET, families, page

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy/grafana/exportd.json"
ALERTS = ROOT / "deploy/prometheus/alerts.yaml"
RUNBOOK = ROOT / "docs/runbook.md"

FAMILIES = [family for group in families().values() for family in group]
KNOWN = {name: labels for family in FAMILIES for name, labels in family.series().items()}
PROCESS = {
    name: frozenset[str]()
    for name in (
        *("process_resident_memory_bytes", "process_cpu_seconds_total"),
        *("process_open_fds", "process_start_time_seconds"),
    )
}
"""Of Prometheus' own library, on Linux; a running server is seen to have them."""


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def test_the_page_of_metrics_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_expression_names_metrics_and_labels_that_there_are(
    where: str, expression: str
) -> None:
    found = named(expression)
    assert found.series, where
    assert found.unknown(KNOWN | PROCESS) == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("max(exportd_queue_age)", "no metric exportd_queue_age"),
        ('rate(exportd_claims_total{state="x"}[5m])', "has no label state"),
        ("sum by (tenant) (exportd_claims_total)", "grouped by tenant"),
        ("exportd_claim_seconds > 1", "no metric exportd_claim_seconds"),
        ("a unless sum(exportd_claims_total offset 5m) > 0", "no metric a"),
    ],
)
def test_an_expression_that_names_something_else_is_found(
    expression: str, fault: str
) -> None:
    assert any(fault in told for told in named(expression).unknown(KNOWN))


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    used = {name for _, expression in expressions() for name in named(expression).series}
    unused = [f.name for f in FAMILIES if not used & f.series().keys()]
    assert unused == []


def test_legends_tell_labels_that_the_expression_leaves() -> None:
    for panel in panels():
        for target in panel["targets"]:
            told = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            found = named(target["expr"])
            if found.grouped:
                assert told <= found.grouped, target
            else:
                assert told <= {"instance"}, target


def test_every_panel_has_its_place_and_its_number() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells


def test_every_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in {"warning", "critical"}, rule
        assert re.fullmatch(r"\d+[smh]", rule["for"]), rule
        assert rule["annotations"]["summary"].endswith("."), rule
        anchor = f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook"] == anchor
        assert rule["annotations"]["see"], rule
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)


def test_annotations_tell_labels_that_the_expression_leaves() -> None:
    for rule in alerts():
        texts = " ".join(rule["annotations"].values())
        told = set(re.findall(r"\$labels\.(\w+)", texts))
        found = named(rule["expr"])
        left = found.grouped or frozenset({"instance"})
        assert told <= left, rule


def test_each_alert_has_a_section_of_the_runbook_and_the_other_way_round() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    sections = re.findall(r"^## (Exportd\w+)$", text, flags=re.MULTILINE)
    assert sorted(sections) == sorted(rule["alert"] for rule in alerts())
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if section.startswith("Exportd"):
            for word in ("**Means**", "**See**", "**Do**", "**Over**"):
                assert word in section, section.splitlines()[0]


def test_links_inside_the_runbook_lead_to_its_sections() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*"))
        if path.is_file() and "__pycache__" not in path.parts
    ),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_pages_and_deployments_name_metrics_that_there_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="ignore")
    names = re.findall(r"\b(?:exportd|grpc_server)_[a-z_]+\b", text)
    # Packages, and a table.
    others = {"exportd_server", "exportd_sink_journal", "exportd_deliveries"}
    unknown = set(names) - KNOWN.keys() - {family.name for family in FAMILIES} - others
    assert unknown == set()


def test_labels_are_the_words_that_the_ledger_uses() -> None:
    assert set(metrics.KINDS) == {kind.value for kind in TaskKind}
    assert set(metrics.UNFINISHED) == {s.value for s in JobState if not s.terminal}
    assert set(metrics.ENDS) == {s.value for s in JobState if s.terminal}
    ended = {TaskState.DONE, TaskState.CLOSED}
    assert set(metrics.TASK_STATES) == {s.value for s in TaskState if s not in ended}


def test_no_label_can_name_a_tenant_a_job_or_an_address() -> None:
    labels = {label for family in FAMILIES for label in family.labels}
    assert not labels & {"tenant", "job_id", "subject", "peer", "endpoint", "url", "queue"}
