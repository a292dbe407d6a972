"""What every ObjectStore promises, held against a local folder and against a real S3 server."""

from __future__ import annotations

import io
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.core.errors import (
    AccessDenied,
    ConditionalWriteUnsupported,
    DataError,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
)
from convoy.storage import s3_store as s3_store_module
from convoy.storage import s3_uploads
from convoy.storage.conditional_put import PROBE_FOLDER, probe_conditional_put
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import ConditionalPut, ObjectStore
from convoy.storage.s3_store import S3Store
from convoy.storage.stores import UriReader, open_object, open_store

pytestmark = pytest.mark.integration

# With the root 1,024 bytes, which is all that S3 takes; a file system takes 255 for each name.
LONGEST_KEY = "/".join(["n" * 201] * 5)
AWKWARD_KEYS = [
    LONGEST_KEY,
    "a-b",
    "a/b",
    "a b",
    "ä",
    "%41",
    "A",
    "b",
    "B",
    "+",
    "a+b&c=d",
    "new\nline",
    "q?x#y",
    ".hidden",
    "日本/語",
    "\U0001f600",
    "a/b c/d",
    "<&>\"'",
    "~",
    "back\\slash",
]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local":
        return LocalStore(str(tmp_path / "root folder"))
    return S3Store(request.getfixturevalue("s3_bucket"), "root folder/é")


@pytest.fixture
def s3_store(s3_bucket: str) -> S3Store:
    return S3Store(s3_bucket)


def in_threads(function: Callable[[str], object], keys: list[str]) -> list[object]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, keys))


def keys_of(store: ObjectStore, prefix: str = "", start_after: str = "") -> list[str]:
    return [info.key for info in store.list_objects(prefix, start_after=start_after)]


@pytest.mark.parametrize("size_bytes", [0, 1, 5_000_000])
def test_bytes_come_back_as_they_were_put(store: ObjectStore, size_bytes: int) -> None:
    data = random.Random(size_bytes).randbytes(size_bytes)
    etag = store.put("folder/object", data)
    blob = store.get("folder/object")
    info = store.head("folder/object")
    assert blob.data == data
    assert blob.etag == etag == info.etag
    assert info.size_bytes == size_bytes


