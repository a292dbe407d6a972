"""Races for one object, on the same server as an honest store and as dishonest ones: one winner, or a refusal."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from convoy.core.errors import ConfigError, PreconditionFailed
from convoy.pipelines.workspace import open_workspace
from convoy.storage.conditional_put import VERDICT_KEY, probe_conditional_put
from convoy.storage.object_store import ConditionalPut, WriterMode
from convoy.storage.s3_store import S3Store
from fault_proxy import CONFLICT, Conditions, FaultProxy, FaultRule, lose_answer

pytestmark = pytest.mark.integration

# Writers, rounds: the second is the figure that we show. The probe itself takes 8 rounds of 16 writers.
RACES = [(16, 3), pytest.param(64, 50, marks=pytest.mark.slow)]


@pytest.fixture
def store(s3_bucket: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.as_server().endpoint)
    return S3Store(s3_bucket, "workspace")


@pytest.fixture
def honest(fault_proxy: FaultProxy) -> Iterator[None]:
    with fault_proxy.keeping(Conditions.ATOMIC):
        yield


def winners(write: Callable[[bytes], str], num_writers: int, pool: ThreadPoolExecutor) -> list[bytes]:
    """What those wrote who were told that they won, of so many writers at once, each with bytes of its own."""
    start = threading.Barrier(num_writers)

    def attempt(writer: int) -> list[bytes]:
        data = f"writer {writer}".encode()
        start.wait()
        try:
            write(data)
        except PreconditionFailed:
            return []
        return [data]

    return [data for won in pool.map(attempt, range(num_writers)) for data in won]


@pytest.mark.usefixtures("honest")
@pytest.mark.parametrize(("num_writers", "num_rounds"), RACES)
def test_one_of_many_writers_creates_an_object(store: S3Store, num_writers: int, num_rounds: int) -> None:
    with ThreadPoolExecutor(num_writers) as pool:
        for number in range(num_rounds):
            key = f"manifest-{number}"
            won = winners(lambda data, key=key: store.put_if_absent(key, data), num_writers, pool)
            assert won == [store.get(key).data]


@pytest.mark.usefixtures("honest")
@pytest.mark.parametrize(("num_writers", "num_rounds"), RACES)
def test_one_of_many_writers_replaces_a_version(store: S3Store, num_writers: int, num_rounds: int) -> None:
    etag = store.put("alias", b"first")
    with ThreadPoolExecutor(num_writers) as pool:
        for _round in range(num_rounds):
            won = winners(
                lambda data, etag=etag: store.put_if_match("alias", data, etag=etag), num_writers, pool
            )
            blob = store.get("alias")
            assert won == [blob.data]
            # The next round begins from a version that no writer of it makes.
            etag = store.put("alias", b"between two rounds")


@pytest.mark.usefixtures("honest")
def test_lost_answers_and_conflicts_make_no_second_winner(store: S3Store, fault_proxy: FaultProxy) -> None:
    rules = [
        FaultRule(method="PUT", action=lose_answer, share=0.2, seed=1),
        FaultRule(method="PUT", action=CONFLICT, share=0.2, seed=2),
    ]
    with fault_proxy.injecting(*rules) as faults, ThreadPoolExecutor(8) as pool:
        for number in range(4):
            key = f"manifest-{number}"
            won = winners(lambda data, key=key: store.put_if_absent(key, data), 8, pool)
            assert won == [store.get(key).data]
    assert all(fault.fired > 1 for fault in faults)


@pytest.mark.parametrize(
    ("conditions", "worth"),
    [
        (Conditions.ATOMIC, {ConditionalPut.ATOMIC}),
        # Where every race to create had one winner by luck, the refusal of If-Match is what is left to see.
        (Conditions.AS_SERVED, {ConditionalPut.RACY, ConditionalPut.UNSUPPORTED}),
        (Conditions.IF_MATCH_IGNORED, {ConditionalPut.RACY}),
        (Conditions.IGNORED, {ConditionalPut.RACY}),
    ],
)
@pytest.mark.parametrize(("num_writers", "num_rounds"), RACES)
def test_the_probe_tells_an_honest_store_from_a_dishonest_one(
    store: S3Store,
    fault_proxy: FaultProxy,
    conditions: Conditions,
    worth: set[ConditionalPut],
    num_writers: int,
    num_rounds: int,
) -> None:
    with fault_proxy.keeping(conditions):
        assert probe_conditional_put(store, num_writers=num_writers, num_rounds=num_rounds) in worth


def test_many_writers_are_let_in_by_an_honest_store_only(store: S3Store, fault_proxy: FaultProxy) -> None:
    for conditions in (Conditions.IGNORED, Conditions.IF_MATCH_IGNORED, Conditions.AS_SERVED):
        with (
            fault_proxy.keeping(conditions),
            pytest.raises(ConfigError, match="writers=single"),
        ):
            open_workspace(f"{store.root_uri}/{conditions.name}", WriterMode.MANY)
        assert open_workspace(f"{store.root_uri}/{conditions.name}", WriterMode.SINGLE)
    with fault_proxy.keeping(Conditions.ATOMIC):
        opened = open_workspace(f"{store.root_uri}/{Conditions.ATOMIC.name}", WriterMode.MANY)
    known = json.loads(opened.get(VERDICT_KEY).data)
    assert (known["conditional_put"], known["root_uri"]) == ("atomic", opened.root_uri)
    assert known["endpoint_url"] == fault_proxy.as_server().endpoint
