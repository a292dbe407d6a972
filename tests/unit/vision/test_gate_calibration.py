from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy
from convoy.core.errors import ConfigError
from convoy.vision.committee_options import GateLook, gate_passes
from convoy.vision.gate_calibration import CalibratedGate, GateCalibration

FLIP = CropPlan(policy=CropPolicy.FLIP)
NUM_CLASSES = 5


def made_logits(
    num_rows: int = 3000, *, noise: tuple[float, ...] = (1.0, 1.0, 2.0), seed: int = 0
) -> NDArray[np.float32]:
    """Members see the same classes through noise of their own; rows differ in how clear they are."""
    random = np.random.default_rng(seed)
    truth_N = random.integers(NUM_CLASSES, size=num_rows)
    clearness_N = random.exponential(3.0, num_rows)
    signal_NK = np.eye(NUM_CLASSES)[truth_N] * clearness_N[:, None]
    shape = (len(noise), 2, num_rows, NUM_CLASSES)
    scale = np.array(noise)[:, None, None, None]
    return (signal_NK + random.normal(size=shape) * scale).astype(np.float32)


def calibration(
    logits_MVNK: NDArray[np.float32], averaging: Averaging = Averaging.PROBABILITIES
) -> GateCalibration:
    num_members = len(logits_MVNK)
    return GateCalibration(
        logits_MVNK,
        weights_M=[1 / num_members] * num_members,
        temperatures_M=[1.0] * num_members,
        averaging=averaging,
        plan=FLIP,
    )


def outcome(found: CalibratedGate, logits_MVNK: NDArray[np.float32]) -> tuple[float, float]:
    """Agreement and mean passes of a gate that averages probabilities, row by row, by the words of its definition."""
    p_MVNK = softmax(logits_MVNK.astype(np.float64), axis=-1)
    passes = list(gate_passes(found.gate, FLIP, len(logits_MVNK)).values())
    num_agreeing, num_passes = 0, 0
    for row in range(logits_MVNK.shape[2]):
        exact = p_MVNK[:, :, row].mean(axis=(0, 1)).argmax()
        for look, cost in zip(found.gate.looks, passes, strict=False):
            views = [0] if look.policy is CropPolicy.CENTER else [0, 1]
            seen_K = p_MVNK[list(look.members)][:, views, row].mean(axis=(0, 1))
            if seen_K.max() >= look.threshold:
                num_agreeing += seen_K.argmax() == exact
                num_passes += cost
                break
        else:
            num_agreeing += 1
            num_passes += passes[-1]
    return num_agreeing / logits_MVNK.shape[2], num_passes / logits_MVNK.shape[2]


@pytest.mark.parametrize("target", [0.95, 0.99, 0.998])
def test_the_target_is_held_and_the_figures_are_those_of_the_gate(target: float) -> None:
    logits = made_logits()
    found = calibration(logits).best_gate(target)
    assert found.agreement >= target
    everywhere = calibration(logits).measured(found.gate)
    agreement, mean_passes = outcome(found, logits)
    assert everywhere.agreement == pytest.approx(agreement, abs=1e-12)
    assert everywhere.mean_passes == pytest.approx(mean_passes, abs=1e-9)
    assert found.mean_passes == pytest.approx(mean_passes, rel=0.05)
    assert mean_passes < 6


def test_a_gate_that_is_the_best_of_many_misses_its_target_as_seldom_as_it_says() -> None:
    """One of ten may; of 24, 6 or more do in three of a hundred such tests."""
    unseen = calibration(made_logits(10_000, seed=1000))
    found = [
        unseen.measured(calibration(made_logits(600, seed=seed)).best_gate(0.98).gate) for seed in range(24)
    ]
    assert sum(one.agreement < 0.98 for one in found) <= 5
    assert np.mean([one.mean_passes for one in found]) < 5


