"""The config of a search: every trial is a training before any starts, and a budget that cannot suffice is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cache_jobs import write_digits
from convoy.core.config import load_config, parse_config
from convoy.core.errors import ConfigError
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines.feature_plan import forward_s
from convoy.pipelines.tune_config import TuneConfig
from convoy.pipelines.tune_plan import (
    check_budget,
    copied_weights,
    fetch_networks,
    most_batch_bytes,
    network_key,
    pin_names,
)
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.engine_options import device_here
from convoy.vision.weights import state_to_safetensors
from made_bundles import made_classifier, write_classifier

LENET = {"arch": "lenet5", "weights": "random", "preset": {"resize_px": 32, "crop_px": 32}}
FOLD = {"index": 0, "count": 3}
CONFIG: dict[str, Any] = {
    "name": "search",
    "dataset": "digits",
    "base": {"backbone": LENET, "strategy": "from_scratch", "epochs": 2},
    "space": {"learning_rate": {"log_uniform": [0.01, 1.0]}, "recipe.seed": {"grid": [0, 1]}},
    "budget": {"trials": 4},
}


def parsed(**changes: Any) -> TuneConfig:
    return parse_config(TuneConfig, {**CONFIG, **changes}, where="test")


def test_a_trial_is_the_training_of_base_with_its_values() -> None:
    config = parsed()
    (*_, values) = config.search_space.spot_checks(100)
    training = config.trial_config(values, name="search-0")
    assert (training.name, training.dataset, training.epochs) == ("search-0", "digits", 2)
    assert training.learning_rate == values["learning_rate"]
    assert training.recipe.seed == values["recipe.seed"]
    assert {one.recipe.seed for one in config.examples()} == {0, 1}


def test_a_scheduler_is_given_by_name_or_with_its_settings() -> None:
    short, long = parsed(scheduler="asha"), parsed(scheduler={"kind": "asha", "reduction_factor": 4})
    assert short.scheduler.kind is long.scheduler.kind
    assert (short.scheduler.reduction_factor, long.scheduler.reduction_factor) == (3, 4)


def test_money_is_time_at_a_price() -> None:
    assert parsed(budget={"trials": 1}).budget.seconds is None
    assert parsed(budget={"hours": 2}).budget.seconds == 7200
    assert parsed(budget={"cost_usd": 3, "price_per_hour": 6}).budget.seconds == 1800
    assert parsed(budget={"hours": 0.25, "cost_usd": 3, "price_per_hour": 6}).budget.seconds == 900


def test_overrides_reach_into_base_and_space(tmp_path: Path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(
        "{name: a, dataset: d, base: {strategy: from_scratch, backbone: {arch: lenet5, weights: random}},"
        " space: {learning_rate: {grid: [0.1]}}}"
    )
    overrides = ["base.epochs=7", "space.recipe.seed={grid: [0, 1]}", "base.recipe.batch_size=8"]
    config = load_config(TuneConfig, str(path), overrides)
    assert config.search_space.grid_size == 2
    assert {(one.epochs, one.recipe.batch_size) for one in config.examples()} == {(7, 8)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {}}, "search space is empty"),
        ({"space": {"learning_rat": {"choice": [1]}}}, "did you mean 'learning_rate'"),
        ({"space": {"recipe.sead": {"choice": [1]}}}, "recipe.sead: unknown key; did you mean 'seed'"),
        ({"space": {"learning_rate": {"uniform": [-1, 1]}}}, "greater than 0"),
        ({"space": {"strategy": {"choice": ["fine_tune", "guess"]}}}, "strategy"),
        ({"space": {"strategy": {"grid": ["partial_reuse"]}}}, "partial_reuse needs `reuse"),
        ({"space": {"name": {"grid": ["a"]}}}, "'name' is the same for all trials"),
        (
            {"space": {"config": {"grid": [{"epochs": 3, "dataset": "b"}]}}},
            "'dataset' is the same for all trials",
        ),
        ({"space": {"config": {"choice": [{"tracking": {}}]}}}, "tracked in the run folder"),
        ({"base": {**CONFIG["base"], "workspace": "/tmp"}}, "'workspace' is the same for all trials"),
        ({"base": {**CONFIG["base"], "tracking.mlflow_uri": "x"}}, "tracked in the run folder"),
        ({"base": {**CONFIG["base"], "epoch": 3}}, "did you mean 'epochs'"),
        ({"budget": {}}, "needs a budget"),
        ({"budget": {"trials": 0}}, "greater than 0"),
        ({"budget": {"cost_usd": 3}}, "cost_usd needs price_per_hour"),
        ({"search": "optuna"}, "goes through no grid"),
        ({"search": "optunna"}, "'random' or 'optuna'"),
        ({"crops": "five", "ensemble": {"crops": ["ten"]}}, "keep no views of ten: they hold center, five"),
        ({"crops": "multiscale", "ensemble": {"gate": 0.99}}, "a gate begins at the centre crop"),
        ({"folds": 3, "base": {**CONFIG["base"], "rows": {"fold": FOLD}}}, "leaves out each of them in turn"),
        ({"folds": 3, "space": {"rows.fold": {"choice": [None, FOLD]}}}, "leaves out each of them in turn"),
        ({"name": "No Name"}, "a model's name"),
        ({"budgett": {}}, "did you mean 'budget'"),
    ],
)
def test_what_is_no_search_is_refused_before_anything_starts(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parsed(**changes)


def test_several_keys_may_be_chosen_together() -> None:
    ways = [{"strategy": "fine_tune"}, {"strategy": "partial_reuse", "reuse": {"after": "c1"}}]
    config = parsed(space={"config": {"grid": ways}}, budget={})
    assert sorted(one.strategy.value for one in config.examples()) == ["fine_tune", "partial_reuse"]
    ways = [{"recipe.seed": 1, "epochs": 3}, {"recipe.seed": 2, "epochs": 4}]
    base = {**CONFIG["base"], "recipe": {"batch_size": 32}}
    config = parsed(base=base, space={"config": {"grid": ways}}, budget={})
    recipes = [(one.epochs, one.recipe.seed, one.recipe.batch_size) for one in config.examples()]
    assert recipes == [(3, 1, 32), (4, 2, 32)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStore, Manifest]:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images", 120)
    store = LocalStore(str(folder / "workspace"))
    freeze_dataset(store, "digits", str(folder / "images"), splits=SplitOptions(val_fraction=0.3))
    return store, open_dataset(store, "digits")


def test_weights_from_a_file_are_copied_to_where_every_node_can_read_them(
    digits: tuple[LocalStore, Manifest], tmp_path: Path
) -> None:
    store, manifest = digits
    network = build_network(BackboneConfig(arch="lenet5", weights="random", num_classes=10))
    file = tmp_path / "lenet.safetensors"
    file.write_bytes(state_to_safetensors(network.state_dict()))
    backbone = {**LENET, "weights": str(file), "num_classes": 10}
    space = {"backbone": {"grid": [LENET, backbone]}, "backbone.preset.resize_px": {"grid": [32, 40]}}
    config = parsed(base={"strategy": "fine_tune", "epochs": 1}, space=space)
    examples = fetch_networks(store, manifest, config, {})
    copies = copied_weights(examples)
    assert copies.keys() == {network_key(BackboneConfig.model_validate(backbone))}
    file.unlink()
    again = fetch_networks(store, manifest, config, copies)
    assert [one.network.weights_digest for one in again] == [one.network.weights_digest for one in examples]
    assert copied_weights(again) == copies


def test_every_teacher_that_a_space_may_come_to_is_pinned(digits: tuple[LocalStore, Manifest]) -> None:
    store, manifest = digits
    refs = {
        name: write_classifier(store, name, made_classifier(store, seed, classes=manifest.classes))
        for seed, name in enumerate(("small", "large", "unasked"))
    }
    config = parsed(
        base={**CONFIG["base"], "distill": {"teacher": "small"}},
        space={"distill.teacher": {"choice": ["small", str(refs["large"])]}},
    )
    pins = pin_names(store, manifest, config)
    assert pins.teachers == {"small": str(refs["small"]), str(refs["large"]): str(refs["large"])}
    of_precision, note = pins.notes
    assert of_precision == f"where it is auto, {device_here().precision_note}"
    assert note.startswith(f"the teacher of all trials is {refs['small']}: what small was")


def test_a_teacher_that_lacks_a_class_is_refused_before_any_trial(
    digits: tuple[LocalStore, Manifest],
) -> None:
    store, manifest = digits
    write_classifier(store, "narrow", made_classifier(store, 0, classes=manifest.classes[1:]))
    config = parsed(base={**CONFIG["base"], "distill": {"teacher": "narrow"}})
    with pytest.raises(ConfigError, match="the teacher does not know 1 classes"):
        pin_names(store, manifest, config)


def test_a_budget_too_small_for_one_trial_is_refused_with_the_numbers(
    digits: tuple[LocalStore, Manifest],
) -> None:
    store, manifest = digits
    resnet = {"arch": "torchvision:resnet50", "weights": "random"}
    config = parsed(
        base={"backbone": resnet, "strategy": "from_scratch", "epochs": 50},
        budget={"trials": 4, "hours": 0.001},
    )
    examples = fetch_networks(store, manifest, config, {})
    laptop = [{"CPU": 2.0, "GPU": 0.0}]
    with pytest.raises(ConfigError, match=r"the budget of 4 s is too small for one trial, which takes \d+ s"):
        check_budget(config, examples, manifest, [*laptop, {"CPU": 0.0, "GPU": 1.0}])
    check_budget(config, examples, manifest, [{"CPU": 2000.0, "GPU": 0.0}])
    check_budget(config, examples, manifest, [{"CPU": 2.0, "GPU": 1.0}])
    enough = config.model_copy(update={"budget": config.budget.model_copy(update={"hours": 10.0})})
    check_budget(enough, examples, manifest, laptop)


HEAD = {"name": "head", "epochs": 30, "freeze_depth": "body", "learning_rate": 0.1}
REST = {"name": "all", "epochs": 2, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("base", "passes"),
    [
        ({"epochs": 20, "freeze_depth": 0}, 20 * 3),
        ({"strategy": "from_scratch", "epochs": 20}, 20 * 3),
        # Behind frozen stages there may be no way back but that of the head.
        ({"epochs": 20, "freeze_depth": "body"}, 20),
        ({"epochs": 20}, 20),
        # A head that is fitted on features, which may lie in the cache.
        ({"phases": [HEAD, REST], "head_source": "cache"}, 2 * 3),
        ({"phases": [HEAD, REST]}, 30 + 2 * 3),
        ({"phases": [{**REST, "resolution_px": 112}]}, 2 * 3 / 4),
        ({"epochs": 100, "freeze_depth": 0, "recipe": {"patience_epochs": 3}}, 4 * 3),
        ({"epochs": 2, "freeze_depth": 0, "recipe": {"patience_epochs": 3}}, 2 * 3),
        # The new network may end behind the first of its layers.
        ({"strategy": "partial_reuse", "reuse": {"after": "layer1"}, "epochs": 20, "freeze_depth": 0}, 0),
    ],
)
def test_a_budget_is_refused_only_where_the_least_that_a_trial_computes_takes_longer(
    digits: tuple[LocalStore, Manifest], base: dict[str, Any], passes: float
) -> None:
    store, manifest = digits
    resnet = {"arch": "torchvision:resnet18", "weights": "random"}
    config = parsed(
        base={"backbone": resnet, "strategy": "fine_tune", **base},
        space={"recipe.seed": {"grid": [0, 1]}},
        budget={"hours": 1.0},
    )
    examples = fetch_networks(store, manifest, config, {})
    pass_s = forward_s(manifest.counts[Split.TRAIN].num_samples * examples[0].network.macs)
    laptop = [{"CPU": 2.0, "GPU": 0.0}]
    for share in (0.9, 1.1):
        # The forecast is true to within a factor of two.
        hours = share * max(passes, 1e-6) * pass_s / 2 / 3600
        within = config.model_copy(update={"budget": config.budget.model_copy(update={"hours": hours})})
        is_refused = passes > 0 and share < 1
        with pytest.raises(ConfigError, match="too small for one trial") if is_refused else nullcontext():
            check_budget(within, examples, manifest, laptop)


def test_trainings_of_one_network_that_take_longer_or_shorter_are_told_apart(
    digits: tuple[LocalStore, Manifest],
) -> None:
    store, manifest = digits
    config = parsed(
        base={"backbone": {"arch": "torchvision:resnet18", "weights": "random"}, "strategy": "fine_tune"},
        space={"freeze_depth": {"grid": [0, "body"]}, "recipe.patience_epochs": {"grid": [1, 3]}},
    )
    assert len(fetch_networks(store, manifest, config, {})) == 4


def test_a_search_over_heads_needs_no_time_for_features_that_may_be_cached(
    digits: tuple[LocalStore, Manifest],
) -> None:
    store, manifest = digits
    config = parsed(
        base={"backbone": {"arch": "torchvision:resnet50", "weights": "random"}, "strategy": "linear_probe"},
        space={"head.C": {"grid": [[0.1], [1.0]]}},
        budget={"hours": 1e-6},
    )
    check_budget(config, fetch_networks(store, manifest, config, {}), manifest, [{"CPU": 2.0, "GPU": 0.0}])


@pytest.mark.parametrize(("num_workers", "num_images"), [(1, 60), (2, 48)])
def test_a_search_knows_the_largest_batch_of_its_trials(
    digits: tuple[LocalStore, Manifest], num_workers: int, num_images: int
) -> None:
    """Which is one worker's share of a batch, or a batch of its own."""
    store, manifest = digits
    space = {
        "config": {
            "choice": [
                {"recipe.batch_size": 16},
                {"recipe.batch_size": 60},
                {"recipe.batch_size": 48, "recipe.batch_unit": "worker"},
            ]
        }
    }
    examples = fetch_networks(store, manifest, parsed(space=space), {})
    (side_px,) = {one.network.preset.crop_px for one in examples}
    assert most_batch_bytes(examples, num_workers) == num_images * 3 * side_px**2
    probes = parsed(
        base={"backbone": LENET, "strategy": "linear_probe"}, space={"head.C": {"grid": [[0.1], [1.0]]}}
    )
    assert most_batch_bytes(fetch_networks(store, manifest, probes, {}), num_workers) == 0
