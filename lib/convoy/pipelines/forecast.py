"""What a scoring will take, by a measured sample, and what it took, by its records: the same figures side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapreplace

from pydantic import Field, NonNegativeFloat

from convoy.core.config import StrictModel
from convoy.pipelines.feature_summary import seconds_under_way
from convoy.storage.commits import RunManifest, SliceRecord

_BYTES_A_GB = 10**9
# What a slice costs beside its images: the footer and the row group of its input.
_GETS_A_SLICE = 2
# Slices whose workers have just started say little of the steady state.
_MIN_STEADY_SLICES = 2


class Prices(StrictModel):
    """Prices in any currency: of an hour of the whole cluster, of traffic, and of requests."""

    per_hour: NonNegativeFloat = 0.0
    per_gb_read: NonNegativeFloat = 0.0
    per_gb_written: NonNegativeFloat = 0.0
    per_1000_gets: NonNegativeFloat = 0.0
    per_1000_puts: NonNegativeFloat = 0.0


class Cost(StrictModel):
    """Money by position, in the currency of the prices."""

    compute: float
    read: float
    written: float
    requests: float
    total: float


class Work(StrictModel):
    """How much there is to do, and how fast it is done.

    `hours` is the time in which a worker was busy with a slice, without start-up and pauses. Requests are those of
    workers to object storage.
    """

    images: int
    images_per_s: float
    hours: float
    bytes_read: int
    bytes_written: int
    get_requests: int
    put_requests: int
    cost: Cost


class Forecast(Work):
    """From a sample: `images_per_s_range` are its slowest and fastest slice, at the same number of workers.

    `images` are those that are left to do, `startup_s` is from the call to the first batch through the network.
    Requests are as many an image as the sample sent: none for local ones, and few for those in parquet files. Where
    nothing is left, there is no sample, and all figures are 0. The run that follows costs by these `prices`, unless it
    is given others.
    """

    images_per_s_range: tuple[float, float]
    startup_s: float
    sampled_images: int
    prices: Prices | None = None
    notes: list[str] = Field(default_factory=list)


class Actual(Work):
    """What a finished run took, over all its attempts that count: requests as they were sent, repeated ones too.

    Of slices of before they were counted they are what the forecast says.
    """


def nothing_left(notes: Sequence[str]) -> Forecast:
    """The forecast for what is done already, without a sample."""
    amounts = {"bytes_read": 0, "bytes_written": 0, "get_requests": 0, "put_requests": 0}
    return Forecast(
        images=0,
        images_per_s=0.0,
        images_per_s_range=(0.0, 0.0),
        hours=0.0,
        cost=_cost(Prices(), 0.0, **amounts),
        startup_s=0.0,
        sampled_images=0,
        prices=None,
        notes=list(notes),
        **amounts,
    )


def actual_of(manifest: RunManifest, prices: Prices) -> Actual:
    """What the published slices of a run took."""
    slices = manifest.slices
    images = manifest.num_results + manifest.num_rejects
    hours = seconds_under_way(slices) / 3600
    files = [file for one in slices for file in one.files]
    amounts = {
        "bytes_read": sum(one.bytes_read for one in slices),
        "bytes_written": sum(file.size_bytes for file in files),
        "get_requests": sum(map(_gets, slices)),
        "put_requests": sum(map(_puts, slices)),
    }
    return Actual(
        images=images,
        images_per_s=_rate(images, hours),
        hours=hours,
        cost=_cost(prices, hours, **amounts),
        **amounts,
    )


def extrapolate(
    sample: Sequence[SliceRecord],
    *,
    slice_rows: Sequence[int],
    num_workers: int,
    startup_s: float,
    prices: Prices,
    notes: Iterable[str],
    batches_ratio: float = 1.0,
) -> Forecast:
    """The forecast for slices of so many rows. The first slice of each worker is left out of the rate.

    A slice is one worker's, and `num_workers` are all that will be at work: how many of them the few slices of a sample
    kept busy says nothing. In the end some of them have no slice left. `batches_ratio` is how many batches there are
    for each one of the images in a single row.
    """
    num_images, num_slices = sum(slice_rows), len(slice_rows)
    steady = steady_slices(sample)
    num_busy = num_images / most_rows_of_a_worker(slice_rows, num_workers) / batches_ratio
    rates = [num_busy * _rate_of_a_worker([one]) for one in steady]
    images_per_s = num_busy * _rate_of_a_worker(steady)
    sampled = sum(_num_rows(one) for one in sample)
    hours = num_images / max(images_per_s, 1e-9) / 3600
    files = [file for one in sample for file in one.parts.values()]
    share = num_images / max(sampled, 1)
    # The first slices have those for the weights, too.
    slice_gets = _GETS_A_SLICE if any(map(_gets, steady)) else 0
    image_gets = max(sum(map(_gets, steady)) - slice_gets * len(steady), 0)
    amounts = {
        "bytes_read": round(share * sum(one.bytes_read for one in sample)),
        "bytes_written": round(share * sum(file.size_bytes for file in files)),
        "get_requests": round(num_images * image_gets / max(sum(map(_num_rows, steady)), 1))
        + slice_gets * num_slices,
        "put_requests": round(num_slices * sum(map(_puts, steady)) / max(len(steady), 1)),
    }
    return Forecast(
        images=num_images,
        images_per_s=_rate(num_images, hours),
        images_per_s_range=(min(rates), max(rates)),
        hours=hours,
        cost=_cost(prices, hours, **amounts),
        startup_s=startup_s,
        sampled_images=sampled,
        prices=prices,
        notes=list(notes),
        **amounts,
    )


def most_rows_of_a_worker(slice_rows: Iterable[int], num_workers: int) -> int:
    """The rows of the worker that is done last, where each takes the largest slice that is left when it is free."""
    rows_W = [0] * num_workers
    for rows in sorted(slice_rows, reverse=True):
        heapreplace(rows_W, rows_W[0] + rows)
    return max(rows_W)


def steady_slices(sample: Sequence[SliceRecord]) -> Sequence[SliceRecord]:
    """The slices that began when another had ended, if there are enough of them, else all."""
    first_end_s = min((one.finished_unix_s for one in sample), default=0.0)
    later = [one for one in sample if one.started_unix_s >= first_end_s]
    return later if len(later) >= _MIN_STEADY_SLICES else sample


def _cost(
    prices: Prices, hours: float, *, bytes_read: int, bytes_written: int, get_requests: int, put_requests: int
) -> Cost:
    compute = hours * prices.per_hour
    read = bytes_read / _BYTES_A_GB * prices.per_gb_read
    written = bytes_written / _BYTES_A_GB * prices.per_gb_written
    requests = get_requests / 1000 * prices.per_1000_gets + put_requests / 1000 * prices.per_1000_puts
    total = compute + read + written + requests
    return Cost(compute=compute, read=read, written=written, requests=requests, total=total)


def _rate(num_images: int, hours: float) -> float:
    return num_images / max(hours * 3600, 1e-9)


def _rate_of_a_worker(slices: Sequence[SliceRecord]) -> float:
    return sum(map(_num_rows, slices)) / max(sum(map(_duration_s, slices)), 1e-9)


def _duration_s(one: SliceRecord) -> float:
    return one.finished_unix_s - one.started_unix_s


def _gets(one: SliceRecord) -> int:
    return _num_rows(one) + _GETS_A_SLICE if one.get_requests is None else one.get_requests


def _puts(one: SliceRecord) -> int:
    return len(one.files) + 1 if one.put_requests is None else one.put_requests


def _num_rows(one: SliceRecord) -> int:
    return one.num_results + one.num_rejects
