"""What S3Store makes of the faults of a store: a real S3 server behind a proxy that spoils its answers.

Every test asks whether its fault fired: one that was not met would prove nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from convoy.core.errors import (
    AccessDenied,
    ChecksumMismatch,
    CredentialsExpired,
    CredentialsRefused,
    ExitCode,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageFull,
    StoreUnavailable,
)
from convoy.core.records import RejectCode, SampleRejected
from convoy.core.splits import SplitOptions
from convoy.storage import s3_store as s3_store_module
from convoy.storage import s3_uploads
from convoy.storage.parquet_files import BUFFER_BYTES
from convoy.storage.request_counts import REQUESTS
from convoy.storage.run_input import freeze_input
from convoy.storage.runs import FIRST_SLICE, RunFolder, RunRecord
from convoy.storage.s3_store import S3Store
from convoy.storage.samples import SampleReader
from convoy.storage.sources.completion import complete_rows
from convoy.storage.sources.reading import read_source
from convoy.storage.sources.rows import ReadingOptions
from fault_proxy import (
    ACCESS_DENIED,
    CONFLICT,
    EXPIRED_TOKEN,
    INTERNAL_ERROR,
    NO_ROOM,
    PRECONDITION_FAILED,
    SLOW_DOWN,
    Action,
    Delay,
    FaultProxy,
    FaultRule,
    Hang,
    Refuse,
    Stall,
    Throttle,
    corrupt_body,
    corrupt_upload,
    cut_body,
    lose_answer,
    reset,
)
from made_runs import made_manifest

pytestmark = pytest.mark.integration

DATA = bytes(range(256)) * 400


def name_of(action: Action) -> str:
    return getattr(action, "__name__", str(action))


@pytest.fixture
def store(s3_bucket: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store behind the proxy, with little patience for silence."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.as_server().endpoint)
    return S3Store(s3_bucket, deadline_s=20.0, read_timeout_s=1.0)


@pytest.mark.parametrize(
    "action",
    [
        SLOW_DOWN,
        INTERNAL_ERROR,
        Refuse(502, ""),
        Refuse(504, ""),
        Refuse(429, "TooManyRequests"),
        Delay(0.3),
        Hang(5.0),
        Stall(5.0),
        reset,
        lose_answer,
        cut_body,
        corrupt_body,
    ],
    ids=name_of,
)
def test_a_read_outlives_a_fault_and_is_right(
    store: S3Store, fault_proxy: FaultProxy, action: Action
) -> None:
    store.put("image", DATA)
    with fault_proxy.injecting(FaultRule(method="GET", action=action, times=1)) as (fault,):
        assert store.get("image").data == DATA
    assert fault.fired == 1
    assert store.num_retries == (0 if isinstance(action, Delay) else 1)


@pytest.mark.parametrize(
    "action", [SLOW_DOWN, INTERNAL_ERROR, reset, lose_answer, corrupt_upload], ids=name_of
)
@pytest.mark.parametrize("write", [S3Store.put, S3Store.put_if_absent])
def test_a_write_outlives_a_fault_and_is_whole(
    store: S3Store, fault_proxy: FaultProxy, action: Action, write: Callable[[S3Store, str, bytes], str]
) -> None:
    with fault_proxy.injecting(FaultRule(method="PUT", action=action, times=1)) as (fault,):
        etag = write(store, "manifest", DATA)
    assert fault.fired == 1
    assert store.get("manifest").data == DATA
    assert store.head("manifest").etag == etag


@pytest.mark.parametrize("action", [SLOW_DOWN, INTERNAL_ERROR, reset, lose_answer, cut_body], ids=name_of)
def test_listing_and_deleting_outlive_a_fault(
    store: S3Store, fault_proxy: FaultProxy, action: Action
) -> None:
    keys = [f"part-{number}" for number in range(5)]
    for key in keys:
        store.put(key, b"x")
    with fault_proxy.injecting(FaultRule(method="GET", action=action, times=1)) as (fault,):
        assert [info.key for info in store.list_objects()] == keys
    assert fault.fired == 1
    with fault_proxy.injecting(FaultRule(method="POST", action=action, times=1)) as (fault,):
        store.delete(keys)
    assert fault.fired == 1
    assert list(store.list_objects()) == []


def test_a_store_that_throttles_is_asked_little_more_often_than_it_serves(
    store: S3Store, fault_proxy: FaultProxy
) -> None:
    keys = [f"image-{number}" for number in range(120)]
    for key in keys:
        store.put(key, DATA[:1000])
    # As two processes have them, each with the threads of an operator.
    readers = [S3Store(store.bucket, deadline_s=60.0) for _process in range(2)]
    throttle = Throttle(per_s=10.0)
    fault_proxy.forget()
    with (
        fault_proxy.injecting(FaultRule(method="GET", action=throttle)) as (fault,),
        ThreadPoolExecutor(32) as pool,
    ):
        blobs = list(pool.map(lambda number: readers[number % 2].get(keys[number]), range(len(keys))))
    assert all(blob.data == DATA[:1000] for blob in blobs)
    assert throttle.num_refused > 0
    assert fault.fired == fault_proxy.requests["GET"] <= 2 * len(keys)


def test_a_conflict_is_no_answer_but_a_reason_to_ask_again(store: S3Store, fault_proxy: FaultProxy) -> None:
    with fault_proxy.injecting(FaultRule(method="PUT", action=CONFLICT, times=2)) as (fault,):
        store.put_if_absent("manifest", b"by me")
    assert fault.fired == 2
    assert store.get("manifest").data == b"by me"


def test_a_refusal_is_looked_into_and_not_believed(store: S3Store, fault_proxy: FaultProxy) -> None:
    rule = FaultRule(method="PUT", action=PRECONDITION_FAILED, times=1)
    store.put("manifest", b"by me")
    with fault_proxy.injecting(rule) as (fault,):
        store.put_if_absent("manifest", b"by me")
    assert fault.fired == 1
    for key, action in (("manifest", PRECONDITION_FAILED), ("other", PRECONDITION_FAILED)):
        with (
            fault_proxy.injecting(FaultRule(method="PUT", action=action, times=1)) as (fault,),
            pytest.raises(PreconditionFailed),
        ):
            store.put_if_absent(key, b"by another")
        assert fault.fired == 1
    assert store.get("manifest").data == b"by me"


def test_a_store_that_asks_to_slow_down_is_given_time(store: S3Store, fault_proxy: FaultProxy) -> None:
    """A third of all answers is 503: nobody gives up, and nobody asks twice as often."""
    keys = [f"image-{number:03d}" for number in range(40)]
    for key in keys:
        store.put(key, key.encode())
    fault_proxy.forget()
    rule = FaultRule(action=SLOW_DOWN, share=0.3, seed=1)
    with fault_proxy.injecting(rule) as (fault,), ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda key: store.get(key).data, keys)) == [key.encode() for key in keys]
    assert fault.fired > 5
    assert fault_proxy.requests.total() < 2 * len(keys)


def test_a_store_that_stays_in_trouble_is_given_up_at_the_deadline(
    s3_bucket: str, store: S3Store, fault_proxy: FaultProxy
) -> None:
    impatient = S3Store(s3_bucket, deadline_s=2.0)
    with (
        fault_proxy.injecting(FaultRule(action=SLOW_DOWN)) as (fault,),
        pytest.raises(StoreUnavailable, match="slow down") as caught,
    ):
        impatient.put("image", DATA)
    assert fault.fired > 1
    assert caught.value.retryable


def test_bytes_that_stay_wrong_are_never_handed_on(store: S3Store, fault_proxy: FaultProxy) -> None:
    store.put("weights", DATA)
    with (
        fault_proxy.injecting(FaultRule(method="GET", action=corrupt_body)) as (fault,),
        pytest.raises(ChecksumMismatch, match="checksum") as caught,
    ):
        store.get("weights")
    assert fault.fired == 2
    assert caught.value.where == store.uri("weights")


def test_credentials_that_expired_stop_a_job_that_can_go_on(store: S3Store, fault_proxy: FaultProxy) -> None:
    store.put("image", DATA)
    requests: list[Callable[[], object]] = [
        lambda: store.get("image"),
        lambda: store.get("image", byte_range=(0, 5)),
        # A HEAD has no body, so that the reason has to be asked for.
        lambda: store.head("image"),
        lambda: store.put("image", DATA),
        lambda: store.put_if_absent("other", DATA),
        lambda: list(store.list_objects()),
        lambda: store.delete(["image"]),
    ]
    for request in requests:
        with (
            fault_proxy.injecting(FaultRule(action=EXPIRED_TOKEN)) as (fault,),
            pytest.raises(CredentialsExpired, match="same command") as caught,
        ):
            request()
        assert caught.value.exit_code is ExitCode.STOPPED_RESUMABLE
        assert fault.fired


def test_credentials_are_looked_up_again_once_they_have_expired(
    store: S3Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a mounted secret needs: botocore reads a file of credentials once a client."""
    server = fault_proxy.behind
    words = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    secret = tmp_path / "credentials"
    secret.write_text(words.format(server.access_key, server.secret_key))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secret))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store.put("image", DATA)
    first = store._get_client()
    with fault_proxy.injecting(FaultRule(action=EXPIRED_TOKEN, times=1)) as (fault,):
        assert store.get("image").data == DATA
    assert fault.fired == 1
    assert store._get_client() is not first


