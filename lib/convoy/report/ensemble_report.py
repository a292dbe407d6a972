"""The page of an ensemble alone, as a search leaves it in its run folder."""

from __future__ import annotations

from convoy.pipelines.ensemble_building import EnsembleReport
from convoy.report.blocks import Page
from convoy.report.ensemble_sections import ensemble_lead, ensemble_sections, ensemble_tiles
from convoy.report.html import render_page


def draw_ensemble_report(report: EnsembleReport) -> bytes:
    """One HTML file that needs nothing else, for light and dark screens."""
    return render_page(
        Page(
            target=f"ensemble:{report.ensemble}",
            title=report.ensemble,
            lead=ensemble_lead(report),
            tiles=ensemble_tiles(report),
            sections=list(ensemble_sections(report)),
        )
    )
