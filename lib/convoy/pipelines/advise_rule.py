"""The rule of `convoy advise`: from measured probes to what each strategy is expected to be worth. Pure functions.

CS231n's rule of thumb has two words, small or large and similar or different. Here both are numbers:

- *progress* of a probe: ln(chance error / its error), how far labels are explained, in factors of the error;
- *dissimilarity*, 0 to 1: what share of the pretrained features' progress an untrained network of the same
  architecture makes (1: the pretrained weights bring nothing), or how much of it is lost between the best depth and
  the top, whichever is more.

Probes are measured. A trained network is not, so its worth is the probe's progress times a factor:

    share = n / (n + half_images), n counting images a class
    gained = gain * dissimilarity ** power * share
    lost = loss * (1 - dissimilarity) * (1 - share)
    progress(network) = progress(probe) * (1 + gained - lost)

What does not fit is learnt anew, the more of it the more images there are; what fits is spoilt, the more the fewer
there are. From scratch it starts at the probe of the untrained network, with a dissimilarity of 1. The factor is a
prior (`TransferPrior` says where it is from) with a wide spread, and intervals carry it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat

from convoy.core.config import StrictModel
from convoy.core.learning_curve import AS_MEASURED, Shrink
from convoy.core.statistics import Interval, effective_counts, percentile_interval, wilson_interval
from convoy.pipelines.classifiers import Strategy

_NUM_DRAWS = 4000
_SEED = 0


class TransferPrior(StrictModel):
    """What nobody measures before a training, and where the numbers come from.

    `gain`, `power`, `loss` and `half_images` are those of the module's formula, `spread` is the standard deviation of
    the logarithm of what is gained. They were set by hand so that the formula passes near fine-tunings and trainings
    from scratch of a CIFAR ResNet-20: on photos of hands (tests/benchmarks/results/2026-11-26-strategies.md), on all of
    CIFAR-10 (2026-11-26-cifar.md), and on 20 and 80 CIFAR images a class. So on data and networks like these they
    are no test of the formula, and elsewhere a guess: set your own where you have measured. That fine-tuning
    gains most where features transfer worst is found by Kornblith et al. 2019 (arXiv:1805.08974), that few images do
    not train many layers by Yosinski et al. 2014 (arXiv:1411.1792). `similar_below` and `small_below` only name the
    scenario: the latter is where `freeze_depth: auto` trains half of the body. More images are advised where twice
    as many are expected to bring `collect_from` in top-1.
    """

    gain: NonNegativeFloat = 3.5
    power: PositiveFloat = 1.5
    loss: float = Field(default=0.6, ge=0, le=1)
    half_images: PositiveFloat = 20.0
    spread: NonNegativeFloat = 0.6
    similar_below: float = Field(default=1 / 3, ge=0, le=1)
    small_below: PositiveFloat = 141.0
    collect_from: PositiveFloat = 0.02


class DataSize(StrEnum):
    """How many images a class there are to train on."""

    SMALL = "small"
    LARGE = "large"


class Likeness(StrEnum):
    """Whether the images are like those that the backbone was trained on."""

    SIMILAR = "similar"
    DIFFERENT = "different"


class JudgedProbe(StrictModel):
    """A head on one tap, and how many of the judged rows it got right, both in rows of equal weight.

    Where classes of which more than their share was judged count less, that is what their rows are worth, and no
    whole number.
    """

    tap: str
    num_correct: float
    num_rows: float

    @classmethod
    def of(cls, tap: str, correct_M: NDArray[np.bool_], weights_M: NDArray[np.float64]) -> JudgedProbe:
        """By the judged rows that it got right, and what each of them counts."""
        num_correct, num_rows = effective_counts(correct_M, weights_M)
        return cls(tap=tap, num_correct=num_correct, num_rows=num_rows)

    @property
    def top1(self) -> Interval:
        """The share that is right."""
        return wilson_interval(self.num_correct, self.num_rows)

    @property
    def error(self) -> float:
        """The share that is wrong, half a row at least: a finite sample shows no smaller error."""
        return max(self.num_rows - self.num_correct, 0.5) / self.num_rows


class Evidence(StrictModel):
    """What was measured of one backbone on one dataset: all that the rule knows.

    `images_per_class` are those that a training would have; probes were fitted on as many, or on fewer, and their
    errors then shrink by `shrink` (from the learning curve). `chance_top1` is what always naming the class with most
    training images gets. `top` is the probe at the top of the backbone, `best` the best at any depth, `untrained` the
    best of random weights, both on rows that did not choose the depth. All are judged on rows among which classes have
    the shares that they have where a training is measured.
    """

    images_per_class: PositiveFloat
    chance_top1: float = Field(ge=0, lt=1)
    top: JudgedProbe
    best: JudgedProbe
    untrained: JudgedProbe
    shrink: Shrink = AS_MEASURED


class FourScenarios(StrictModel):
    """CS231n's table with the measured numbers in it, and the strategy that it names."""

    size: DataSize
    images_per_class: float
    small_below: float
    likeness: Likeness
    dissimilarity: float
    similar_below: float
    strategy: Strategy
    says: str


