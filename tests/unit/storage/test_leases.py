from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from convoy.core.errors import (
    ConditionalWriteUnsupported,
    ConfigError,
    ExitCode,
    LeaseHeld,
    LeaseLost,
    RunCancelled,
    StoreUnavailable,
)
from convoy.core.fingerprints import canonical_json
from convoy.core.processes import this_process
from convoy.storage.leases import (
    LEASE,
    WhenHeld,
    give_up,
    hold_run,
    living_holders,
    read_lease,
)
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import OpenRun, RunFolder, open_pointers, run_ids
from made_leases import put_lease

LONG_S = 60.0
HOLD_AND_SLEEP = """
import sys
from convoy.storage.leases import hold_run
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
with hold_run(RunFolder(LocalStore(sys.argv[1]), "r1"), ttl_s=60) as lease:
    print(lease.token, flush=True)
    input()
"""


class PlainStore(LocalStore):
    """A folder on a file system without hard links, where no write is conditional."""

    def put_if_absent(self, key: str, data: bytes) -> str:
        raise ConditionalWriteUnsupported("no hard links")

    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        raise ConditionalWriteUnsupported("no hard links")


class BrokenStore(LocalStore):
    """A folder that takes no replacements as long as the file `broken` lies in it."""

    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        if Path(self.root, "broken").exists():
            raise StoreUnavailable("broken")
        return super().put_if_match(key, data, etag=etag)


@pytest.fixture(params=[LocalStore, PlainStore])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    make: Callable[[str], LocalStore] = request.param
    return RunFolder(make(str(tmp_path)), "r1")


def token_of(folder: RunFolder) -> int:
    lease = read_lease(folder)
    assert lease is not None
    return lease.token


@contextmanager
def renewing_elsewhere(folder: RunFolder, *, ttl_s: float) -> Iterator[None]:
    """A driver on another machine that holds the run and renews its lease."""
    stop = threading.Event()

    def renew() -> None:
        renewals = 0
        while not stop.wait(ttl_s / 5):
            renewals += 1
            put_lease(folder, renewals=renewals, ttl_s=ttl_s)

    put_lease(folder, ttl_s=ttl_s)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_token_grows_from_holder_to_holder(folder: RunFolder) -> None:
    assert read_lease(folder) is None
    for token in (1, 2, 3):
        with hold_run(folder) as lease:
            assert lease.token == token
            lease.confirm()
            held = read_lease(folder)
            assert held is not None
            assert held.holder == this_process()
        free = read_lease(folder)
        assert free is not None
        assert free.holder is None


def test_second_driver_is_refused_and_told_who_the_first_is(folder: RunFolder) -> None:
    with hold_run(folder, ttl_s=1.5) as first:
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on ") as refused, hold_run(folder):
            pass
        assert refused.value.exit_code is ExitCode.ERROR
        first.confirm()
        assert token_of(folder) == first.token


def test_living_driver_elsewhere_is_told_by_its_renewals(folder: RunFolder) -> None:
    with (
        renewing_elsewhere(folder, ttl_s=1.0),
        pytest.raises(LeaseHeld, match="process 1 on elsewhere"),
        hold_run(folder),
    ):
        pass


def test_driver_elsewhere_that_renews_no_more_is_replaced_after_its_time_to_live(folder: RunFolder) -> None:
    put_lease(folder, token=7, ttl_s=0.5)
    started_s = time.monotonic()
    with hold_run(folder) as lease:
        assert time.monotonic() - started_s >= 0.5
        assert lease.token == 8


def test_driver_that_was_killed_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_SLEEP, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "1\n"
        driver.kill()
        driver.wait()
    started_s = time.monotonic()
    with hold_run(RunFolder(LocalStore(str(tmp_path)), "r1")) as lease:
        assert lease.token == 2
    assert time.monotonic() - started_s < LONG_S / 4


def test_lease_of_an_earlier_process_with_this_id_is_taken_at_once(folder: RunFolder) -> None:
    put_lease(folder, holder=this_process().model_copy(update={"started": "1"}), ttl_s=LONG_S)
    started_s = time.monotonic()
    with hold_run(folder) as lease:
        assert lease.token == 8
    assert time.monotonic() - started_s < LONG_S / 4


def test_waiting_driver_gets_the_run_when_the_first_is_done(folder: RunFolder) -> None:
    order = []

    def wait() -> None:
        with hold_run(folder, ttl_s=1.5, when_held=WhenHeld.WAIT):
            order.append("second")

    with hold_run(folder, ttl_s=1.5):
        second = threading.Thread(target=wait)
        second.start()
        time.sleep(2)
        order.append("first")
    second.join()
    assert order == ["first", "second"]
    assert token_of(folder) == 2


