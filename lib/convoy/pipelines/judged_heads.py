"""A head that judges a tap: which of the judged rows it gets right, and what the best of several taps is worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from convoy.core.statistics import Interval, effective_counts, wilson_interval
from convoy.pipelines.advise_rule import JudgedProbe
from convoy.pipelines.probe_judging import CrossFittedProbe, best_by_other_half
from convoy.vision.head_config import HeadConfig
from convoy.vision.head_fitting import fit_path
from convoy.vision.heads import FeatureSource


@dataclass(frozen=True, slots=True, eq=False)
class JudgedHead:
    """Of each judged row if the head is right, its weight, and its place among all that were to judge, in their order.

    `C` is the stronger of the two chosen, `seconds` are those of the fit.
    """

    correct_M: NDArray[np.bool_]
    weights_M: NDArray[np.float64]
    places_M: NDArray[np.intp]
    C: float
    seconds: float

    @property
    def top1(self) -> Interval:
        """The share of judged rows that it gets right."""
        return wilson_interval(*effective_counts(self.correct_M, self.weights_M))

    def judged(self, tap: str) -> JudgedProbe:
        """What the rule needs of it."""
        return JudgedProbe.of(tap, self.correct_M, self.weights_M)


def judge_head(
    config: HeadConfig,
    train: FeatureSource,
    judged_MD: NDArray[np.float32],
    judged_labels_M: NDArray[np.int64],
    judged_weights_M: NDArray[np.float64] | None = None,
    places_M: NDArray[np.intp] | None = None,
    *,
    num_classes: int,
) -> JudgedHead:
    """A head on features, each judged row being judged by one that the other half of the rows chose.

    So none flatters the head that it chose. Rows choose alike, whatever they weigh (by default 1) where they judge.
    Without `places_M` they are all that were to judge.
    """
    started_s = time.monotonic()
    heads = fit_path(config, train, num_classes=num_classes)
    all_M = np.ones(len(judged_MD), np.bool_)
    probe = CrossFittedProbe.choose(heads, judged_MD, all_M, judged_labels_M, config.selection)
    predicted_M = probe.predict(judged_MD, all_M)
    strongest = min(heads.index(head) for head in probe.heads)
    return JudgedHead(
        correct_M=predicted_M == judged_labels_M,
        weights_M=np.ones(len(judged_MD)) if judged_weights_M is None else judged_weights_M,
        places_M=np.arange(len(judged_MD)) if places_M is None else places_M,
        C=sorted(set(config.C))[strongest],
        seconds=time.monotonic() - started_s,
    )


def peak_counts(heads: Sequence[JudgedHead]) -> tuple[float, float]:
    """How many rows are right, and of how many, where the best head was chosen by the others, of equals the last.

    Counted in rows of equal weight, of those that all heads have judged: a tap may have lost some to the range of
    float16, and one that is computed anew to images that have changed since.
    """
    correct_TM, weights_M = _judged_by_all(heads)
    return effective_counts(best_by_other_half(correct_TM, weights_M), weights_M)


def flattery(heads: Sequence[JudgedHead]) -> float:
    """By what share of the rows the best of the heads looks better on those that chose it than on others."""
    correct_TM, weights_M = _judged_by_all(heads)
    chosen_M = best_by_other_half(correct_TM, weights_M)
    right_T = correct_TM @ weights_M
    return max(float(right_T.max() - chosen_M @ weights_M) / float(weights_M.sum()), 0.0)


def _judged_by_all(heads: Sequence[JudgedHead]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """What each head makes of the rows that all of them have judged, and the weights of these."""
    places = [head.places_M for head in heads]
    common = reduce(np.intersect1d, places)
    correct_TM = np.stack([head.correct_M[np.isin(head.places_M, common)] for head in heads])
    return correct_TM, heads[0].weights_M[np.isin(places[0], common)]
