"""Made predictions of candidates, and the report that an ensemble of them gets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convoy.core.crop_policies import CropPlan, CropPolicy, crop_views
from convoy.core.statistics import bootstrap_difference, mcnemar_test
from convoy.pipelines.ensemble_building import EnsembleReport
from convoy.pipelines.ensemble_choice import CandidatePredictions, EnsembleChooser, EnsembleSettings
from convoy.pipelines.ensemble_measuring import CropWorth, Gain, SizeWorth
from convoy.vision.ensembling import error_overlap

NUM_ROWS, NUM_CLASSES = 500, 3
LABELS_N = np.random.default_rng(0).integers(0, NUM_CLASSES, NUM_ROWS).astype(np.int32)


def noisy_logits(noise: float, seed: int, num_views: int) -> NDArray[np.float32]:
    """Logits_VNK that point at the label, behind noise that views share in part."""
    rng = np.random.default_rng(seed)
    shared_NK = rng.normal(0, noise, (NUM_ROWS, NUM_CLASSES))
    own_VNK = rng.normal(0, noise / 2, (num_views, NUM_ROWS, NUM_CLASSES))
    return (2.0 * np.eye(NUM_CLASSES)[LABELS_N] + shared_NK + own_VNK).astype(np.float32)


def made_candidates(
    *noises: float,
    policy: CropPolicy = CropPolicy.FLIP,
    seconds: tuple[float, ...] | None = None,
    seconds_once: float = 0.0,
) -> CandidatePredictions:
    plan = CropPlan(policy=policy)
    num_views = len(crop_views(plan))
    return CandidatePredictions(
        logits_MVNK=np.stack([noisy_logits(noise, seed, num_views) for seed, noise in enumerate(noises)]),
        labels_N=LABELS_N,
        plan=plan,
        seconds_per_pass_M=seconds or (0.01,) * len(noises),
        seconds_once_M=(seconds_once,) * len(noises),
        macs_M=(1000,) * len(noises),
        num_networks_M=(1,) * len(noises),
    )


def made_report(candidates: CandidatePredictions, settings: EnsembleSettings | None = None) -> EnsembleReport:
    chooser = EnsembleChooser(candidates, settings or EnsembleSettings())
    choice = chooser.choose()
    better_N = np.random.default_rng(1).random(NUM_ROWS) < 0.9
    worse_N = better_N & (np.random.default_rng(2).random(NUM_ROWS) < 0.95)
    gain = Gain(
        rows="test",
        num_rows=NUM_ROWS,
        top1=float(better_N.mean()),
        best_single_top1=float(worse_N.mean()),
        difference=bootstrap_difference(better_N, worse_N),
        mcnemar=mcnemar_test(better_N, worse_N),
    )
    return EnsembleReport(
        ensemble="made@0",
        best_single="candidate-0@0",
        gain=gain.difference.estimate,
        gain_interval=gain.difference,
        measured=gain,
        members=[],
        crops=choice.point.crops,
        temperature=choice.temperature,
        chosen=choice.point,
        front=choice.front,
        candidates=[f"candidate-{place}@{place}" for place in range(len(candidates.macs_M))],
        overlap=error_overlap(chooser.values(choice.point.crops), LABELS_N).tolist(),
        by_crops=[CropWorth(crops=choice.point.crops, top1=0.9, best_single_top1=0.88, passes_per_image=2)],
        by_size=[SizeWorth(num_members=1, top1=0.87, passes_per_image=2)],
        gate=None,
        evaluation=None,
        reliability_before=[],
        reliability_after=[],
    )
