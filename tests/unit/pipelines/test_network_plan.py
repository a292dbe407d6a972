from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from convoy.core.errors import ConfigError
from convoy.pipelines.network_plan import (
    NetworkPlan,
    plan_network,
    trained_backbone_config,
)
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.wanted_training import wanted_recipe
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.engine_options import NetworkDevice
from convoy.vision.recipes import paper_recipe
from convoy.vision.training_config import Optimiser, OptimiserKind, TrainingPrecision
from made_devices import made_device

COUNTS = (40, 40)
CONVNEXT = "timm:convnext_atto"
H100 = made_device()


def config_of(strategy: str = "from_scratch", arch: str = "cifar_resnet20", **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"dataset": "d", "name": "n", "strategy": strategy, "backbone": {"arch": arch}, **settings}
    )


def plan_of(
    num_workers: int = 1,
    recipe: dict[str, Any] | None = None,
    device: NetworkDevice | None = H100,
    on_gpus: bool = True,
    has_val: bool = True,
    counts: Sequence[int] = COUNTS,
    **settings: Any,
) -> NetworkPlan:
    config = config_of(recipe={"batch_size": 8, **(recipe or {})}, **settings)
    backbone = trained_backbone_config(config, len(counts)).model_copy(update={"weights": "random"})
    network = build_network(backbone)
    axis = depth_axis(backbone, network)
    return plan_network(
        config,
        network,
        axis,
        counts,
        num_workers=num_workers,
        on_gpus=on_gpus,
        device=device,
        has_val=has_val,
    )


def learning_rate(num_workers: int, rate: float | None = None, **recipe: Any) -> float:
    """Of the only phase of a training from scratch."""
    (found,) = rates(plan_of(num_workers, recipe, learning_rate=rate))
    return found


def rates(plan: NetworkPlan) -> list[float]:
    return [phase.learning_rate for phase in plan.phases]


@pytest.mark.parametrize("rate", [None, 0.05])
@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_from_scratch_follows_the_scaling_of_rates(rate: float | None, scaling: str, factor: float) -> None:
    alone, four = (
        learning_rate(num_workers, rate, batch_unit="worker", rate_scaling=scaling) for num_workers in (1, 4)
    )
    assert four == pytest.approx(factor * alone)


def test_where_the_batch_is_the_groups_so_is_the_rate() -> None:
    assert learning_rate(4) == learning_rate(1)


def test_one_key_of_an_optimiser_leaves_the_others_of_the_paper() -> None:
    paper = paper_recipe(CONVNEXT).recipe
    recipe = wanted_recipe(config_of(arch=CONVNEXT, recipe={"optimiser": {"weight_decay": 0.1}}))
    assert recipe.optimiser == paper.optimiser.model_copy(update={"weight_decay": 0.1})
    assert recipe == paper.model_copy(update={"optimiser": recipe.optimiser})


def test_an_optimiser_of_another_kind_takes_nothing_of_the_papers() -> None:
    sgd = wanted_recipe(config_of(arch=CONVNEXT, recipe={"optimiser": {"kind": "sgd"}}))
    assert sgd.optimiser == Optimiser(kind=OptimiserKind.SGD)


@pytest.mark.parametrize("strategy", ["fine_tune", "from_scratch"])
def test_adamw_in_place_of_sgd_has_a_weight_decay_of_its_own_and_says_so(strategy: str) -> None:
    plan = plan_of(recipe=ADAMW, strategy=strategy, learning_rate=0.002)
    assert plan.recipe.optimiser == Optimiser(kind=OptimiserKind.ADAMW, weight_decay=0.01)
    assert "weight decay 0.01, for AdamW: none is given, and the default would be SGD's" in plan.notes


def test_a_weight_decay_that_is_given_or_is_the_papers_for_adamw_stays() -> None:
    given = plan_of(recipe={"optimiser": {"kind": "adamw", "weight_decay": 1e-4}})
    papers = plan_of(arch=CONVNEXT, recipe=ADAMW)
    for plan, decay in ((given, 1e-4), (papers, 0.05)):
        assert plan.recipe.optimiser.weight_decay == decay
        assert not any("weight decay" in note for note in plan.notes)


