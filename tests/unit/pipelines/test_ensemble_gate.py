from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy
from convoy.pipelines.committees import CommitteeMember, CommitteeRecord, committee_of
from convoy.pipelines.ensemble_gate import calibrate_gate, gate_notes, measure_gate
from convoy.storage.local_store import LocalStore
from convoy.vision.ensembling import joint_logits, member_values
from made_bundles import made_classifier

NUM_CLASSES, NUM_ROWS = 10, 3000


@pytest.fixture
def committee(tmp_path: Path) -> CommitteeRecord:
    """Three members whose networks are not asked: their outputs are made."""
    store = LocalStore(str(tmp_path))
    members = [
        CommitteeMember(
            name=f"member {seed}",
            digest=f"{seed}" * 32,
            bundle=None,
            classifier=made_classifier(store, seed),
            weight=1.0,
        )
        for seed in range(3)
    ]
    return committee_of(members, plan=CropPlan(policy=CropPolicy.FLIP))


def made_rows(seed: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Outputs logits_MVNK of three members in two views; rows differ in how clear they are."""
    random = np.random.default_rng(seed)
    labels_N = random.integers(0, NUM_CLASSES, NUM_ROWS).astype(np.int32)
    signal_NK = np.eye(NUM_CLASSES)[labels_N] * random.exponential(4.0, NUM_ROWS)[:, None]
    logits_MVNK = signal_NK + random.normal(0, 1, (3, 2, NUM_ROWS, NUM_CLASSES))
    return logits_MVNK.astype(np.float32), labels_N


def exact_top1(logits_MVNK: NDArray[np.float32], labels_N: NDArray[np.int32]) -> float:
    values_MNK = member_values(logits_MVNK, [0, 1], Averaging.PROBABILITIES, [1.0] * 3)
    joint_NK = joint_logits(values_MNK, [1 / 3] * 3, Averaging.PROBABILITIES)
    return float((joint_NK.argmax(axis=1) == labels_N).mean())


def test_the_target_holds_where_it_was_calibrated_and_where_it_was_not(committee: CommitteeRecord) -> None:
    report = calibrate_gate(committee, made_rows(0)[0], 0.99)
    assert report.val_agreement >= 0.99
    assert report.speedup == pytest.approx(6 / report.val_passes_per_image)
    assert report.speedup > 1.2
    assert report.test is None
    logits_MVNK, labels_N = made_rows(1)
    exact = exact_top1(logits_MVNK, labels_N)
    test = measure_gate(report, committee, logits_MVNK, labels_N, exact_top1=exact).test
    assert test is not None
    assert test.agreement >= 0.99
    assert test.speedup == pytest.approx(report.speedup, rel=0.1)
    # Only rows on which the two disagree can change it.
    assert abs(test.top1_change) <= 1 - test.agreement + 1e-12


def test_the_curve_goes_from_fast_to_true_and_holds_the_wanted_agreement(committee: CommitteeRecord) -> None:
    logits_MVNK, labels_N = made_rows(0)
    report = calibrate_gate(committee, logits_MVNK, 0.985)
    targets = [worth.target_agreement for worth in report.curve]
    assert targets == sorted({*targets, 0.985})
    passes = [worth.val_passes_per_image for worth in report.curve]
    assert passes == sorted(passes)
    assert passes[0] < passes[-1]
    assert all(worth.val_agreement >= worth.target_agreement for worth in report.curve)
    chosen = next(worth for worth in report.curve if worth.target_agreement == 0.985)
    assert chosen.gate == report.gate
    # Some of these rows tested the gates.
    exact = exact_top1(logits_MVNK, labels_N)
    again = measure_gate(report, committee, logits_MVNK, labels_N, exact_top1=exact)
    for worth in again.curve:
        assert worth.test is not None
        assert worth.test.agreement == pytest.approx(worth.val_agreement, abs=0.01)
        assert worth.test.passes_per_image == pytest.approx(worth.val_passes_per_image, rel=0.05)


@pytest.mark.parametrize(
    ("num_rows", "target", "words"),
    [
        (600, 0.995, "takes 690 validation rows, and there are 600"),
        (NUM_ROWS, 1.0, "no number of rows shows an agreement of 1"),
        (NUM_ROWS, 0.9999, "takes 34,538 validation rows"),
        (NUM_ROWS, 0.99, None),
    ],
)
def test_a_gate_that_saves_nothing_says_why(
    committee: CommitteeRecord, num_rows: int, target: float, words: str | None
) -> None:
    report = calibrate_gate(committee, made_rows(0)[0][:, :, :num_rows], target)
    notes = gate_notes(report, num_rows)
    assert (report.speedup == 1) == (words is not None)
    assert [words in note for note in notes if words] == [True] * len(notes)
    assert bool(notes) == (words is not None)


def test_with_the_rows_that_it_takes_a_gate_can_be_shown_to_hold(committee: CommitteeRecord) -> None:
    """Where no look ever disagrees: all members say the same."""
    logits_MVNK = np.repeat(made_rows(0)[0][:1, :1], 3, axis=0).repeat(2, axis=1)
    for num_rows, speedup in ((690, 6.0), (600, 1.0)):
        assert calibrate_gate(committee, logits_MVNK[:, :, :num_rows], 0.995).speedup == speedup
