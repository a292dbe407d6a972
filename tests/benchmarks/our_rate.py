"""The rate of our jobs, taken as that of the peers is."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.pipelines.feature_summary import seconds_under_way
from convoy.pipelines.forecast import steady_slices
from convoy.storage.commits import SliceRecord


def steady_rate(records: Sequence[SliceRecord]) -> float:
    """Images per second of the slices that began after the first one had ended; of all, if those are too few.

    The start of the first slice is what its worker does once: fill its pipeline, try a batch in float32. The rates of
    peers leave their first batch out as well.
    """
    steady = steady_slices(records)
    return sum(one.num_results + one.num_rejects for one in steady) / seconds_under_way(steady)
