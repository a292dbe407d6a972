"""Members are measured alone, from the parts that a run kept of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, EvaluationMode, MemberOutputs
from convoy.core.errors import ErrorBudgetExceeded
from convoy.core.metrics import EvaluationCounts
from convoy.core.records import Split
from convoy.pipelines import committee_evaluation
from convoy.pipelines.committee_evaluation import _Measuring, crop_notes, evaluate_members
from convoy.pipelines.committee_predictions import CommitteePredictions
from convoy.pipelines.committees import CommitteeMember, committee_of
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.storage.commits import RunManifest, SliceRecord
from convoy.storage.local_store import LocalStore
from convoy.storage.member_predictions import member_output, write_member_predictions
from convoy.vision.ensembling import mean_of_views
from convoy.vision.presets import EvalPreset
from made_bundles import DIGITS, FP32, made_classifier
from made_runs import slice_record

ROWS_A_SLICE = (5, 3)
TEMPERATURES = (1.0, 2.5)


def made_slice(store: LocalStore, number: int, logits_MNVK: np.ndarray, labels_N: np.ndarray) -> SliceRecord:
    """A slice whose last sample has no label."""
    samples = pa.table({"sample_id": [f"{number}/{row}" for row in range(len(labels_N) + 1)]})
    parts = {
        member_output(member): write_member_predictions(
            store,
            f"{member_output(member)}/{number}.parquet",
            samples,
            labels=pa.array([*labels_N.tolist(), None], pa.int32()),
            logits_NVK=np.concatenate([logits_NVK, logits_NVK[:1]]),
            metadata={},
        )
        for member, logits_NVK in enumerate(logits_MNVK)
    }
    return slice_record(f"0-{number:06d}", parts, num_results=samples.num_rows, attempt="a")


@pytest.mark.parametrize(("keep", "num_views"), [(MemberOutputs.MEMBERS, 1), (MemberOutputs.VIEWS, 2)])
def test_members_are_measured_over_all_slices_at_their_own_temperature(
    tmp_path: Path, keep: MemberOutputs, num_views: int
) -> None:
    store = LocalStore(str(tmp_path))
    classifier = made_classifier(store, 0)
    committee = committee_of(
        [
            CommitteeMember(
                name=f"m{t}", digest="", bundle=None, classifier=classifier, weight=1, temperature=t
            )
            for t in TEMPERATURES
        ]
    )
    rng = np.random.default_rng(0)
    logits = [
        rng.normal(size=(len(TEMPERATURES), rows, num_views, len(DIGITS))).astype(np.float32)
        for rows in ROWS_A_SLICE
    ]
    labels = [rng.integers(0, len(DIGITS), rows) for rows in ROWS_A_SLICE]
    slices = [
        made_slice(store, number, *of_slice)
        for number, of_slice in enumerate(zip(logits, labels, strict=True))
    ]
    found = evaluate_members(
        store,
        committee,
        CommitteePredictions(
            run_id="r1",
            keep=keep,
            manifest=RunManifest(run_id="r1", slices=tuple(slices)),
            finished=(),
            images_per_s=None,
            seconds={},
            flags={},
        ),
    )
    for one, logits_NVK, temperature in zip(found, np.concatenate(logits, axis=1), TEMPERATURES, strict=True):
        counts = EvaluationCounts(len(DIGITS))
        logits_NK = logits_NVK[:, 0]
        if keep is MemberOutputs.VIEWS:
            logits_NK = mean_of_views(logits_NVK.transpose(1, 0, 2), Averaging.PROBABILITIES, temperature)
        counts.add(logits_NK, np.concatenate(labels))
        assert (one.name, one.top1) == (f"m{temperature}", counts.summary().top1)
        assert one.nll == pytest.approx(counts.summary().nll)


@pytest.mark.parametrize(
    ("resize_px", "policy", "images", "shown"),
    [
        (None, CropPolicy.TEN, "32x32 images", "what flip shows, in 10 passes a member in place of 2"),
        (32, CropPolicy.FIVE, "square images", "what center shows, in 5 passes a member in place of 1"),
        (36, CropPolicy.TEN, "", ""),
        (None, CropPolicy.FLIP, "", ""),
    ],
)
def test_crops_that_show_nothing_new_are_named(
    tmp_path: Path, resize_px: int | None, policy: CropPolicy, images: str, shown: str
) -> None:
    classifier = made_classifier(LocalStore(str(tmp_path)), 0)
    backbone = classifier.backbone.model_copy(update={"preset": EvalPreset(resize_px=resize_px, crop_px=32)})
    member = CommitteeMember(
        name="m", digest="", bundle=None, classifier=replace(classifier, backbone=backbone), weight=1
    )
    request = PredictionRequest(
        committee=committee_of([member, member], plan=CropPlan(policy=policy)),
        dataset="made",
        splits=None,
        extraction=FP32,
    )
    notes = crop_notes(request)
    assert len(notes) == bool(shown)
    assert all(images in note and shown in note for note in notes)


def test_a_run_none_of_whose_labelled_images_has_a_result_ends_and_whoever_asked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ErrorBudgetExceeded("nothing can be measured")

    monkeypatch.setattr(committee_evaluation, "measure_predictions", refuse)
    store = LocalStore(str(tmp_path))
    member = CommitteeMember(
        name="m", digest="", bundle=None, classifier=made_classifier(store, 0), weight=1, temperature=1
    )
    request = PredictionRequest(
        committee=committee_of([member]),
        dataset="digits",
        splits=(Split.TEST,),
        extraction=FP32,
        keep=MemberOutputs.NONE,
        mode=EvaluationMode.EXACT,
    )
    predictions = CommitteePredictions(
        run_id="r1",
        keep=MemberOutputs.NONE,
        manifest=RunManifest.model_construct(run_id="r1", slices=[]),
        finished=(),
        images_per_s=None,
        seconds={},
        flags={},
    )
    measuring = _Measuring(store, request, (Split.TEST,), None)
    assert measuring.describe(predictions) == predictions.report()
    with pytest.raises(ErrorBudgetExceeded):
        measuring.of(predictions)
