from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from convoy.pipelines.feature_summary import network_share, seconds_under_way, timings
from convoy.pipelines.forecast import Prices, actual_of, extrapolate, most_rows_of_a_worker, steady_slices
from convoy.pipelines.forecast_sampling import SampleSize, sample_size, spread_blocks
from convoy.storage.commits import PartFile, RunManifest, SliceRecord

PRICES = Prices(per_hour=36.0, per_gb_read=2.0, per_gb_written=3.0, per_1000_gets=5.0, per_1000_puts=7.0)


def made_file(size_bytes: int, num_rows: int = 1) -> PartFile:
    return PartFile(
        key=f"part-{size_bytes}",
        size_bytes=size_bytes,
        etag="",
        checksum="",
        num_rows=num_rows,
        rows_digest="",
    )


def made_slice(
    name: str, started_s: float, finished_s: float, *, num_results: int = 100, num_rejects: int = 0
) -> SliceRecord:
    """A slice that read a megabyte an image and wrote a kilobyte a result."""
    return SliceRecord(
        run_id="r1",
        slice=name,
        attempt="a",
        parts={"predictions": made_file(1000 * num_results, num_results)},
        rejects=made_file(500, num_rejects) if num_rejects else None,
        num_results=num_results,
        num_rejects=num_rejects,
        reject_codes={"truncated": num_rejects} if num_rejects else {},
        flags={},
        seconds={},
        started_unix_s=started_s,
        first_row_unix_s=started_s + 1,
        finished_unix_s=finished_s,
        precision_effect={},
        bytes_read=10**6 * num_results,
    )


# Two workers: their first slices take 10 s, all later ones 5 s.
SAMPLE = [
    made_slice("0-0", 0, 10),
    made_slice("0-1", 0, 10),
    made_slice("0-2", 10, 15),
    made_slice("0-3", 10, 15),
    made_slice("0-4", 15, 20),
    made_slice("0-5", 15, 20),
]


def test_time_in_which_slices_overlap_or_nobody_works_counts_once_or_not_at_all() -> None:
    slices = [
        made_slice("0-0", 0, 10),
        made_slice("0-1", 5, 12),
        made_slice("0-2", 6, 7),
        made_slice("0-3", 50, 51),
    ]
    assert seconds_under_way(slices) == 13
    assert seconds_under_way([]) == 0


def test_what_is_not_spent_in_networks_is_spent_once_an_image() -> None:
    """Of 25 s; a slice without a usable image was in no network."""
    slices = [
        made_slice("0-0", 0, 10).model_copy(update={"seconds": {"forward": 6.0, "wait": 3.0}}),
        made_slice("0-1", 5, 15).model_copy(update={"seconds": {"forward": 4.0}}),
        made_slice("0-2", 5, 10),
    ]
    assert network_share(slices) == pytest.approx(0.4)


def test_the_rate_of_a_run_that_was_killed_and_went_on_later_does_not_count_the_pause() -> None:
    slices = [made_slice("0-0", 0, 10), made_slice("0-1", 5, 20), made_slice("0-2", 3600, 3610)]
    assert timings(slices, 0.0)["images_per_s"] == 10


def test_the_first_slice_of_each_worker_is_not_the_steady_state() -> None:
    assert [one.slice for one in steady_slices(SAMPLE)] == ["0-2", "0-3", "0-4", "0-5"]


def test_a_sample_of_first_slices_alone_is_better_than_none() -> None:
    assert steady_slices(SAMPLE[:2]) == SAMPLE[:2]


def test_the_forecast_scales_the_steady_rate_and_the_bytes_of_the_sample() -> None:
    forecast = extrapolate(
        SAMPLE, slice_rows=[1440] * 100, num_workers=2, startup_s=9.0, prices=PRICES, notes=["why"]
    )
    assert forecast.images_per_s == pytest.approx(40)
    assert forecast.images_per_s_range == pytest.approx((40, 40))
    assert forecast.hours == pytest.approx(1)
    assert (forecast.bytes_read, forecast.bytes_written) == (144 * 10**9, 144 * 10**6)
    assert (forecast.get_requests, forecast.put_requests) == (144_200, 200)
    assert (forecast.sampled_images, forecast.startup_s, forecast.notes) == (600, 9.0, ["why"])
    cost = forecast.cost
    assert (cost.compute, cost.read, cost.written) == pytest.approx((36, 288, 0.432))
    assert cost.requests == pytest.approx(144.2 * 5 + 0.2 * 7)
    assert cost.total == pytest.approx(cost.compute + cost.read + cost.written + cost.requests)


@pytest.mark.parametrize(
    ("gets", "puts", "foretold"),
    [
        pytest.param(3, 2, (1640, 200), id="images in parquet files"),
        pytest.param(102, 3, (144_200, 300), id="objects, of which some are rejected"),
        pytest.param(0, 0, (0, 0), id="all in a local folder"),
    ],
)
def test_requests_are_foretold_as_the_sample_sent_them(
    gets: int, puts: int, foretold: tuple[int, int]
) -> None:
    sample = [one.model_copy(update={"get_requests": gets, "put_requests": puts}) for one in SAMPLE]
    # Weights and the like.
    first = sample[0].model_copy(update={"get_requests": gets + 40})
    forecast = extrapolate(
        [first, *sample[1:]], slice_rows=[1440] * 100, num_workers=2, startup_s=0, prices=PRICES, notes=[]
    )
    assert (forecast.get_requests, forecast.put_requests) == foretold


def test_the_range_is_that_of_the_slowest_and_the_fastest_slice() -> None:
    slices = [*SAMPLE[:2], made_slice("0-2", 10, 14), made_slice("0-3", 14, 22)]
    forecast = extrapolate(slices, slice_rows=[100], num_workers=1, startup_s=0, prices=Prices(), notes=[])
    assert forecast.images_per_s == pytest.approx(200 / 12)
    assert forecast.images_per_s_range == pytest.approx((12.5, 25))
    assert forecast.cost.total == 0


