"""A made report of `convoy advise`, and one of `convoy inspect`, with names that nobody should trust."""

from __future__ import annotations

from typing import Any

import numpy as np

from convoy.core.learning_curve import CurveSample, fit_curve
from convoy.core.machine import machine_facts
from convoy.core.statistics import Interval, mcnemar_test, paired_rate_difference, wilson_interval
from convoy.pipelines.advise_data import DataFacts
from convoy.pipelines.advise_probes import BackboneProbes, TapProbe
from convoy.pipelines.advise_report import (
    AdviceReport,
    AdvisedForecast,
    MoreData,
    MoreDataAdvice,
    Similarity,
    Verification,
    VerifiedStrategy,
)
from convoy.pipelines.advise_rule import DataSize, FourScenarios, Likeness, TransferPrior
from convoy.pipelines.advise_strategies import Basis, StrategyAdvice, StrategyCost
from convoy.pipelines.augmentation_effect import AugmentationEffect, EffectBudget
from convoy.pipelines.augmentation_outcomes import PolicyEffect, Verdict
from convoy.pipelines.backbone_costs import BackboneCost
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.cost_front import cost_fronts
from convoy.pipelines.inspect_report import InspectionFigure, InspectionReport
from convoy.pipelines.near_duplicates import NearDuplicateGroup, NearDuplicateReport, NearDuplicateSample
from convoy.storage.duplicates import DuplicateReport
from convoy.vision.engine_options import Precision
from made_pages import IMAGE, QUOTES, SCRIPT

NUM_ROWS = 400
# Two of them are of one architecture.
NAMES = ("small", SCRIPT, "bad")


def interval(estimate: float, width: float = 0.05) -> Interval:
    return Interval(estimate=estimate, low=estimate - width, high=estimate + width, confidence=0.95)


def made_near_duplicates() -> NearDuplicateReport:
    samples = [NearDuplicateSample(sample_id=SCRIPT, split="train", label=None)]
    return NearDuplicateReport(
        threshold=0.9,
        compared=100,
        groups=1,
        samples=2,
        spare=1,
        across_splits=1,
        label_conflicts=0,
        examples=[NearDuplicateGroup(score=0.99, samples=samples)],
    )


def made_cost(arch: str, images_per_s: float, num_parameters: int) -> BackboneCost:
    return BackboneCost(
        arch=arch,
        weights_digest="0" * 32,
        input_px=32,
        num_parameters=num_parameters,
        size_bytes=4 * num_parameters,
        macs=10**6,
        images_per_s=images_per_s,
        from_store=True,
        network_images_per_s=2 * images_per_s,
        slow_network_images_per_s=images_per_s,
        fast_network_images_per_s=3 * images_per_s,
        latency_p50_ms=5000 / images_per_s,
        latency_p95_ms=9000 / images_per_s,
        peak_memory_bytes=None,
        usd_per_million=None,
        precision=Precision.FP32,
        batch_size=32,
        compiled=False,
        num_threads=2,
        machine=machine_facts(None),
        measured_unix_s=1.0,
    )


def made_probes(backbone: str, shift: float) -> BackboneProbes:
    taps = [
        TapProbe(
            tap=f"stage {number}",
            depth=number / 4,
            num_features=8,
            top1=interval(0.5 + 0.08 * number + shift),
            knn_top1=0.5,
            logme=0.1,
            num_correct=200,
            fit_seconds=1.0,
            C=0.1,
        )
        for number in range(4)
    ]
    return BackboneProbes(
        backbone=backbone,
        weights_digest="0" * 32,
        macs=10**6,
        num_parameters=1000,
        images_per_s=100.0,
        judged_rows=NUM_ROWS,
        taps=taps,
    )


def made_strategy(rank: int, strategy: Strategy, top1: float, seconds: float) -> StrategyAdvice:
    cost = StrategyCost(
        seconds=seconds, low_s=seconds / 2, high_s=2 * seconds, money=None, basis=Basis.MEASURED
    )
    return StrategyAdvice(
        rank=rank,
        strategy=strategy,
        backbone=IMAGE,
        tap=None,
        expected_top1=top1,
        interval=interval(top1),
        cost=cost,
        basis=Basis.PRIOR,
        config=QUOTES,
        why=SCRIPT,
    )


def made_more_data() -> MoreData:
    rng = np.random.default_rng(0)
    samples = [
        CurveSample(images_per_class=size, correct_SN=rng.random((3, 200)) < 1 - 0.9 * size**-0.35)
        for size in (10.0, 20.0, 40.0, 80.0)
    ]
    return MoreData(
        advice=MoreDataAdvice.COLLECT,
        why=SCRIPT,
        curve=fit_curve(samples, num_resamples=50),
        strategy=Strategy.FINE_TUNE,
        advised=[AdvisedForecast(factor=2.0, images_per_class=160.0, top1=interval(0.9))],
        wanted_top1=0.95,
        images_needed=None,
    )


