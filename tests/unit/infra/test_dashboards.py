"""Dashboard, alerts and runbooks: they ask for metrics that jobs export, and each alert has its page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from convoy.cluster.slice_metrics import SliceMetrics
from infra_files import INFRA, ROOT, documents

# Counters, a histogram and a gauge of jobs, with their tags.
METRICS = {
    "convoy_images_total", "convoy_rejects_total", "convoy_bytes_read_total",
    "convoy_bytes_written_total", "convoy_slice_seconds_bucket", "convoy_slice_seconds_count",
    "convoy_slice_seconds_sum", "convoy_slices_left", "convoy_retries_total",
}  # fmt: skip
EXPORTER = ROOT / "lib" / "convoy" / "cluster" / "slice_metrics.py"
LABELS = {"verb", "run", "code", "le"}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((INFRA / "dashboards" / "convoy.json").read_text())
    return loaded


def rules() -> list[dict[str, Any]]:
    (file,) = documents("dashboards", "alerts.yaml")
    return [rule for group in file["groups"] for rule in group["rules"]]


def queries() -> Iterator[str]:
    yield from (target["expr"] for panel in dashboard()["panels"] for target in panel["targets"])
    yield from (
        variable["query"] for variable in dashboard()["templating"]["list"] if variable["type"] == "query"
    )
    yield from (rule["expr"] for rule in rules())


def test_queries_ask_for_metrics_that_jobs_export() -> None:
    asked = [name for query in queries() for name in re.findall(r"\bray_(convoy_\w+)", query)]
    assert asked
    assert set(asked) <= METRICS


@pytest.mark.skipif(not EXPORTER.exists(), reason="jobs export no metrics yet")
def test_the_metrics_are_those_of_the_code() -> None:
    exported = set(re.findall(r'"(convoy_\w+)"', EXPORTER.read_text()))
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in METRICS} <= exported


def test_queries_group_and_select_by_tags_that_exist() -> None:
    for query in queries():
        grouped = [
            label for part in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in part.split(", ")
        ]
        selected = [
            label for part in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)=~?", part)
        ]
        assert {*grouped, *selected} <= LABELS, query
        assert query.count("(") == query.count(")")


def test_counters_are_read_as_rates_and_rejects_as_totals() -> None:
    """Of a series with one value `rate` makes 0: all rejects of a run may be in its first slice."""
    for query in queries():
        if "ray_convoy_rejects_total" in query:
            assert not re.search(r"\b(?:rate|increase)\(", query), query
            continue
        for match in re.finditer(r"ray_convoy_\w+_(?:total|bucket|count)", query):
            assert re.search(r"(?:rate|label_values)\($", query[: match.start()]), query


def test_alerts_count_what_a_series_is_born_with() -> None:
    """Of a series with one value `increase` makes 0: all rejects of a run may be in its first slice."""
    counted = r"max_over_time\((?P<counter>[^\[]+)\[(?P<window>\w+)\]\)"
    grown = rf"{counted} - \((?P=counter) offset (?P=window) or max_over_time\((?P=counter)\[(?P=window)\]\) \* 0\)"
    for rule in rules():
        assert "increase(" not in rule["expr"]
        assert "_total" not in re.sub(grown, "", rule["expr"]), rule["alert"]


def test_a_run_that_waits_for_its_first_slice_shows_how_many_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[tuple[float, dict[str, str]]] = []
    monkeypatch.setattr("ray.util.metrics.Gauge.set", lambda _, value, tags: shown.append((value, tags)))
    SliceMetrics("score", "run-1", num_slices=7)
    assert shown == [(7, {"verb": "score", "run": "run-1"})]
    (stalled,) = [rule["expr"] for rule in rules() if rule["alert"] == "ConvoyRunStalled"]
    assert set(re.findall(r"ray_convoy_\w+", stalled)) == {"ray_convoy_slices_left"}


def test_panels_have_their_own_places() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    pages = {path.stem for path in (INFRA / "dashboards" / "runbooks").glob("*.md")}
    assert {rule["alert"] for rule in rules()} == pages
    for rule in rules():
        text = (ROOT / rule["annotations"]["runbook"]).read_text()
        assert text.startswith(f"# {rule['alert']}\n")
        assert all(part in text for part in ("**What it says.**", "**What it means.**", "**Look**", "**Do**"))
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["for"]