def test_a_config_that_was_written_out_and_read_back_trains_the_same() -> None:
    config = config_of(arch=CONVNEXT, recipe={"label_smoothing": 0.0, "optimiser": {"momentum": 0.9}})
    read = TrainConfig.model_validate_json(config.model_dump_json())
    assert wanted_recipe(read) == wanted_recipe(config)
    assert read.model_dump(mode="json") == config.model_dump(mode="json")
    assert wanted_recipe(config).mixup_alpha == 0.8


ADAMW = {"optimiser": {"kind": "adamw"}}
REUSE = {"reuse": {"after": "layer2", "convs": []}}


def frozen(name: str, freeze_depth: int | str) -> dict[str, Any]:
    """A phase with that freeze depth."""
    return {"name": name, "epochs": 1, "learning_rate": 0.1, "freeze_depth": freeze_depth}


@pytest.mark.parametrize(
    ("settings", "sgd", "body_rate"),
    [
        ({"strategy": "fine_tune"}, 0.1, 0.1),
        ({"strategy": "partial_reuse", **REUSE}, 0.1, 0.1),
        ({"strategy": "from_scratch"}, 0.1 * 8 / 128, 1.0),
    ],
)
def test_adamw_has_a_default_rate_of_its_own_and_says_so(
    settings: dict[str, Any], sgd: float, body_rate: float
) -> None:
    by_sgd, by_adamw = plan_of(**settings), plan_of(recipe=ADAMW, **settings)
    assert rates(by_sgd) == pytest.approx([sgd] * len(by_sgd.phases))
    assert rates(by_adamw) == [1e-3] * len(by_adamw.phases)
    assert by_adamw.phases[-1].body_rate == by_sgd.phases[-1].body_rate == body_rate
    assert any("AdamW" in note for note in by_adamw.notes)
    assert not any("AdamW" in note for note in by_sgd.notes)


def test_sgd_in_place_of_the_papers_adamw_has_its_own_rate_and_says_so() -> None:
    by_sgd = plan_of(arch=CONVNEXT, recipe={"optimiser": {"kind": "sgd"}})
    assert rates(by_sgd) == pytest.approx([0.1 * 8 / 256] * len(by_sgd.phases))
    assert any("for SGD: none is given" in note for note in by_sgd.notes)


def test_a_rate_that_is_given_or_is_the_papers_for_adamw_stays() -> None:
    given = plan_of(recipe=ADAMW, strategy="fine_tune", learning_rate=0.02)
    phase = {"name": "all", "epochs": 1, "learning_rate": 0.02}
    of_phases = plan_of(recipe=ADAMW, strategy="fine_tune", phases=[phase])
    papers = plan_of(arch=CONVNEXT, recipe=ADAMW)
    for plan, rate in ((given, 0.02), (of_phases, 0.02), (papers, 4e-3 * 8 / 4096)):
        assert rates(plan) == pytest.approx([rate] * len(plan.phases))
        assert not any("learning rate" in note for note in plan.notes)


@pytest.mark.parametrize("averaging", ["swa", "soup"])
@pytest.mark.parametrize(
    ("epochs", "wanted", "taken"),
    [
        (1, None, 1),
        (1, 2, 1),
        (2, None, 2),
        (3, None, 2),
        (5, None, 2),
        (8, None, 4),
        (10, None, 5),
        (8, 3, 3),
    ],
)
def test_at_most_half_of_the_last_phase_or_two_are_averaged(
    averaging: str, epochs: int, wanted: int | None, taken: int
) -> None:
    recipe = {"averaging": averaging} | ({"average_epochs": wanted} if wanted else {})
    plan = plan_of(recipe=recipe, strategy="fine_tune", epochs=epochs)
    # A soup's number is two or more; of a single epoch the training takes that one.
    assert min(plan.recipe.average_epochs, epochs) == taken
    said = f"{averaging} takes {taken} of the {epochs} epochs of phase body: at most half, or two"
    assert (said in plan.notes) == (taken < (wanted or 5))
    assert NetworkPlan.model_validate_json(plan.model_dump_json()) == plan


