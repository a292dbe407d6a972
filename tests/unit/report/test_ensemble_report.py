from __future__ import annotations

from convoy.core.crop_policies import CropPolicy
from convoy.core.metrics import ReliabilityBin
from convoy.report.ensemble_report import draw_ensemble_report
from made_ensembles import made_candidates, made_report

BINS = [
    ReliabilityBin(low=0.0, high=0.5, num_rows=0, accuracy=None, mean_confidence=None),
    ReliabilityBin(low=0.5, high=1.0, num_rows=10, accuracy=0.8, mean_confidence=0.9),
]


def test_the_page_needs_nothing_else_and_holds_the_figures() -> None:
    report = made_report(made_candidates(1.2, 1.2, 1.5))
    report = report.model_copy(update={"reliability_before": BINS, "reliability_after": BINS})
    page = draw_ensemble_report(report).decode()
    assert f"{100 * report.measured.top1:.2f} %" in page
    assert f"{100 * report.gain:+.2f}" in page
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("http-equiv", "")
    for place in report.chosen.members:
        assert f"candidate-{place}" in page
    assert '<tr class="chosen">' in page


def test_names_from_outside_are_escaped() -> None:
    report = made_report(made_candidates(1.2, 1.2, policy=CropPolicy.CENTER))
    report = report.model_copy(
        update={
            "ensemble": "<script>alert(1)</script>",
            "reliability_before": BINS,
            "reliability_after": BINS,
        }
    )
    page = draw_ensemble_report(report).decode()
    assert "<script>" not in page
