"""What is asked of a committee says everything that determines the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from convoy.core.errors import RunMismatch
from convoy.pipelines.classifiers import classifier_digest
from convoy.pipelines.committees import single_committee
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunRecord, refuse_changed_identity
from convoy.vision.decode_rule import DecodeRule
from made_bundles import FP32, made_classifier
from made_sources import write_files


def pretrained_request(store: LocalStore, rule: DecodeRule) -> PredictionRequest:
    """A pretrained network as it is, which no bundle ties to a decode rule."""
    extraction = FP32.model_copy(update={"decode": rule})
    classifier = made_classifier(store, 0, extraction=extraction)
    committee = single_committee(classifier, name="lenet5", digest=classifier_digest(classifier))
    return PredictionRequest(committee=committee, dataset="digits", splits=None, extraction=extraction)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"background_rgb": (0, 0, 0)}, "background_rgb"),
        ({"min_side_px": 8}, "min_side_px"),
        ({"max_pixels": 10_000}, "max_pixels"),
        ({"formats": ("PNG",)}, "formats"),
    ],
)
def test_predictions_of_other_pixels_are_another_request(
    tmp_path: Path, changed: dict[str, object], field: str
) -> None:
    store = LocalStore(str(tmp_path / "workspace"))
    write_files(tmp_path / "images", "0/a.jpg", "1/b.jpg")
    freeze_dataset(store, "digits", str(tmp_path / "images"))
    manifest = open_dataset(store, "digits")
    one = pretrained_request(store, DecodeRule()).identity(manifest)
    other = pretrained_request(store, DecodeRule.model_validate(changed)).identity(manifest)
    record = RunRecord.new("r1", verb="score", identity=one, config={}, outputs={}, groups=[])
    with pytest.raises(RunMismatch, match=f"decode_rule.*{field}"):
        refuse_changed_identity(record, other)


@pytest.mark.parametrize(("num_rows", "told", "expected"), [(3, None, 32), (40, None, 64), (40, 256, 256)])
def test_a_batch_that_is_not_told_is_no_larger_than_the_rows_can_fill(
    tmp_path: Path, num_rows: int, told: int | None, expected: int
) -> None:
    """A pass that is not full takes as long, and every folder of scores ends with one."""
    store = LocalStore(str(tmp_path / "workspace"))
    write_files(tmp_path / "images", *(f"{index % 2}/{index}.jpg" for index in range(num_rows)))
    freeze_dataset(store, "digits", str(tmp_path / "images"))
    request = pretrained_request(store, DecodeRule())
    sized = replace(request, extraction=request.extraction.model_copy(update={"batch_size": told}))
    assert sized.batch_size(store, open_dataset(store, "digits")) == expected


@pytest.mark.parametrize(("macs", "slice_rows"), [(10**6, 8), (10**12, 2)])
def test_slices_of_heavy_networks_have_fewer_rows(tmp_path: Path, macs: int, slice_rows: int) -> None:
    store = LocalStore(str(tmp_path / "workspace"))
    write_files(tmp_path / "images", *(f"{index % 2}/{index}.jpg" for index in range(64)))
    freeze_dataset(store, "digits", str(tmp_path / "images"))
    classifier = made_classifier(store, 0)
    heavy = replace(
        classifier, backbone=classifier.backbone.model_copy(update={"macs": macs, "tap_macs": ()})
    )
    committee = single_committee(heavy, name="lenet5", digest=classifier_digest(heavy))
    request = PredictionRequest(committee=committee, dataset="digits", splits=None, extraction=FP32)
    assert request.slice_rows(open_dataset(store, "digits"), 1) == slice_rows


def test_a_probe_at_an_early_tap_costs_the_pass_to_there(tmp_path: Path) -> None:
    classifier = made_classifier(LocalStore(str(tmp_path)), 0)
    early = replace(classifier, tap="c1")
    # LeNet-5: 6 maps of 28x28 pixels from kernels of 5x5 over three channels.
    assert early.macs == 6 * 28 * 28 * 3 * 5 * 5
    assert early.macs < classifier.macs == classifier.backbone.macs

    # A record of before they were counted names the same network, and costs as a whole.
    old = classifier.backbone.model_copy(update={"tap_macs": ()})
    assert replace(early, backbone=old).macs == old.macs
    assert classifier_digest(replace(classifier, backbone=old)) == classifier_digest(classifier)
