"""What more images would bring: the measured curve of the probe, carried over to the advised strategy."""

from __future__ import annotations

from convoy.core.learning_curve import LearningCurve
from convoy.core.statistics import Interval
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_report import AdvisedForecast, MoreData, MoreDataAdvice
from convoy.pipelines.advise_rule import expected_probe
from convoy.pipelines.advise_strategies import StrategyAdvice, network_top1
from convoy.pipelines.backbone_evidence import BackboneEvidence
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.train_config import NETWORKS

# How far ahead images are asked for that reach a wanted accuracy; further a curve of a few points says nothing.
_FURTHEST = 64.0
_STEPS_A_DOUBLING = 4


def more_data(
    config: AdviseConfig, one: BackboneEvidence, advised: StrategyAdvice, curve: LearningCurve | None
) -> MoreData:
    """Whether to collect more images for the advised strategy on its backbone, and how many."""
    if curve is None:
        return MoreData(
            advice=MoreDataAdvice.UNKNOWN,
            why="there are too few images a class for a learning curve: collect more before anything else",
            curve=None,
            strategy=advised.strategy,
            advised=[],
            wanted_top1=config.wanted_top1,
        )
    forecast = [
        AdvisedForecast(
            factor=factor,
            images_per_class=factor * _start(one, curve),
            top1=_expected(config, one, advised, curve, factor),
        )
        for factor in config.curve.factors
    ]
    now = _expected(config, one, advised, curve, 1.0).estimate
    double = _expected(config, one, advised, curve, 2.0).estimate
    needed = _images_needed(config, one, advised, curve)
    advice, why = _decide(config, advised.strategy, now, double, needed)
    return MoreData(
        advice=advice,
        why=why,
        curve=curve,
        strategy=advised.strategy,
        advised=forecast,
        wanted_top1=config.wanted_top1,
        images_needed=needed,
    )


def _decide(
    config: AdviseConfig, strategy: Strategy, now: float, double: float, needed: float | None
) -> tuple[MoreDataAdvice, str]:
    gain, wanted = double - now, config.wanted_top1
    if strategy is Strategy.AS_IS:
        beyond = "" if wanted is None or now >= wanted else f", and {wanted:.3f} is wanted"
        why = f"nothing is trained: more images change nothing of the {now:.3f} that are expected{beyond}"
        return MoreDataAdvice.ENOUGH, why
    brings = f"twice the images are expected to bring {gain:+.3f}, from {now:.3f} to {double:.3f}"
    if wanted is not None and now < wanted:
        ending = "no forecast reaches it" if needed is None else f"about {needed:.0f} images a class reach it"
        return MoreDataAdvice.COLLECT, f"{now:.3f} is expected and {wanted:.3f} is wanted: {ending}; {brings}"
    if wanted is None and gain >= config.prior.collect_from:
        return MoreDataAdvice.COLLECT, f"{brings}, at least {config.prior.collect_from:g}"
    return MoreDataAdvice.ENOUGH, brings


def _expected(
    config: AdviseConfig,
    one: BackboneEvidence,
    advised: StrategyAdvice,
    curve: LearningCurve,
    factor: float,
) -> Interval:
    """The top-1 of the advised strategy with `factor` times the images: its probe's errors shrink as the curve says."""
    if advised.strategy is Strategy.AS_IS:
        return advised.interval
    shrink = curve.shrink(factor * _start(one, curve))
    images = factor * one.evidence.images_per_class
    evidence = one.evidence.model_copy(update={"images_per_class": images, "shrink": shrink})
    if advised.strategy in NETWORKS:
        return network_top1(one.model_copy(update={"evidence": evidence}), config, advised.strategy)
    if advised.strategy is Strategy.EARLY_LAYER_PROBE and one.svm is not None:
        return expected_probe(one.svm.judged, shrink=shrink)
    return expected_probe(evidence.top, shrink=shrink)


def _start(one: BackboneEvidence, curve: LearningCurve) -> float:
    """Where all images that there are stand on the axis of the curve, whose last point has those looked at."""
    return curve.points[-1].images_per_class * one.train_images / one.looked_images


def _images_needed(
    config: AdviseConfig, one: BackboneEvidence, advised: StrategyAdvice, curve: LearningCurve
) -> float | None:
    """The least images a class, on a grid of quarter doublings, at which the wanted top-1 is expected."""
    if config.wanted_top1 is None:
        return None
    factor = 1.0
    while factor <= _FURTHEST:
        if _expected(config, one, advised, curve, factor).estimate >= config.wanted_top1:
            return factor * _start(one, curve)
        factor *= 2 ** (1 / _STEPS_A_DOUBLING)
    return None
