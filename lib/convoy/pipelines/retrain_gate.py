"""The gate of a retraining: may this candidate take the champion's place? Decided from the rows that both saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.statistics import Interval, McNemarResult, mcnemar_test, paired_rate_difference

# A difference with a smaller p is one: of the tests that look for harm.
_SIGNIFICANCE = 0.05


class GateConfig(StrictModel):
    """What a candidate must show. Rates are in 0..1, differences the candidate's value less the champion's.

    `margin`: so far below 0 may the 95 % interval of the holdout's top-1 difference reach. `min_gain`: what the
    difference itself must be. `max_class_drop`: what a class of `min_class_rows` rows or more may lose of its recall.
    `max_ece_rise`: what calibration may lose. `max_cost_ratio`: multiply-adds an image, relative to the champion's.
    The newest rows are asked where there are `min_newest_rows`: the candidate must not be significantly worse there.
    """

    margin: float = Field(default=0.005, ge=0, le=1)
    min_gain: float = Field(default=0.0, ge=-1, le=1)
    max_class_drop: float = Field(default=0.1, ge=0, le=1)
    min_class_rows: int = Field(default=20, ge=1)
    max_ece_rise: float = Field(default=0.02, ge=0, le=1)
    max_cost_ratio: float = Field(default=1.05, gt=0)
    min_newest_rows: int = Field(default=30, ge=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelScores:
    """One model on some rows; `found_N` marks those that it could see. `ece` is None for scores that are none.

    `labels_N` are indices that all models share; a class that the model does not know makes its rows wrong.
    """

    labels_N: NDArray[np.int64]
    correct_N: NDArray[np.bool_]
    found_N: NDArray[np.bool_]
    ece: float | None
    macs: int

    def __len__(self) -> int:
        return len(self.labels_N)


class GateCheck(StrictModel):
    """One question of the gate, what was found, and what it may be at least or at most."""

    name: str
    passed: bool
    found: float
    limit: float
    text: str


class PairedScores(StrictModel):
    """Two models on the rows that both saw: top-1 of the first and the second, and what the difference is worth."""

    rows: int
    top1: tuple[float, float]
    difference: Interval
    mcnemar: McNemarResult

    @property
    def first_is_worse(self) -> bool:
        """Whether the first is worse by more than chance."""
        return self.difference.estimate < 0 and self.mcnemar.mid_p < _SIGNIFICANCE


class GateEvidence(StrictModel):
    """What was found on the frozen holdout and on the newest rows; the latter is null where there are too few."""

    holdout: PairedScores
    newest: PairedScores | None
    ece: tuple[float | None, float | None]
    checks: list[GateCheck]

    @property
    def passed(self) -> bool:
        """Whether every check was passed."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The checks that were not passed, or what was gained."""
        failed = [check.text for check in self.checks if not check.passed]
        if failed:
            return "; ".join(failed)
        gained = self.holdout.difference
        return (
            f"top-1 on the holdout {self.holdout.top1[0]:.4f} against {self.holdout.top1[1]:.4f}"
            f" ({gained.low:+.4f} to {gained.high:+.4f}), and no check objects"
        )


def judge(
    candidate: tuple[ModelScores, ModelScores],
    champion: tuple[ModelScores, ModelScores],
    classes: Sequence[str],
    config: GateConfig,
) -> GateEvidence:
    """The gate's evidence from the scores of both models on (the holdout, the newest rows), in the same order."""
    holdout = pair(candidate[0], champion[0])
    newest = pair_if_enough(candidate[1], champion[1], config.min_newest_rows)
    checks = [
        *_holdout_checks(holdout, config),
        *_class_checks(candidate[0], champion[0], classes, config),
        *_calibration_check(candidate[0], champion[0], config),
        cost_check(candidate[0].macs, champion[0].macs, config),
        *_newest_check(newest),
    ]
    return GateEvidence(
        holdout=holdout, newest=newest, ece=(candidate[0].ece, champion[0].ece), checks=checks
    )


def pair(first: ModelScores, second: ModelScores) -> PairedScores:
    """Two models on the rows that both saw; DataError where there is none."""
    both_N = first.found_N & second.found_N
    if not both_N.any():
        raise DataError(
            "no row was seen by both models: they cannot be compared",
            where=f"{int(first.found_N.sum())} and {int(second.found_N.sum())} of {len(first)} rows",
            next_step="look at the rejects of both models' features with `convoy cache`",
        )
    ours_N, theirs_N = first.correct_N[both_N], second.correct_N[both_N]
    return PairedScores(
        rows=int(both_N.sum()),
        top1=(float(ours_N.mean()), float(theirs_N.mean())),
        difference=paired_rate_difference(ours_N, theirs_N),
        mcnemar=mcnemar_test(ours_N, theirs_N),
    )