def test_a_confident_gate_holds_its_target_on_rows_it_has_not_seen() -> None:
    logits = made_logits(8000)
    found = calibration(logits[:, :, :4000]).best_gate(0.98, confidence=0.99)
    agreement, mean_passes = outcome(found, logits[:, :, 4000:])
    unseen = calibration(logits[:, :, 4000:]).measured(found.gate)
    assert (unseen.agreement, unseen.mean_passes) == pytest.approx((agreement, mean_passes), abs=1e-9)
    assert agreement >= 0.98
    assert mean_passes < 5


def test_more_agreement_costs_more_passes() -> None:
    fitted = calibration(made_logits())
    passes = [fitted.best_gate(target).mean_passes for target in (0.9, 0.97, 0.99, 0.998)]
    assert passes == sorted(passes)
    assert passes[0] < passes[-1]


def test_several_looks_leave_less_to_do_than_the_best_single_one() -> None:
    logits = made_logits()
    found = calibration(logits).best_gate(0.99, confidence=0.5)
    assert len(found.gate.looks) > 1
    p_MVNK = softmax(logits.astype(np.float64), axis=-1)
    exact_N = p_MVNK.mean(axis=(0, 1)).argmax(axis=-1)
    for member in range(3):
        seen_NK = p_MVNK[member, 0]
        is_wrong_N = (seen_NK.argmax(axis=-1) != exact_N)[np.argsort(-seen_NK.max(axis=-1))]
        num_believed = int((is_wrong_N.cumsum() <= 30).sum())
        assert calibration(logits).measured(found.gate).mean_passes < 1 + 5 * (1 - num_believed / 3000)


def test_a_member_that_is_always_right_is_looked_at_first_and_alone() -> None:
    logits = made_logits()
    logits[1] = logits.mean(axis=(0, 1)) * 50
    logits[[0, 2]] *= 0.01
    found = calibration(logits, Averaging.LOGITS).best_gate(0.99)
    assert found.gate.members == (1,)
    assert found.mean_passes == pytest.approx(1.0)


def test_without_enough_rows_nothing_is_believed() -> None:
    found = calibration(made_logits(20)).best_gate(0.995)
    assert all(look.threshold > 1 for look in found.gate.looks)
    assert (found.agreement, found.mean_passes) == (1.0, 6.0)


def test_rows_of_equal_confidence_are_believed_together_or_not_at_all() -> None:
    """Two kinds of rows; one look at a single member cannot tell them apart."""
    logits = np.zeros((1, 2, 100, 2), np.float32)
    logits[0, 0, :, 0] = 1.0
    logits[0, 1, :50, 1] = 3.0
    found = calibration(logits).best_gate(0.9)
    assert found.agreement == 1.0
    assert found.mean_passes == 2.0


def test_a_plan_without_a_centre_crop_has_no_gate() -> None:
    with pytest.raises(ConfigError, match="centre"):
        GateCalibration(
            made_logits(10)[:, :1].repeat(144, axis=1),
            weights_M=[1 / 3] * 3,
            temperatures_M=[1.0] * 3,
            averaging=Averaging.PROBABILITIES,
            plan=CropPlan(policy=CropPolicy.MULTISCALE),
        ).best_gate(0.99)


def test_looks_grow_from_one_to_the_next() -> None:
    gate = calibration(made_logits(noise=(1.0, 1.0, 1.0, 1.0))).best_gate(0.99).gate
    members = [set(look.members) for look in gate.looks]
    assert all(one < other for one, other in pairwise(members))
    assert all(isinstance(look, GateLook) for look in gate.looks)


@pytest.mark.parametrize("averaging", list(Averaging))
def test_calibration_holds_no_copy_of_the_outputs_of_all_members(averaging: Averaging) -> None:
    """They may lie on disk because they do not fit."""
    logits_MVNK = np.random.default_rng(0).normal(size=(16, 2, 2000, 200)).astype(np.float32)
    tracemalloc.start()
    calibration(logits_MVNK, averaging).best_gate(0.9)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A few arrays in float64 of one member in one view, and what each look says of each row.
    assert peak_bytes < 0.6 * logits_MVNK.nbytes
