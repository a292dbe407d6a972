"""Strategies of an advice: every config is one that `convoy train` takes, and costs follow from measured rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from convoy.core.config import load_config
from convoy.core.learning_curve import CurveSample, Shrink, fit_curve
from convoy.core.statistics import Interval
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_more_data import more_data
from convoy.pipelines.advise_probes import BackboneProbes, TapProbe
from convoy.pipelines.advise_report import MoreDataAdvice
from convoy.pipelines.advise_rule import Evidence, JudgedProbe
from convoy.pipelines.advise_strategies import (
    Basis,
    Option,
    advice,
    config_name,
    options,
    train_config,
)
from convoy.pipelines.backbone_evidence import BackboneEvidence, SvmProbe
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.train_config import NETWORKS, TrainConfig
from convoy.pipelines.training_rows import Fold
from convoy.pipelines.wanted_training import wanted_recipe
from convoy.storage.bundles import check_bundle_name

TAPS = {"layer1.2": (0.3, 0.45), "layer2.2": (0.6, 0.75), "pooled": (0.9, 0.8)}


def config(*settings: str) -> AdviseConfig:
    backbone = "{arch: cifar_resnet20, weights: nets/resnet20.th, preset: {resize_px: 32, crop_px: 32}}"
    base = [f"candidates=[{{backbone: {backbone}}}]", "dataset=hands", "workspace=/w", "price_per_hour=3.6"]
    return load_config(AdviseConfig, None, [*base, *settings])


def found(settings: AdviseConfig, **changes: Any) -> BackboneEvidence:
    taps = [
        TapProbe(
            tap=tap,
            depth=depth,
            num_features=16,
            top1=Interval(estimate=top1, low=top1 - 0.05, high=top1 + 0.05, confidence=0.95),
            knn_top1=top1,
            logme=0.0,
            num_correct=round(200 * top1),
            C=0.01,
            fit_seconds=2.0,
        )
        for tap, (depth, top1) in TAPS.items()
    ]
    probes = BackboneProbes(
        backbone=settings.candidates[0].name,
        weights_digest="0" * 32,
        macs=1,
        num_parameters=1,
        images_per_s=100.0,
        timed_images=500,
        judged_rows=200,
        taps=taps,
    )
    fields: dict[str, Any] = {
        "probes": probes,
        "evidence": Evidence(
            images_per_class=100,
            chance_top1=0.1,
            top=probes.judged(taps[2]),
            best=probes.judged(taps[2]),
            untrained=JudgedProbe(tap="stem", num_correct=110, num_rows=200),
        ),
        "config": settings.candidates[0].backbone,
        "as_is": None,
        "own_classes": {},
        "svm": SvmProbe(
            judged=JudgedProbe(tap="layer2.2", num_correct=152, num_rows=200),
            C=0.1,
            fit_seconds=3.0,
            missing_images=500,
        ),
        "reused": JudgedProbe(tap="layer1.2", num_correct=90, num_rows=200),
        "untrained_rate": 80.0,
        "train_images": 1000,
        "looked_images": 500,
        "missing_images": 500,
        "has_val": True,
        "has_held_out": True,
        "learnt_share": 1.0,
        "is_unbalanced": False,
    }
    return BackboneEvidence(**(fields | changes))


def by_strategy(settings: AdviseConfig, **changes: Any) -> dict[Strategy, Option]:
    return {option.strategy: option for option in options(settings, [found(settings, **changes)])}


def test_every_option_has_a_config_that_training_takes() -> None:
    settings = config("network.reuse={after: layer1}", "rows={max_per_class: 100}")
    for strategy, option in by_strategy(settings).items():
        parsed, text = train_config(option.settings, where="here")
        assert parsed.strategy is strategy
        assert parsed.unused_keys_notes == ()
        assert parsed.workspace == "/w"
        assert parsed.rows.max_per_class == 100
        assert TrainConfig.model_validate(yaml.safe_load(text)) == parsed


def test_strategies_use_what_they_are_named_after() -> None:
    found_ = by_strategy(config("network.reuse={after: layer1}"))
    parsed = {strategy: train_config(option.settings, where="here")[0] for strategy, option in found_.items()}
    assert set(parsed) == set(Strategy) - {Strategy.AS_IS}
    assert parsed[Strategy.LINEAR_PROBE].tap == "pooled"
    assert parsed[Strategy.EARLY_LAYER_PROBE].tap == "layer2.2"
    assert parsed[Strategy.EARLY_LAYER_PROBE].head.kind == "linear_svm"
    assert parsed[Strategy.FROM_SCRATCH].backbone.weights == "DEFAULT"
    assert parsed[Strategy.FINE_TUNE].epochs == 30
    assert parsed[Strategy.PARTIAL_REUSE].freeze_depth == "body.layer1.2"


def test_configs_name_weights_and_workspace_so_that_they_run_from_any_folder() -> None:
    settings = by_strategy(config("workspace=ws"))[Strategy.FINE_TUNE].settings
    assert settings["backbone"]["weights"] == str(Path.cwd() / "nets/resnet20.th")
    assert settings["workspace"] == str(Path.cwd() / "ws")


def test_a_network_that_has_the_classes_is_an_option_as_it_is_and_costs_nothing() -> None:
    own = {"class_map": {"plane": "fist", "frog": "palm"}}
    judged = JudgedProbe(tap="logits", num_correct=150, num_rows=200)
    option = by_strategy(config(), as_is=judged, own_classes=own)[Strategy.AS_IS]
    parsed, _ = train_config(option.settings, where="here")
    assert parsed.class_map == own["class_map"]
    assert (option.cost.seconds, option.cost.money, option.basis) == (0, 0, Basis.MEASURED)
    assert option.top1.low < 0.75 < option.top1.high


def test_unlike_images_unfreeze_everything_and_alike_ones_as_much_as_their_number_allows() -> None:
    alike = found(config()).evidence.model_copy(
        update={"untrained": JudgedProbe(tap="stem", num_correct=30, num_rows=200)}
    )
    unlike = by_strategy(config())[Strategy.FINE_TUNE]
    similar = by_strategy(config(), evidence=alike)[Strategy.FINE_TUNE]
    assert unlike.settings["freeze_depth"] == 0
    assert similar.settings["freeze_depth"] == "auto"


def test_without_a_tap_below_the_top_there_is_no_early_layer_probe_and_without_an_untrained_network_no_scratch() -> (
    None
):
    left = by_strategy(config(), svm=None, untrained_rate=None)
    assert set(left) == {Strategy.LINEAR_PROBE, Strategy.FINE_TUNE}


def test_without_validation_rows_configs_name_the_chosen_c() -> None:
    found_ = by_strategy(config(), has_val=False)
    chosen = {
        strategy: train_config(option.settings, where="here")[0].head.C for strategy, option in found_.items()
    }
    assert chosen[Strategy.LINEAR_PROBE] == chosen[Strategy.FINE_TUNE] == (0.01,)
    assert chosen[Strategy.EARLY_LAYER_PROBE] == (0.1,)


def test_where_neither_test_nor_val_has_labels_configs_leave_a_fold_out_to_be_measured_on() -> None:
    options_ = by_strategy(config("rows={max_per_class: 100}"), has_val=False, has_held_out=False)
    for option in options_.values():
        rows = train_config(option.settings, where="here")[0].rows
        assert (rows.fold, rows.max_per_class) == (Fold(index=0, count=5), 100)


@pytest.mark.parametrize(
    ("dataset", "backbone", "name"),
    [
        ("Hands.v2", "cifar_resnet20/Best.1", "hands.v2-fine-tune-cifar-resnet20-best-1"),
        ("hands", "lenet5/caf\u00e9", "hands-fine-tune-lenet5-caf-"),
    ],
)
def test_configs_have_names_that_a_bundle_can_have(dataset: str, backbone: str, name: str) -> None:
    assert config_name(dataset, Strategy.FINE_TUNE, backbone) == name
    check_bundle_name(name)


def test_long_names_are_cut_and_stay_different_with_room_for_a_verification() -> None:
    names = {config_name("Hands" * 30, Strategy.FINE_TUNE, backbone) for backbone in ("one", "other")}
    assert len(names) == 2
    for name in names:
        check_bundle_name(f"{name}-verify")


@pytest.mark.parametrize("writers", ["many", "single"])
def test_configs_let_as_many_write_as_the_advice_does(writers: str) -> None:
    for option in by_strategy(config(f"writers={writers}")).values():
        assert train_config(option.settings, where="here")[0].writers == writers


@pytest.mark.parametrize("has_val", [True, False])
def test_heads_are_trained_as_they_were_measured(has_val: bool) -> None:
    options_ = by_strategy(config("head={standardisation: none, C: [0.01, 0.1]}"), has_val=has_val)
    for strategy in (Strategy.LINEAR_PROBE, Strategy.EARLY_LAYER_PROBE, Strategy.FINE_TUNE):
        head = train_config(options_[strategy].settings, where="here")[0].head
        assert head.standardisation == "none"
        assert len(head.C) == (2 if has_val else 1)


def test_heads_that_nobody_set_are_trained_as_they_were_timed() -> None:
    settings = config()
    head = train_config(by_strategy(settings)[Strategy.LINEAR_PROBE].settings, where="here")[0].head
    assert head == settings.head


def test_uneven_classes_are_weighed() -> None:
    option = by_strategy(config(), is_unbalanced=True)[Strategy.FINE_TUNE]
    assert train_config(option.settings, where="here")[0].recipe.balance == "auto"


def test_probes_cost_the_rest_of_the_pass_and_networks_three_passes_an_epoch() -> None:
    found_ = by_strategy(config("network.epochs=10"))
    probe, tuned = found_[Strategy.LINEAR_PROBE].cost, found_[Strategy.FINE_TUNE].cost
    assert probe.seconds == pytest.approx(500 / 100 + 2.0 * 2)
    assert probe.basis is Basis.EXTRAPOLATED
    assert probe.low_s < probe.seconds < probe.high_s
    assert tuned.seconds == pytest.approx(1000 * 10 * 3 / 100)
    assert tuned.low_s < tuned.seconds < tuned.high_s
    assert tuned.money == pytest.approx(tuned.seconds / 3600 * 3.6)
    assert found_[Strategy.FROM_SCRATCH].cost.seconds == pytest.approx(1000 * 10 * 3 / 80)


def test_a_rate_that_no_pass_tells_makes_of_costs_a_guess_unless_all_is_cached() -> None:
    settings = config()
    probes = found(settings).probes.model_copy(update={"timed_images": 0})
    timed, guessed = by_strategy(settings), by_strategy(settings, probes=probes)
    for strategy in (Strategy.LINEAR_PROBE, Strategy.FINE_TUNE):
        cost = guessed[strategy].cost
        assert cost.basis is Basis.PRIOR
        assert cost.high_s - cost.low_s > timed[strategy].cost.high_s - timed[strategy].cost.low_s
    whole = by_strategy(settings, probes=probes, missing_images=0, looked_images=1000)
    assert whole[Strategy.LINEAR_PROBE].cost.basis is Basis.MEASURED


def test_the_list_begins_with_the_advice_and_says_why() -> None:
    settings = config()
    found_ = options(settings, [found(settings)])
    listed = advice(found_, tie=0.005, paths=[f"{option.strategy}.yaml" for option in found_])
    assert [one.rank for one in listed] == [1, 2, 3, 4]
    assert listed[0].strategy is Strategy.FINE_TUNE
    assert listed[0].config == "fine_tune.yaml"
    assert "dissimilarity" in listed[0].why
    assert "below the best" in listed[-1].why
    assert all(one.interval.low <= one.expected_top1 <= one.interval.high for one in listed)


def samples(*top1: float) -> list[CurveSample]:
    sizes = (12, 25, 50, 100)
    return [
        CurveSample(float(size), np.arange(400)[None, :] < 400 * value)
        for size, value in zip(sizes, top1, strict=True)
    ]


def first(settings: AdviseConfig) -> Any:
    found_ = options(settings, [found(settings)])
    return advice(found_, tie=0.005, paths=["x"] * len(found_))[0]


def test_a_rising_curve_speaks_for_more_images_until_the_wanted_accuracy_is_there() -> None:
    curve = fit_curve(samples(0.5, 0.62, 0.72, 0.8))
    wanted = config("wanted_top1=0.995")
    more = more_data(wanted, found(wanted), first(wanted), curve)
    assert more.advice is MoreDataAdvice.COLLECT
    assert more.images_needed is not None
    assert more.images_needed > 100
    assert more.needed is not None
    assert more.needed.low is not None
    assert more.needed.low < more.images_needed < (more.needed.high or np.inf)
    times = more.images_needed / more.advised[0].images_per_class
    assert f"{times:.1f} times the images reach it" in more.why
    assert f"about {more.images_needed:.0f} of the largest class ({more.needed.low:.0f} " in more.why
    assert [point.factor for point in more.advised] == [1.0, 2.0, 4.0]
    estimates = [point.top1.estimate for point in more.advised]
    assert estimates == sorted(estimates)
    modest = config("wanted_top1=0.5")
    assert more_data(modest, found(modest), first(modest), curve).advice is MoreDataAdvice.ENOUGH


def test_where_more_images_bring_nothing_none_are_asked_for_however_much_is_wanted() -> None:
    flat = fit_curve(samples(0.8, 0.8, 0.8, 0.8))
    wanted = config("wanted_top1=0.995")
    more = more_data(wanted, found(wanted), first(wanted), flat)
    assert more.advice is MoreDataAdvice.NO_HELP
    assert "0.995 is wanted: no forecast reaches it" in more.why
    assert "a better network or better labels" in more.why


def test_too_few_images_for_a_curve_are_said_to_be_too_few() -> None:
    settings = config()
    more = more_data(settings, found(settings), first(settings), None)
    assert more.advice is MoreDataAdvice.UNKNOWN
    assert more.advised == []


def test_more_images_change_nothing_of_a_network_that_is_used_as_it_is() -> None:
    settings = config("wanted_top1=0.99")
    judged = JudgedProbe(tap="logits", num_correct=196, num_rows=200)
    known = found(settings, as_is=judged)
    found_ = options(settings, [known])
    advised = advice(found_, tie=0.005, paths=["x"] * len(found_))[0]
    assert advised.strategy is Strategy.AS_IS
    more = more_data(settings, known, advised, fit_curve(samples(0.5, 0.62, 0.72, 0.8)))
    assert [point.top1 for point in more.advised] == [advised.interval] * 3
    assert more.advice is MoreDataAdvice.NO_HELP
    assert "more images change nothing" in more.why
    assert "0.990 is wanted" in more.why
    assert more.images_needed is None
    modest = config("wanted_top1=0.9")
    assert (
        more_data(modest, known, advised, fit_curve(samples(0.5, 0.62, 0.72, 0.8))).advice
        is MoreDataAdvice.ENOUGH
    )


def test_twice_the_images_of_uneven_classes_bring_what_the_law_says() -> None:
    """The last point of the curve is the largest class; the median one has far fewer images."""
    settings = config()
    known = found(settings)
    evidence = known.evidence.model_copy(update={"images_per_class": 20})
    few = known.model_copy(update={"evidence": evidence, "looked_images": 1000, "missing_images": 0})
    probe = next(
        one
        for one in advice(options(settings, [few]), tie=0.005, paths=["x"] * 4)
        if one.strategy is Strategy.LINEAR_PROBE
    )
    curve = fit_curve(samples(0.5, 0.62, 0.72, 0.8))
    more = more_data(settings, few, probe, curve)
    errors = [1 - point.top1.estimate for point in more.advised]
    laws = [1 - curve.law.top1(100 * factor) for factor in (1, 2, 4)]
    assert [point.images_per_class for point in more.advised] == [100, 200, 400]
    assert errors[1] / errors[0] == pytest.approx(laws[1] / laws[0], abs=0.01)
    assert errors[2] / errors[0] == pytest.approx(laws[2] / laws[0], abs=0.01)
    assert more.advice is MoreDataAdvice.COLLECT


def test_a_probe_on_fewer_images_than_there_are_is_extrapolated_and_not_measured() -> None:
    known = found(config()).evidence
    ahead = known.model_copy(update={"shrink": Shrink(factor=0.8, spread=0.1)})
    probes = (Strategy.LINEAR_PROBE, Strategy.EARLY_LAYER_PROBE)
    assert {by_strategy(config())[one].basis for one in probes} == {Basis.MEASURED}
    assert {by_strategy(config(), evidence=ahead)[one].basis for one in probes} == {Basis.EXTRAPOLATED}


@pytest.mark.parametrize(("given", "batch_size"), [((), 32), (("network.recipe={batch_size: 128}",), 128)])
def test_networks_get_the_batch_that_was_set_or_that_of_the_advice(
    given: tuple[str, ...], batch_size: int
) -> None:
    settings = config(*given)
    for settings_ in (settings, AdviseConfig.model_validate_json(settings.model_dump_json())):
        option = by_strategy(settings_)[Strategy.FROM_SCRATCH]
        parsed, _ = train_config(option.settings, where="here")
        assert parsed.recipe.model_fields_set == {"batch_size"}
        assert parsed.recipe.batch_size == batch_size


@pytest.mark.parametrize("given", [(), ("network.recipe={label_smoothing: 0.1}",)])
def test_batches_that_the_training_images_cannot_fill_are_made_smaller_and_said_to_be(
    given: tuple[str, ...],
) -> None:
    """The recipe of CIFAR's paper has batches of 128, and one with any key set those of its strategy."""
    settings = config("network.reuse={after: layer1}", *given)
    for strategy, option in by_strategy(settings, train_images=25).items():
        recipe = wanted_recipe(train_config(option.settings, where="here")[0])
        assert (recipe.batch_size == 25) is (strategy in NETWORKS)
        assert ("by batches of all 25 images" in option.why) is (strategy in NETWORKS)
        assert recipe.label_smoothing == (0.1 if given and strategy in NETWORKS else 0.0)


def test_a_balance_that_was_set_is_kept_where_classes_are_unbalanced() -> None:
    for given, balance in (("network.epochs=3", "auto"), ("network.recipe={balance: none}", "none")):
        option = by_strategy(config(given), is_unbalanced=True)[Strategy.FINE_TUNE]
        parsed, _ = train_config(option.settings, where="here")
        assert parsed.recipe.balance == balance


def test_without_a_rate_each_strategy_takes_its_own() -> None:
    """One that is written down would be SGD's under any optimiser."""
    for given, rate in ((), None), (("network.learning_rate=0.3",), 0.3):
        found_ = by_strategy(config("network.reuse={after: layer1}", *given))
        for strategy, expected in (
            (Strategy.FINE_TUNE, rate),
            (Strategy.PARTIAL_REUSE, rate),
            (Strategy.FROM_SCRATCH, None),
        ):
            parsed, _ = train_config(found_[strategy].settings, where="here")
            assert parsed.learning_rate == expected