def least_margin(num_rows: int) -> float:
    """The narrowest margin that a candidate can keep on so many rows without a gain: that of two equal models."""
    all_N = np.ones(num_rows, np.bool_)
    return -paired_rate_difference(all_N, all_N).low


def pair_if_enough(first: ModelScores, second: ModelScores, min_rows: int) -> PairedScores | None:
    """The same, or None where fewer rows than that were seen by both."""
    return pair(first, second) if int((first.found_N & second.found_N).sum()) >= min_rows else None


def _holdout_checks(holdout: PairedScores, config: GateConfig) -> Iterator[GateCheck]:
    gain = holdout.difference
    yield GateCheck(
        name="gain",
        passed=gain.estimate >= config.min_gain,
        found=gain.estimate,
        limit=config.min_gain,
        text=f"top-1 on the holdout changes by {gain.estimate:+.4f}, wanted is {config.min_gain:+.4f}",
    )
    least = least_margin(holdout.rows)
    too_few = f"; on {holdout.rows} rows even of equal models that is {least:.4f}: gate.margin must be wider"
    yield GateCheck(
        name="margin",
        passed=gain.low >= -config.margin,
        found=gain.low,
        limit=-config.margin,
        text=f"top-1 on the holdout may fall by {-gain.low:.4f}, more than the margin of {config.margin:.4f}"
        + (too_few if least > config.margin else ""),
    )


def _class_checks(
    candidate: ModelScores, champion: ModelScores, classes: Sequence[str], config: GateConfig
) -> Iterator[GateCheck]:
    """The class that loses most, of those with rows enough."""
    both_N = candidate.found_N & champion.found_N
    drops: list[tuple[float, str]] = []
    for label in np.unique(candidate.labels_N[both_N]):
        rows_N = both_N & (candidate.labels_N == label)
        if rows_N.sum() >= config.min_class_rows:
            drop = float(champion.correct_N[rows_N].mean() - candidate.correct_N[rows_N].mean())
            drops.append((drop, classes[int(label)]))
    if drops:
        drop, name = max(drops)
        yield GateCheck(
            name="class_floor",
            passed=drop <= config.max_class_drop,
            found=drop,
            limit=config.max_class_drop,
            text=f"class {name} loses {drop:.4f} of its recall, allowed are {config.max_class_drop:.4f}",
        )


def _calibration_check(
    candidate: ModelScores, champion: ModelScores, config: GateConfig
) -> Iterator[GateCheck]:
    """Nothing where one of them gives no probabilities."""
    if candidate.ece is None or champion.ece is None:
        return
    rise = candidate.ece - champion.ece
    yield GateCheck(
        name="calibration",
        passed=rise <= config.max_ece_rise,
        found=rise,
        limit=config.max_ece_rise,
        text=f"the calibration error rises by {rise:.4f}, allowed are {config.max_ece_rise:.4f}",
    )


def cost_check(candidate_macs: int, champion_macs: int, config: GateConfig) -> GateCheck:
    """Whether a candidate may cost what it does, which is known before it is trained."""
    ratio = candidate_macs / max(champion_macs, 1)
    return GateCheck(
        name="cost",
        passed=ratio <= config.max_cost_ratio,
        found=ratio,
        limit=config.max_cost_ratio,
        text=f"an image costs {ratio:.2f} times as much, allowed are {config.max_cost_ratio:.2f}",
    )


def _newest_check(newest: PairedScores | None) -> Iterator[GateCheck]:
    if newest is None:
        return
    change = newest.difference.estimate
    yield GateCheck(
        name="newest",
        passed=not newest.first_is_worse,
        found=change,
        limit=0.0,
        text=f"top-1 on the {newest.rows} newest rows changes by {change:+.4f} (p {newest.mcnemar.mid_p:.3g})",
    )


def summary(evidence: GateEvidence | None) -> dict[str, Any]:
    """The few numbers that go into the history of aliases."""
    if evidence is None:
        return {}
    return {
        "holdout_rows": evidence.holdout.rows,
        "holdout_top1": list(evidence.holdout.top1),
        "holdout_difference": [evidence.holdout.difference.low, evidence.holdout.difference.high],
        "newest_rows": evidence.newest.rows if evidence.newest else 0,
        "failed": [check.name for check in evidence.checks if not check.passed],
    }
