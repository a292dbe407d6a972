from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from convoy.pipelines.near_duplicates import (
    joined_taps,
    last_of_sizes,
    near_duplicate_taps,
    report_near_duplicates,
)
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, native_px
from convoy.vision.depth_axis import derive_depth_axis
from convoy.vision.stages import DepthAxis

CLASSES = ("cat", "dog")


def axis_of(arch: str) -> DepthAxis:
    config = BackboneConfig(arch=arch, weights="random")
    with torch.device("meta"):
        network = build_network(config)
    return derive_depth_axis(network, input_px=native_px(config))


def with_copies(*copies: int) -> NDArray[np.float32]:
    """300 rows, and behind them nearly equal ones of some of them."""
    random = np.random.default_rng(0)
    rows_ND = random.normal(5, 1, (300, 40)).astype(np.float32)
    return np.concatenate([rows_ND, rows_ND[list(copies)] + 0.01])


def described(labels: dict[int, int | None], splits: dict[int, str], num_rows: int) -> pa.Table:
    """Rows that are cats of the split `train`, but for those that are named."""
    return pa.table(
        {
            "sample_id": [f"s{row:03}" for row in range(num_rows)],
            "split": [splits.get(row, "train") for row in range(num_rows)],
            "label": pa.array([labels.get(row, 0) for row in range(num_rows)], pa.int32()),
        }
    )


def test_leaks_and_label_conflicts_are_counted_and_come_first() -> None:
    features_ND = with_copies(10, 20, 30, 40)
    rows = described({302: 1}, {301: "test"}, 304)
    report = report_near_duplicates(features_ND, rows, CLASSES)
    assert (report.groups, report.samples, report.spare, report.compared) == (4, 8, 4, 304)
    assert (report.across_splits, report.label_conflicts) == (1, 1)
    conflict, leak = report.examples[:2]
    assert [(one.sample_id, one.label) for one in conflict.samples] == [("s030", "cat"), ("s302", "dog")]
    assert [(one.sample_id, one.split) for one in leak.samples] == [("s020", "train"), ("s301", "test")]
    assert len(report.examples) == 4


def test_a_picture_without_a_label_contradicts_nobody() -> None:
    report = report_near_duplicates(with_copies(10), described({300: None}, {}, 301), CLASSES)
    assert (report.groups, report.label_conflicts) == (1, 0)
    assert report.examples[0].samples[1].label is None


def test_of_a_placeholder_that_is_there_often_some_are_named_and_all_are_counted() -> None:
    features_ND = with_copies(*[10] * 49)
    report = report_near_duplicates(features_ND, described({349: 1}, {}, 349), CLASSES)
    (group,) = report.examples
    assert (report.samples, group.size, len(group.samples), group.num_unnamed) == (50, 50, 20, 30)


def test_a_set_without_near_duplicates_has_none() -> None:
    report = report_near_duplicates(with_copies(), described({}, {}, 300), CLASSES)
    assert (report.groups, report.samples, report.examples) == (0, 0, [])


def test_taps_are_the_last_stages_of_the_smallest_maps() -> None:
    assert near_duplicate_taps(axis_of("cifar_resnet20")) == ("layer1.2", "layer2.2", "layer3.2")
    # The widest of a large network is left out.
    assert near_duplicate_taps(axis_of("torchvision:resnet50")) == ("layer2.3", "layer3.5")
    sizes = [stage.resolution_px for stage in last_of_sizes(axis_of("torchvision:resnet18"), 4)]
    assert sizes == [56, 28, 14, 7]


def test_no_tap_outweighs_another() -> None:
    random = np.random.default_rng(0)
    small_ND, large_ND = random.normal(size=(50, 4)), 1000 * random.normal(size=(50, 8))
    joined_ND = joined_taps([small_ND, large_ND, np.zeros((50, 1))])
    assert joined_ND.shape == (50, 13)
    np.testing.assert_allclose(joined_ND[:, :4].var(axis=0).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(joined_ND[:, 4:12].var(axis=0).sum(), 1, rtol=1e-5)