@pytest.mark.parametrize("size_bytes", [5 * 2**20, 11 * 2**20 + 1])
def test_bytes_that_were_put_in_parts_come_back_under_one_etag(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    """Parts of the least size that S3 takes."""
    monkeypatch.setattr(s3_uploads, "_PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_store_module, "WHOLE_BYTES", 5 * 2**20 - 1)
    store = S3Store(s3_bucket, "root folder/é")
    first = store.put("folder/ä b", b"what was there before")
    data = random.Random(size_bytes).randbytes(size_bytes)
    etag = store.put("folder/ä b", data)
    blob, info, (listed,) = store.get("folder/ä b"), store.head("folder/ä b"), store.list_objects()
    assert blob.data == data
    assert first != etag == blob.etag == info.etag == listed.etag
    assert info.size_bytes == listed.size_bytes == size_bytes
    assert {blob.checksum, info.checksum, listed.checksum} == {""}
    assert store.get("folder/ä b", byte_range=(5 * 2**20 - 3, 3)).data == data[5 * 2**20 - 3 : 5 * 2**20]
    store.delete(["folder/ä b"])
    assert keys_of(store) == []


@pytest.mark.parametrize("key", AWKWARD_KEYS)
def test_every_key_can_be_written_read_listed_and_deleted(store: ObjectStore, key: str) -> None:
    store.put(key, key.encode())
    assert store.get(key).data == key.encode()
    assert store.head(key).key == key
    assert keys_of(store) == [key]
    store.delete([key])
    assert keys_of(store) == []


def test_a_listing_is_in_the_order_of_the_utf8_bytes(store: ObjectStore) -> None:
    in_threads(lambda key: store.put(key, b"x"), AWKWARD_KEYS)
    assert keys_of(store) == sorted(AWKWARD_KEYS, key=str.encode)


def test_a_listing_tells_the_size_and_the_etag_that_a_read_tells(store: ObjectStore) -> None:
    store.put("object", b"12345")
    (info,) = store.list_objects()
    assert info == store.head("object")
    assert info.size_bytes == 5
    assert info.etag == store.get("object").etag


@pytest.mark.parametrize("start_after", ["", "A", "a", "a-b", "a/", "a/b", "a/b b", "zz", "ä", "\U0001f601"])
def test_a_listing_starts_after_any_key(store: ObjectStore, start_after: str) -> None:
    in_threads(lambda key: store.put(key, b"x"), AWKWARD_KEYS)
    assert keys_of(store, start_after=start_after) == [
        key for key in sorted(AWKWARD_KEYS, key=str.encode) if key > start_after
    ]


@pytest.mark.parametrize("prefix", ["a", "a/", "a/b", "a/b c/", "日", "日本/", "none/", "a/b c/d/e"])
def test_a_listing_keeps_to_its_prefix(store: ObjectStore, prefix: str) -> None:
    in_threads(lambda key: store.put(key, b"x"), AWKWARD_KEYS)
    expected = [key for key in sorted(AWKWARD_KEYS, key=str.encode) if key.startswith(prefix)]
    assert keys_of(store, prefix) == expected
    assert keys_of(store, prefix, start_after="a/b") == [key for key in expected if key > "a/b"]


def test_an_empty_root_lists_nothing(store: ObjectStore) -> None:
    assert keys_of(store) == []
    assert store.list_folders() == []


def test_a_listing_spans_pages(store: ObjectStore) -> None:
    keys = [f"part-{index:05d}" if index % 3 else f"part/{index:05d}" for index in range(2010)]
    in_threads(lambda key: store.put(key, b""), keys)
    assert keys_of(store) == sorted(keys)
    assert keys_of(store, start_after=sorted(keys)[100]) == sorted(keys)[101:]
    store.delete(keys)
    assert keys_of(store) == []


def test_folders_are_the_names_directly_below_a_prefix(store: ObjectStore) -> None:
    for key in ("b c/1", "a/x/1", "a/y/1", "a/file", "file", "ä/1", "a-b/1"):
        store.put(key, b"x")
    assert store.list_folders() == ["a", "a-b", "b c", "ä"]
    assert store.list_folders("a/") == ["x", "y"]
    assert store.list_folders("none/") == []


def test_a_range_is_exactly_what_was_asked_for(store: ObjectStore) -> None:
    etag = store.put("object", b"0123456789")
    assert store.get("object", byte_range=(3, 4)).data == b"3456"
    assert store.get("object", byte_range=(9, 1)).data == b"9"
    assert store.get("object", byte_range=(0, 10)).etag == etag
    assert store.get("object", byte_range=(4, 0)).data == b""


@pytest.mark.parametrize("byte_range", [(8, 3), (10, 1), (100, 5)])
def test_a_range_beyond_the_end_is_an_error(store: ObjectStore, byte_range: tuple[int, int]) -> None:
    store.put("object", b"0123456789")
    with pytest.raises(StorageError) as caught:
        store.get("object", byte_range=byte_range)
    assert not isinstance(caught.value, (StoreUnavailable, ObjectNotFound))


@pytest.mark.parametrize("byte_range", [None, (10, 20)])
def test_of_another_version_than_the_wanted_one_nothing_is_read(
    store: ObjectStore, byte_range: tuple[int, int] | None
) -> None:
    etag = store.put("image", bytes(100))
    whole = store.get("image", byte_range=byte_range, wanted_etag=etag)
    assert (len(whole.data), whole.etag) == (20 if byte_range else 100, etag)
    replaced = store.put("image", bytes(range(200)))
    other = store.get("image", byte_range=byte_range, wanted_etag=etag)
    assert (other.data, other.etag) == (b"", replaced)


def test_a_missing_object_is_not_found(store: ObjectStore) -> None:
    store.put("folder/object", b"x")
    for key in ("none", "folder", "folder/object/below"):
        for read in (store.get, store.head, store.open_parquet):
            with pytest.raises(ObjectNotFound) as caught:
                read(key)
            assert caught.value.where == store.uri(key)
    with pytest.raises(ObjectNotFound):
        store.get("none", byte_range=(0, 1))


def test_every_overwrite_changes_the_etag(store: ObjectStore) -> None:
    contents = [b"a", b"b", b"c", b"d"]
    etags = {store.put("object", content) for content in contents}
    assert len(etags) == len(contents)
    assert store.get("object").data == b"d"


def test_an_object_is_created_only_where_there_is_none(store: ObjectStore) -> None:
    etag = store.put_if_absent("object", b"mine")
    assert store.get("object").etag == etag
    with pytest.raises(PreconditionFailed, match="first"):
        store.put_if_absent("object", b"theirs")
    assert store.get("object").data == b"mine"


def test_a_refused_create_of_the_same_bytes_is_our_own_success(store: ObjectStore) -> None:
    etag = store.put_if_absent("object", b"written by me")
    assert store.put_if_absent("object", b"written by me") == etag


def test_one_of_many_local_writers_creates_an_object(tmp_path: Path) -> None:
    assert probe_conditional_put(LocalStore(str(tmp_path)), num_rounds=20) is ConditionalPut.ATOMIC


def test_the_probe_trusts_no_conditional_write_of_this_server(s3_store: S3Store) -> None:
    # It checks first and writes then, and has no If-Match: the latter shows where no race had two winners.
    assert probe_conditional_put(s3_store) in {ConditionalPut.RACY, ConditionalPut.UNSUPPORTED}
    assert keys_of(s3_store, PROBE_FOLDER) == []


def test_one_of_many_local_writers_replaces_a_version(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    etag = store.put("alias", b"first")
    start = threading.Barrier(16)

    def replace(writer: str) -> bool:
        start.wait()
        try:
            store.put_if_match("alias", writer.encode(), etag=etag)
        except PreconditionFailed:
            return False
        return True

    won = in_threads(replace, [f"writer {number}" for number in range(16)])
    assert sum(map(bool, won)) == 1
    assert store.get("alias").data == f"writer {won.index(True)}".encode()


def test_a_local_version_is_replaced_only_if_it_is_the_expected_one(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    first = store.put("alias", b"first")
    second = store.put_if_match("alias", b"second", etag=first)
    with pytest.raises(PreconditionFailed):
        store.put_if_match("alias", b"third", etag=first)
    assert store.get("alias").etag == second
    assert store.put_if_match("alias", b"second", etag=first) == second
    assert keys_of(store) == ["alias"]
    store.delete(["alias"])
    with pytest.raises(PreconditionFailed):
        store.put_if_match("alias", b"third", etag=second)


def test_a_server_without_compare_and_swap_is_named_as_such(s3_store: S3Store) -> None:
    etag = s3_store.put("alias", b"first")
    with pytest.raises(ConditionalWriteUnsupported):
        s3_store.put_if_match("alias", b"second", etag=etag)
    assert s3_store.get("alias").data == b"first"


def test_deleting_what_is_not_there_is_no_error(store: ObjectStore) -> None:
    store.put("kept", b"x")
    store.put("folder/gone", b"x")
    store.delete(iter(["folder/gone", "folder/none", "none", "kept/below"]))
    store.delete([])
    assert keys_of(store) == ["kept"]


def test_parquet_is_read_by_column(store: ObjectStore) -> None:
    table = pa.table({"id": list(range(50_000)), "text": [f"row {row}" for row in range(50_000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=10_000)
    store.put("rows.parquet", buffer.getvalue())
    file = store.open_parquet("rows.parquet")
    assert file.metadata.num_rows == 50_000
    assert file.read(columns=["id"]).column("id").to_pylist() == list(range(50_000))
    assert file.read_row_group(2).equals(table.slice(20_000, 10_000))
    assert sum(batch.num_rows for batch in file.iter_batches(batch_size=777)) == 50_000


@pytest.mark.parametrize("cut_bytes", [0, 3, 100, 2000])
def test_a_file_that_is_not_whole_parquet_is_a_data_error(store: ObjectStore, cut_bytes: int) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(1000))}), buffer)
    store.put("cut.parquet", buffer.getvalue()[:cut_bytes])
    with pytest.raises(DataError, match="parquet"):
        store.open_parquet("cut.parquet")


def test_a_column_is_not_read_from_two_versions_of_an_object(s3_store: S3Store) -> None:
    def content(first: int) -> bytes:
        buffer = io.BytesIO()
        rows = random.Random(first).randbytes(3_000_000)
        pq.write_table(pa.table({"bytes": [rows]}), buffer, compression="none")
        return buffer.getvalue()

    s3_store.put("rows.parquet", content(1))
    file = s3_store.open_parquet("rows.parquet")
    s3_store.put("rows.parquet", content(2))
    with pytest.raises(StorageError, match="replaced"):
        file.read()


def test_a_store_pickles(store: ObjectStore) -> None:
    store.put("object", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.root_uri == store.root_uri
    assert copy.get("object").data == b"x"


def test_a_uri_leads_back_to_its_object(store: ObjectStore) -> None:
    reader = pickle.loads(pickle.dumps(UriReader()))
    in_threads(lambda key: store.put(key, key.encode()), AWKWARD_KEYS)
    for key in AWKWARD_KEYS:
        uri = store.uri(key)
        assert uri == f"{store.root_uri.rstrip('/')}/{key}"
        parent, name = open_object(uri)
        assert parent.get(name).data == key.encode()
        assert reader.get(uri).data == key.encode()
        assert reader.get(uri, byte_range=(0, 1)).data == key.encode()[:1]
    assert keys_of(open_store(store.root_uri + "/")) == sorted(AWKWARD_KEYS)


def test_a_wrong_secret_is_denied_and_not_told(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    store = S3Store(s3_bucket)
    for request in (lambda: store.get("x"), lambda: store.head("x"), lambda: store.put("x", b"")):
        with pytest.raises(AccessDenied) as caught:
            request()
        assert "not-the-secret" not in str(caught.value)
    with pytest.raises(AccessDenied, match="AWS_SECRET_ACCESS_KEY"):
        list(store.list_objects())


def test_no_credentials_are_denied_at_once(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDenied, match="AWS_PROFILE"):
        S3Store(s3_bucket).get("x")


@pytest.mark.parametrize("request_", [lambda s: s.get("x"), lambda s: s.put("x", b""), keys_of])
def test_a_missing_bucket_is_not_a_missing_object(
    s3_store: S3Store, request_: Callable[[ObjectStore], object]
) -> None:
    with pytest.raises(StorageError, match="bucket does not exist") as caught:
        request_(S3Store("no-such-bucket"))
    assert not isinstance(caught.value, ObjectNotFound)


def test_directory_markers_of_s3_are_not_objects(s3_store: S3Store) -> None:
    client = boto3.session.Session().client("s3")
    client.put_object(Bucket=s3_store.bucket, Key="data/", Body=b"")
    client.put_object(Bucket=s3_store.bucket, Key="data/folder/", Body=b"")
    s3_store.put("data/folder/object", b"x")
    s3_store.put("data/empty", b"")
    assert keys_of(S3Store(s3_store.bucket, "data")) == ["empty", "folder/object"]


def test_a_key_of_s3_with_an_empty_folder_name_keeps_it(s3_store: S3Store) -> None:
    for key in ("/top", "data//object"):
        s3_store.put(key, key.encode())
        store, name = open_object(s3_store.uri(key))
        assert store.get(name).data == key.encode()
        assert store.uri(name) == s3_store.uri(key)
        assert UriReader().get(s3_store.uri(key)).data == key.encode()


def test_the_checksum_of_s3_is_the_md5_of_the_content(s3_store: S3Store) -> None:
    s3_store.put("object", b"hello")
    md5 = "md5:5d41402abc4b2a76b9719d911017c592"
    assert s3_store.get("object").checksum == md5
    assert s3_store.get("object", byte_range=(1, 2)).checksum == md5
    assert s3_store.head("object").checksum == md5
    assert next(s3_store.list_objects()).checksum == md5


def test_the_etag_of_a_multipart_upload_is_not_taken_for_a_checksum(s3_store: S3Store) -> None:
    client = boto3.session.Session().client("s3")
    target = {"Bucket": s3_store.bucket, "Key": "object"}
    upload = client.create_multipart_upload(**target)["UploadId"]
    part = client.upload_part(**target, UploadId=upload, PartNumber=1, Body=b"hello")
    parts = [{"ETag": part["ETag"], "PartNumber": 1}]
    client.complete_multipart_upload(**target, UploadId=upload, MultipartUpload={"Parts": parts})
    assert s3_store.get("object").data == b"hello"
    assert s3_store.get("object").checksum == ""
    assert next(s3_store.list_objects()).checksum == ""
