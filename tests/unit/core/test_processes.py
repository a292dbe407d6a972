from __future__ import annotations

import subprocess
import sys
import time

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
