from __future__ import annotations

import os
from pathlib import Path

import pytest

from convoy.core.errors import ConfigError, ObjectNotFound
from convoy.storage.local_store import LocalStore
from convoy.storage.s3_store import S3Store
from convoy.storage.stores import UriReader, open_object, open_store


@pytest.mark.parametrize(
    ("uri", "root_uri"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a b/%41/", "s3://bucket/a b/%41"),
        ("/data/a b/", "/data/a b"),
        ("/", "/"),
        ("/data/../other", "/other"),
        ("//data/a", "/data/a"),
        ("//", "/"),
        ("file:////data", "/data"),
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
    ],
)
def test_a_uri_names_the_root(uri: str, root_uri: str) -> None:
    store = open_store(uri)
    assert store.root_uri == root_uri
    assert isinstance(store, S3Store if uri.startswith("s3:") else LocalStore)
    assert store.uri("a/key") == f"{root_uri.rstrip('/')}/a/key"


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    store = open_store("work/space")
    monkeypatch.chdir("/")
    assert store.root_uri == f"{tmp_path}/work/space"
    assert open_store("~/work").root_uri == "/home/me/work"


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("gs://bucket/x", "AWS_ENDPOINT_URL"),
        ("s3a://bucket/x", "s3://"),
        ("https://host/x", "s3://"),
        ("s3://", "s3://bucket"),
        ("s3:///x", "s3://bucket"),
        ("file://host/x", "file:///path"),
        ("file://x", "file:///path"),
        ("", "path"),
    ],
)
def test_other_uris_are_config_errors_with_a_way_out(uri: str, hint: str) -> None:
    for use in (open_store, open_object, UriReader().get):
        with pytest.raises(ConfigError) as caught:
            use(uri)
        assert hint in caught.value.next_step or uri.endswith("/")


def test_an_object_is_split_into_its_folder_and_its_name() -> None:
    for uri, root_uri, name in [
        ("s3://bucket/a/b.csv", "s3://bucket/a", "b.csv"),
        ("s3://bucket/b.csv", "s3://bucket", "b.csv"),
        ("/a/b.csv", "/a", "b.csv"),
        ("/b.csv", "/", "b.csv"),
        ("file:///a/b%20c.csv", "/a", "b c.csv"),
    ]:
        store, key = open_object(uri)
        assert (store.root_uri, key) == (root_uri, name)


def test_a_path_with_two_slashes_at_its_start_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"data")
    for uri in (f"/{tmp_path}/a", f"file:///{tmp_path}/a"):
        assert UriReader().get(uri).data == b"data"


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3://bucket/a/", "/a/"])
def test_a_folder_is_not_an_object(uri: str) -> None:
    with pytest.raises(ConfigError, match="folder"):
        open_object(uri)


def test_the_root_of_the_file_system_is_a_store_too(tmp_path: Path) -> None:
    key = f"{tmp_path}/object".removeprefix("/")
    store = LocalStore("/")
    store.put(key, b"x")
    assert store.uri(key) == f"{tmp_path}/object"
    assert [info.key for info in store.list_objects(f"{os.path.dirname(key)}/")] == [key]


def test_a_reader_takes_paths_and_file_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").write_bytes(b"0123456789")
    monkeypatch.chdir(tmp_path)
    reader = UriReader()
    for uri in (f"{tmp_path}/a b", f"file://{tmp_path}/a%20b", "a b"):
        assert reader.get(uri).data == b"0123456789"
        assert reader.get(uri, byte_range=(2, 3)).data == b"234"
    with pytest.raises(ObjectNotFound) as caught:
        reader.get(f"{tmp_path}/none")
    assert caught.value.where == f"{tmp_path}/none"


@pytest.mark.parametrize("key", ["gone.parquet", "2024-01-01/gone.jpg"])
def test_a_bucket_with_other_objects_lacks_not_all_whatever_is_deleted_at_its_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """A folder stands for the bucket."""
    bucket = LocalStore(str(tmp_path))
    monkeypatch.setattr(UriReader, "_impatient_store", lambda *_: bucket)
    reader = UriReader()
    assert reader.lacks_all(f"s3://bucket/{key}", num_images=1000)
    bucket.put("2024-01-02/there.jpg", b"image")
    assert not reader.lacks_all(f"s3://bucket/{key}", num_images=1000)