def made_effect() -> AugmentationEffect:
    rng = np.random.default_rng(0)
    with_N, without_N = rng.random(NUM_ROWS) < 0.6, rng.random(NUM_ROWS) < 0.8
    effect = PolicyEffect(
        name="mirror",
        strength=None,
        policy={},
        num_rows=NUM_ROWS,
        top1=wilson_interval(int(with_N.sum()), NUM_ROWS),
        difference=paired_rate_difference(with_N, without_N),
        mcnemar=mcnemar_test(with_N, without_N),
        adjusted_p=0.001,
        verdict=Verdict.LOSS,
        top1_as_drawn=None,
        confused=[],
        alike=[],
        warning=SCRIPT,
    )
    return AugmentationEffect(
        dataset="digits",
        arch=IMAGE,
        weights_digest="0" * 32,
        budget=EffectBudget.PROBE,
        tap="pooled",
        views=2,
        num_train_rows=100,
        num_judged_rows=NUM_ROWS,
        without=interval(0.8),
        effects=[effect],
        warnings=[SCRIPT],
        seconds=1.0,
    )


def made_advice() -> AdviceReport:
    costs = [
        made_cost("resnet18", 1000, 10_000),
        made_cost("resnet18", 200, 4_000_000),
        made_cost("lenet5", 100, 90_000),
    ]
    correct_MN = np.stack([np.arange(NUM_ROWS) < rate * NUM_ROWS for rate in (0.7, 0.9, 0.8)])
    size: dict[str, Any] = {
        "samples": {"train": 100}, "classes": 3, "images_per_class_min": 20, "images_per_class_median": 30.0,
        "images_per_class_max": 50, "imbalance": 2.5, "unlabelled": 0, "resolution": None, "looked_at": 100,
        "rejects": 1,
        "reject_codes": {"empty": 1}, "near_duplicates": made_near_duplicates(), "warnings": [SCRIPT],
        "duplicates": DuplicateReport(groups=0, samples=0, across_splits=0, label_conflicts=0, examples=[]),
    }  # fmt: skip
    strategies = [
        made_strategy(1, Strategy.FINE_TUNE, 0.9, 60.0),
        made_strategy(2, Strategy.LINEAR_PROBE, 0.8, 2.0),
    ]
    verified = VerifiedStrategy(
        rank=1,
        strategy=Strategy.FINE_TUNE,
        backbone=IMAGE,
        expected_top1=0.9,
        top1=interval(0.88),
        seconds=5.0,
        bundle="",
    )
    return AdviceReport(
        run="r",
        dataset="digits",
        fingerprint="f" * 32,
        advised=SCRIPT,
        rule=FourScenarios(
            size=DataSize.SMALL, images_per_class=30.0, small_below=141.0, likeness=Likeness.SIMILAR, dissimilarity=0.2,
            similar_below=0.33, strategy=Strategy.LINEAR_PROBE, says=SCRIPT,
        ),
        strategies=strategies,
        more_data=made_more_data(),
        similarity=Similarity(
            verdict=Likeness.SIMILAR, dissimilarity=0.2, backbone=IMAGE, peak_tap="stage 3", peak_depth=0.75,
            peak_top1=interval(0.8), top_top1=interval(0.8), untrained_top1=interval(0.4), knn_top1=0.7,
            domain_distance=None, probes=[made_probes(name, 0.0) for name in NAMES], untrained=made_probes(IMAGE, -0.3),
        ),
        size=DataFacts(**size),
        verification=Verification(
            images_per_class=20, epochs=2, runs=[verified], best=Strategy.FINE_TUNE, regret=0.0,
            difference=interval(-0.02), left_out=3, seconds=9.0,
        ),
        costs=costs,
        cost_fronts=cost_fronts(costs, NAMES, correct_MN),
        augmentation_effect=made_effect(),
        prior=TransferPrior(),
        seconds=100.0,
        notes=[SCRIPT],
        within_error_budget=True,
    )  # fmt: skip


def made_inspection(*names: str) -> InspectionReport:
    figures = [
        InspectionFigure(
            kind="filters",
            name=name,
            title=SCRIPT,
            caption=QUOTES,
            picture=f"{name}.png",
            data=f"{name}.json",
        )
        for name in names
    ]
    return InspectionReport(
        run="r",
        model="m@0",
        model_digest="0" * 32,
        dataset="digits",
        splits=["test"],
        samples=10,
        results=9,
        rejects=1,
        top1=0.5,
        neighbour_agreement=0.25,
        stages=["stem"],
        near_duplicates=made_near_duplicates(),
        figures=figures,
        notes=[SCRIPT],
        folder="/w",
        within_error_budget=True,
    )