def test_in_the_last_round_workers_without_a_slice_wait() -> None:
    """As 69 slices take 64 workers two rounds; short ones begin last, and two of them fit beside a long one."""
    options = {"startup_s": 0, "prices": PRICES, "notes": []}
    forecast = extrapolate(SAMPLE, slice_rows=[100] * 69, num_workers=64, **options)
    assert forecast.hours * 3600 == pytest.approx(2 * 5)
    assert forecast.images_per_s_range == pytest.approx((690, 690))
    uneven = [100] * 28 + [44, 44, 41]
    assert most_rows_of_a_worker(uneven, 30) == 100
    assert extrapolate(SAMPLE, slice_rows=uneven, num_workers=30, **options).hours * 3600 == pytest.approx(5)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 60])
@pytest.mark.parametrize("num_slices", [4, 120])
def test_the_rate_is_that_of_all_workers_whatever_the_sample_kept_busy(
    num_workers: int, num_slices: int
) -> None:
    """Each of them does 100 images in 5 s."""
    rounds = (divmod(number, num_workers)[0] for number in range(num_slices))
    slices = [made_slice(f"0-{number}", 5 * turn, 5 * turn + 5) for number, turn in enumerate(rounds)]
    forecast = extrapolate(
        slices,
        slice_rows=[600] * 1200,
        num_workers=num_workers,
        startup_s=0,
        prices=PRICES,
        notes=[],
    )
    assert forecast.images_per_s == pytest.approx(20 * num_workers)
    assert forecast.images_per_s_range == pytest.approx((20 * num_workers, 20 * num_workers))
    assert (forecast.hours, forecast.cost.compute) == pytest.approx((10 / num_workers, 360 / num_workers))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "num_workers", "size"),
    [
        (10**6, 32, 1, (4, 128)),
        (10**6, 2, 1, (4, 128)),
        (10**6, 256, 3, (6, 1024)),
        (10**6, 256, 60, (120, 1024)),
        # A quarter of all, and never less than a batch.
        (60_000, 32, 60, (120, 96)),
        (20_000, 256, 10, (20, 256)),
        (96, 16, 2, (4, 16)),
        (13, 4, 1, (3, 4)),
        (5, 32, 60, (1, 32)),
    ],
)
def test_a_sample_has_two_slices_for_each_worker_and_is_a_part_of_the_images(
    num_images: int, batch_size: int, num_workers: int, size: tuple[int, int]
) -> None:
    assert sample_size(num_images, batch_size, num_workers) == size


@pytest.mark.parametrize(
    ("num_images", "num_slices", "slice_rows"), [(100, 4, 10), (13, 3, 4), (12, 3, 4), (5, 1, 32)]
)
def test_a_sample_is_of_blocks_of_neighbours_at_even_distances(
    num_images: int, num_slices: int, slice_rows: int
) -> None:
    rows = pa.table({"row": range(num_images)})
    batches = [rows.slice(0, 7), *rows.slice(7).to_batches(max_chunksize=11)]
    found = spread_blocks(batches, num_images, SampleSize(num_slices, slice_rows))["row"].to_numpy()
    blocks = found.reshape(num_slices, -1)
    assert (np.diff(blocks, axis=1) == 1).all()
    assert (blocks[0, 0], blocks[-1, -1]) == (0, num_images - 1)
    assert np.ptp(np.diff(blocks[:, 0])) <= 1 if num_slices > 1 else len(found) == num_images
    assert len(set(found)) == len(found)


def test_batches_that_are_not_full_cost_as_much_as_full_ones() -> None:
    whole, apart = (
        extrapolate(
            SAMPLE,
            slice_rows=[1440] * 100,
            num_workers=2,
            startup_s=0,
            prices=PRICES,
            notes=[],
            batches_ratio=ratio,
        )
        for ratio in (1.0, 4.0)
    )
    assert apart.hours == pytest.approx(4 * whole.hours)
    assert apart.cost.compute == pytest.approx(4 * whole.cost.compute)
    assert apart.images_per_s_range == pytest.approx((10, 10))
    assert (apart.bytes_read, apart.get_requests) == (whole.bytes_read, whole.get_requests)


def test_a_finished_run_is_told_by_the_same_figures_rejects_included() -> None:
    slices = (made_slice("0-0", 0, 20, num_results=90, num_rejects=10), made_slice("0-1", 10, 40))
    actual = actual_of(RunManifest(run_id="r1", slices=slices), PRICES)
    assert actual.images == 200
    assert actual.hours == pytest.approx(40 / 3600)
    assert actual.images_per_s == pytest.approx(5)
    assert (actual.bytes_read, actual.bytes_written) == (190 * 10**6, 190_500)
    # Three files and two records.
    assert (actual.get_requests, actual.put_requests) == (204, 5)


def test_requests_of_a_finished_run_are_those_that_were_sent() -> None:
    """As of images in tars, with requests that were repeated; beside a slice of before requests were counted."""
    counted = made_slice("0-0", 0, 20).model_copy(update={"get_requests": 23, "put_requests": 4})
    slices = (counted, made_slice("0-1", 10, 40))
    actual = actual_of(RunManifest(run_id="r1", slices=slices), PRICES)
    assert (actual.get_requests, actual.put_requests) == (23 + 102, 4 + 2)


def test_a_run_over_nothing_cost_nothing() -> None:
    actual = actual_of(RunManifest(run_id="r1", slices=()), PRICES)
    assert (actual.images, actual.images_per_s, actual.cost.total) == (0, 0, 0)
