"""The gate of an ensemble: calibrated on validation rows, and what it holds on rows that did not calibrate it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.pipelines.committees import CommitteeRecord
from convoy.vision.committee_options import GateOptions
from convoy.vision.gate_calibration import GateCalibration, rows_to_show

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
    """A gate for an agreement, and what it holds on the validation rows that tested it.

    And on rows that had no part in it: those of `test`, or where there are none, all of `val`: `cross_fitted`, each
    row by the gate of an ensemble that was chosen without it.
    """

    gate: GateOptions
    target_agreement: float
    val_agreement: float
    val_passes_per_image: float
    speedup: float
    test: GateOutcome | None = None
    cross_fitted: GateOutcome | None = None

    @property
    def untouched(self) -> GateOutcome | None:
        """What it holds on rows that had no part in it."""
        return self.test or self.cross_fitted


class GateReport(GateWorth):
    """The gate of an ensemble. `curve` has those for other agreements, from the loosest to the strictest."""

    curve: tuple[GateWorth, ...]

    def with_cross_fitted(self, outcomes: Mapping[float, GateOutcome]) -> GateReport:
        """The same gates, with what was found for each agreement."""
        curve = tuple(
            worth.model_copy(update={"cross_fitted": outcomes[worth.target_agreement]})
            for worth in self.curve
        )
        return self.model_copy(update={"cross_fitted": outcomes[self.target_agreement], "curve": curve})


@dataclass(slots=True)
class _Totals:
    """Sums over rows; `right_change` is how many more the gates get right than the exact committees."""

    agreeing: float = 0.0
    passes: float = 0.0
    exact_passes: float = 0.0
    right_change: int = 0


class CrossFittedGates:
    """What the gates for an agreement, and for others beside it, hold over folds: an ensemble and its gates each."""

    def __init__(self, target_agreement: float) -> None:
        self._num_rows = 0
        self._totals = {target: _Totals() for target in _targets(target_agreement)}

    def add(
        self,
        seen: GateCalibration,
        unseen: GateCalibration,
        *,
        is_exact_right_N: NDArray[np.bool_],
        labels_N: NDArray[np.int32],
    ) -> None:
        """The rows of a fold: `unseen`, by gates that the `seen` rows calibrate."""
        num_rows = len(labels_N)
        self._num_rows += num_rows
        for target, totals in self._totals.items():
            found = unseen.measured(seen.best_gate(target).gate)
            totals.agreeing += found.agreement * num_rows
            totals.passes += found.mean_passes * num_rows
            totals.exact_passes += unseen.exact_passes * num_rows
            totals.right_change += int((found.class_N == labels_N).sum()) - int(is_exact_right_N.sum())

    def outcomes(self) -> dict[float, GateOutcome]:
        """By agreement, over all rows that were added."""
        return {
            target: GateOutcome(
                agreement=totals.agreeing / self._num_rows,
                passes_per_image=totals.passes / self._num_rows,
                top1_change=totals.right_change / self._num_rows,
                speedup=totals.exact_passes / totals.passes,
            )
            for target, totals in self._totals.items()
        }


def calibrate_gate(
    committee: CommitteeRecord, logits_MVNK: NDArray[np.float32], target_agreement: float
) -> GateReport:
    """The gate for an agreement from outputs of the committee's members at its crops, on validation rows.

    At a one-sided confidence of 90 % the share of equal top-1 classes is at least the target, on other rows too.
    """
    calibration = _calibration(committee, logits_MVNK)
    curve = {target: _worth(calibration, target) for target in _targets(target_agreement)}
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

    def measured(worth: GateWorth) -> GateWorth:
        found = calibration.measured(worth.gate)
        outcome = GateOutcome(
            agreement=found.agreement,
            passes_per_image=found.mean_passes,
            top1_change=float((found.class_N == labels_N).mean()) - exact_top1,
            speedup=calibration.exact_passes / found.mean_passes,
        )
        return worth.model_copy(update={"test": outcome})

    curve = {worth.target_agreement: measured(worth) for worth in report.curve}
    return report.model_copy(
        update={"test": curve[report.target_agreement].test, "curve": tuple(curve.values())}
    )


def gate_notes(report: GateReport, num_rows: int) -> list[str]:
    """What is to be said of a gate that believes no look, and so saves nothing; `num_rows` have calibrated it."""
    if any(look.threshold <= 1 for look in report.gate.looks):
        return []
    wanted = report.target_agreement
    why = f"no look was shown to agree with the whole ensemble on {wanted} of the rows"
    if wanted == 1:
        why = "no number of rows shows an agreement of 1"
    elif num_rows < (needed := rows_to_show(wanted)):
        why = f"to show an agreement of {wanted} takes {needed:,} validation rows, and there are {num_rows:,}"
    return [f"the gate saves nothing: {why}; a lower ensemble.gate may"]


def _targets(wanted: float) -> list[float]:
    return sorted({*_TARGETS, wanted})


def _worth(calibration: GateCalibration, target: float) -> GateWorth:
    best = calibration.best_gate(target)
    return GateWorth(
        gate=best.gate,
        target_agreement=target,
        val_agreement=best.agreement,
        val_passes_per_image=best.mean_passes,
        speedup=calibration.exact_passes / best.mean_passes,
    )


def _calibration(committee: CommitteeRecord, logits_MVNK: NDArray[np.float32]) -> GateCalibration:
    return GateCalibration(
        logits_MVNK,
        weights_M=[member.weight for member in committee.members],
        temperatures_M=[member.temperature for member in committee.members],
        averaging=committee.averaging,
        plan=committee.plan,
    )
