"""The node's image cache: never wrong bytes, never more than its limit, never a reason for a job to fail."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from convoy.core.fingerprints import digest_bytes
from convoy.storage.local_cache import LocalImageCache
from convoy.storage.local_walk import PRIVATE_PREFIX

pytestmark = pytest.mark.usefixtures("ample_disk")

LIBRARY = Path(__file__).parents[3] / "lib"
HEADER_BYTES = 16


def image(number: int, size_bytes: int = 100) -> tuple[bytes, bytes]:
    """A content id and its bytes."""
    data = number.to_bytes(4, "little") * (size_bytes // 4)
    return digest_bytes(b"id" + data), data


def fill(cache: LocalImageCache, *numbers: int) -> None:
    for number in numbers:
        cache.offer(*image(number))


def found(cache: LocalImageCache, *numbers: int) -> list[int]:
    kept = []
    for number in numbers:
        content_id, data = image(number)
        answer = cache.get(content_id)
        assert answer in (None, data)
        if answer is not None:
            kept.append(number)
    return kept


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "usage")


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def cache(folder: Path) -> LocalImageCache:
    return LocalImageCache(str(folder), 1 << 20)


def test_an_admitted_image_comes_back_and_is_counted(cache: LocalImageCache) -> None:
    content_id, data = image(1)
    assert cache.get(content_id) is None
    cache.offer(content_id, data)
    assert cache.get(content_id) == data
    assert cache.find(content_id) == len(data)
    counts = cache.counts
    assert (counts.hits, counts.misses, counts.admitted_bytes, counts.notes) == (1, 1, len(data), {})


def test_finding_nothing_is_a_miss(cache: LocalImageCache, folder: Path) -> None:
    assert cache.find(image(1)[0]) is None
    assert cache.counts.misses == 1
    assert not folder.exists(), "looking makes no folder"


def test_files_lie_in_folders_by_prefix_for_their_owner_only(cache: LocalImageCache, folder: Path) -> None:
    content_id, data = image(1)
    cache.offer(content_id, data)
    name = content_id.hex()
    assert files_of(folder) == [folder / name[:2] / name[2:4] / name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_a_folder_it_is_among_the_temporary_files_of_its_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fill(LocalImageCache(None, 1000), 1)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"convoy-images-{os.geteuid()}", "users of a node do not share it"
    assert found(LocalImageCache(str(folder), 1000), 1) == [1]


@pytest.fixture
def default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """That of this node and user, with image 1."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = LocalImageCache(None, 1 << 20)
    fill(cache, 1)
    return Path(cache.folder)


