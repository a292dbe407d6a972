from __future__ import annotations

import pytest
from pydantic import ValidationError

from convoy.vision.optimisation import schedule_factor
from convoy.vision.recipes import fine_tuning_phases, paper_recipe, reuse_phases, transfer_recipe
from convoy.vision.training_config import (
    BatchUnit,
    OptimiserKind,
    Phase,
    RateScaling,
    Recipe,
    Schedule,
    ScheduleKind,
    WeightAveraging,
    group_batch_size,
    rate_factor,
)

SOURCES = {
    "LeCun": ["lenet5"],
    "section 4.2": ["cifar_resnet20", "cifar_resnet110"],
    "Simonyan": ["torchvision:alexnet", "torchvision:vgg16_bn", "timm:vgg19", "torchvision:squeezenet1_1"],
    "Sandler": [
        "torchvision:mobilenet_v2",
        "torchvision:mobilenet_v3_small",
        "torchvision:efficientnet_b0",
        "torchvision:efficientnet_v2_s",
        "torchvision:mnasnet1_0",
        "torchvision:shufflenet_v2_x1_0",
        "timm:mobilenetv1_100",
        "timm:efficientnet_b3",
        "timm:tf_efficientnetv2_s",
        "timm:tf_mobilenetv3_large_100",
        "timm:semnasnet_100",
    ],
    "Liu": [
        "torchvision:convnext_tiny",
        "timm:convnext_base",
        "timm:convnextv2_nano",
        "timm:inception_next_tiny",
    ],
    "Szegedy": [
        "torchvision:googlenet",
        "torchvision:inception_v3",
        "timm:inception_resnet_v2",
        "timm:xception41",
        "timm:legacy_xception",
        "timm:nasnetalarge",
        "timm:pnasnet5large",
    ],
    "section 3.4": [
        "torchvision:resnet50",
        "torchvision:densenet121",
        "torchvision:regnet_y_400mf",
        "timm:resnet18",
        "my_package.networks:build",
    ],
}


@pytest.mark.parametrize(
    ("source", "arch"), [(source, arch) for source in SOURCES for arch in SOURCES[source]]
)
def test_every_family_has_the_recipe_of_its_paper(source: str, arch: str) -> None:
    assert source in paper_recipe(arch).source


def test_recipes_have_the_numbers_of_their_papers() -> None:
    resnet, vgg, convnext = (
        paper_recipe(f"torchvision:{name}") for name in ("resnet50", "vgg16", "convnext_tiny")
    )
    assert (resnet.learning_rate, resnet.recipe.batch_size, resnet.epochs) == (0.1, 256, 90)
    assert resnet.recipe.optimiser.weight_decay == 1e-4
    assert vgg.recipe.optimiser.weight_decay == 5e-4
    assert (convnext.learning_rate, convnext.recipe.batch_size, convnext.epochs) == (4e-3, 4096, 300)
    assert convnext.recipe.optimiser.kind is OptimiserKind.ADAMW
    assert convnext.recipe.averaging is WeightAveraging.EMA


def test_the_deepest_resnet_for_cifar_alone_warms_up_as_in_its_paper() -> None:
    phases = {depth: paper_recipe(f"cifar_resnet{depth}").scaled_to(128) for depth in (56, 110)}
    assert phases[110].schedule == phases[56].schedule.model_copy(update={"warmup": 1 / 160})
    assert phases[110].model_copy(update={"schedule": phases[56].schedule}) == phases[56]
    factors = [schedule_factor(phases[110].schedule, step, 64_000) for step in (0, 399, 400, 31_999, 32_000)]
    assert factors == pytest.approx([1 / 401, 400 / 401, 1, 1, 0.1])


def test_the_rate_scales_linearly_with_the_batch() -> None:
    paper = paper_recipe("torchvision:resnet50")
    rates = [paper.scaled_to(batch_size).learning_rate for batch_size in (64, 128, 256, 512)]
    assert rates == pytest.approx([0.025, 0.05, 0.1, 0.2])
    assert paper.scaled_to(256) == Phase(
        name="train",
        epochs=90,
        learning_rate=0.1,
        schedule=Schedule(kind=ScheduleKind.STEP, milestones=(1 / 3, 2 / 3)),
    )
    assert paper.scaled_to(256, epochs=7).epochs == 7


def test_fine_tuning_begins_with_the_head_and_goes_on_slowly() -> None:
    head, body = fine_tuning_phases(6, "layer2")
    assert (head.epochs, head.freeze_depth, body.epochs, body.freeze_depth) == (1, "body", 6, "layer2")
    assert body.learning_rate == head.learning_rate
    assert (body.body_rate, body.layer_decay) == (0.1, 0.95)
    assert head.name != body.name
    assert transfer_recipe().optimiser.kind is OptimiserKind.SGD


def test_swa_is_refused_where_patience_may_end_the_training_before_its_epochs() -> None:
    with pytest.raises(ValidationError, match="patience_epochs may cut off"):
        Recipe(averaging=WeightAveraging.SWA, patience_epochs=3)
    assert Recipe(averaging=WeightAveraging.SOUP, patience_epochs=3).patience_epochs == 3


def test_reuse_trains_in_one_phase() -> None:
    (phase,) = reuse_phases(4, "body")
    assert (phase.epochs, phase.freeze_depth, phase.body_rate, phase.layer_decay) == (4, "body", 0.1, 1.0)


@pytest.mark.parametrize(
    ("unit", "scaling", "factor", "images"),
    [
        (BatchUnit.GROUP, RateScaling.LINEAR, 1.0, 32),
        (BatchUnit.WORKER, RateScaling.LINEAR, 4.0, 128),
        (BatchUnit.WORKER, RateScaling.SQRT, 2.0, 128),
        (BatchUnit.WORKER, RateScaling.NONE, 1.0, 128),
    ],
)
def test_rates_follow_the_workers_only_where_the_batch_does(
    unit: BatchUnit, scaling: RateScaling, factor: float, images: int
) -> None:
    recipe = Recipe(batch_size=32, batch_unit=unit, rate_scaling=scaling)
    assert rate_factor(recipe, 4) == factor
    assert group_batch_size(recipe, 4) == images


def test_a_soup_of_one_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="average_epochs of 2 or more"):
        Recipe(averaging=WeightAveraging.SOUP, average_epochs=1)
