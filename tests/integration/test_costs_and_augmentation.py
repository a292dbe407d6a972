"""What backbones cost and what augmentation does, on a real Ray: on handwritten digits, where a mirror harms."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_jobs import freeze, write_digits
from convoy.core.progress import Silent
from convoy.pipelines.augmentation_effect import (
    AugmentationEffect,
    AugmentationEffectConfig,
    EffectBudget,
    measure_augmentation,
)
from convoy.pipelines.augmentation_outcomes import PolicyEffect, Verdict
from convoy.pipelines.augmentation_trainings import ShortFineTuning
from convoy.pipelines.backbone_costs import BackboneCost, CostsConfig, measure_costs
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.cost_front import CostAxis, cost_fronts
from convoy.pipelines.feature_plan import ExtractionConfig, PrecisionChoice
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.training_rows import RowLimit
from convoy.storage.datasets import open_dataset
from convoy.storage.stores import open_store
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.augmentation_strengths import AugmentationKind, Strength
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.presets import EvalPreset

pytestmark = pytest.mark.integration

NUM_ROWS = {"train": 400, "val": 400, "test": 10}
PRESET = EvalPreset(resize_px=32, crop_px=32)
EXTRACTION = ExtractionConfig(precision=PrecisionChoice.FP32, batch_size=64)
COSTS = CostsConfig(batch_size=16, seconds=0.2, latencies=10, images=64, price_per_hour=2.0)


class Digits:
    """A workspace with handwritten digits, and two networks of random weights, a small one and a large one."""

    def __init__(self, workspace: str) -> None:
        self.workspace = workspace
        self.store = open_store(workspace)
        self.manifest = open_dataset(self.store, "digits")
        self.lenet, self.resnet = (self._backbone(arch) for arch in ("lenet5", "cifar_resnet20"))

    def _backbone(self, arch: str) -> BackboneRecord:
        return fetch_backbone(self.store, BackboneConfig(arch=arch, weights="random", preset=PRESET))

    def measure(self) -> list[BackboneCost]:
        backbones = [self.lenet, self.resnet]
        return measure_costs(self.store, self.manifest, backbones, COSTS, EXTRACTION, progress=Silent())

    def augment(self, **settings: Any) -> AugmentationEffect:
        config = AugmentationEffectConfig(
            kinds=(AugmentationKind.MIRROR,), strengths=(Strength.STRONG,), **settings
        )
        return measure_augmentation(
            self.store,
            self.manifest,
            "digits",
            self.lenet,
            config,
            EXTRACTION,
            progress=Silent(),
            draw_curves=lambda history: b"no picture",
        )

    def num_runs(self) -> int:
        return sum(1 for path in Path(self.workspace, "runs").glob("*/run.json"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> Digits:
    folder = tmp_path_factory.mktemp("digits")
    start = 0
    for split, num_rows in NUM_ROWS.items():
        write_digits(folder / "images" / split, num_rows, start=start)
        start += num_rows
    assert freeze(folder / "images", str(folder / "workspace"))["splits"] == NUM_ROWS
    return Digits(str(folder / "workspace"))


@pytest.fixture(scope="module")
def costs(digits: Digits) -> list[BackboneCost]:
    return digits.measure()


@pytest.fixture(scope="module")
def effect(digits: Digits) -> AugmentationEffect:
    return digits.augment(tap="f6", policies={"nothing": AugmentationPolicy.ready("none")})


def test_costs_are_those_of_the_networks(digits: Digits, costs: list[BackboneCost]) -> None:
    lenet, resnet = costs
    for cost, record in ((lenet, digits.lenet), (resnet, digits.resnet)):
        assert (cost.arch, cost.macs, cost.num_parameters) == (
            record.arch,
            record.macs,
            record.num_parameters,
        )
        assert cost.size_bytes >= 4 * record.num_parameters
        assert cost.slow_network_images_per_s <= cost.network_images_per_s <= cost.fast_network_images_per_s
        assert cost.images_per_s > 0
        assert 0 < cost.latency_p50_ms <= cost.latency_p95_ms
        assert cost.usd_per_million == pytest.approx(2.0 * 1e6 / 3600 / cost.images_per_s)
        assert cost.num_threads >= 1
    assert resnet.peak_memory_bytes is None or resnet.peak_memory_bytes > 0


def test_every_kind_of_cost_has_its_front(costs: list[BackboneCost]) -> None:
    correct_MN = np.stack([np.arange(100) < 60, np.arange(100) < 90])
    fronts = cost_fronts(costs, ["lenet5", "cifar_resnet20"], correct_MN)
    axes = [front.axis for front in fronts]
    assert axes[:2] == [CostAxis.THROUGHPUT, CostAxis.LATENCY]
    assert axes[-1] is CostAxis.MONEY
    for front in fronts:
        cheapest, dearest = front.choices
        assert cheapest.is_best
        assert cheapest.cost < dearest.cost
        # Either it is more accurate, or the cheaper one beats it.
        assert (dearest.gain is None) == (dearest.dominated_by is not None) == (not dearest.is_best)
        assert {choice.backbone for choice in front.choices} == {"lenet5", "cifar_resnet20"}


def test_what_was_measured_is_not_measured_again(digits: Digits, costs: list[BackboneCost]) -> None:
    started_unix_s = time.time()
    assert digits.measure() == costs
    assert all(cost.measured_unix_s < started_unix_s for cost in costs)


def test_mirrored_digits_cost_accuracy_and_are_warned_of(effect: AugmentationEffect) -> None:
    mirror, nothing = effect.effects
    assert (effect.num_train_rows, effect.num_judged_rows, effect.tap) == (400, 400, "f6")
    assert mirror.verdict is Verdict.LOSS
    assert mirror.difference.high < 0
    assert mirror.confused
    (warning,) = effect.warnings
    assert warning.startswith("mirror (strong) costs ")
    assert " are confused " in warning
    assert nothing.warning is None


def test_a_policy_that_draws_nothing_changes_nothing(effect: AugmentationEffect) -> None:
    """So what a policy does is its draws' doing, not that of having more rows."""
    nothing: PolicyEffect = effect.effects[1]
    assert nothing.name == "nothing"
    assert nothing.top1 == effect.without
    assert nothing.difference.estimate == 0
    # So few rows show no more than that.
    assert nothing.difference.low == -nothing.difference.high < 0
    assert nothing.top1_as_drawn == pytest.approx(effect.without.estimate)


def test_views_that_were_drawn_are_not_drawn_again(digits: Digits, effect: AugmentationEffect) -> None:
    num_runs = digits.num_runs()
    again = digits.augment(tap="f6", policies={"nothing": AugmentationPolicy.ready("none")})
    assert digits.num_runs() == num_runs
    assert again.effects == effect.effects


@pytest.mark.slow
def test_short_fine_tunings_judge_a_kind_too(digits: Digits) -> None:
    settings: dict[str, Any] = {
        "budget": EffectBudget.FINE_TUNE,
        "rows": RowLimit(max_per_class=20),
        "fine_tuning": ShortFineTuning(epochs=2),
    }
    effect = digits.augment(**settings)
    (mirror,) = effect.effects
    assert (effect.tap, effect.views, mirror.top1_as_drawn) == (None, None, None)
    assert 0.1 < effect.without.estimate < 1
    assert mirror.num_rows == NUM_ROWS["val"]
    num_runs = digits.num_runs()
    assert digits.augment(**settings).effects == effect.effects
    assert digits.num_runs() == num_runs
