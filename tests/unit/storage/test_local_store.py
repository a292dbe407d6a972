from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy.core.errors import AccessDenied, ObjectNotFound, StorageError
from convoy.storage.local_store import LocalStore
from convoy.storage.local_walk import PRIVATE_PREFIX, UnfollowedLinks

NOBODY = 65534


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "root"))


@pytest.fixture
def without_root_rights(tmp_path: Path) -> Iterator[None]:
    """Root may do everything: become nobody. pytest's own folders are closed to others."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def keys_of(store: LocalStore, prefix: str = "", start_after: str = "") -> list[str]:
    return [info.key for info in store.list_objects(prefix, start_after=start_after)]


def private_files(root: str) -> list[str]:
    return [name for _, _, names in os.walk(root) for name in names if name.startswith(PRIVATE_PREFIX)]


names = st.text(st.sampled_from("ab-./ é\uffff\U0001f600~"), min_size=1, max_size=4)
keys = st.lists(names, min_size=1, max_size=4).map("/".join)


@settings(max_examples=60)
@given(written=st.sets(keys, max_size=12), prefix=st.just("") | keys, start_after=st.just("") | keys)
def test_a_listing_is_the_sorted_keys_behind_a_key_and_below_a_prefix(
    written: set[str], prefix: str, start_after: str
) -> None:
    root = tempfile.mkdtemp()
    store = LocalStore(root)
    stored = []
    for key in written:
        try:
            store.put(key, b"x")
            stored.append(key)
        except StorageError:
            continue  # no key for a folder, or in conflict with another
    try:
        listed = keys_of(store, prefix, start_after)
    except StorageError:
        assert {"", ".", ".."} & set(prefix.split("/")[:-1])
    else:
        stored.sort(key=str.encode)
        assert listed == [key for key in stored if key.startswith(prefix) and key > start_after]
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/", "./a", "nul\0", f"{PRIVATE_PREFIX}x"]
)
def test_a_key_that_is_no_file_below_the_root_is_an_error(store: LocalStore, key: str) -> None:
    for request in (store.get, store.head, lambda key: store.put(key, b"x"), lambda key: store.delete([key])):
        with pytest.raises(StorageError, match="below the root") as caught:
            request(key)
        assert not isinstance(caught.value, ObjectNotFound)


def test_dot_files_are_listed_but_not_our_own(store: LocalStore) -> None:
    store.put(".convoy/config", b"x")
    store.put(".hidden", b"x")
    store.put_if_match(".hidden", b"y", etag=store.head(".hidden").etag)
    Path(store.root, f"{PRIVATE_PREFIX}left-behind").write_bytes(b"half")
    assert keys_of(store) == [".convoy/config", ".hidden"]


def test_links_are_followed_but_not_in_a_circle(store: LocalStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "image").write_bytes(b"x")
    store.put("a/b/object", b"x")
    root = Path(store.root)
    (root / "a/b/to-root").symlink_to(root)
    (root / "a/b/to-a").symlink_to("../../a")
    (root / "a/to-itself").symlink_to("to-itself")
    (root / "a/to-nothing").symlink_to("nothing")
    (root / "linked").symlink_to(elsewhere)
    (root / "object").symlink_to("a/b/object")
    assert keys_of(store) == ["a/b/object", "linked/image", "object"]
    assert keys_of(store, "a/b/") == ["a/b/object"]
    assert store.list_folders("a/b/") == []
    assert store.list_folders() == ["a", "linked"]


def test_what_is_no_file_and_an_empty_folder_are_not_listed(store: LocalStore) -> None:
    store.put("folder/object", b"x")
    os.mkfifo(f"{store.root}/folder/fifo")
    os.makedirs(f"{store.root}/empty/er")
    assert keys_of(store) == ["folder/object"]
    assert store.list_folders() == ["folder"]


def test_a_name_that_is_not_utf8_is_named_not_skipped(store: LocalStore) -> None:
    store.put("object", b"x")
    with open(os.fsencode(store.root) + b"/caf\xe9.jpg", "wb"):
        pass
    with pytest.raises(StorageError, match=r"not UTF-8.*caf") as caught:
        keys_of(store)
    assert "rename" in caught.value.next_step


def test_a_listing_is_a_stream(store: LocalStore) -> None:
    for index in range(20):
        store.put(f"folder-{index:02d}/object", b"x")
    listing = store.list_objects()
    assert next(listing).key == "folder-00/object"
    store.put("folder-19/second", b"x")
    assert [info.key for info in listing][-1] == "folder-19/second"


def test_quick_writes_of_one_size_have_different_etags(store: LocalStore) -> None:
    assert len({store.put("object", b"same size") for _ in range(200)}) == 200


def test_the_etag_is_that_of_a_file_written_by_others(store: LocalStore) -> None:
    store.put("object", b"x")
    path = Path(store.root, "object")
    path.write_bytes(b"12345")
    os.utime(path, ns=(10, 255))
    assert store.head("object").etag == "5-ff"
    assert store.head("object").checksum == ""


def test_a_put_follows_the_umask(store: LocalStore) -> None:
    store.put("object", b"x")
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat(f"{store.root}/object").st_mode & 0o777 == 0o666 & ~umask


def test_readers_see_one_version_or_the_other_never_a_part(store: LocalStore) -> None:
    versions = [bytes([number]) * 300_000 for number in range(2)]
    store.put("object", versions[0])
    done = threading.Event()

    def overwrite() -> None:
        for number in range(60):
            store.put("object", versions[number % 2])
        done.set()

    writer = threading.Thread(target=overwrite)
    writer.start()
    num_reads = 0
    while not done.is_set() or num_reads == 0:
        assert store.get("object").data in versions
        num_reads += 1
    writer.join()


def test_a_delete_removes_empty_folders_while_others_write_into_them(store: LocalStore) -> None:
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        start.wait()
        try:
            for _ in range(100):
                store.put(f"a/b/c/{worker}", b"x")
                store.delete([f"a/b/c/{worker}"])
        except StorageError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert os.listdir(store.root) == []


def test_a_broken_link_in_the_way_is_an_error(store: LocalStore) -> None:
    store.put("object", b"x")
    Path(store.root, "link").symlink_to("nowhere/at/all")
    with pytest.raises(StorageError, match="same name"):
        store.put("link/below", b"x")
    with pytest.raises(StorageError, match="No such file"):
        store.put("link/far/below", b"x")


def test_a_file_in_the_way_of_a_folder_is_explained(store: LocalStore) -> None:
    store.put("taken", b"x")
    store.put("folder/object", b"x")
    for key in ("taken/below", "taken/be/low", "folder"):
        with pytest.raises(StorageError, match="same name") as caught:
            store.put(key, b"y")
        assert not isinstance(caught.value, ObjectNotFound)
    assert keys_of(store) == ["folder/object", "taken"]
    assert private_files(store.root) == []


@pytest.mark.usefixtures("without_root_rights")
def test_a_closed_folder_is_access_denied() -> None:
    with tempfile.TemporaryDirectory() as folder:
        closed = Path(folder, "closed")
        closed.mkdir()
        (closed / "object").write_bytes(b"x")
        closed.chmod(0)
        store = LocalStore(folder)
        try:
            for request in (
                lambda: store.get("closed/object"),
                lambda: store.head("closed/object"),
                lambda: store.open_parquet("closed/object"),
                lambda: store.put("closed/object", b"y"),
                lambda: store.delete(["closed/object"]),
                lambda: keys_of(store),
                lambda: keys_of(store, "closed/further/"),
                lambda: store.list_folders("closed/"),
            ):
                with pytest.raises(AccessDenied) as caught:
                    request()
                assert str(closed) in caught.value.where
        finally:
            closed.chmod(0o700)


@pytest.mark.usefixtures("without_root_rights")
def test_the_root_of_a_volume_is_listed_without_its_closed_lost_and_found() -> None:
    with tempfile.TemporaryDirectory() as folder:
        closed = Path(folder, "lost+found")
        closed.mkdir()
        closed.chmod(0)
        Path(folder, "cat").mkdir()
        Path(folder, "cat/1.jpg").write_bytes(b"x")
        store = LocalStore(folder)
        try:
            assert keys_of(store) == ["cat/1.jpg"]
            assert (store.list_folders(), store.find_unfollowed_links()) == (["cat"], UnfollowedLinks())
        finally:
            closed.chmod(0o700)


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    script = f"""
import os
from convoy.core.errors import StorageError
from convoy.storage.local_store import LocalStore
store = LocalStore({str(tmp_path)!r})
store.put("object", b"small")
try:
    store.put("object", os.urandom(1 << 20))
except StorageError as error:
    print(error.what)
print(store.get("object").data, os.listdir(store.root))
"""
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=64k none '{tmp_path}'"
    if not shutil.which("unshare") or subprocess.run([*mounted, mount], check=False).returncode:
        pytest.skip("this machine does not let a test mount a small disk of its own")
    run = subprocess.run(
        [*mounted, f'{mount} && exec "$0" -c "$1"', sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert run.stdout.splitlines() == ["the disk is full", "b'small' ['object']"]
