"""Jobs on a real S3 server whose answers are spoiled: the same rows as without, or a stop that can be gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from chaos_jobs import SLICE_ROWS, ChaosBucket, ChaosJob, FaultTable
from command_lines import convoy_here
from convoy.core.errors import ExitCode
from convoy.storage.runs import RunFolder
from convoy.vision.weights import read_state_dict, state_to_safetensors
from fault_proxy import (
    ACCESS_DENIED,
    EXPIRED_TOKEN,
    INTERNAL_ERROR,
    NO_ROOM,
    SLOW_DOWN,
    Action,
    Delay,
    FaultProxy,
    FaultRule,
    Hang,
    Stall,
    corrupt_body,
    corrupt_upload,
    cut_body,
    lose_answer,
    reset,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NUM_IMAGES = 96
NUM_SLICES = NUM_IMAGES // SLICE_ROWS
VERBS = ("cache", "evaluate", "score")
# A key below a bucket: an object, and no listing, which nothing but TLS protects.
AN_OBJECT = r"/."
A_RECORD = r"/records/"

# What a job must ride over, by the numbers of reliability-anchors; some of it on every verb.
RIDDEN_OVER = {
    "F13 503 SlowDown to 30 % for 60 s": [FaultRule(action=SLOW_DOWN, share=0.3, seed=3, for_s=60)],
    "F14 500 and resets": [
        FaultRule(action=INTERNAL_ERROR, every=9, start=4),
        FaultRule(action=reset, every=7),
    ],
    "F15 bodies cut": [FaultRule(method="GET", action=cut_body, times_a_key=1)],
    "F16 wrong bytes of the right length": [
        FaultRule(method="GET", key=AN_OBJECT, action=corrupt_body, times_a_key=1),
        FaultRule(method="PUT", action=corrupt_upload, times_a_key=1),
    ],
    "F17 answers to writes lost": [FaultRule(method="PUT", action=lose_answer, times_a_key=1)],
    "F26 late answers": [FaultRule(action=Delay(0.5), share=0.1, seed=5)],
    "F26 hung reads": [
        FaultRule(method="GET", key="images/", action=Stall(60), start=20, times=1),
        FaultRule(method="GET", key="images/", action=Hang(60), start=40, times=1),
    ],
}
# Every fault meets one verb in the short form, and all in the long one.
IN_SHORT_FORM = {
    ("F13 503 SlowDown to 30 % for 60 s", "score"),
    ("F14 500 and resets", "cache"),
    ("F15 bodies cut", "evaluate"),
    ("F16 wrong bytes of the right length", "score"),
    ("F17 answers to writes lost", "cache"),
}


@dataclass(frozen=True, slots=True)
class CleanRun:
    """What a verb gives without a fault, and how many requests that takes."""

    digest: str
    num_requests: int


@pytest.fixture(scope="module")
def bucket(
    ray_behind_proxy: None, s3_behind_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> ChaosBucket:
    return ChaosBucket(s3_behind_proxy, tmp_path_factory.mktemp("images"), num_images=NUM_IMAGES)


@pytest.fixture(scope="module")
def clean_run(bucket: ChaosBucket, s3_behind_proxy: FaultProxy) -> Callable[[str], CleanRun]:
    known: dict[str, CleanRun] = {}

    def run(verb: str) -> CleanRun:
        if verb not in known:
            job = bucket.new_job(verb)
            s3_behind_proxy.forget()
            job.run_here()
            num_requests = s3_behind_proxy.requests.total()
            audit = job.audit()
            assert (audit.inputs, audit.lost, audit.doubled) == (NUM_IMAGES, 0, 0)
            known[verb] = CleanRun(audit.digest, num_requests)
        return known[verb]

    return run


def faults_and_verbs() -> list[object]:
    return [
        pytest.param(fault, verb, marks=() if (fault, verb) in IN_SHORT_FORM else pytest.mark.slow)
        for fault in RIDDEN_OVER
        for verb in VERBS
    ]


@pytest.mark.parametrize(("fault", "verb"), faults_and_verbs())
def test_a_job_rides_over_a_store_in_trouble(
    fault: str,
    verb: str,
    bucket: ChaosBucket,
    clean_run: Callable[[str], CleanRun],
    s3_behind_proxy: FaultProxy,
    fault_table: FaultTable,
) -> None:
    clean = clean_run(verb)
    job = bucket.new_job(verb)
    s3_behind_proxy.forget()
    with s3_behind_proxy.injecting(*RIDDEN_OVER[fault]) as injected:
        job.run_here()
        num_requests = s3_behind_proxy.requests.total()
    assert all(one.fired for one in injected)
    # What failed is asked for again, and nothing else. Where that is every answer once, small things (a lease, a probe)
    # may come once more.
    most = 2 * clean.num_requests if fault.startswith("F13") else 2.2 * clean.num_requests + 20
    assert num_requests <= most
    assert {len(attempts) for attempts in job.attempts().values()} == {1}
    fired = sum(one.fired for one in injected)
    fault_table.add(f"{fault}, {verb}", fired=fired, audit=job.audit(), clean_digest=clean.digest)


# A store that stops the job: the rule, the exit code, and what is said.
STOPPED_BY = {
    "F21 credentials expired": (
        EXPIRED_TOKEN,
        ExitCode.STOPPED_RESUMABLE,
        "renew them and run the same command",
    ),
    "F25 no room in the store": (NO_ROOM, ExitCode.STOPPED_RESUMABLE, "has no room left"),
    "F22 writing forbidden": (ACCESS_DENIED, ExitCode.ERROR, "allow s3:PutObject"),
}


@pytest.mark.parametrize("fault", STOPPED_BY)
def test_a_stopped_job_goes_on_where_it_was(
    fault: str,
    bucket: ChaosBucket,
    clean_run: Callable[[str], CleanRun],
    s3_behind_proxy: FaultProxy,
    fault_table: FaultTable,
) -> None:
    clean = clean_run("cache")
    job = bucket.new_job("cache")
    action, exit_code, words = STOPPED_BY[fault]
    with s3_behind_proxy.injecting(stopping_after_three_slices(action)) as (injected,):
        stopped = job.start_here()
    assert stopped.returncode == exit_code, stopped.stderr
    assert words in stopped.stderr
    before = job.attempts()
    assert len(before) == 3
    job.run_here()
    assert {name: job.attempts()[name] for name in before} == before
    fault_table.add(f"{fault}, cache", fired=injected.fired, audit=job.audit(), clean_digest=clean.digest)


def stopping_after_three_slices(action: Action) -> FaultRule:
    """Images are read slice by slice, and each slice has a record: from the fourth on all fails."""
    if action is EXPIRED_TOKEN:
        return FaultRule(method="GET", key="images/", action=action, start=3 * SLICE_ROWS + 1)
    return FaultRule(method="PUT", key=A_RECORD, action=action, start=4)


def test_a_missing_right_to_write_ends_the_job_before_an_image_is_read(
    bucket: ChaosBucket,
    clean_run: Callable[[str], CleanRun],
    s3_behind_proxy: FaultProxy,
    fault_table: FaultTable,
) -> None:
    clean = clean_run("score")
    job = bucket.new_job("score")
    refuse, watch = (
        FaultRule(method="PUT", action=ACCESS_DENIED),
        FaultRule(method="GET", key="images/", action=Delay(0)),
    )
    with s3_behind_proxy.injecting(refuse, watch) as (injected, read):
        refused = job.start_here()
    assert (injected.fired, read.fired) == (1, 0), "it is not asked again, and nothing is computed"
    assert refused.returncode == 1
    assert "allow s3:PutObject" in refused.stderr
    assert "Traceback" not in refused.stderr
    job.run_here()
    fault_table.add(
        "F23 no right to write, score", fired=injected.fired, audit=job.audit(), clean_digest=clean.digest
    )


def test_an_image_that_nobody_may_read_is_one_reject(
    bucket: ChaosBucket, s3_behind_proxy: FaultProxy, fault_table: FaultTable
) -> None:
    """The damaged one is the other, so the budget of one is exceeded."""
    job = bucket.new_job("score").changed("error_budget={rows: 1}")
    rule = FaultRule(method="GET", key=r"images/3/00003\.jpg", action=ACCESS_DENIED)
    with s3_behind_proxy.injecting(rule) as (injected,):
        finished = job.start_here()
    assert injected.fired
    assert finished.returncode == ExitCode.ERROR_BUDGET_EXCEEDED, finished.stderr
    assert json.loads(finished.stdout)["reject_codes"] == {"access_denied": 1, "truncated": 1}
    fault_table.add("F22 a forbidden key, score", fired=injected.fired, audit=job.audit(), clean_digest=None)


def test_a_job_does_not_go_on_with_other_weights(
    bucket: ChaosBucket,
    clean_run: Callable[[str], CleanRun],
    s3_behind_proxy: FaultProxy,
    fault_table: FaultTable,
) -> None:
    clean = clean_run("cache")
    job = bucket.new_job("cache")
    with s3_behind_proxy.injecting(stopping_after_three_slices(EXPIRED_TOKEN)):
        assert job.start_here().returncode == ExitCode.STOPPED_RESUMABLE
    before = job.attempts()
    changed = change_weights(job)
    refused = job.start_here()
    assert refused.returncode == 1
    assert "weights have the digest" in refused.stderr
    assert job.attempts() == before, "a slice was computed with other weights"
    for key, data in changed.items():
        job.store.put(key, data)
    job.run_here()
    fault_table.add(
        "F29 other weights on resume, cache", fired=len(changed), audit=job.audit(), clean_digest=clean.digest
    )


def change_weights(job: ChaosJob) -> dict[str, bytes]:
    """Add a little to every tensor of every backbone of the workspace; what was there before, by key."""
    before = {
        info.key: job.store.get(info.key).data
        for info in job.store.list_objects("models/backbones/")
        if info.key.endswith(".safetensors")
    }
    for key, data in before.items():
        state = {name: tensor + 0.01 for name, tensor in read_state_dict(data).items()}
        job.store.put(key, state_to_safetensors(state))
    return before


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["cache", "score"])
def test_a_part_that_is_damaged_after_the_commit_is_named_and_only_its_slice_rebuilt(
    verb: str, bucket: ChaosBucket, clean_run: Callable[[str], CleanRun], fault_table: FaultTable
) -> None:
    clean = clean_run(verb)
    job = bucket.new_job(verb)
    job.run_here()
    before = job.attempts()
    key, slice_name = a_part_of(job)
    job.store.put(key, job.store.get(key).data[:-7])
    where = ("--workspace", job.workspace, "--json")
    damaged = convoy_here("verify", job.run_id, *where)
    assert damaged.returncode == 1
    assert key in damaged.stdout
    repaired = convoy_here("runs", "repair", job.run_id, "--apply", *where)
    assert repaired.returncode == 0, repaired.stderr
    job.run_here()
    after = job.attempts()
    assert {name for name in after if after[name] != before[name]} == {slice_name}
    assert convoy_here("verify", job.run_id, *where).returncode == 0
    fault_table.add(f"F28 part cut short, {verb}", fired=1, audit=job.audit(), clean_digest=clean.digest)


def a_part_of(job: ChaosJob) -> tuple[str, str]:
    """The key of one part of the job's run, and the slice that it is of."""
    folder = RunFolder(job.store, job.run_id)
    record = folder.record()
    assert record is not None
    prefix = sorted(record.outputs.values())[0]
    keys = sorted(info.key for info in job.store.list_objects(prefix) if "/part-" in info.key)
    name = keys[2].rpartition("/part-")[2]
    return keys[2], "-".join(name.split("-")[:2])
