from __future__ import annotations

import pytest

from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_plan import (
    ErrorBudget,
    ExtractionConfig,
    FeatureRequest,
    ManyPolicies,
    PrecisionChoice,
    forecast_forward_s,
    plan_sets,
    set_labels,
)
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.presets import EvalPreset

LIGHT, STANDARD = AugmentationPolicy.ready("light"), AugmentationPolicy.ready("standard")
CONFIG = BackboneConfig(arch="lenet5", weights="random", preset=EvalPreset(resize_px=32, crop_px=32))
EXTRACTION = ExtractionConfig(precision=PrecisionChoice.FP32)


def record(config: BackboneConfig = CONFIG) -> BackboneRecord:
    return BackboneRecord(
        config=config,
        arch=CONFIG.arch,
        weights_digest="0" * 32,
        weights_key="models/backbones/made/model.safetensors",
        preset=EvalPreset(resize_px=32, crop_px=32),
        num_classes=10,
        classes=None,
        num_parameters=1,
        macs=10**6,
        axis=depth_axis(CONFIG, build_network(CONFIG)),
    )


def request(*policies: AugmentationPolicy, views: int) -> ManyPolicies:
    return ManyPolicies(
        dataset="digits",
        backbone=CONFIG,
        taps=("c3", "f6"),
        views=views,
        augmentation=LIGHT,
        policies=policies,
    )


def test_the_set_of_a_network_is_the_one_that_workspaces_remember_unless_a_factory_made_it() -> None:
    plain = FeatureRequest(dataset="digits", backbone=CONFIG, taps=("f6",))
    # Newer rules decode otherwise, so that their sets are others.
    extraction = EXTRACTION.model_copy(update={"decode": DecodeRule(version=3)})
    (lenet,) = plan_sets(record(), plain, extraction)
    assert lenet.set_id == "7acbc036c7a4a503b657c4b76da8beb0"
    factories = [
        BackboneConfig(arch="nets:tiny", weights="random", code_digest=code * 32, preset=CONFIG.preset)
        for code in "ab"
    ]
    made = [plan_sets(record(config), plain, extraction)[0].set_id for config in factories]
    assert len({lenet.set_id, *made}) == 3


def test_further_policies_share_the_eval_view_and_add_views_of_their_own() -> None:
    sets = plan_sets(record(), request(STANDARD, views=3), EXTRACTION)
    assert [(spec.tap, spec.view) for spec in sets] == [
        (tap, view) for tap in ("c3", "f6") for view in (0, 1, 2, 1, 2)
    ]
    assert len({spec.set_id for spec in sets}) == 10
    plain = FeatureRequest(**request(views=3).model_dump(exclude={"policies"}))
    alone = [spec.set_id for spec in plan_sets(record(), plain, EXTRACTION)]
    # So what one policy has cached serves the job of many, and the other way round.
    assert [spec.set_id for spec in sets if spec in sets[:3] + sets[5:8]] == alone


def test_a_policy_that_is_there_already_adds_nothing() -> None:
    assert request(LIGHT, STANDARD, STANDARD, views=2).drawn_views == (
        (LIGHT, 0),
        (LIGHT, 1),
        (STANDARD, 1),
    )


def test_labels_tell_the_sets_of_several_policies_apart() -> None:
    sets = plan_sets(record(), request(STANDARD, views=2), EXTRACTION)
    labels = set_labels(sets)
    assert len(set(labels)) == len(sets)
    assert labels[0] == "c3/0"
    assert labels[1] == f"c3/1 {sets[1].set_id}"
    assert set_labels(sets[:2]) == ["c3/0", "c3/1"]


def test_the_forecast_counts_the_views_of_all_policies() -> None:
    one = forecast_forward_s(record(), request(views=1), 1000)
    assert forecast_forward_s(record(), request(STANDARD, views=3), 1000) == 5 * one


@pytest.mark.parametrize(
    ("rejects", "samples", "settings", "is_allowed"),
    [
        (0, 0, {}, True),
        (100, 101, {}, True),
        (101, 102, {}, False),
        (200, 20_000, {}, True),
        (201, 20_000, {}, False),
        # Not one image could be used, so nothing was done.
        (1, 1, {}, False),
        (50, 50, {}, False),
        (50, 50, {"rows": 1000}, False),
        (50, 50, {"rate": 1}, True),
    ],
)
def test_the_error_budget_allows_so_many_rejects_but_not_all(
    rejects: int, samples: int, settings: dict[str, float], is_allowed: bool
) -> None:
    assert ErrorBudget.model_validate(settings).allows(rejects, samples) is is_allowed
