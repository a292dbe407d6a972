from __future__ import annotations

import pytest

from convoy.core.crop_policies import CropPolicy
from convoy.core.metrics import ReliabilityBin
from convoy.core.statistics import Interval
from convoy.pipelines.committee_evaluation import CommitteeCost, CommitteeEvaluation
from convoy.pipelines.ensemble_gate import GateOutcome, GateReport, GateWorth
from convoy.report.ensemble_report import draw_ensemble_report
from convoy.report.words import percent
from convoy.vision.committee_options import GateOptions
from made_ensembles import made_candidates, made_report
from made_pages import PageParts

BINS = [
    ReliabilityBin(low=0.0, high=0.5, num_rows=0, accuracy=None, mean_confidence=None),
    ReliabilityBin(low=0.5, high=1.0, num_rows=10, accuracy=0.8, mean_confidence=0.9),
]


def test_the_page_needs_nothing_else_and_holds_the_figures() -> None:
    report = made_report(made_candidates(1.2, 1.2, 1.5))
    report = report.model_copy(update={"reliability_before": BINS, "reliability_after": BINS})
    page = draw_ensemble_report(report)
    text = page.decode()
    assert f"{100 * report.measured.top1:.2f} %" in text
    assert f"{100 * report.gain:+.2f}" in text
    assert "http" not in text.replace("http-equiv", "")
    for place in report.chosen.members:
        assert f"candidate-{place}" in text
    assert '<tr class="chosen">' in text
    parts = PageParts(page)
    figures = [attributes["id"] for tag, attributes in parts.elements if tag == "figure"]
    assert len(figures) == 5
    assert parts.json_of("cost-front") == [point.model_dump(mode="json") for point in report.front]
    costs = [(1000 / point.images_per_s, point.top1) for point in report.front]
    shown = [(float(cells[2]), cells[3]) for cells in parts.values_below("cost-front")]
    assert shown == [
        (pytest.approx(ms, rel=0.01), percent(top1)) for ms, top1 in sorted(costs, key=lambda cost: cost[0])
    ]
    sizes = {
        (policy, size): percent(top1)
        for policy, best in parts.json_of("sizes-front").items()
        for size, top1 in best.items()
    }
    assert {(one[0], one[1]): one[2] for one in parts.values_below("sizes-front")} == sizes
    assert parts.json_of("overlap")["overlap"] == report.overlap
    assert parts.json_of("reliability-after") == [one.model_dump() for one in BINS]


def test_figures_of_crops_and_sizes_stand_with_their_intervals() -> None:
    report = made_report(made_candidates(1.2, 1.2, 1.5))
    (by_crops,) = report.by_crops
    top1 = Interval(estimate=0.9, low=0.87123, high=0.92345, confidence=0.95)
    gain = Interval(estimate=0.02, low=-0.00123, high=0.04567, confidence=0.95)
    known = by_crops.model_copy(update={"top1_interval": top1, "gain": gain})
    text = draw_ensemble_report(report.model_copy(update={"by_crops": [known]})).decode()
    assert "87.12 to 92.34 %" in text
    assert "-0.12 to +4.57" in text


def test_without_a_test_split_the_page_says_of_which_rows_members_alone_are() -> None:
    report = made_report(made_candidates(1.2, 1.2, 1.5)).model_copy(update={"by_crops": [], "by_size": []})
    page = draw_ensemble_report(report)
    assert "Without a test split no figures by crops" in page.decode()
    shown = PageParts(page).json_of("ensemble-members")
    assert [one["weight"] for one in shown] == list(report.chosen.weights)
    assert "which chose the members, so the figures flatter" in page.decode()
    for place, one in zip(report.chosen.members, shown, strict=True):
        assert one["alone"]["crops"] == report.crops
        assert one["alone"]["members"] == [place]


def test_the_estimated_rate_stands_beside_the_measured_one() -> None:
    report = made_report(made_candidates(1.2, 1.2, 1.5))
    assert "estimated at" not in draw_ensemble_report(report).decode()
    cost = CommitteeCost(
        passes_per_image=2, macs_per_image=1000, num_parameters=10, parameter_bytes=40, images_per_s=123.4
    )
    evaluation = CommitteeEvaluation.model_construct(cost=cost)
    text = draw_ensemble_report(report.model_copy(update={"evaluation": evaluation})).decode()
    assert f"estimated at {report.chosen.images_per_s:.1f} images/s; on test it ran at 123.4" in text


def test_a_gate_without_test_rows_shows_what_it_held_by_cross_fitting() -> None:
    look = GateOptions(members=(0,), policy=CropPolicy.CENTER, threshold=0.9)
    held = GateOutcome(agreement=0.9876, passes_per_image=1.5, top1_change=-0.002, speedup=4.0)
    worth = GateWorth(
        gate=look, target_agreement=0.98, val_agreement=0.99, val_passes_per_image=1.5, speedup=4.0
    )
    gate = GateReport(**dict(worth), curve=(worth,)).with_cross_fitted({0.98: held})
    report = made_report(made_candidates(1.2, 1.2)).model_copy(
        update={"gate": gate, "reliability_before": BINS, "reliability_after": BINS}
    )
    rows = report.measured.model_copy(update={"rows": "val, cross-fitted"})
    text = draw_ensemble_report(report.model_copy(update={"measured": rows})).decode()
    assert "on val, cross-fitted" in text
    assert "single models may have been chosen by it" in text
    assert "chose nothing" not in text
    assert "98.76 %" in text


def test_names_from_outside_are_escaped() -> None:
    report = made_report(made_candidates(1.2, 1.2, policy=CropPolicy.CENTER))
    report = report.model_copy(
        update={
            "ensemble": "<script>alert(1)</script>",
            "candidates": ["\"'><svg/onload=alert(1)>@0", "<b>@1"],
            "reliability_before": BINS,
            "reliability_after": BINS,
        }
    )
    page = draw_ensemble_report(report)
    assert b"<script>" not in page
    assert b"<svg/" not in page