def test_of_many_drivers_one_holds_the_run_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(LocalStore(str(tmp_path)), "r1")
    num_inside = 0
    seen: list[int] = []

    def drive(_: int) -> int:
        nonlocal num_inside
        with hold_run(folder, ttl_s=3, when_held=WhenHeld.WAIT) as lease:
            num_inside += 1
            seen.append(num_inside)
            time.sleep(0.01)
            num_inside -= 1
            return lease.token

    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(drive, range(8)))
    assert seen == [1] * 8
    assert sorted(tokens) == list(range(1, 9))


def test_replaced_driver_is_told_and_leaves_the_lease_to_the_other(folder: RunFolder) -> None:
    with hold_run(folder, ttl_s=LONG_S) as lease:
        lease.confirm()
        put_lease(folder, token=2)
        with pytest.raises(LeaseLost, match="elsewhere"):
            lease.confirm()
    assert token_of(folder) == 2
    left = read_lease(folder)
    assert left is not None
    assert left.at_work is not None


def test_replaced_driver_hears_of_it_at_its_next_slice(folder: RunFolder) -> None:
    with hold_run(folder, ttl_s=0.3) as lease:
        lease.check()
        put_lease(folder, token=2)
        time.sleep(0.5)
        with pytest.raises(LeaseLost, match="elsewhere"):
            lease.check()


def test_driver_that_could_not_renew_asks_the_store_before_it_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(BrokenStore(str(tmp_path)), "r1")
    with hold_run(folder, ttl_s=0.5) as lease:
        (tmp_path / "broken").touch()
        lease.check()
        time.sleep(0.8)
        with pytest.raises(StoreUnavailable):
            lease.check()
        (tmp_path / "broken").unlink()
        lease.check()


def test_renewal_whose_answer_was_lost_is_known_as_our_own(folder: RunFolder) -> None:
    with hold_run(folder, ttl_s=LONG_S) as lease:
        held = read_lease(folder)
        assert held is not None
        stored = held.model_copy(update={"renewals": held.renewals + 1})
        folder.store.put(folder.key(LEASE), canonical_json(stored))
        lease.confirm()
        lease.confirm()
        assert token_of(folder) == lease.token


def test_given_up_run_stops_its_driver_and_takes_no_other(folder: RunFolder) -> None:
    with hold_run(folder, ttl_s=0.3) as lease:
        give_up(folder)
        time.sleep(0.1)
        with pytest.raises(RunCancelled) as cancelled:
            lease.check()
        with pytest.raises(RunCancelled):
            lease.confirm()
    assert cancelled.value.exit_code is ExitCode.GIVEN_UP
    with pytest.raises(RunCancelled), hold_run(folder):
        pass


def test_a_run_that_was_finished_while_it_was_given_up_may_be_held_for_its_repair(folder: RunFolder) -> None:
    give_up(folder)
    folder.store.put(folder.key("_SUCCESS"), b"")
    with hold_run(folder):
        pass


def refuse(folder: RunFolder, before: Callable[[], None] = lambda: None) -> None:
    """Hold a run for something that is refused."""

    def ask() -> None:
        with hold_run(folder):
            before()
            raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        ask()


def test_a_run_that_is_refused_before_anything_was_written_is_forgotten(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    open_run = OpenRun(store, verb="train", target="t")

    refuse(open_run.start())
    assert (open_run.current(), run_ids(store), open_pointers(store)) == (None, [], {})
    # What was begun is gone on with.
    begun = open_run.start()
    store.put(begun.key("input/0.parquet"), b"")
    refuse(begun)
    assert run_ids(store) == list(open_pointers(store)) == [begun.run_id]
    with hold_run(begun) as lease:
        assert lease.token == 2


def test_a_run_that_another_driver_took_over_is_not_forgotten(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    folder = OpenRun(store, verb="train", target="t").start()
    refuse(folder, lambda: put_lease(folder))
    assert list(open_pointers(store)) == [folder.run_id]
    assert token_of(folder) == 7


def test_living_holders_are_those_that_renew(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    held, dead, gone, free, untouched = (RunFolder(store, name) for name in ("a", "b", "c", "d", "e"))
    put_lease(dead, ttl_s=0.5)
    put_lease(gone, holder=this_process().model_copy(update={"started": "1"}))
    put_lease(free, holder=None)
    with hold_run(held, ttl_s=1.0):
        assert living_holders([held, dead, gone, free, untouched]) == {"a"}
    assert living_holders([held, free, untouched]) == set()
