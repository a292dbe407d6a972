"""Learning-curve forecasts against what the probe reaches with twice and four times the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from convoy.core.config import StrictModel
from convoy.core.learning_curve import CurveSample, fit_curve, weighted_top1
from convoy.core.progress import Silent
from convoy.core.statistics import Interval
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_probes import LabelledFeatures, Prober
from convoy.pipelines.advise_rows import subset_rows
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.workspace import open_workspace
from convoy.storage.datasets import open_dataset

_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
_REPEATS = 3
# The truth is measured on other subsets than those of the curve.
_OTHER_SEED = 1000


class ForecastCase(StrictModel):
    """A forecast from `images_per_class` to `factor` times as many, and the top-1 that was reached there.

    `is_held` says whether the interval holds it. The truth is the mean over subsets, on the rows that judge.
    """

    dataset: str
    tap: str
    images_per_class: int
    factor: int
    forecast: Interval
    truth: float
    is_held: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Tap:
    """One tap of a dataset, and the prober that fits heads on it."""

    dataset: str
    tap: str
    prober: Prober
    features: LabelledFeatures

    def measure(self, size: int, seed: int) -> CurveSample:
        labels_N = self.features.train_labels_N
        subsets = [subset_rows(labels_N, size, seed=seed, repeat=repeat) for repeat in range(_REPEATS)]
        correct = [self.prober.judge(self.features, rows_N=rows_N).correct_M for rows_N in subsets]
        return CurveSample(float(size), np.stack(correct))

    def cases(self, size: int, factors: Sequence[int], seed: int) -> Iterator[ForecastCase]:
        sizes = sorted({max(round(share * size), 1) for share in _SHARES})
        weights_M = self.features.judged_weights_M
        curve = fit_curve([self.measure(one, seed) for one in sizes], weights_N=weights_M, factors=factors)
        for point, factor in zip(curve.forecast, factors, strict=True):
            truth = weighted_top1(self.measure(factor * size, seed + _OTHER_SEED), weights_M)
            yield ForecastCase(
                dataset=self.dataset,
                tap=self.tap,
                images_per_class=size,
                factor=factor,
                forecast=point.top1,
                truth=truth,
                is_held=point.top1.low <= truth <= point.top1.high,
            )


def forecast_cases(
    config: AdviseConfig, sizes: Sequence[int], factors: Sequence[int], seeds: Sequence[int]
) -> list[ForecastCase]:
    """A case for every size, factor, tap and seed of subsets that the dataset has the images for."""
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset_name)
    prober = Prober(store, manifest, config, Silent())
    candidate = config.candidates[0]
    look = prober.look(candidate, fetch_backbone(store, candidate.backbone))
    cases = []
    for name in dict.fromkeys((look.probes.best.tap, look.probes.earlier[0].tap)):
        features = prober.features(prober.set_id(look, name))
        tap = _Tap(config.dataset_name, name, prober, features)
        most = int(np.bincount(features.train_labels_N).min())
        for size in sizes:
            wanted = [factor for factor in factors if factor * size <= most]
            for seed in seeds if wanted else ():
                cases += tap.cases(size, wanted, seed)
    return cases
