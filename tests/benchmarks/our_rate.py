"""The rate of our jobs, taken as that of the peers is, and what their operators did meanwhile."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

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


def network_share(records: Sequence[SliceRecord]) -> float:
    """The share of all cores, or of all GPUs where there are some, that was in networks while slices were under way.

    It is ours alone, in one run: unlike a ratio to a bound, it does not move with the pace of the machine.
    """
    steady = steady_slices(records)
    num_devices = torch.cuda.device_count() or os.cpu_count() or 1
    return sum(one.seconds["forward"] for one in steady) / (seconds_under_way(steady) * num_devices)