def test_a_right_that_is_missing_is_named(store: S3Store, fault_proxy: FaultProxy) -> None:
    store.put("image", DATA)
    for request, right in (
        (lambda: store.put("image", DATA), "s3:PutObject"),
        (lambda: store.get("image"), "s3:GetObject"),
        (lambda: store.head("image"), "s3:GetObject"),
        (lambda: store.delete(["image"]), "s3:DeleteObject"),
        (lambda: list(store.list_objects()), "s3:ListBucket"),
    ):
        with (
            fault_proxy.injecting(FaultRule(action=ACCESS_DENIED)) as (fault,),
            pytest.raises(AccessDenied, match=right) as caught,
        ):
            request()
        assert not isinstance(caught.value, CredentialsRefused)
        assert fault.fired


def test_a_store_without_room_stops_a_job_that_can_go_on(store: S3Store, fault_proxy: FaultProxy) -> None:
    with (
        fault_proxy.injecting(FaultRule(method="PUT", action=NO_ROOM)) as (fault,),
        pytest.raises(StorageFull, match="same command") as caught,
    ):
        store.put("part", DATA)
    assert caught.value.exit_code is ExitCode.STOPPED_RESUMABLE
    assert fault.fired == 1
    with pytest.raises(ObjectNotFound):
        store.get("part")


