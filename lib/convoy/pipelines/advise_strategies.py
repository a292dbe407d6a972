"""The strategies that advice chooses among: what each is expected to be worth and cost, and its config."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from convoy.core.config import StrictModel, parse_config, write_settings
from convoy.core.fingerprints import digest
from convoy.core.learning_curve import AS_MEASURED
from convoy.core.statistics import Interval
from convoy.pipelines.advise_config import AdviseConfig, plain_name
from convoy.pipelines.advise_rule import (
    JudgedProbe,
    Likeness,
    dissimilarity,
    expected_network,
    expected_probe,
    four_scenarios,
    rank,
)
from convoy.pipelines.backbone_evidence import BackboneEvidence
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.probe_judging import JUDGING_FOLD
from convoy.pipelines.train_config import NETWORKS, TrainConfig
from convoy.pipelines.training_rows import RowLimit
from convoy.pipelines.wanted_training import wanted_recipe
from convoy.storage.object_store import WriterMode
from convoy.storage.stores import open_object, open_store
from convoy.vision.backbone_config import WeightSource, weight_source
from convoy.vision.head_config import HeadKind

# A step is a forward pass and, at twice its price, a backward pass (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
_PASSES_PER_STEP = 3.0
# Of the 128 characters of a bundle's name.
_LONGEST_NAME = 120
# Loading, augmentation, and steps that do not fill the machine: a network's cost is known to a factor of two.
_COST_SPREAD = 2.0
# A pass and fits are timed on fewer images, or beside other work.
_PROBE_SPREAD = 1.5
# Without a timed pass the rate is that of two cores, whatever machine this is.
_UNTIMED_SPREAD = 4.0


class Basis(StrEnum):
    """Whether a figure was measured, or follows from what was measured of fewer images, or from a prior."""

    MEASURED = "measured"
    EXTRAPOLATED = "extrapolated"
    PRIOR = "prior"


class StrategyCost(StrictModel):
    """What a training takes on this machine: seconds, their limits, and money where a price was given."""

    seconds: float
    low_s: float
    high_s: float
    money: float | None
    basis: Basis


class StrategyAdvice(StrictModel):
    """One way to use a backbone. `rank` 1 is advised; `config` is a file for `convoy train`, ready to run."""

    rank: int
    strategy: Strategy
    backbone: str
    tap: str | None
    expected_top1: float
    interval: Interval
    cost: StrategyCost
    basis: Basis
    config: str
    why: str


class Option(StrictModel):
    """A strategy before it is ranked, with the settings of its config."""

    strategy: Strategy
    backbone: str
    tap: str | None
    top1: Interval
    cost: StrategyCost
    basis: Basis
    settings: dict[str, Any]
    why: str


def options(config: AdviseConfig, found: Sequence[BackboneEvidence]) -> list[Option]:
    """Every strategy on every backbone; from scratch only on the one whose untrained network was looked through."""
    result = []
    for one in found:
        made = [*_as_is(config, one), _linear_probe(config, one), *_early_probe(config, one)]
        made += [_fine_tune(config, one)]
        made += [*_partial_reuse(config, one), *_from_scratch(config, one)]
        result += [_that_fills_batches(option, one.train_images) for option in made]
    return result


def advice(found: Sequence[Option], *, tie: float, paths: Sequence[str]) -> list[StrategyAdvice]:
    """The options in the order of the advice; `paths` are where their configs lie, in the order of `found`."""
    spans_s = [(one.cost.low_s, one.cost.high_s) for one in found]
    order, equal = rank([one.top1 for one in found], spans_s, tie=tie)
    best = max(one.top1.estimate for one in found)
    result = []
    for number, place in enumerate(order, start=1):
        option = found[place]
        why = option.why
        if number == 1 and len(equal) > 1:
            why += f"; of {len(equal)} within {tie:g} of the best the surest of those that are about as cheap"
        elif number > 1:
            why += (
                f"; {best - option.top1.estimate:.3f} below the best"
                if place not in equal
                else "; as good, not clearly cheaper"
            )
        result.append(
            StrategyAdvice(
                rank=number,
                strategy=option.strategy,
                backbone=option.backbone,
                tap=option.tap,
                expected_top1=option.top1.estimate,
                interval=option.top1,
                cost=option.cost,
                basis=option.basis,
                config=paths[place],
                why=why,
            )
        )
    return result


def train_config(settings: dict[str, Any], *, where: str) -> tuple[TrainConfig, str]:
    """The config that settings describe, checked as `convoy train` would, and the text of its file."""
    return parse_config(TrainConfig, settings, where=where), write_settings(settings)


def fitting_batches(settings: dict[str, Any], num_rows: int) -> dict[str, Any]:
    """The settings of a training, with batches of no more than all of its rows: larger ones would be refused."""
    config, _ = train_config(settings, where=settings["name"])
    if config.strategy not in NETWORKS or wanted_recipe(config).batch_size <= num_rows:
        return settings
    return settings | {"recipe": {**settings.get("recipe", {}), "batch_size": num_rows}}


def network_top1(one: BackboneEvidence, config: AdviseConfig, strategy: Strategy) -> Interval:
    """The expected top-1 of a strategy that trains a network, from the probe that it starts from."""
    start = {
        Strategy.FINE_TUNE: one.evidence.best,
        Strategy.FROM_SCRATCH: one.evidence.untrained,
        Strategy.PARTIAL_REUSE: one.reused or one.evidence.best,
    }[strategy]
    return expected_network(strategy, one.evidence, config.prior, start=start)


def _that_fills_batches(option: Option, num_rows: int) -> Option:
    """The option with `fitting_batches`, and why where they are others."""
    settings = fitting_batches(option.settings, num_rows)
    if settings is option.settings:
        return option
    why = f"{option.why}; by batches of all {num_rows:,} images, which fill no larger one"
    return option.model_copy(update={"settings": settings, "why": why})


def _as_is(config: AdviseConfig, one: BackboneEvidence) -> list[Option]:
    judged = one.as_is
    if judged is None:
        return []
    return [
        Option(
            strategy=Strategy.AS_IS,
            backbone=one.probes.backbone,
            tap=judged.tap,
            top1=expected_probe(judged),
            # Nothing is trained: no images are looked at for it.
            cost=StrategyCost(seconds=0, low_s=0, high_s=0, money=_money(config, 0), basis=Basis.MEASURED),
            basis=Basis.MEASURED,
            settings=_settings(config, one, Strategy.AS_IS, **one.own_classes),
            why=f"measured: the network's own outputs get {_counted(judged)}",
        )
    ]


def _linear_probe(config: AdviseConfig, one: BackboneEvidence) -> Option:
    top = one.probes.top
    return Option(
        strategy=Strategy.LINEAR_PROBE,
        backbone=one.probes.backbone,
        tap=top.tap,
        top1=expected_probe(one.evidence.top, shrink=one.evidence.shrink),
        cost=_probe_cost(config, one, top.fit_seconds, one.missing_images),
        basis=_probe_basis(one),
        settings=_settings(
            config, one, Strategy.LINEAR_PROBE, tap=top.tap, head=_head(config, one, HeadKind.SOFTMAX, top.C)
        ),
        why=f"measured: a softmax head at {top.tap} gets {_counted(one.evidence.top)}",
    )


def _early_probe(config: AdviseConfig, one: BackboneEvidence) -> list[Option]:
    svm = one.svm
    if svm is None:
        return []
    tap = svm.judged.tap
    head = _head(config, one, HeadKind.LINEAR_SVM, svm.C)
    return [
        Option(
            strategy=Strategy.EARLY_LAYER_PROBE,
            backbone=one.probes.backbone,
            tap=tap,
            top1=expected_probe(svm.judged, shrink=one.evidence.shrink),
            cost=_probe_cost(config, one, svm.fit_seconds, svm.missing_images),
            basis=_probe_basis(one),
            settings=_settings(config, one, Strategy.EARLY_LAYER_PROBE, tap=tap, head=head),
            why=f"measured: a linear SVM at {tap} gets {_counted(svm.judged)}",
        )
    ]


def _fine_tune(config: AdviseConfig, one: BackboneEvidence) -> Option:
    scenario = four_scenarios(one.evidence, config.prior)
    # Unlike the pretraining data no stage is right as it is; else as many train as the images allow.
    depth: int | str = 0 if scenario.likeness is Likeness.DIFFERENT else "auto"
    unlike = dissimilarity(one.evidence)
    head = _head(config, one, HeadKind.SOFTMAX, one.probes.top.C)
    return Option(
        strategy=Strategy.FINE_TUNE,
        backbone=one.probes.backbone,
        tap=None,
        top1=network_top1(one, config, Strategy.FINE_TUNE),
        cost=_network_cost(config, one, one.probes.images_per_s),
        basis=Basis.PRIOR,
        settings=_settings(
            config, one, Strategy.FINE_TUNE, freeze_depth=depth, head=head, **_training(config)
        ),
        why=f"from the probe at {one.evidence.best.tap} and dissimilarity {unlike:.2f}",
    )


def _from_scratch(config: AdviseConfig, one: BackboneEvidence) -> list[Option]:
    if one.untrained_rate is None:
        return []
    untrained = one.evidence.untrained
    training = _training(config)
    # The paper's own rate: that of the transfer would be too small.
    training.pop("learning_rate", None)
    return [
        Option(
            strategy=Strategy.FROM_SCRATCH,
            backbone=one.probes.backbone,
            tap=None,
            top1=network_top1(one, config, Strategy.FROM_SCRATCH),
            cost=_network_cost(config, one, one.untrained_rate),
            basis=Basis.PRIOR,
            settings=_settings(config, one, Strategy.FROM_SCRATCH, **training),
            why=f"from the probe of random weights at {untrained.tap}, {1 - untrained.error:.3f}",
        )
    ]


def _partial_reuse(config: AdviseConfig, one: BackboneEvidence) -> list[Option]:
    reuse = config.network.reuse
    if reuse is None or one.reused is None:
        return []
    layers = reuse.model_dump(mode="json", exclude_defaults=True)
    return [
        Option(
            strategy=Strategy.PARTIAL_REUSE,
            backbone=one.probes.backbone,
            tap=one.reused.tap,
            top1=network_top1(one, config, Strategy.PARTIAL_REUSE),
            cost=_network_cost(config, one, one.probes.images_per_s),
            basis=Basis.PRIOR,
            settings=_settings(
                config,
                one,
                Strategy.PARTIAL_REUSE,
                reuse=layers,
                freeze_depth=f"body.{one.reused.tap}",
                **_training(config),
            ),
            why=f"from the probe at {one.reused.tap}, with new layers above it",
        )
    ]


def _settings(config: AdviseConfig, one: BackboneEvidence, strategy: Strategy, **own: Any) -> dict[str, Any]:
    """A config for `convoy train`, to be run from any folder: what every strategy needs, and its own keys."""
    backbone = one.config.model_dump(mode="json", exclude_defaults=True)
    if strategy is Strategy.FROM_SCRATCH:
        backbone.pop("weights", None)
        backbone.pop("weights_digest", None)
    elif weight_source(one.config) is WeightSource.URI:
        store, key = open_object(one.config.weights)
        backbone["weights"] = store.uri(key)
    settings: dict[str, Any] = {
        "name": config_name(config.dataset_name, strategy, one.probes.backbone),
        "dataset": config.dataset_name,
        "strategy": strategy.value,
        "backbone": backbone,
        **own,
    }
    if config.workspace is not None:
        settings["workspace"] = open_store(config.workspace).root_uri
    if config.writers is not WriterMode.MANY:
        settings["writers"] = config.writers.value
    rows = config.rows if one.has_held_out else config.rows.model_copy(update={"fold": JUDGING_FOLD})
    if rows != RowLimit():
        settings["rows"] = rows.model_dump(mode="json", exclude_defaults=True)
    if strategy in NETWORKS and one.is_unbalanced:
        settings["recipe"] = {"balance": "auto", **settings.get("recipe", {})}
    extraction = config.extraction.model_dump(mode="json", exclude_defaults=True)
    return settings | ({"extraction": extraction} if extraction else {})


def _head(config: AdviseConfig, one: BackboneEvidence, kind: HeadKind, chosen: float) -> dict[str, Any]:
    """The head of a config, as it was measured; where no validation rows can choose, with the C chosen here."""
    return {**config.head_changes, "kind": kind.value} | ({} if one.has_val else {"C": [chosen]})


def config_name(dataset: str, strategy: Strategy, backbone: str) -> str:
    """A name for a bundle, of letters that every store takes, with room for what a verification adds."""
    name = f"{dataset.lower()}-{plain_name(f'{strategy.value}-{backbone}')}"
    if len(name) <= _LONGEST_NAME:
        return name
    end = f"-{digest([dataset, strategy.value, backbone])[:8]}"
    return name[: _LONGEST_NAME - len(end)] + end


def _training(config: AdviseConfig) -> dict[str, Any]:
    network = config.network
    rate = {} if network.learning_rate is None else {"learning_rate": network.learning_rate}
    return rate | {
        "epochs": network.epochs,
        "recipe": network.recipe.model_dump(mode="json", exclude_unset=True),
        "augmentation": network.augmentation.model_dump(mode="json", exclude_defaults=True),
    }


def _probe_basis(one: BackboneEvidence) -> Basis:
    return Basis.MEASURED if one.evidence.shrink == AS_MEASURED else Basis.EXTRAPOLATED


def _probe_cost(
    config: AdviseConfig, one: BackboneEvidence, fit_s: float, missing_images: int
) -> StrategyCost:
    """The rest of the pass, at its measured rate, and fits that take as much longer as there are more rows."""
    pass_s = missing_images / one.probes.images_per_s
    seconds = pass_s + fit_s * one.train_images / max(one.looked_images, 1)
    if missing_images and not one.probes.timed_images:
        return _cost(config, seconds, _UNTIMED_SPREAD, Basis.PRIOR)
    is_whole = not missing_images and one.train_images <= one.looked_images
    return _cost(config, seconds, _PROBE_SPREAD, Basis.MEASURED if is_whole else Basis.EXTRAPOLATED)


def _network_cost(config: AdviseConfig, one: BackboneEvidence, images_per_s: float) -> StrategyCost:
    """Epochs at the measured rate of the forward pass, three passes a step."""
    steps = one.train_images * config.network.epochs * _PASSES_PER_STEP
    spread = _COST_SPREAD if one.probes.timed_images else _COST_SPREAD * _UNTIMED_SPREAD
    return _cost(config, steps / images_per_s, spread, Basis.PRIOR)


def _cost(config: AdviseConfig, seconds: float, spread: float, basis: Basis) -> StrategyCost:
    """A cost that is known to a factor, the spread."""
    return StrategyCost(
        seconds=seconds,
        low_s=seconds / spread,
        high_s=seconds * spread,
        money=_money(config, seconds),
        basis=basis,
    )


def _counted(judged: JudgedProbe) -> str:
    return f"{judged.num_correct:.0f} of {judged.num_rows:.0f}"


def _money(config: AdviseConfig, seconds: float) -> float | None:
    return None if config.price_per_hour is None else seconds / 3600 * config.price_per_hour
