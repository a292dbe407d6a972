"""`convoy report ensemble`: the page of an ensemble again, from what its bundle or its search says of it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.pipelines.ensemble_building import EnsembleReport, ReportDrawer
from convoy.pipelines.report_writing import write_html
from convoy.pipelines.workspace import workspace_store
from convoy.storage.bundles import METRICS_FILE, open_bundle
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder


class EnsemblePage(StrictModel):
    """Where the page is, and the ensemble that it shows."""

    output: str
    ensemble: str
    gain: float


def write_ensemble_page(
    workspace: str | None, reference: str, output: str, draw: ReportDrawer
) -> EnsemblePage:
    """Draw the report of an ensemble, by its bundle or the run of its search, and write it to a local path.

    Raises DataError for a bundle or run that holds no such report.
    """
    report = _read_report(workspace_store(workspace), reference)
    write_html(output, draw(report))
    return EnsemblePage(output=output, ensemble=report.ensemble, gain=report.gain)


def _read_report(store: ObjectStore, reference: str) -> EnsembleReport:
    is_bundle = "@" in reference or "/" in reference
    document = None if is_bundle else read_json(store, RunFolder(store, reference).key("report.json"))
    if document is None:
        bundle = open_bundle(store, reference)
        document = {**bundle.read_json(METRICS_FILE), "ensemble": str(bundle.ref)}
    # The report of a search says more than that of its ensemble.
    fields: dict[str, Any] = {
        name: value for name, value in document.items() if name in EnsembleReport.model_fields
    }
    try:
        return EnsembleReport.model_validate(fields)
    except ValidationError as error:
        raise DataError(
            f"there is no report of an ensemble: {error.error_count()} of its fields are missing or others",
            where=reference,
            next_step="name an ensemble that convoy tune built, or the run of its search",
        ) from error