def test_a_default_folder_is_that_of_the_process_that_gets_the_cache(
    default_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pickled = pickle.dumps(LocalImageCache(None, 1 << 20))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    assert pickle.loads(pickled).folder == str(tmp_path / "elsewhere" / default_folder.name)


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_default_folder_that_others_may_write_to_is_no_cache(default_folder: Path, mode: int) -> None:
    default_folder.chmod(mode)
    assert_is_no_cache(LocalImageCache(None, 1 << 20), f"others may write to {default_folder}")
    named = LocalImageCache(str(default_folder), 1 << 20)
    assert found(named, 1) == [1], "a volume that is named is trusted"


def test_a_default_folder_of_another_user_is_no_cache(
    default_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, own_uid = LocalImageCache(None, 1 << 20), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own_uid + 1)
    assert_is_no_cache(cache, f"{default_folder} belongs to another user")


def test_a_link_of_another_user_to_an_own_folder_is_no_cache(
    default_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = default_folder.rename(default_folder.with_name("moved"))
    default_folder.symlink_to(moved)
    assert found(LocalImageCache(None, 1 << 20), 1) == [1]
    others = list(os.lstat(default_folder))
    others[stat.ST_UID] += 1
    monkeypatch.setattr(os, "lstat", lambda _: os.stat_result(others))
    assert_is_no_cache(LocalImageCache(None, 1 << 20), f"{default_folder} belongs to another user")


def assert_is_no_cache(cache: LocalImageCache, reason: str) -> None:
    """Of one whose folder has image 1."""
    assert cache.find(image(1)[0]) is None
    fill(cache, 2)
    assert found(cache, 1, 2) == []
    assert len(files_of(Path(cache.folder))) == 1, "and nothing is put there"
    assert cache.counts.notes == {f"nothing more is admitted: {reason}": 1}


def test_an_image_is_admitted_once(cache: LocalImageCache, folder: Path) -> None:
    fill(cache, 1, 1)
    fill(LocalImageCache(str(folder), 1 << 20), 1)
    assert cache.counts.admitted_bytes == 100
    assert len(files_of(folder)) == 1


def test_another_process_of_the_node_finds_it(cache: LocalImageCache) -> None:
    fill(cache, 1)
    other = pickle.loads(pickle.dumps(cache))
    assert (other.folder, other.max_bytes, other.counts.admitted_bytes) == (cache.folder, 1 << 20, 0)
    assert found(other, 1) == [1]


def test_when_full_the_first_images_stay_and_no_more_come(folder: Path) -> None:
    cache = LocalImageCache(str(folder), 3 * (100 + HEADER_BYTES))
    for _epoch in range(3):
        fill(cache, *range(10))
        assert found(cache, *range(10)) == [0, 1, 2]
    assert used_bytes(folder) == cache.max_bytes
    assert cache.counts.admitted_bytes == 300
    assert cache.counts.notes == {}


def test_what_is_larger_than_the_cache_does_not_close_it(folder: Path) -> None:
    cache = LocalImageCache(str(folder), 150)
    cache.offer(*image(1, size_bytes=200))
    fill(cache, 2)
    assert found(cache, 2) == [2]


@pytest.mark.parametrize("damage", ["truncated", "empty", "header only", "flipped", "of another"])
def test_a_damaged_file_is_a_miss_and_is_replaced(cache: LocalImageCache, folder: Path, damage: str) -> None:
    fill(cache, 1)
    (path,) = files_of(folder)
    whole = path.read_bytes()
    fill(cache, 2)
    (other,) = set(files_of(folder)) - {path}
    path.write_bytes(
        {
            "truncated": whole[:-1],
            "empty": b"",
            "header only": whole[:HEADER_BYTES],
            "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
            "of another": other.read_bytes(),
        }[damage]
    )
    assert found(cache, 1) == []
    assert not path.exists()
    assert cache.counts.notes == {"a damaged file was deleted": 1}
    fill(cache, 1)
    assert found(cache, 1) == [1]


def test_an_unwritable_folder_turns_admission_off_and_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = LocalImageCache(str(tmp_path / "file" / "images"), 1 << 20)
    fill(cache, 1, 2)
    assert found(cache, 1, 2) == []
    assert cache.counts.notes == {"nothing more is admitted: Not a directory": 1}


def put_on_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, *, size_bytes: int, others_bytes: int) -> None:
    """Let the folder be on a disk of so many bytes, of which others take some."""

    def fstatvfs(_: int) -> SimpleNamespace:
        free_bytes = size_bytes - others_bytes - used_bytes(folder)
        return SimpleNamespace(f_frsize=1, f_blocks=size_bytes, f_bavail=free_bytes)

    monkeypatch.setattr(os, "fstatvfs", fstatvfs)


def test_the_last_tenth_of_the_disk_is_left_to_others(
    cache: LocalImageCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_images = 2 * (100 + HEADER_BYTES)
    put_on_disk(monkeypatch, folder, size_bytes=2000, others_bytes=1800 - two_images)
    fill(cache, 1, 2, 3, 4, 1)
    assert found(cache, 1, 2, 3, 4) == [1, 2]
    assert cache.counts.notes == {
        "nothing is admitted while that leaves less than 10% of the disk free": 2
    }, "of those that would be admitted"
    put_on_disk(monkeypatch, folder, size_bytes=2000, others_bytes=1000)
    fill(cache, 3)
    assert found(cache, 3) == [3], "as soon as there is space again"


def test_images_that_nobody_has_used_for_days_make_room_on_a_short_disk(
    cache: LocalImageCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache, 1, 2)
    os.utime(cache._path(image(1)[0]), (time.time() - 3 * 86_400,) * 2)
    put_on_disk(monkeypatch, folder, size_bytes=2000, others_bytes=1800 - used_bytes(folder))
    with_old_count(folder)
    fill(LocalImageCache(cache.folder, cache.max_bytes), 3)
    assert found(cache, 1, 2, 3) == [2, 3]


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Writes fail in the middle of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_takes_no_more_turns_admission_off_and_leaves_no_part(
    cache: LocalImageCache, folder: Path
) -> None:
    fill(cache, 1)
    with file_size_limit(10_000):
        cache.offer(*image(2, size_bytes=50_000))
    assert len(files_of(folder)) == 1
    assert cache.counts.notes == {"nothing more is admitted: File too large": 1}
    fill(cache, 3)
    assert found(cache, 1, 3) == [1], "what is there is still read"
    assert cache.counts.admitted_bytes == 100


def test_files_that_were_deleted_make_room_at_the_next_opening(folder: Path) -> None:
    cache = LocalImageCache(str(folder), 3 * (100 + HEADER_BYTES))
    fill(cache, 1, 2, 3)
    files_of(folder)[0].unlink()
    with_old_count(folder)
    fill(LocalImageCache(cache.folder, cache.max_bytes), 4, 5)
    assert found(cache, 4, 5) == [4]
    assert used_bytes(folder) == cache.max_bytes


def with_old_count(folder: Path) -> None:
    """Make the last count two minutes older."""
    used, counted_unix_s = struct.unpack("<qd", (folder / "usage").read_bytes())
    (folder / "usage").write_bytes(struct.pack("<qd", used, counted_unix_s - 120))


@pytest.mark.parametrize(("num_places", "left"), [(3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_images_that_nobody_has_used_for_days_make_room_where_there_is_none(
    folder: Path, num_places: int, left: list[int]
) -> None:
    cache = LocalImageCache(str(folder), num_places * (100 + HEADER_BYTES))
    fill(cache, 1, 2, 3)
    for number in (1, 2):
        os.utime(cache._path(image(number)[0]), (time.time() - 3 * 86_400,) * 2)
    assert found(cache, 2) == [2], "a use, which counts"
    with_old_count(folder)
    fill(LocalImageCache(cache.folder, cache.max_bytes), 4)
    assert found(cache, 1, 2, 3, 4) == left


@pytest.mark.parametrize(("age_s", "is_left"), [(60, True), (90_000, False)])
def test_an_unfinished_file_is_removed_once_it_is_a_day_old(folder: Path, age_s: int, is_left: bool) -> None:
    cache = LocalImageCache(str(folder), 2 * (100 + HEADER_BYTES))
    fill(cache, 1)
    unfinished = files_of(folder)[0].parent / f"{PRIVATE_PREFIX}0123"
    unfinished.write_bytes(bytes(90))
    os.utime(unfinished, (time.time() - age_s,) * 2)
    with_old_count(folder)
    fill(LocalImageCache(cache.folder, cache.max_bytes), 2)
    assert unfinished.exists() is is_left
    assert found(cache, 2) == ([] if is_left else [2]), "what is left counts"


def test_a_long_job_counts_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LocalImageCache(str(folder), 100 + HEADER_BYTES)
    fill(cache, 1)
    os.unlink(files_of(folder)[0])
    fill(cache, 2)
    assert found(cache, 2) == []
    monkeypatch.setattr("convoy.storage.local_cache._RECOUNT_AFTER_S", -1.0)
    fill(cache, 2)
    assert found(cache, 2) == [2]


@pytest.mark.parametrize("usage", [b"", b"short", bytes(8) + b"\xff" * 8])
def test_a_damaged_usage_file_is_counted_anew(folder: Path, usage: bytes) -> None:
    cache = LocalImageCache(str(folder), 2 * (100 + HEADER_BYTES))
    fill(cache, 1)
    (folder / "usage").write_bytes(usage)
    fill(cache, 2, 3)
    assert found(cache, 1, 2, 3) == [1, 2]


# The fixture `ample_disk` does not reach another process.
FILL_FOREVER = """
import itertools, os, sys, types
from convoy.core.fingerprints import digest_bytes
from convoy.storage.local_cache import LocalImageCache
os.fstatvfs = lambda _: types.SimpleNamespace(f_frsize=4096, f_blocks=1 << 30, f_bavail=1 << 30)
cache = LocalImageCache(sys.argv[1], int(sys.argv[2]))
print("ready", flush=True)
for number in itertools.count(int(sys.argv[3])):
    data = number.to_bytes(4, "little") * 2000
    cache.offer(digest_bytes(data), data)
    if number % 50 == 0 and cache.counts.notes:
        sys.exit(f"stopped admitting: {dict(cache.counts.notes)}")
"""


def test_processes_that_fill_one_cache_and_are_killed_keep_to_its_limit(folder: Path) -> None:
    max_bytes, file_bytes, num_processes = 16_000_000, 8000 + HEADER_BYTES, 4
    environment = {**os.environ, "PYTHONPATH": str(LIBRARY)}
    for generation in range(2):
        starts = [str((generation * num_processes + process) << 24) for process in range(num_processes)]
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", FILL_FOREVER, folder, str(max_bytes), start],
                env=environment,
                stdout=subprocess.PIPE,
            )
            for start in starts
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            writer.stdout.close()
        # The first generation dies while it fills; the second finds the cache full and stays below the limit.
        # A killed writer may have counted a file that it did not write.
        goal_bytes = (max_bytes // 8, max_bytes - (num_processes + 2) * file_bytes)[generation]
        while used_bytes_of_live(folder) <= goal_bytes:
            assert all(writer.poll() is None for writer in writers), "a writer stopped admitting"
            time.sleep(0.005)
        time.sleep(0.2 * generation)
        for writer in writers:
            assert writer.poll() is None, "a writer stopped admitting"
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert used_bytes(folder) <= max_bytes + num_processes * file_bytes
    whole = [path for path in files_of(folder) if not path.name.startswith(PRIVATE_PREFIX)]
    reader = LocalImageCache(str(folder), max_bytes)
    assert all(reader.get(bytes.fromhex(path.name)) for path in whole)
    assert reader.counts.hits == len(whole) > 0


def used_bytes_of_live(folder: Path) -> int:
    """As `used_bytes`, while files come and go."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total