def images_in(store: S3Store, num_images: int) -> pa.Table:
    """Manifest rows of made images in the store's bucket."""
    for number in range(num_images):
        store.put(f"images/cat/{number}.jpg", bytes([number]) * 1000)
    scan = read_source(store.uri("images"), ReadingOptions())[1]
    return complete_rows(scan, SplitOptions())[0].sort_by("sample_id")


def codes(rows: pa.Table) -> list[RejectCode | None]:
    return [data.code if isinstance(data, SampleRejected) else None for _, data in SampleReader().read(rows)]


def test_an_image_that_stays_wrong_is_one_reject(store: S3Store, fault_proxy: FaultProxy) -> None:
    rows = images_in(store, 5)
    for action, times, code in (
        (corrupt_body, 1, None),
        (corrupt_body, None, RejectCode.CHECKSUM_MISMATCH),
        (ACCESS_DENIED, None, RejectCode.ACCESS_DENIED),
    ):
        rule = FaultRule(method="GET", key=r"cat/3\.jpg", action=action, times=times)
        with fault_proxy.injecting(rule) as (fault,):
            assert codes(rows) == [None, None, None, code, None]
        assert fault.fired


@pytest.mark.parametrize("action", [INTERNAL_ERROR, Refuse(422, "Strange")], ids=name_of)
def test_an_image_that_the_store_keeps_failing_to_give_is_one_reject(
    store: S3Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    monkeypatch.setattr("convoy.storage.stores.S3Store", partial(S3Store, deadline_s=1.0))
    rows = images_in(store, 5)
    with fault_proxy.injecting(FaultRule(method="GET", key=r"cat/3\.jpg", action=action)) as (fault,):
        assert codes(rows) == [None, None, None, RejectCode.UNREADABLE, None]
    assert fault.fired
    with (
        fault_proxy.injecting(FaultRule(method="GET", key=r"\.jpg", action=action)) as (fault,),
        pytest.raises(StorageError),
    ):
        codes(rows)
    assert fault.fired


def test_expired_credentials_are_no_fault_of_the_images(store: S3Store, fault_proxy: FaultProxy) -> None:
    rows = images_in(store, 5)
    rule = FaultRule(method="GET", key=r"\.jpg", action=EXPIRED_TOKEN)
    with fault_proxy.injecting(rule) as (fault,), pytest.raises(CredentialsExpired):
        codes(rows)
    assert fault.fired


def test_an_upload_in_parts_outlives_an_end_that_is_an_error_with_status_200(
    store: S3Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_uploads, "_PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_store_module, "WHOLE_BYTES", 5 << 20)
    data = bytes(6 << 20)
    # The first POST begins the upload.
    rule = FaultRule(method="POST", action=Refuse(200, "InternalError"), start=2, times=1)
    with fault_proxy.injecting(rule) as (fault,):
        store.put("weights", data)
    assert fault.fired == 1
    assert store.get("weights").data == data


def test_requests_are_counted_as_the_server_sees_them(store: S3Store, fault_proxy: FaultProxy) -> None:
    """Repeated ones too, which a bill has as well."""
    store.put("first", DATA)
    fault_proxy.forget()
    REQUESTS.take()
    with fault_proxy.injecting(FaultRule(method="GET", action=INTERNAL_ERROR, times=1)):
        assert store.get("first").data == DATA
    store.head("first")
    store.put("second", DATA)
    counts = REQUESTS.take()
    seen = fault_proxy.requests
    assert counts == (seen["GET"] + seen["HEAD"], seen["PUT"]) == (3, 1)


@pytest.mark.parametrize(("num_rows", "nth_get"), [(50, 1), (100_000, 2)])
def test_a_slice_whose_rows_arrive_damaged_is_read_again(
    store: S3Store, fault_proxy: FaultProxy, num_rows: int, nth_get: int
) -> None:
    """A small shard is compared as a whole; of a large one only ranges are read, whose pages have checksums."""
    rows = made_manifest([f"{number:06d}" for number in range(num_rows)])
    folder = RunFolder(store, "r1")
    groups = freeze_input(folder, [(("set",), rows)], slice_rows=num_rows)
    folder.write_record(RunRecord.new("r1", verb="cache", identity={}, config={}, outputs={}, groups=groups))
    assert (store.head(folder.input_key(0, 0, groups[0].attempt)).size_bytes > BUFFER_BYTES) == (nth_get == 2)
    # The record is read once, with the first slice.
    assert folder.read_slice(FIRST_SLICE).num_rows == num_rows
    rule = FaultRule(method="GET", action=corrupt_body, start=nth_get, times=1)
    with fault_proxy.injecting(rule) as (fault,):
        assert folder.read_slice(FIRST_SLICE).equals(rows)
    assert fault.fired == 1


def test_a_server_that_hangs_costs_its_timeout_and_no_more(store: S3Store, fault_proxy: FaultProxy) -> None:
    store.put("image", DATA)
    started_s = time.monotonic()
    with fault_proxy.injecting(FaultRule(method="GET", action=Stall(30.0), times=1)) as (fault,):
        assert store.get("image").data == DATA
    assert fault.fired == 1
    assert 0.9 < time.monotonic() - started_s < 10
