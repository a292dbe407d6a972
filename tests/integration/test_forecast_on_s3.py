"""What a dry run says of reading, writing and requests, beside what the run then takes of a real S3 server."""

from __future__ import annotations

import pytest

from chaos_jobs import SLICE_ROWS, ChaosBucket
from command_lines import convoy_here, report_of
from fault_proxy import FaultProxy

pytestmark = pytest.mark.integration

NUM_IMAGES = 12 * SLICE_ROWS
PRICES = "prices={per_gb_read: 0.1, per_gb_written: 0.1, per_1000_gets: 1.0, per_1000_puts: 10.0}"


@pytest.fixture(scope="module")
def bucket(
    ray_behind_proxy: None, s3_behind_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> ChaosBucket:
    return ChaosBucket(s3_behind_proxy, tmp_path_factory.mktemp("images"), num_images=NUM_IMAGES)


def test_a_forecast_is_near_what_the_run_takes(bucket: ChaosBucket, s3_behind_proxy: FaultProxy) -> None:
    job = bucket.new_job("score").changed(PRICES)
    foretold = report_of(convoy_here(*job.arguments(), "--dry-run"))
    s3_behind_proxy.forget()
    report = report_of(job.start_here())
    asked = s3_behind_proxy.requests.copy()

    assert {**report["forecast"], "notes": foretold["notes"]} == foretold
    actual = report["actual"]
    assert foretold["images"] == actual["images"] == NUM_IMAGES
    # Of parts of so few rows most bytes are footers, of which a sample has fewer.
    for name, margin in (
        ("bytes_read", 0.1),
        ("get_requests", 0.25),
        ("put_requests", 0.25),
        ("bytes_written", 0.5),
    ):
        assert foretold[name] == pytest.approx(actual[name], rel=margin), name
    assert foretold["cost"]["requests"] == pytest.approx(actual["cost"]["requests"], rel=0.25)
    assert actual["cost"]["requests"] == pytest.approx(
        actual["get_requests"] / 1000 + actual["put_requests"] / 100
    )
    # The server has counted too; the driver's own requests come on top of those of the workers.
    assert NUM_IMAGES <= actual["get_requests"] <= asked["GET"] + asked["HEAD"]
    assert 12 <= actual["put_requests"] <= asked["PUT"]
