"""The report of `convoy advise`: what was measured, what it means, and what to do."""

from __future__ import annotations

from enum import StrEnum

from convoy.core.config import StrictModel
from convoy.core.learning_curve import ImagesNeeded, LearningCurve
from convoy.core.statistics import Interval
from convoy.core.transferability import DomainDistance
from convoy.pipelines.advise_data import DataFacts
from convoy.pipelines.advise_probes import BackboneProbes
from convoy.pipelines.advise_rule import FourScenarios, Likeness, TransferPrior
from convoy.pipelines.advise_strategies import StrategyAdvice
from convoy.pipelines.augmentation_effect import AugmentationEffect
from convoy.pipelines.backbone_costs import BackboneCost
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.cost_front import CostFront


class Similarity(StrictModel):
    """How like the pretraining data the images are, measured with the advised backbone.

    `dissimilarity` is 0 (all that pretraining learnt serves) to 1 (nothing); `top_top1` and `peak_top1` are probes at
    the top and at the best depth, `untrained_top1` the best of `untrained`, the same architecture with random
    weights. LogME stands beside each probe in `probes`, never instead of it.
    """

    verdict: Likeness
    dissimilarity: float
    backbone: str
    peak_tap: str
    peak_depth: float
    peak_top1: Interval
    top_top1: Interval
    untrained_top1: Interval
    knn_top1: float
    domain_distance: DomainDistance | None
    probes: list[BackboneProbes]
    untrained: BackboneProbes


class MoreDataAdvice(StrEnum):
    """Whether more images are worth more than another strategy."""

    COLLECT = "collect"
    ENOUGH = "enough"
    NO_HELP = "no_help"  # they would change next to nothing of what is reached, which is less than is wanted
    UNKNOWN = "unknown"  # too few images for a curve


class AdvisedForecast(StrictModel):
    """What the advised strategy is expected to reach with `factor` times the images.

    `images_per_class` is the place on the curve: where classes are uneven, the images of its largest one.
    """

    factor: float
    images_per_class: float
    top1: Interval


class MoreData(StrictModel):
    """What more images would bring. `curve` is of the best probe, measured; `advised` of the advised strategy.

    `images_needed` are those of the largest class at which the advised strategy is expected to reach `wanted_top1`,
    a fold that it is measured on included; the other classes have theirs in proportion. It is null where no forecast
    does, and without a `curve`. `needed` has the limits: where those of the forecast reach it; it is null in reports of
    versions without it.
    """

    advice: MoreDataAdvice
    why: str
    curve: LearningCurve | None
    strategy: Strategy
    advised: list[AdvisedForecast]
    wanted_top1: float | None = None
    images_needed: float | None = None
    needed: ImagesNeeded | None = None


class VerifiedStrategy(StrictModel):
    """A strategy as it was run at the small budget: its top-1 there, and the seconds that it took.

    `top1` is of all rows of `val`; where it cannot judge, of a fold of the budget's own rows, as even as these are.
    `run` has the predictions, and is empty in reports of versions that did not name it.
    """

    rank: int
    strategy: Strategy
    backbone: str
    expected_top1: float
    top1: Interval
    seconds: float
    bundle: str
    run: str = ""


class Verification(StrictModel):
    """The advice against what was run. `regret` is how far the advised strategy stayed behind the best of them.

    `difference` is the top-1 of the best of the others less that of the advised one, on the rows that both predicted,
    with its paired interval; null where there is no other. `left_out` are options of the advice that were not run,
    null in reports of versions that did not count them.
    """

    images_per_class: int
    epochs: int
    runs: list[VerifiedStrategy]
    best: Strategy
    regret: float
    difference: Interval | None = None
    left_out: int | None = None
    seconds: float


class AdviceReport(StrictModel):
    """The advice: what to do, what the rule of thumb says, all strategies in order, and what they rest on.

    Configs are files of the run folder `runs/<run>/configs/`. `costs`, `cost_fronts` and `augmentation_effect` are
    there where the config has these sections. `seconds` is what this look took, all in all.
    """

    run: str
    dataset: str
    fingerprint: str
    advised: str
    rule: FourScenarios
    strategies: list[StrategyAdvice]
    more_data: MoreData
    similarity: Similarity
    size: DataFacts
    verification: Verification | None
    costs: list[BackboneCost]
    cost_fronts: list[CostFront]
    augmentation_effect: AugmentationEffect | None
    prior: TransferPrior
    seconds: float
    notes: list[str]
    within_error_budget: bool