_SCENARIOS = {
    (DataSize.SMALL, Likeness.SIMILAR): (Strategy.LINEAR_PROBE, "a linear classifier on the top features"),
    (DataSize.SMALL, Likeness.DIFFERENT): (
        Strategy.EARLY_LAYER_PROBE,
        "a linear SVM on features of an earlier layer",
    ),
    (DataSize.LARGE, Likeness.SIMILAR): (Strategy.FINE_TUNE, "fine-tuning, deep into the network"),
    (DataSize.LARGE, Likeness.DIFFERENT): (
        Strategy.FINE_TUNE,
        "training from scratch, or all layers from the pretrained weights, which start ahead",
    ),
}


def progress(error: float, chance_top1: float) -> float:
    """ln(chance error / error): 0 for a classifier no better than chance."""
    return max(math.log((1 - chance_top1) / error), 0.0)


def dissimilarity(evidence: Evidence) -> float:
    """How little of the pretraining serves these images, 0 to 1; 1 where no probe beats chance."""
    best = progress(evidence.best.error, evidence.chance_top1)
    if best <= 0:
        return 1.0
    without = progress(evidence.untrained.error, evidence.chance_top1) / best
    lost_at_the_top = 1 - progress(evidence.top.error, evidence.chance_top1) / best
    return min(max(without, lost_at_the_top, 0.0), 1.0)


def four_scenarios(evidence: Evidence, prior: TransferPrior) -> FourScenarios:
    """Which of the four scenarios this is, and what the rule of thumb says of it."""
    images, unlike = evidence.images_per_class, dissimilarity(evidence)
    size = DataSize.SMALL if images < prior.small_below else DataSize.LARGE
    likeness = Likeness.SIMILAR if unlike < prior.similar_below else Likeness.DIFFERENT
    strategy, what = _SCENARIOS[size, likeness]
    return FourScenarios(
        size=size,
        images_per_class=images,
        small_below=prior.small_below,
        likeness=likeness,
        dissimilarity=unlike,
        similar_below=prior.similar_below,
        strategy=strategy,
        says=(
            f"{size.value} ({images:g} images a class, {prior.small_below:g} is the limit) and {likeness.value}"
            f" (dissimilarity {unlike:.2f}, {prior.similar_below:.2f} is the limit): {what}"
        ),
    )


def expected_probe(probe: JudgedProbe, *, shrink: Shrink = AS_MEASURED) -> Interval:
    """The top-1 of a probe that was measured, at the images of the whole dataset."""
    return percentile_interval(1 - _errors(probe, shrink, np.random.default_rng(_SEED)))


def expected_network(
    strategy: Strategy, evidence: Evidence, prior: TransferPrior, *, start: JudgedProbe
) -> Interval:
    """The top-1 that a strategy which trains a network is expected to reach, by the formula of this module.

    `start` is the probe that it starts from: the best one for `fine_tune`, that of the untrained network for
    `from_scratch`, one at the last reused stage for `partial_reuse`, whose new layers begin with nothing: their
    progress is multiplied by n / (n + half_images) once more.
    """
    random = np.random.default_rng(_SEED)
    unlike = dissimilarity(evidence) if strategy is Strategy.FINE_TUNE else 1.0
    share = evidence.images_per_class / (evidence.images_per_class + prior.half_images)
    errors_R = _errors(start, evidence.shrink, random)
    chance_error = 1 - evidence.chance_top1
    progress_R = np.log(chance_error / np.minimum(errors_R, chance_error))
    luck_R = np.exp(prior.spread * random.standard_normal(_NUM_DRAWS))
    gained_R = prior.gain * unlike**prior.power * share * luck_R
    factor_R = 1 + gained_R - prior.loss * (1 - unlike) * (1 - share)
    if strategy is Strategy.PARTIAL_REUSE:
        factor_R *= share
    return percentile_interval(np.clip(1 - chance_error * np.exp(-progress_R * factor_R), 0.0, 1.0))


def rank(
    expected: Sequence[Interval], cost_spans_s: Sequence[tuple[float, float]], *, tie: float
) -> tuple[list[int], list[int]]:
    """The places of the strategies in the order of the advice, and those that count as equal to the best.

    `cost_spans_s` are the limits between which each cost is known. Of those within `tie` of the highest expected top-1
    the cheapest comes first; where costs may be the same, as their limits overlap, the surest: that whose top-1 has the
    highest lower limit. Then the others from the highest expected top-1 to the lowest.
    """
    best = max(top1.estimate for top1 in expected)
    equal = [place for place, top1 in enumerate(expected) if top1.estimate >= best - tie]
    least_s = min(cost_spans_s[place][1] for place in equal)
    as_cheap = [place for place in equal if cost_spans_s[place][0] <= least_s]
    first = max(as_cheap, key=lambda place: (expected[place].low, -cost_spans_s[place][0]))
    rest = [place for place in range(len(expected)) if place != first]
    return [first, *sorted(rest, key=lambda place: (-expected[place].estimate, cost_spans_s[place]))], equal


def _errors(probe: JudgedProbe, shrink: Shrink, random: np.random.Generator) -> NDArray[np.float64]:
    """Draws of a probe's error given the rows that it was judged by (Jeffreys' prior), and of its fall from there."""
    num_wrong = probe.num_rows - probe.num_correct
    errors_R = random.beta(num_wrong + 0.5, probe.num_correct + 0.5, size=_NUM_DRAWS)
    falls_R = shrink.factor * np.exp(shrink.spread * random.standard_normal(_NUM_DRAWS))
    # No law of the curve rises.
    return errors_R * np.minimum(falls_R, 1.0)
