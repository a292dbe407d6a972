"""What a store's conditional writes are worth is found out by racing them, not by asking it.

Many servers that speak S3 accept If-None-Match but check first and write then, so that of several writers at
the same time more than one is told that it won. Others keep that, and ignore If-Match.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from convoy.core.config import StrictModel
from convoy.core.errors import ConditionalWriteUnsupported, DataError, PreconditionFailed
from convoy.core.fingerprints import canonical_json
from convoy.storage.documents import read_model
from convoy.storage.object_store import ConditionalPut, ObjectStore

PROBE_FOLDER = ".convoy/probe/"
# Where it was conditional_put.json, only create-if-absent had been raced.
VERDICT_KEY = ".convoy/conditional_writes.json"


class StoreVerdict(StrictModel):
    """What a probe found, and of which store: a workspace that is copied elsewhere takes the file with it."""

    conditional_put: ConditionalPut
    root_uri: str = ""
    endpoint_url: str = ""
    probed_utc: str = ""


def known_conditional_put(store: ObjectStore) -> ConditionalPut:
    """What the workspace remembers of this very store; where it remembers nothing, the store is probed."""
    known = None
    # Of one that cannot be understood the answer is asked for again.
    with suppress(DataError):
        known = read_model(StoreVerdict, store, VERDICT_KEY)
    if known is not None and (known.root_uri, known.endpoint_url) == (store.root_uri, store.endpoint_url):
        return known.conditional_put
    return judge_conditional_put(store)


def judge_conditional_put(store: ObjectStore) -> ConditionalPut:
    """Probe a store, whatever the workspace remembers of it, and leave the answer there for the jobs to come."""
    verdict = StoreVerdict(
        conditional_put=probe_conditional_put(store),
        root_uri=store.root_uri,
        endpoint_url=store.endpoint_url,
        probed_utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store.put(VERDICT_KEY, canonical_json(verdict))
    return verdict.conditional_put


def probe_conditional_put(
    store: ObjectStore, *, num_writers: int = 16, num_rounds: int = 8
) -> ConditionalPut:
    """Race `num_writers` threads for one throw-away object, `num_rounds` times, and judge by the winners.

    First they create it, then they replace the version that was created. ATOMIC if every race had exactly one winner,
    which is strong evidence but no proof; RACY otherwise; UNSUPPORTED if the store says so itself. Every writer writes
    its own bytes, so that reading back, the store's way to settle a refusal, cannot count a loser as a winner. The
    objects are deleted again.
    """
    # All probes in one folder, as on a disk it keeps the lock of its writers.
    keys = [f"{PROBE_FOLDER}{uuid.uuid4().hex}" for _ in range(num_rounds)]
    try:
        with ThreadPoolExecutor(num_writers) as pool:
            num_creators = [_race(partial(store.put_if_absent, key), num_writers, pool) for key in keys]
            if set(num_creators) != {1}:
                return ConditionalPut.RACY
            replace = [partial(store.put_if_match, key, etag=store.head(key).etag) for key in keys]
            num_replacers = [_race(replace_one, num_writers, pool) for replace_one in replace]
    except ConditionalWriteUnsupported:
        return ConditionalPut.UNSUPPORTED
    finally:
        store.delete(keys)
    return ConditionalPut.ATOMIC if set(num_replacers) == {1} else ConditionalPut.RACY


def _race(write: Callable[[bytes], str], num_writers: int, pool: ThreadPoolExecutor) -> int:
    """The number of writers that were told that they were first."""
    start = threading.Barrier(num_writers)

    def is_first(_: int) -> bool:
        start.wait()
        try:
            write(uuid.uuid4().bytes)
        except PreconditionFailed:
            return False
        return True

    return sum(pool.map(is_first, range(num_writers)))
