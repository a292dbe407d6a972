"""What more images would bring: the measured curve of the probe, carried over to the advised strategy."""

from __future__ import annotations

import numpy as np

from convoy.core.learning_curve import ImagesNeeded, LearningCurve
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
    advice, why = _decide(config, advised.strategy, now, double, _in_words(needed, one, curve))
    return MoreData(
        advice=advice,
        why=why,
        curve=curve,
        strategy=advised.strategy,
        advised=forecast,
        wanted_top1=config.wanted_top1,
        images_needed=None if needed is None else needed.images_per_class,
        needed=needed,
    )


def _decide(
    config: AdviseConfig, strategy: Strategy, now: float, double: float, needed: str | None
) -> tuple[MoreDataAdvice, str]:
    gain, wanted = double - now, config.wanted_top1
    if strategy is Strategy.AS_IS:
        why = f"nothing is trained: more images change nothing of the {now:.3f} that are expected"
        if wanted is not None and now < wanted:
            return (
                MoreDataAdvice.NO_HELP,
                f"{why}, and {wanted:.3f} is wanted: that takes a training or another network",
            )
        return MoreDataAdvice.ENOUGH, why
    brings = f"twice the images are expected to bring {gain:+.3f}, from {now:.3f} to {double:.3f}"
    if wanted is not None and now < wanted:
        why = f"{now:.3f} is expected and {wanted:.3f} is wanted: {needed or 'no forecast reaches it'}; {brings}"
        if needed is not None or gain >= config.prior.collect_from:
            return MoreDataAdvice.COLLECT, why
        return MoreDataAdvice.NO_HELP, f"{why}: that takes a better network or better labels"
    if wanted is None and gain >= config.prior.collect_from:
        return MoreDataAdvice.COLLECT, f"{brings}, at least {config.prior.collect_from:g}"
    return MoreDataAdvice.ENOUGH, brings


def _in_words(needed: ImagesNeeded | None, one: BackboneEvidence, curve: LearningCurve) -> str | None:
    """How many images reach the wanted top-1, None where no forecast does."""
    if needed is None or needed.images_per_class is None:
        return None
    low = needed.low or needed.images_per_class
    limits = f"{low:.0f} or more" if needed.high is None else f"{low:.0f} to {needed.high:.0f}"
    times = needed.images_per_class * one.learnt_share / _start(one, curve)
    return f"{times:.1f} times the images reach it, about {needed.images_per_class:.0f} of the largest class ({limits})"


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
) -> ImagesNeeded | None:
    """The least images a class, on a grid of quarter doublings, at which the wanted top-1 is expected.

    The limits are where the upper and the lower end of its interval reach it. Of all of them a training that is
    measured on a fold of its images learns from the others.
    """
    wanted = config.wanted_top1
    if wanted is None:
        return None
    factors = 2 ** (np.arange(np.log2(_FURTHEST) * _STEPS_A_DOUBLING + 1) / _STEPS_A_DOUBLING)
    forecast = [
        (factor * _start(one, curve) / one.learnt_share, _expected(config, one, advised, curve, factor))
        for factor in factors.tolist()
    ]
    return ImagesNeeded(
        top1=wanted,
        images_per_class=next((images for images, top1 in forecast if top1.estimate >= wanted), None),
        low=next((images for images, top1 in forecast if top1.high >= wanted), None),
        high=next((images for images, top1 in forecast if top1.low >= wanted), None),
    )
