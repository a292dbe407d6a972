from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time

import pytest

from convoy.core.processes import ProcessIdentity, has_ended, this_process

ASLEEP = "from convoy.core.processes import this_process; print(this_process().model_dump_json(), flush=True); input()"


def test_this_process_has_not_ended() -> None:
    assert not has_ended(this_process())


def test_a_process_has_ended_once_it_is_killed_though_its_parent_did_not_look() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ASLEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        identity = ProcessIdentity.model_validate_json(child.stdout.readline())
        assert identity.pid == child.pid
        assert not has_ended(identity)
        child.kill()
        deadline_s = time.monotonic() + 10
        while not has_ended(identity) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert has_ended(identity)
        assert child.returncode is None, "the child was reaped, so this was no zombie"
        child.wait()
        assert has_ended(identity)


def test_a_later_process_with_the_same_id_is_another_one() -> None:
    assert has_ended(this_process().model_copy(update={"started": "1"}))


def test_of_a_process_elsewhere_nobody_knows() -> None:
    assert not has_ended(this_process().model_copy(update={"place": "another boot", "pid": 2**22}))
    assert not has_ended(this_process().model_copy(update={"host": "elsewhere", "pid": 2**22}))
    assert not has_ended(this_process().model_copy(update={"place": "", "started": "1"}))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to keep")
def test_memory_that_was_freed_is_used_again_without_the_kernel() -> None:
    script = """
import resource
import threading
import numpy as np
from convoy.core.processes import keep_freed_memory

def faults_of_ten_rounds():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(5_000_000)
        np.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults_of_ten_rounds())
keep_freed_memory()
faults_of_ten_rounds()
print(faults_of_ten_rounds())
later = threading.Thread(target=lambda: (faults_of_ten_rounds(), print(faults_of_ten_rounds())))
later.start()
later.join()
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    by_default, kept, in_a_later_thread = map(int, result.stdout.split())
    one_round_pages = 120_000_000 // resource.getpagesize()
    # Where large pages are on, a fault brings more than one.
    assert kept < by_default / 10 <= one_round_pages
    assert in_a_later_thread < by_default / 10
