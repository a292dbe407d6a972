"""What the report of a head says of its fit, and of the images that it could not use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from convoy.pipelines.probing import _reject_codes, _summarise
from convoy.storage.commits import publish, read_records
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from convoy.vision.head_fitting import FittedHead, HeadTrial
from convoy.vision.heads import Head, HeadKind, HeadSpec
from made_runs import SET_ID, finish_slice, made_manifest, new_run


def fitted(trials: Sequence[HeadTrial]) -> FittedHead:
    head = Head(HeadSpec(kind=HeadKind.SOFTMAX, num_features=2, num_classes=2))
    return FittedHead(
        head=head, chosen=trials[-1], trials=tuple(trials), converged=True, num_train_rows=8, seconds=1.0
    )


@pytest.mark.parametrize(("values_of_c", "num_passes"), [((0.1, 1.0, 10.0), 6), ((None, None, None), 3)])
def test_epochs_of_an_mlp_are_passes_once(
    tmp_path: Path, values_of_c: tuple[float | None, ...], num_passes: int
) -> None:
    trials = [
        HeadTrial(C=value, num_iterations=number, converged=None, val=None)
        for number, value in enumerate(values_of_c, start=1)
    ]
    assert _summarise(LocalStore(str(tmp_path)), fitted(trials), None).num_passes == num_passes


def test_training_images_without_features_are_rejects_by_code(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    names = ["a", "b", "c", "d"]
    record = new_run(store, names, slice_rows=len(names))
    finish_slice(store, record, "0-000000", rejected=["b", "d"])
    publish(RunFolder(store, record.run_id), record, read_records(RunFolder(store, record.run_id)))
    cache = FeatureCache(store)
    # Row d is no training image, and the cache has never seen e.
    assert _reject_codes(cache, SET_ID, made_manifest(["a", "b", "c"])) == {"corrupt": 1}
    assert _reject_codes(cache, SET_ID, made_manifest(["a", "b", "e"])) == {"corrupt": 1, "unreadable": 1}
    assert _reject_codes(cache, SET_ID, made_manifest(["a", "c"])) == {}
