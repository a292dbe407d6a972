"""An ensemble built of real trainings on a real Ray: chosen on val, measured on test, and found again by `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from command_lines import convoy_here, last_json
from convoy.core.crop_policies import CropPlan, CropPolicy, MemberOutputs
from convoy.core.errors import DataError
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines.committee_predictions import CommitteeJob
from convoy.pipelines.committees import open_committee
from convoy.pipelines.ensemble_building import EnsembleReport, build_ensemble
from convoy.pipelines.ensemble_candidates import Candidate
from convoy.pipelines.ensemble_choice import EnsembleSettings
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.storage.datasets import open_dataset
from convoy.storage.object_store import ObjectStore
from convoy.storage.stores import open_store
from train_jobs import LENET, NUM_ROWS, TrainJob, frozen_digits

pytestmark = pytest.mark.integration

TAPS = ("f6", "c3", "c1")
EXTRACTION = ExtractionConfig(precision="fp32", dtype="float32", batch_size=16)


def kept_predictions(store: ObjectStore, bundle: str, split: Split) -> Candidate:
    """A candidate with its predictions of both views of `flip`."""
    request = PredictionRequest(
        committee=open_committee(store, bundle).with_plan(CropPlan(policy=CropPolicy.FLIP)),
        dataset="digits",
        splits=(split,),
        extraction=EXTRACTION,
        keep=MemberOutputs.VIEWS,
    )
    manifest = open_dataset(store, "digits")
    run = CommitteeJob(store, manifest, request).ensure(progress=Silent(), config={})
    return Candidate(bundle=bundle, predictions_run=run.run_id, seconds_per_pass=0.001, seconds_once=0.0)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]
) -> tuple[str, list[str]]:
    """A workspace, and the bundles of probes at three depths of the same random network."""
    workspace = frozen_digits(tmp_path_factory.mktemp("digits"))
    job = TrainJob(
        workspace, (f"backbone={LENET}", "extraction={precision: fp32, dtype: float32}"), ray_cluster
    )
    return workspace, [
        job.changed(f"name=probe-{tap}", "strategy=early_layer_probe", f"tap={tap}").run_here()["bundle"]
        for tap in TAPS
    ]


@pytest.fixture(scope="module")
def built(trained: tuple[str, list[str]]) -> tuple[str, EnsembleReport]:
    workspace, bundles = trained
    store = open_store(workspace)
    report = build_ensemble(
        store,
        open_dataset(store, "digits"),
        [kept_predictions(store, bundle, Split.VAL) for bundle in bundles],
        EnsembleSettings(gate=0.9),
        name="together",
        dataset="digits",
        extraction=EXTRACTION,
        progress=Silent(),
    )
    return workspace, report


def evaluated(workspace: str, *arguments: str) -> dict[str, Any]:
    finished = convoy_here("evaluate", *arguments, "--dataset", "digits", "--workspace", workspace, "--json")
    assert finished.returncode == 0, finished.stderr
    return last_json(finished)


def test_what_is_reported_is_what_evaluate_finds_on_test(built: tuple[str, EnsembleReport]) -> None:
    workspace, report = built
    assert (report.measured.rows, report.measured.num_rows) == ("test", NUM_ROWS["test"])
    assert report.dataset_fingerprint == open_dataset(open_store(workspace), "digits").fingerprint
    assert report.gain == pytest.approx(report.measured.top1 - report.measured.best_single_top1)
    again = evaluated(workspace, report.ensemble)
    assert again["top1"] == report.measured.top1
    assert again["crops"] == report.crops
    assert [member["name"] for member in again["members"]] == [member.name for member in report.members]
    single = evaluated(workspace, report.best_single, "--crops", report.crops.value)
    assert single["top1"] == pytest.approx(report.measured.best_single_top1, abs=1.01 / NUM_ROWS["test"])
    rates = [row.images_per_s or 0.0 for row in report.by_crops]
    assert rates == sorted(rates, reverse=True)
    assert report.chosen.images_per_s == pytest.approx(rates[-1])
    ends = (report.by_crops[-1], report.by_size[-1])
    assert [one.top1 for one in ends] == [report.measured.top1] * 2
    assert sum(one.num_rows for one in report.reliability_after) == NUM_ROWS["test"]


def test_the_gate_holds_on_test_what_the_report_says(built: tuple[str, EnsembleReport]) -> None:
    workspace, report = built
    assert report.gate is not None
    assert report.gate.test is not None
    gated = evaluated(workspace, report.ensemble, "--mode", "gated")
    assert gated["effect"]["agreement"] == pytest.approx(report.gate.test.agreement, abs=1e-9)
    assert gated["effect"]["speedup"] == pytest.approx(report.gate.test.speedup, rel=1e-6)
    assert gated["effect"]["top1_change"] == pytest.approx(report.gate.test.top1_change, abs=1e-9)


def test_the_page_is_written_again_from_the_bundle(built: tuple[str, EnsembleReport], tmp_path: Path) -> None:
    workspace, report = built
    output = tmp_path / "page.html"
    finished = convoy_here(
        "report", "ensemble", "together", "-o", str(output), "--workspace", workspace, "--json"
    )
    assert finished.returncode == 0, finished.stderr
    assert last_json(finished) == {"output": str(output), "ensemble": report.ensemble, "gain": report.gain}
    page = output.read_text()
    assert f"{100 * report.measured.top1:.2f} %" in page
    refused = convoy_here(
        "report", "ensemble", report.best_single, "-o", str(output), "--workspace", workspace
    )
    assert refused.returncode == 1
    assert "no report of an ensemble" in refused.stderr


def test_predictions_of_test_rows_build_nothing(trained: tuple[str, list[str]]) -> None:
    workspace, bundles = trained
    store = open_store(workspace)
    with pytest.raises(DataError, match="test rows, which must choose nothing"):
        build_ensemble(
            store,
            open_dataset(store, "digits"),
            [kept_predictions(store, bundles[0], Split.TEST)],
            EnsembleSettings(),
            name="cheating",
            dataset="digits",
            extraction=EXTRACTION,
            progress=Silent(),
        )
    assert not Path(workspace, "models", "cheating").exists()