def test_who_averages_no_epochs_is_told_nothing_of_them() -> None:
    plan = plan_of(recipe={"averaging": "ema"}, strategy="fine_tune", epochs=3)
    assert not any("half" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"patience_epochs": 2}, ["patience_epochs has no effect"]),
        ({"averaging": "best"}, ["averaging best goes by the training loss"]),
        ({"averaging": "soup"}, ["averaging soup goes by the training loss"]),
        ({"averaging": "ema"}, []),
    ],
)
def test_what_goes_by_validation_rows_is_told_where_there_are_none(
    recipe: dict[str, Any], told: list[str]
) -> None:
    watched, alone = plan_of(recipe=recipe).notes, plan_of(recipe=recipe, has_val=False).notes
    added = [note for note in alone if note not in watched]
    assert [any(note.startswith(words) for words in told) for note in added] == [True] * len(told)
    assert set(watched) <= set(alone)


@pytest.mark.parametrize(
    ("recipe", "unused"),
    [
        (
            {"ema_decay": 0.99, "average_epochs": 3},
            "average_epochs (averaging: last), recipe.ema_decay (averaging: last)",
        ),
        ({"ema_decay": 0.99, "average_epochs": 3, "averaging": "ema"}, "average_epochs (averaging: ema)"),
        ({"ema_decay": 0.99, "average_epochs": 3, "averaging": "swa"}, "ema_decay (averaging: swa)"),
        ({"rate_scaling": "linear"}, "rate_scaling (batch_unit: group)"),
        ({"rate_scaling": "linear", "batch_unit": "worker"}, None),
        ({"optimiser": {"betas": [0.9, 0.99], "momentum": 0.8}}, "optimiser.betas (kind: sgd)"),
        ({"optimiser": {"kind": "adamw", "momentum": 0.8}}, "optimiser.momentum (kind: adamw)"),
        ({"averaging": "ema", "optimiser": {"kind": "adamw"}}, None),
    ],
)
def test_what_is_set_of_a_recipe_and_means_nothing_beside_the_rest_is_told(
    recipe: dict[str, Any], unused: str | None
) -> None:
    told = [note for note in plan_of(recipe=recipe).notes if "without effect" in note]
    assert told == ([] if unused is None else [f"without effect: recipe.{unused}"])


def test_what_a_paper_chooses_beside_a_setting_gives_it_its_effect() -> None:
    """ConvNeXt's recipe has AdamW and a moving average."""
    recipe = {"ema_decay": 0.99, "optimiser": {"betas": [0.9, 0.99]}}
    assert not any("without effect" in note for note in plan_of(arch=CONVNEXT, recipe=recipe).notes)


@pytest.mark.parametrize(
    ("kind", "unused"),
    [
        ("constant", ["final_factor", "gamma", "milestones"]),
        ("cosine", ["gamma", "milestones"]),
        ("step", ["final_factor"]),
        ("one_cycle", ["final_factor", "gamma", "milestones", "warmup"]),
    ],
)
def test_what_is_set_of_a_schedule_of_another_kind_is_told(kind: str, unused: list[str]) -> None:
    changed = {"warmup": 0.1, "milestones": [0.9], "gamma": 0.5, "final_factor": 0.1}
    phases = [
        {"name": "all", "epochs": 1, "learning_rate": 0.1, "schedule": {"kind": kind, **changed}},
        {"name": "more", "epochs": 1, "learning_rate": 0.1, "schedule": {"kind": kind}},
    ]
    config = config_of(phases=phases)
    for one in (config, TrainConfig.model_validate_json(config.model_dump_json())):
        (note,) = [note for note in plan_of(phases=one.phases).notes if "without effect" in note]
        assert note == "without effect: " + ", ".join(
            f"phases.all.schedule.{key} (kind: {kind})" for key in unused
        )


