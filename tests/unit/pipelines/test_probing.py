"""What the report of a head says of its fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.metrics import EvaluationCounts
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines import probing
from convoy.pipelines.distillation import TaughtRows
from convoy.pipelines.feature_source import LabelledRows
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.probing import TrainingInputs, _seconds_an_image, _summarise, fit_probe
from convoy.pipelines.train import run_train
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.training_rows import Fold, RowLimit, read_split
from convoy.storage.commits import publish, read_records, write_record
from convoy.storage.datasets import freeze_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from convoy.vision.head_config import HeadKind, HeadSpec
from convoy.vision.head_fitting import FittedHead, HeadTrial
from convoy.vision.heads import Head, TensorFeatures
from features_here import compute_features_here
from made_advice_rows import frozen_rows
from made_bundles import FP32
from made_runs import SET_ID, finish_slice, new_run


class Asked(Exception):
    """What a probe wants features of."""


@pytest.mark.parametrize(
    ("strategy", "max_per_class", "fold", "looked_at"),
    [
        ("linear_probe", None, None, None),
        ("linear_probe", 4, None, {"train": 8, "val": 10}),
        ("linear_probe", 4, Fold(index=0, count=2), {"train": 8, "val": 10}),
        ("fine_tune", None, None, {"train": 20, "val": 10}),
        ("fine_tune", None, Fold(index=0, count=2), {"train": 20, "val": 10}),
        ("fine_tune", 4, None, {"train": 8, "val": 10}),
    ],
)
def test_the_head_of_a_network_and_a_few_rows_a_class_need_no_other_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    max_per_class: int | None,
    fold: Fold | None,
    looked_at: dict[str, int] | None,
) -> None:
    class Job:
        def __init__(self, *_: object, rows: pa.Table | None) -> None:
            self.rows = rows

        def ensure(self, **_: object) -> None:
            raise Asked(None if self.rows is None else Counter(self.rows["split"].to_pylist()))

    monkeypatch.setattr(probing, "FeatureJob", Job)
    rows = {Split.TRAIN: (10, 10), Split.VAL: (5, 5), Split.TEST: (5, 5)}
    manifest = frozen_rows(tmp_path, rows, ("good", "defect"))
    settings = {
        "name": "parts",
        "dataset": "parts",
        "strategy": strategy,
        "backbone": {"arch": "lenet5", "weights": "random"},
    }
    config = parse_config(TrainConfig, settings, where="here")
    config = config.model_copy(update={"rows": RowLimit(max_per_class=max_per_class, fold=fold)})
    store = LocalStore(str(tmp_path))
    backbone = fetch_backbone(store, config.backbone)
    taught = TaughtRows(rows=read_split(manifest, Split.TRAIN, config.rows))
    with pytest.raises(Asked) as asked:
        fit_probe(
            TrainingInputs(store, manifest, backbone, config),
            tap="f6",
            taught=taught,
            progress=Silent(),
            new_run=False,
        )
    assert asked.value.args == (looked_at,)


def fitted(trials: Sequence[HeadTrial]) -> FittedHead:
    head = Head(HeadSpec(kind=HeadKind.SOFTMAX, num_features=2, num_classes=2))
    return FittedHead(
        head=head, chosen=trials[-1], trials=tuple(trials), converged=True, num_train_rows=8, seconds=1.0
    )


def test_a_network_that_ends_below_the_head_that_it_began_with_is_told_with_both_numbers() -> None:
    counts = EvaluationCounts(2)
    counts.add(np.array([[1.0, 0.0]] * 4, np.float32), np.array([0, 0, 0, 1]))
    chosen = HeadTrial(C=1.0, num_iterations=1, converged=True, val=counts.summary())
    head = _summarise(fitted([chosen]), None, 1.0)
    assert head.val_top1 == 0.75
    (note,) = head.notes_of_loss(0.1, 20)
    assert "top-1 on the validation rows is 0.1000, and was 0.7500" in note
    assert head.notes_of_loss(0.75, 20) == head.notes_of_loss(None, 0) == ()
    assert head.notes_of_loss(0.7, 20) == (), "one row fewer of twenty is chance"
    assert head.model_copy(update={"val_top1": None}).notes_of_loss(0.1, 20) == ()


@pytest.mark.parametrize(("values_of_c", "num_passes"), [((0.1, 1.0, 10.0), 6), ((None, None, None), 3)])
def test_epochs_of_an_mlp_are_passes_once(values_of_c: tuple[float | None, ...], num_passes: int) -> None:
    trials = [
        HeadTrial(C=value, num_iterations=number, converged=None, val=None)
        for number, value in enumerate(values_of_c, start=1)
    ]
    told = _summarise(fitted(trials), None, 1.0)
    assert (told.num_passes, told.body_pass_s, told.saved_s) == (num_passes, None, None)


def committed(store: LocalStore, run_id: str, num_rows: int, *, pair_s: float) -> None:
    """A run of four slices in two pairs, the second of which began when half of the first was done."""
    run = new_run(
        store, [f"{run_id}-{row}" for row in range(num_rows)], slice_rows=-(-num_rows // 4), run_id=run_id
    )
    for number, name in enumerate(run.slice_names()):
        record = finish_slice(store, run, name)
        begun_unix_s = 100.0 + (pair_s / 2 if number >= 2 else 0.0)
        times = {"started_unix_s": begun_unix_s, "finished_unix_s": begun_unix_s + pair_s}
        write_record(store, record.model_copy(update={**times, "seconds": {"wait": 1.0, "forward": 9.0}}))
    publish(RunFolder(store, run_id), run, read_records(RunFolder(store, run_id)))


def test_a_pass_through_the_body_takes_as_long_as_all_workers_beside_each_other_took(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    committed(store, "r1", 400, pair_s=400.0)
    assert _seconds_an_image(store, SET_ID) == 1.5


def test_a_few_images_that_were_added_tell_nothing_of_a_pass(tmp_path: Path) -> None:
    """Most of their time is that of starting."""
    store = LocalStore(str(tmp_path))
    assert _seconds_an_image(store, SET_ID) is None
    committed(store, "r2", 1, pair_s=30.0)
    assert _seconds_an_image(store, SET_ID) is None
    committed(store, "r1", 400, pair_s=4.0)
    committed(store, "r3", 1, pair_s=30.0)
    assert _seconds_an_image(store, SET_ID) == pytest.approx(0.015)


@pytest.mark.parametrize("share_computed", [0.0, 0.25, 1.0])
def test_a_fit_saves_its_passes_but_what_of_one_computed_the_features_now(share_computed: float) -> None:
    trials = [HeadTrial(C=1.0, num_iterations=3, converged=True, val=None)]
    told = _summarise(fitted(trials), 1.5, share_computed)
    assert told.body_pass_s == 12.0
    assert told.saved_s == (3 - share_computed) * 12.0 - 1.0
    assert told.in_place_of(1, num_views=1).saved_s == (1 - share_computed) * 12.0 - 1.0
    assert told.in_place_of(4, num_views=1).saved_s == (4 - share_computed) * 12.0 - 1.0
    # Of the eight rows of the fit, half are second views of the same images, which no epoch would have shown.
    assert told.in_place_of(4, num_views=2).saved_s == (2 - share_computed) * 12.0 - 1.0


def test_what_a_probe_saves_goes_by_the_features_that_it_had_to_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_features_here(monkeypatch)
    monkeypatch.setattr(probing, "_FEWEST_TIMED", 1)
    store = LocalStore(str(tmp_path / "workspace"))
    write_digits(tmp_path / "images", 60)
    freeze_dataset(store, "digits", str(tmp_path / "images"), splits=SplitOptions(val_fraction=0.3))
    settings = {
        "workspace": store.root_uri,
        "name": "digits",
        "dataset": "digits",
        "backbone": {"arch": "lenet5", "weights": "random"},
        "head": {"C": [1.0]},
        "extraction": FP32.model_dump(),
    }
    # All of it, nothing, and the second of two views of the training images.
    for views, share_computed in ((1, 1.0), (1, 0.0), (2, 0.5)):
        config = parse_config(TrainConfig, {**settings, "views": views}, where="here")
        head = run_train(config, progress=Silent(), draw_curves=lambda _: b"").head
        assert head is not None
        assert head.body_pass_s
        passes_s = head.body_pass_s * (head.num_passes - share_computed)
        assert head.saved_s == pytest.approx(passes_s - head.fit_seconds)


def test_the_seconds_of_a_fit_are_those_of_reading_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=100.0)

    def read(_cache: object, _sets: object, rows: LabelledRows) -> TensorFeatures:
        clock.now_s += 7.0 if len(rows) == 20 else 2.0
        labels_N, weights_N = torch.from_numpy(rows.labels_N), torch.from_numpy(rows.weights_N)
        return TensorFeatures(torch.randn(len(rows), 2), labels_N, weights_N)

    class Job:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def ensure(self, **_: object) -> SimpleNamespace:
            clock.now_s += 1000.0
            return SimpleNamespace(share_computed=1.0)

        def set_id(self, *_: object) -> str:
            return SET_ID

    point = HeadTrial(C=1.0, num_iterations=3, converged=True, val=None)
    monkeypatch.setattr(probing, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(probing, "FeatureJob", Job)
    monkeypatch.setattr(probing, "open_features", read)
    monkeypatch.setattr(probing, "fit_head", lambda *_, **__: fitted([point]))
    rows = {Split.TRAIN: (10, 10), Split.VAL: (5, 5)}
    manifest = frozen_rows(tmp_path, rows, ("good", "defect"))
    backbone = {"arch": "lenet5", "weights": "random"}
    settings = {"name": "parts", "dataset": "parts", "backbone": backbone}
    config = parse_config(TrainConfig, settings, where="here")
    store = LocalStore(str(tmp_path))
    probe = fit_probe(
        TrainingInputs(store, manifest, fetch_backbone(store, config.backbone), config),
        tap="f6",
        taught=TaughtRows(rows=read_split(manifest, Split.TRAIN)),
        progress=Silent(),
        new_run=False,
    )
    # Of both splits, before the second that the fit took.
    assert probe.summary.fit_seconds == 7.0 + 2.0 + 1.0
