"""The gate of an ensemble: calibrated on validation rows, and what it holds on rows that did not calibrate it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.pipelines.committees import CommitteeRecord
from convoy.vision.committee_options import GateOptions
from convoy.vision.gate_calibration import GateCalibration

# Beside the wanted agreement, for the curve of what each costs.
_TARGETS = (0.95, 0.98, 0.99, 0.995, 0.998)


class GateOutcome(StrictModel):
    """A gate on rows that did not calibrate it, against the exact committee on the same rows.

    `top1_change` is the gated top-1 less the exact one; `speedup` is the ratio of network passes.
    """

    agreement: float
    passes_per_image: float
    top1_change: float
    speedup: float


class GateWorth(StrictModel):
    """A gate for an agreement, and what it holds on the validation rows that tested it, and on those of `test`."""

    gate: GateOptions
    target_agreement: float
    val_agreement: float
    val_passes_per_image: float
    speedup: float
    test: GateOutcome | None = None


class GateReport(GateWorth):
    """The gate of an ensemble. `curve` has those for other agreements, from the loosest to the strictest."""

    curve: tuple[GateWorth, ...]


def calibrate_gate(
    committee: CommitteeRecord, logits_MVNK: NDArray[np.float32], target_agreement: float
) -> GateReport:
    """The gate for an agreement from outputs of the committee's members at its crops, on validation rows.

    At a one-sided confidence of 90 % the share of equal top-1 classes is at least the target, on other rows too.
    """
    calibration = _calibration(committee, logits_MVNK)
    targets = sorted({*_TARGETS, target_agreement})
    curve = {target: _worth(calibration, committee, logits_MVNK.shape[1], target) for target in targets}
    return GateReport(**dict(curve[target_agreement]), curve=tuple(curve.values()))


def measure_gate(
    report: GateReport,
    committee: CommitteeRecord,
    logits_MVNK: NDArray[np.float32],
    labels_N: NDArray[np.int32],
    *,
    exact_top1: float,
) -> GateReport:
    """The same gates, with what they hold on rows that did not calibrate them."""
    calibration = _calibration(committee, logits_MVNK)
    exact_passes = len(committee.members) * logits_MVNK.shape[1]

    def measured(worth: GateWorth) -> GateWorth:
        found = calibration.measured(worth.gate)
        outcome = GateOutcome(
            agreement=found.agreement,
            passes_per_image=found.mean_passes,
            top1_change=float((found.class_N == labels_N).mean()) - exact_top1,
            speedup=exact_passes / found.mean_passes,
        )
        return worth.model_copy(update={"test": outcome})

    curve = {worth.target_agreement: measured(worth) for worth in report.curve}
    return report.model_copy(
        update={"test": curve[report.target_agreement].test, "curve": tuple(curve.values())}
    )


def _worth(
    calibration: GateCalibration, committee: CommitteeRecord, num_views: int, target: float
) -> GateWorth:
    best = calibration.best_gate(target)
    return GateWorth(
        gate=best.gate,
        target_agreement=target,
        val_agreement=best.agreement,
        val_passes_per_image=best.mean_passes,
        speedup=len(committee.members) * num_views / best.mean_passes,
    )


def _calibration(committee: CommitteeRecord, logits_MVNK: NDArray[np.float32]) -> GateCalibration:
    return GateCalibration(
        logits_MVNK,
        weights_M=[member.weight for member in committee.members],
        temperatures_M=[member.temperature for member in committee.members],
        averaging=committee.averaging,
        plan=committee.plan,
    )