@pytest.mark.parametrize(
    ("settings", "num_learnt"),
    [
        ({"strategy": "from_scratch", "freeze_depth": "layer3"}, 0),
        ({"strategy": "from_scratch", "freeze_depth": "body"}, 0),
        # The stem, three blocks of each of two layers; behind them all is new.
        ({"strategy": "partial_reuse", **REUSE, "freeze_depth": "pooled"}, 7),
        ({"strategy": "partial_reuse", **REUSE, "phases": [frozen("one", "mlp.0"), frozen("two", 0)]}, 7),
    ],
)
def test_a_training_that_would_freeze_random_weights_is_refused(
    settings: dict[str, Any], num_learnt: int
) -> None:
    with pytest.raises(ConfigError, match=f"would keep random weights: {num_learnt} of") as caught:
        plan_of(**settings)
    assert f"at most {num_learnt}" in caught.value.next_step


def frozen_by(**settings: Any) -> list[int | str]:
    return [phase.freeze_depth for phase in plan_of(**settings).phases]


def test_a_later_phase_may_freeze_what_an_earlier_one_has_trained() -> None:
    assert frozen_by(phases=[frozen("all", 0), frozen("end", "layer3")]) == [0, 10]
    reused = {"strategy": "partial_reuse", **REUSE}
    assert frozen_by(**reused, phases=[frozen("all", "body"), frozen("end", "mlp.0")]) == [7, 9]


def test_an_automatic_depth_freezes_only_what_was_learnt() -> None:
    phases = [frozen("first", "auto"), frozen("second", "auto")]
    assert frozen_by(phases=phases) == [0, 8]
    assert frozen_by(phases=phases, strategy="fine_tune") == [8, 8]
    assert frozen_by(freeze_depth="auto") == [0]


def test_new_layers_whose_weights_are_those_of_a_training_before_may_be_frozen() -> None:
    layers = {"after": "layer2", "convs": []}
    backbone = {"arch": "cifar_resnet20", "weights": "a/model.pt", "new_layers": layers, "num_classes": 2}
    settings = {"strategy": "partial_reuse", "reuse": layers, "freeze_depth": "mlp.0"}
    assert frozen_by(backbone=backbone, **settings) == [9]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"strategy": "fine_tune", "freeze_depth": "layer1"}, "4 stages keep random weights to the end"),
        ({"strategy": "partial_reuse", **REUSE, "freeze_depth": "body"}, "7 stages keep random weights"),
        ({"strategy": "fine_tune", "freeze_depth": 0}, None),
    ],
)
def test_frozen_stages_of_random_weights_are_told(settings: dict[str, Any], told: str | None) -> None:
    random = {"arch": "cifar_resnet20", "weights": "random"}
    notes = plan_of(backbone=random, **settings).notes
    assert any(told in note for note in notes) if told else not any("random" in note for note in notes)
    assert not any("random" in note for note in plan_of(**settings).notes)


@pytest.mark.parametrize(
    ("freeze_depth", "is_told"),
    [("body", True), ("layer3", True), ("layer3.1", False), ("auto", False), (0, False)],
)
def test_a_fine_tuning_of_nothing_but_its_head_is_told(freeze_depth: int | str, is_told: bool) -> None:
    notes = plan_of(strategy="fine_tune", freeze_depth=freeze_depth).notes
    assert any("body trains the head alone, as phase head does" in note for note in notes) == is_told


def test_a_last_phase_of_another_resolution_is_told() -> None:
    phases = [{"name": "small", "epochs": 1, "learning_rate": 0.1, "resolution_px": 24}]
    assert any("judged at 24 pixels" in note for note in plan_of(phases=phases).notes)
    assert not any("judged at" in note for note in plan_of().notes)


@pytest.mark.parametrize("resolution_px", [24, 48])
def test_a_resolution_that_the_network_cannot_take_is_refused(resolution_px: int) -> None:
    phases = [
        {"name": "small", "epochs": 1, "learning_rate": 0.1, "resolution_px": resolution_px},
        {"name": "full", "epochs": 1, "learning_rate": 0.1, "resolution_px": 32},
    ]
    with pytest.raises(ConfigError, match=f"cannot take images of {resolution_px} px") as caught:
        plan_of(arch="lenet5", phases=phases)
    assert caught.value.where == "phases.small.resolution_px"


