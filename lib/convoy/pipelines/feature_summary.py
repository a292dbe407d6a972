"""What a job that needs features would do, and what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convoy.core.config import StrictModel
from convoy.storage.commits import SliceRecord


class FeatureSummary(StrictModel):
    """What `ensure_features` found and did, in samples; `rows + rejects == samples`.

    `reject_codes` say why of all rejects, whichever call met them; `flags` are of the run's own slices.
    `sets` maps "<tap>/<view>" to the id of its feature set; `run` is the run that computed rows now, or else the
    last one that did. `images_per_s` is the steady rate of this call, over the time in which slices were being
    computed; `first_row_s` is when its first batch was through the network, `seconds` sums over workers.
    """

    run: str | None
    samples: int
    rows: int
    rejects: int
    recomputed: int
    reject_codes: dict[str, int]
    flags: dict[str, int]
    sets: dict[str, str]
    seconds: dict[str, float]
    job_s: float
    images_per_s: float
    first_row_s: float | None
    precision: str
    precision_effect: dict[str, float]
    notes: list[str]

    @property
    def share_computed(self) -> float:
        """Which share of the samples this call computed; the rest was there."""
        return self.recomputed / max(self.samples, 1)


class FeaturePlan(StrictModel):
    """What a job would do: samples asked for, samples that lack something, and a rough forecast of the forward.

    The forecast assumes two cores with native bf16; an unfinished run is gone on with before anything else.
    """

    samples: int
    missing: int
    missing_by_set: dict[str, int]
    unfinished_run: str | None
    precision: str
    forward_forecast_s: float
    notes: list[str]


def slice_totals(slices: Sequence[SliceRecord]) -> dict[str, Any]:
    """The fields of a summary that describe all slices of a run, whenever they were computed."""
    effects = (record.precision_effect for record in slices if record.precision_effect)
    return {
        "reject_codes": _added(record.reject_codes for record in slices),
        "flags": _added(record.flags for record in slices),
        "precision_effect": next(effects, {}),
    }


def timings(finished: Sequence[SliceRecord], started_unix_s: float) -> dict[str, Any]:
    """The fields of a summary that describe the slices that were computed by this call, or by all calls of a run."""
    num_samples = sum(record.num_results + record.num_rejects for record in finished)
    seconds: Counter[str] = Counter()
    for record in finished:
        seconds.update(record.seconds)
    first_rows = [record.first_row_unix_s for record in finished if record.first_row_unix_s]
    return {
        "recomputed": num_samples,
        "seconds": {stage: round(total, 3) for stage, total in seconds.items()},
        "images_per_s": num_samples / max(seconds_under_way(finished), 1e-9),
        "first_row_s": min(first_rows) - started_unix_s if first_rows else None,
    }


def seconds_under_way(slices: Sequence[SliceRecord]) -> float:
    """Seconds in which at least one of the slices was being computed: pauses after a kill do not count."""
    total_s = ended_unix_s = 0.0
    for one in sorted(slices, key=lambda one: one.started_unix_s):
        total_s += max(one.finished_unix_s - max(one.started_unix_s, ended_unix_s), 0.0)
        ended_unix_s = max(ended_unix_s, one.finished_unix_s)
    return total_s


def network_share(slices: Sequence[SliceRecord]) -> float:
    """The share of the time of slices that their operators spent in networks, not waiting for images or writing."""
    seconds = sum(one.finished_unix_s - one.started_unix_s for one in slices)
    return min(sum(one.seconds.get("forward", 0.0) for one in slices) / max(seconds, 1e-9), 1.0)


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)
