"""Reading samples: in order, ahead, checked, and with a reason for each that fails."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import md5
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from convoy.core.errors import (
    AccessDenied,
    ChecksumMismatch,
    CredentialsExpired,
    ExitCode,
    ObjectArchived,
    ObjectUnreadable,
    ReadingRefused,
    SourceMissing,
    StorageError,
    StoreUnavailable,
)
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.core.splits import SplitOptions
from convoy.storage.local_cache import LocalImageCache
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import MANIFEST_SCHEMA
from convoy.storage.object_store import Blob
from convoy.storage.parquet_files import BUFFER_BYTES, buffered_reader, open_parquet_file
from convoy.storage.row_groups import ImageColumn
from convoy.storage.samples import SampleReader
from convoy.storage.sources.completion import complete_rows
from convoy.storage.sources.reading import read_source
from convoy.storage.sources.rows import ReadingOptions
from convoy.storage.stores import UriReader, open_object
from made_sources import jpeg_bytes, shard_bytes, write_files

NEVER_HEAL = {RejectCode.EMPTY, RejectCode.TOO_LARGE}


def rows_of(source: Path) -> pa.Table:
    samples, _ = complete_rows(read_source(str(source), ReadingOptions())[1], SplitOptions())
    return samples.sort_by("sample_id")


def with_values(rows: pa.Table, **values: Any) -> pa.Table:
    changed = [{**row, **values} for row in rows.to_pylist()]
    return pa.Table.from_pylist(changed, MANIFEST_SCHEMA)


def read(rows: pa.Table, **options: Any) -> list[bytes | RejectCode]:
    results = list(SampleReader(**options).read(rows))
    assert [row for row, _ in results] == list(range(rows.num_rows))
    for _, data in results:
        assert isinstance(data, bytes) or (data.stage is Stage.DECODE) == (data.code in NEVER_HEAL)
    return [data if isinstance(data, bytes) else data.code for _, data in results]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path / "folder", *(f"cat/{index:03d}.jpg" for index in range(40)))
    return tmp_path / "folder"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    images = [{"bytes": jpeg_bytes(index), "path": None} for index in range(20)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=6)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("options", [{}, {"num_threads": 1}, {"window_reads": 1}, {"window_bytes": 1}])
def test_objects_come_in_the_order_of_the_rows(folder: Path, options: dict[str, int]) -> None:
    rows = rows_of(folder)
    rows = rows.take(pa.array([7, 3, 39, 0, 3]))
    assert read(rows, **options) == [Path(uri).read_bytes() for uri in rows["uri"].to_pylist()]


def test_files_are_read_by_few_threads_and_objects_of_a_store_by_many_unless_told_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads_of(rows: pa.Table, **options: Any) -> int:
        names = set()

        def fetched(*_: Any) -> bytes:
            names.add(threading.current_thread().name)
            time.sleep(0.02)
            return b"data"

        monkeypatch.setattr("convoy.storage.samples.fetch", fetched)
        read(rows, **options)
        return len(names)

    files = rows_of(folder)
    objects = files.set_column(
        files.column_names.index("uri"),
        "uri",
        pa.array([f"s3://bucket/{row}" for row in range(files.num_rows)]),
    )
    assert threads_of(files) == 2
    # As for a mount of a network: each has a file under way.
    assert threads_of(files, num_threads=12, window_reads=12) == 12
    assert threads_of(objects) == 16
    assert threads_of(objects, num_threads=3) == 3


def test_members_of_shards_are_read_by_range(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(shard_bytes({f"{index}": "cat" for index in range(5)}))
    assert read(rows_of(tmp_path / "0.tar")) == [jpeg_bytes(index) for index in range(5)]


def test_rows_of_parquet_files_come_in_any_order(parquet: Path) -> None:
    rows = rows_of(parquet)
    order = [19, 0, 7, 1, 6, 13, 0]
    assert read(rows.take(pa.array(order))) == [jpeg_bytes(index) for index in order]


@pytest.mark.parametrize(
    ("limit", "value", "longest"), [("BYTES", 3 * len(jpeg_bytes(0)), 2), ("BYTES", 1, 1), ("ROWS", 4, 4)]
)
def test_a_row_group_is_read_in_batches_of_bounded_size(
    parquet: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, longest: int
) -> None:
    lengths = []
    iter_batches = pq.ParquetFile.iter_batches

    def noting(file: pq.ParquetFile, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        for batch in iter_batches(file, *args, **options):
            lengths.append(batch.num_rows)
            yield batch

    rows = rows_of(parquet)
    monkeypatch.setattr(f"convoy.storage.row_groups._BATCH_{limit}", value)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noting)
    order = [19, 0, 7, 1, 5, 6, 13, 0, 8, 3]
    assert read(rows.take(pa.array(order))) == [jpeg_bytes(index) for index in order]
    assert max(lengths) == longest


def test_plain_binary_columns_and_missing_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([jpeg_bytes(0), None, b""])}), tmp_path / "a.parquet")
    assert read(rows_of(tmp_path / "a.parquet")) == [jpeg_bytes(0), RejectCode.EMPTY, RejectCode.EMPTY]


def test_a_row_group_is_read_once(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    iter_batches = pq.ParquetFile.iter_batches

    def counting(file: pq.ParquetFile, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        reads.extend(options["row_groups"])
        return iter_batches(file, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    read(rows_of(parquet).take(pa.array([1, 7, 2, 8, 0])))
    assert sorted(reads) == [0, 1]


def test_a_row_group_is_read_again_rather_than_held_for_rows_far_ahead(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0
    read_images = ImageColumn.read

    def counting(column: ImageColumn, group: int, row_indices: Sequence[int]) -> list[bytes]:
        nonlocal num_read
        num_read += len(row_indices)
        return read_images(column, group, row_indices)

    monkeypatch.setattr(ImageColumn, "read", counting)
    # One of each row group after the other, so that all images would come with the first few.
    order = sorted(range(20), key=lambda row: (row % 6, row))
    reader = SampleReader(window_bytes=4 * len(jpeg_bytes(0)), num_threads=1)
    held = []
    for number, (_, data) in enumerate(reader.read(rows_of(parquet).take(pa.array(order)))):
        assert data == jpeg_bytes(order[number])
        held.append(num_read - number)
    # Those that came along, and the read that is under way.
    assert max(held) <= 8


def test_containers_and_objects_mix(folder: Path, parquet: Path) -> None:
    rows = pa.concat_tables(
        [rows_of(parquet).slice(0, 2), rows_of(folder).slice(0, 2), rows_of(parquet).slice(2, 2)]
    )
    objects = [Path(uri).read_bytes() for uri in rows["uri"].to_pylist()[2:4]]
    assert read(rows) == [jpeg_bytes(0), jpeg_bytes(1), *objects, jpeg_bytes(2), jpeg_bytes(3)]


def test_each_fault_is_a_reject_of_its_row_only(folder: Path) -> None:
    (folder / "cat/001.jpg").write_bytes(b"")
    (folder / "cat/002.jpg").write_bytes(b"x" * 2000)
    rows = rows_of(folder).slice(0, 6)
    os.remove(folder / "cat/003.jpg")
    (folder / "cat/004.jpg").write_bytes(jpeg_bytes(5) + b"another")
    codes = [code for code in read(rows, max_bytes=1999) if not isinstance(code, bytes)]
    assert codes == [RejectCode.EMPTY, RejectCode.TOO_LARGE, RejectCode.GONE, RejectCode.CHANGED]


def test_a_shard_that_shrank_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(shard_bytes({f"{index}": "cat" for index in range(5)}))
    rows = rows_of(path)
    path.write_bytes(shard_bytes({"0": "cat"})[:4096])
    assert read(rows) == [RejectCode.CHANGED] * 5
    path.unlink()
    assert read(rows) == [RejectCode.GONE] * 5


def test_parquet_files_that_are_gone_changed_or_damaged(parquet: Path) -> None:
    rows = rows_of(parquet)
    status = parquet.stat()
    data = bytearray(parquet.read_bytes())
    data[4:400] = b"\xff" * 396
    parquet.write_bytes(data)
    assert set(read(rows)) == {RejectCode.CHANGED}
    os.utime(parquet, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read(rows)[0] is RejectCode.UNREADABLE
    parquet.write_bytes(b"no parquet at all")
    assert set(read(rows)) == {RejectCode.UNREADABLE}
    parquet.unlink()
    assert set(read(rows)) == {RejectCode.GONE}


class _StoreOfRanges(LocalStore):
    """Reads parquet files as an S3 store does: by a request for each range, which the newest version answers."""

    def open_parquet(self, key: str) -> Any:
        return open_parquet_file(buffered_reader(self, key), where=self.uri(key))


@pytest.mark.parametrize("num_rows", [6, 1])
def test_a_parquet_file_that_is_replaced_while_it_is_read_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    path = tmp_path / "a.parquet"

    def write(*images: bytes) -> None:
        pq.write_table(pa.table({"image": images}), tmp_path / "new", row_group_size=1, compression="none")
        os.replace(tmp_path / "new", path)

    def ranges_of(uri: str) -> tuple[LocalStore, str]:
        store, key = open_object(uri)
        assert isinstance(store, LocalStore)
        return _StoreOfRanges(store.root), key

    monkeypatch.setattr("convoy.storage.row_groups.open_object", ranges_of)
    images = [bytes([index]) * BUFFER_BYTES for index in range(6)]
    write(*images)
    outcomes = SampleReader(num_threads=1, window_bytes=1).read(rows_of(path))
    first = next(outcomes)
    write(*images[:num_rows])
    left = [data for _, data in outcomes]
    assert first == (0, images[0])
    assert {data.code for data in left if isinstance(data, SampleRejected)} == {RejectCode.CHANGED}
    # The next one may have been on its way.
    assert isinstance(left[1], SampleRejected)


def test_a_parquet_file_whose_footer_is_damaged_is_unreadable(parquet: Path) -> None:
    rows = rows_of(parquet)
    status = parquet.stat()
    data = bytearray(parquet.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[footer : footer + 60] = b"\xff" * 60
    parquet.write_bytes(data)
    os.utime(parquet, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert set(read(rows)) == {RejectCode.UNREADABLE}


def fail_row_groups(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """The first reads of row groups raise these errors."""
    to_come = list(errors)
    iter_batches = pq.ParquetFile.iter_batches

    def failing(file: pq.ParquetFile, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        if to_come:
            raise to_come.pop(0)
        return iter_batches(file, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", failing)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "made"), OSError("a damaged page"), pa.ArrowInvalid("made")]
)
def test_a_row_group_that_failed_once_is_read_again(
    parquet: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    rows = rows_of(parquet)
    fail_row_groups(monkeypatch, error)
    assert read(rows, num_threads=1) == [jpeg_bytes(index) for index in range(20)]


def test_a_row_group_that_the_disk_does_not_give_is_lost_and_no_other(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(parquet)
    fail_row_groups(monkeypatch, *[OSError(errno.EIO, "made")] * 4)
    found = read(rows, num_threads=1)
    num_lost = found.count(RejectCode.UNREADABLE)
    assert 0 < num_lost < 20
    assert found[num_lost:] == [jpeg_bytes(index) for index in range(num_lost, 20)]


def test_a_parquet_file_that_the_disk_does_not_open_is_a_reject(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opening(*_: Any, **_options: Any) -> Any:
        raise OSError(errno.EIO, "made")

    rows = rows_of(parquet)
    monkeypatch.setattr("convoy.storage.local_store.open_parquet_file", opening)
    assert set(read(rows)) == {RejectCode.UNREADABLE}


def test_a_file_system_that_keeps_failing_otherwise_is_no_fault_of_a_parquet_file(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(parquet)
    fail_row_groups(monkeypatch, *[OSError(errno.ESTALE, "made")] * 2)
    with pytest.raises(StorageError, match="made") as caught:
        read(rows, num_threads=1)
    assert (caught.value.where, caught.value.fields["errno"]) == (str(parquet), errno.ESTALE)


def test_memory_that_a_row_group_lacks_is_no_fault_of_it(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(parquet)
    fail_row_groups(monkeypatch, pa.ArrowMemoryError("made"))
    with pytest.raises(MemoryError):
        read(rows, num_threads=1)


def test_a_wrong_checksum_is_a_reject_and_a_right_one_is_not(folder: Path) -> None:
    rows = rows_of(folder).slice(0, 1)
    digits = md5((folder / "cat/000.jpg").read_bytes()).hexdigest()
    assert isinstance(read(with_values(rows, checksum=f"md5:{digits}"))[0], bytes)
    assert read(with_values(rows, checksum=f"md5:{digits[::-1]}")) == [RejectCode.CHECKSUM_MISMATCH]


class _Store(UriReader):
    """Answers with what a test wants, and counts."""

    def __init__(self, *answers: Blob | Exception, delay_s: float = 0.0) -> None:
        super().__init__()
        self.answers, self.delay_s, self.num_gets = answers, delay_s, 0

    def get(
        self, uri: str, *, byte_range: tuple[int, int] | None = None, wanted_etag: str | None = None
    ) -> Blob:
        answer = self.answers[self.num_gets % len(self.answers)]
        self.num_gets += 1
        time.sleep(self.delay_s)
        if isinstance(answer, Exception):
            raise answer
        return answer


def reader_of(store: UriReader, **options: Any) -> SampleReader:
    reader = SampleReader(**options)
    object.__setattr__(reader, "_uris", store)
    return reader


def test_bytes_that_were_wrong_once_are_read_again(folder: Path) -> None:
    rows = with_values(rows_of(folder).slice(0, 1), etag="e", checksum=f"md5:{md5(b'right').hexdigest()}")
    store = _Store(Blob(data=b"wrong", etag="e"), Blob(data=b"right", etag="e"))
    assert list(reader_of(store).read(rows)) == [(0, b"right")]
    assert store.num_gets == 2


def test_an_etag_that_only_looks_like_an_md5_is_not_held_against_the_bytes(folder: Path) -> None:
    etag = md5(b"of something else").hexdigest()
    rows = with_values(rows_of(folder).slice(0, 1), etag=etag, checksum=f"md5:{etag}")
    assert list(reader_of(_Store(Blob(data=b"data", etag=etag))).read(rows)) == [(0, b"data")]
    compared = _Store(ChecksumMismatch("the store sent other bytes than those of its checksum"))
    ((_, rejected),) = reader_of(compared).read(rows)
    assert isinstance(rejected, SampleRejected)
    assert rejected.code is RejectCode.CHECKSUM_MISMATCH


def test_a_forbidden_object_is_a_reject(folder: Path) -> None:
    rows = with_values(rows_of(folder).slice(0, 2), etag="e")
    store = _Store(AccessDenied("not yours"), Blob(data=b"data", etag="e"))
    (_, rejected), (_, data) = reader_of(store, num_threads=1).read(rows)
    assert isinstance(rejected, SampleRejected)
    assert (rejected.code, rejected.reason, data) == (RejectCode.ACCESS_DENIED, "not yours", b"data")


@pytest.mark.parametrize("in_tar", [False, True])
def test_an_archived_object_is_a_reject_among_others(folder: Path, in_tar: bool) -> None:
    rows = with_values(rows_of(folder).slice(0, 2), etag="e")
    if in_tar:
        rows = with_values(rows, offset_bytes=0, size_bytes=4)
    store = _Store(ObjectArchived("in Glacier"), Blob(data=b"data", etag="e"))
    (_, rejected), (_, data) = reader_of(store, num_threads=1).read(rows)
    assert isinstance(rejected, SampleRejected)
    assert (rejected.code, rejected.stage, data) == (RejectCode.ARCHIVED, Stage.FETCH, b"data")


@pytest.mark.parametrize("in_tar", [False, True])
@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_file_that_the_disk_does_not_give_is_read_once_more_and_then_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_tar: bool, num_failures: int
) -> None:
    write_files(tmp_path, "0.jpg", "1.jpg")
    data = (tmp_path / "0.jpg").read_bytes()
    rows = rows_of(tmp_path)
    if in_tar:
        rows = with_values(rows, offset_bytes=0)
    failures = [OSError(errno.EIO, "made")] * num_failures

    def reading(path: str, mode: str) -> Any:
        if path.endswith("0.jpg") and failures:
            raise failures.pop()
        return open(path, mode)

    monkeypatch.setattr("convoy.storage.local_store.open", reading, raising=False)
    first, second = read(rows)
    assert first == (data if num_failures == 1 else RejectCode.UNREADABLE)
    assert isinstance(second, bytes)


def fail_to_open(
    monkeypatch: pytest.MonkeyPatch, *names: str, code: int = errno.ESTALE, after_images: int = 0
) -> None:
    """Files of these names cannot be opened, by a code that does not say that it is their fault."""
    num_opened = 0

    def opening(path: str, mode: str) -> Any:
        nonlocal num_opened
        if path.endswith(names) and num_opened >= after_images:
            raise OSError(code, "made")
        num_opened += 1
        return open(path, mode)

    monkeypatch.setattr("convoy.storage.local_store.open", opening, raising=False)


def test_a_store_that_gives_nothing_is_no_reject(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(folder)
    fail_to_open(monkeypatch, ".jpg")
    with pytest.raises(StorageError, match="made"):
        read(rows)
    assert _fetch_threads() == 0


@pytest.mark.parametrize("failing", [0, 3, 39])
def test_one_object_that_its_store_keeps_failing_to_give_is_a_reject_and_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    rows = rows_of(folder)
    fail_to_open(monkeypatch, os.path.basename(rows["uri"][failing].as_py()))
    found = read(rows, num_threads=1)
    assert found.pop(failing) is RejectCode.UNREADABLE
    assert all(isinstance(data, bytes) for data in found)


def test_a_store_that_fails_for_many_objects_in_a_row_is_no_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, *(f"{number:03}.jpg" for number in range(40)))
    rows = rows_of(tmp_path)
    fail_to_open(monkeypatch, *(f"{number:03}.jpg" for number in range(1, 40)))
    with pytest.raises(StorageError, match="made"):
        read(rows, num_threads=1)


@pytest.mark.parametrize("after_images", [0, 20])
def test_a_mount_that_fails_for_everything_stops_the_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, after_images: int
) -> None:
    rows = rows_of(folder)
    fail_to_open(monkeypatch, ".jpg", code=errno.EIO, after_images=after_images)
    with pytest.raises(StoreUnavailable, match="disk or mount gives neither"):
        read(rows, num_threads=1)


def test_many_files_in_a_row_that_the_disk_has_lost_are_rejects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, *(f"{number:03}.jpg" for number in range(200)))
    rows = rows_of(tmp_path)
    fail_to_open(monkeypatch, *(f"{number:03}.jpg" for number in range(10, 190)), code=errno.EIO)
    found = read(rows, num_threads=1)
    assert [row for row, data in enumerate(found) if data is RejectCode.UNREADABLE] == list(range(10, 190))


def test_a_parquet_file_that_a_failing_mount_does_not_give_is_no_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [jpeg_bytes(0), jpeg_bytes(1)]}), tmp_path / f"{name}.parquet")
    rows = rows_of(tmp_path)

    def failing(store: LocalStore, key: str, **options: Any) -> Any:
        raise ObjectUnreadable("the mount does not answer", where=key)

    monkeypatch.setattr(LocalStore, "open_parquet", failing)
    monkeypatch.setattr(LocalStore, "get", failing)
    with pytest.raises(StoreUnavailable, match="disk or mount gives neither"):
        read(rows)


def test_a_parquet_file_that_its_store_keeps_failing_to_give_is_lost_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [jpeg_bytes(0), jpeg_bytes(1)]}), tmp_path / f"{name}.parquet")
    rows = rows_of(tmp_path)
    open_parquet = LocalStore.open_parquet

    def opening(store: LocalStore, key: str) -> Any:
        if key == "a.parquet":
            raise StoreUnavailable("no answer")
        return open_parquet(store, key)

    monkeypatch.setattr(LocalStore, "open_parquet", opening)
    lost = RejectCode.UNREADABLE
    assert read(rows) == [lost, lost, jpeg_bytes(0), jpeg_bytes(1)]


def test_images_that_may_not_be_read_among_others_are_rejects(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(folder)
    refused = range(5, 35)
    fail_to_open(monkeypatch, *(rows["uri"][row].as_py() for row in refused), code=errno.EACCES)
    found = read(rows, num_threads=1)
    assert [row for row, data in enumerate(found) if data is RejectCode.ACCESS_DENIED] == list(refused)


@pytest.mark.parametrize("after_images", [0, 20])
def test_a_role_that_may_read_nothing_any_more_stops_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_images: int
) -> None:
    write_files(tmp_path, *(f"{number:03}.jpg" for number in range(70)))
    rows = rows_of(tmp_path)
    fail_to_open(monkeypatch, ".jpg", code=errno.EACCES, after_images=after_images)
    with pytest.raises(ReadingRefused, match="same command"):
        read(rows, num_threads=1)


def images_of_two_folders(root: Path) -> pa.Table:
    write_files(root, *(f"{name}/{number:03}.jpg" for name in ("cat", "dog") for number in range(70)))
    return rows_of(root)


@pytest.mark.parametrize("images_read", [0, 20])
def test_a_folder_that_is_not_mounted_stops_the_job(tmp_path: Path, images_read: int) -> None:
    rows = images_of_two_folders(tmp_path / "images")
    reader = SampleReader(num_threads=1)
    assert len(list(reader.read(rows.slice(0, images_read)))) == images_read
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(SourceMissing, match="not one image") as caught:
        list(reader.read(rows.slice(images_read)))
    assert caught.value.exit_code is ExitCode.STOPPED_RESUMABLE
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    assert all(isinstance(data, bytes) for _, data in reader.read(rows))


def test_a_mount_that_lies_empty_in_its_place_stops_the_job(tmp_path: Path) -> None:
    write_files(tmp_path / "mounts" / "images", *(f"{number:03}.jpg" for number in range(70)))
    rows = rows_of(tmp_path / "mounts" / "images")
    (tmp_path / "mounts" / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "mounts" / "images").mkdir()
    with pytest.raises(SourceMissing):
        read(rows)


def test_a_parquet_file_that_is_not_mounted_stops_the_job_for_all_its_rows(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    file = tmp_path / "mount" / "a.parquet"
    pq.write_table(pa.table({"image": [jpeg_bytes(0)] * 70}), file)
    rows = rows_of(file)
    shutil.rmtree(tmp_path / "mount")
    with pytest.raises(SourceMissing):
        read(rows)


@pytest.mark.parametrize("deleted", ["cat", "dog"])
def test_images_of_a_folder_that_was_deleted_are_rejects_among_others(tmp_path: Path, deleted: str) -> None:
    rows = images_of_two_folders(tmp_path / "images")
    (tmp_path / "images" / deleted).rename(tmp_path / "elsewhere")
    for part in (rows, rows.filter(pc.match_substring(rows["uri"], f"/{deleted}/"))):
        found = read(part, num_threads=1)
        lost = [RejectCode.GONE if f"/{deleted}/" in uri else bytes for uri in part["uri"].to_pylist()]
        assert [one if one is RejectCode.GONE else type(one) for one in found] == lost


def test_credentials_that_the_store_refuses_are_no_reject(folder: Path) -> None:
    rows = with_values(rows_of(folder), etag="e")
    with pytest.raises(CredentialsExpired):
        list(reader_of(_Store(CredentialsExpired("over"))).read(rows))


def test_closing_early_stops_the_threads_and_the_reading(folder: Path) -> None:
    store = _Store(Blob(data=b"data", etag="e"), delay_s=0.01)
    iterator = reader_of(store, num_threads=4, window_reads=8).read(with_values(rows_of(folder), etag="e"))
    assert next(iterator)[0] == 0
    assert _fetch_threads() == 4
    iterator.close()  # type: ignore[attr-defined]
    assert _fetch_threads() == 0
    assert store.num_gets <= 8


def wait_for(is_so: Callable[[], bool]) -> None:
    """Until it is so, or ten seconds are over: threads of a busy machine take their time."""
    deadline_s = time.monotonic() + 10
    while not is_so() and time.monotonic() < deadline_s:
        time.sleep(0.005)


@pytest.mark.parametrize(("options", "held"), [({"window_bytes": 350}, 3), ({"window_reads": 5}, 5)])
def test_no_more_is_read_ahead_than_the_window_holds(
    folder: Path, options: dict[str, int], held: int
) -> None:
    store = _Store(Blob(data=b"data", etag="e"))
    rows = with_values(rows_of(folder), etag="e", size_bytes=100)
    iterator = reader_of(store, **options).read(rows)
    for num_gets in (held, held + 1):
        next(iterator)
        wait_for(lambda wanted=num_gets: store.num_gets >= wanted)
        time.sleep(0.05)  # for one that must not come
        assert store.num_gets == num_gets
    iterator.close()  # type: ignore[attr-defined]


@pytest.fixture
def cache(tmp_path: Path, ample_disk: None) -> LocalImageCache:
    return LocalImageCache(str(tmp_path / "cache"), 1 << 20)


def as_remote(rows: pa.Table, **values: Any) -> pa.Table:
    """The rows as if their objects lay in a bucket."""
    changed = [{**row, "uri": f"s3://bucket{row['uri']}", **values} for row in rows.to_pylist()]
    return pa.Table.from_pylist(changed, MANIFEST_SCHEMA)


def test_what_the_cache_has_needs_no_request(folder: Path, cache: LocalImageCache) -> None:
    rows = as_remote(rows_of(folder), etag="e")
    store = _Store(Blob(data=b"data", etag="e"))
    for num_gets in (40, 40):
        assert list(reader_of(store, cache=cache).read(rows)) == [(row, b"data") for row in range(40)]
        assert store.num_gets == num_gets
    assert (cache.counts.hits, cache.counts.misses, cache.counts.admitted_bytes) == (40, 40, 160)


def test_a_damaged_file_of_the_cache_is_fetched_again(folder: Path, cache: LocalImageCache) -> None:
    rows = as_remote(rows_of(folder).slice(0, 2), etag="e")
    store = _Store(Blob(data=b"data", etag="e"))
    list(reader_of(store, cache=cache).read(rows))
    for path in Path(cache.folder).rglob(rows["content_id"][1].as_py().hex()):
        path.write_bytes(path.read_bytes()[:-1])
    assert list(reader_of(store, cache=cache).read(rows)) == [(0, b"data"), (1, b"data")]
    assert store.num_gets == 3


def test_what_failed_its_checks_is_not_cached(folder: Path, cache: LocalImageCache) -> None:
    rows = as_remote(rows_of(folder).slice(0, 1), etag="e", checksum=f"md5:{md5(b'right').hexdigest()}")
    for answer, code in (
        (Blob(data=b"wrong", etag="e"), RejectCode.CHECKSUM_MISMATCH),
        (Blob(data=b"right", etag="of another version"), RejectCode.CHANGED),
        (AccessDenied("not yours"), RejectCode.ACCESS_DENIED),
    ):
        ((_, rejected),) = reader_of(_Store(answer), cache=cache).read(rows)
        assert isinstance(rejected, SampleRejected)
        assert rejected.code is code
    assert cache.counts.admitted_bytes == 0


def test_the_size_limit_holds_for_what_is_cached(folder: Path, cache: LocalImageCache) -> None:
    rows = as_remote(rows_of(folder).slice(0, 1), etag="e", size_bytes=4)
    store = _Store(Blob(data=b"data", etag="e"))
    list(reader_of(store, cache=cache).read(rows))
    ((_, rejected),) = reader_of(store, cache=cache, max_bytes=3).read(rows)
    assert isinstance(rejected, SampleRejected)
    assert rejected.code is RejectCode.TOO_LARGE


def test_local_files_do_not_go_through_the_cache(folder: Path, cache: LocalImageCache) -> None:
    assert len(read(rows_of(folder), cache=cache)) == 40
    assert not Path(cache.folder).exists()
    assert (cache.counts.hits, cache.counts.misses) == (0, 0)


def test_rows_of_local_parquet_files_do_as_each_costs_a_row_group(
    parquet: Path, cache: LocalImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(parquet)
    images = [jpeg_bytes(index) for index in range(20)]
    assert read(rows.take(pa.array([0, 19, 7])), cache=cache) == [images[index] for index in (0, 19, 7)]
    assert read(rows, cache=cache) == images
    monkeypatch.setattr(pq, "ParquetFile", None)
    assert read(rows, cache=cache) == images
    assert (cache.counts.hits, cache.counts.misses) == (23, 20)


def test_a_reader_pickles(folder: Path, cache: LocalImageCache) -> None:
    reader = pickle.loads(pickle.dumps(SampleReader(num_threads=2, cache=cache)))
    assert reader.cache.folder == cache.folder
    assert len(list(reader.read(rows_of(folder)))) == 40


def _fetch_threads() -> int:
    return sum(thread.name.startswith("fetch") for thread in threading.enumerate())