def test_a_precision_of_auto_is_that_of_what_trains_and_is_told() -> None:
    plan = plan_of()
    assert plan.recipe.precision is TrainingPrecision.BF16
    assert H100.precision_note in plan.notes


def test_a_precision_stays_auto_where_nobody_was_asked() -> None:
    plan = plan_of(device=None)
    assert plan.recipe.precision is TrainingPrecision.AUTO
    assert any("the training itself asks a worker" in note for note in plan.notes)


def test_a_precision_that_is_given_stays_and_needs_no_note() -> None:
    plan = plan_of(recipe={"precision": "fp32"})
    assert plan.recipe.precision is TrainingPrecision.FP32
    assert not any("precision" in note for note in plan.notes)


def test_a_network_that_no_worker_can_compile_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"there is no gcc or clang with Python's headers \(python3-dev\) beside NVIDIA H100",
    ):
        plan_of(recipe={"compile": True}, device=made_device(has_compiler=False))


def batchnorm_of(plan: NetworkPlan) -> tuple[bool | str, str | None]:
    """Whether workers share statistics, and what is told of these."""
    return plan.recipe.sync_batchnorm, next((note for note in plan.notes if "BatchNorm" in note), None)


# 8 images of one update.
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_workers": 4}, (True, "8 images of all workers together")),
        ({"num_workers": 1}, (True, "8 images")),
        ({"num_workers": 4, "recipe": {"accumulate": 2}}, (True, "4 images of all workers together")),
        (
            {"num_workers": 4, "recipe": {"sync_batchnorm": False}},
            (False, "2 images of each worker by itself"),
        ),
        # The batch is each worker's own by wish, and so are its statistics: 80 images are three steps of 26 or 27.
        (
            {"num_workers": 4, "recipe": {"batch_unit": "worker"}},
            (False, "6 images of each worker by itself"),
        ),
        ({"num_workers": 4, "on_gpus": False}, (False, "2 images of each worker by itself, as only GPUs")),
        (
            {"num_workers": 4, "on_gpus": False, "recipe": {"sync_batchnorm": True}},
            (True, "2 images of each worker by itself, as only GPUs"),
        ),
    ],
)
def test_workers_on_gpus_share_the_statistics_of_batchnorm(
    settings: dict[str, Any], expected: tuple[bool, str]
) -> None:
    """Else a gradient is off by 14 % with two workers, and by 23 % with eight."""
    found, note = batchnorm_of(plan_of(**settings))
    is_synced, words = expected
    assert found is is_synced
    assert note is not None
    assert note.startswith(f"BatchNorm takes its statistics over {words}")


@pytest.mark.parametrize(("batch_size", "is_few"), [(15, True), (16, False)])
def test_few_images_for_a_batchnorm_are_warned_of(batch_size: int, is_few: bool) -> None:
    _, note = batchnorm_of(plan_of(recipe={"batch_size": batch_size}))
    assert note is not None
    assert ("raise recipe.batch_size" in note) is is_few


@pytest.mark.parametrize(
    ("counts", "batch_size", "num_steps", "num_images"), [([65, 65], 128, 2, 65), ([10, 10], 19, 2, 10)]
)
def test_steps_that_are_clearly_smaller_than_a_batch_are_told_of_by_their_own_size(
    counts: list[int], batch_size: int, num_steps: int, num_images: int
) -> None:
    plan = plan_of(counts=counts, recipe={"batch_size": batch_size})
    _, note = batchnorm_of(plan)
    assert note is not None
    assert note.startswith(f"BatchNorm takes its statistics over {num_images} images")
    assert f"{sum(counts)} images are {num_steps} steps of about {num_images}" in "; ".join(plan.notes)
    assert "steps of about" not in "; ".join(plan_of().notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"arch": "lenet5"},
        # Inside frozen stages BatchNorm keeps the statistics that it has.
        {"strategy": "fine_tune", "freeze_depth": "body"},
    ],
)
def test_where_no_batchnorm_trains_none_is_shared_or_told_of(settings: dict[str, Any]) -> None:
    assert batchnorm_of(plan_of(num_workers=4, **settings)) == (False, None)
