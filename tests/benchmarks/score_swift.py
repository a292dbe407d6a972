"""A copy of the images on an S3 server of this machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import boto3
from botocore.config import Config
from images import ImageSet

from convoy.storage.stores import open_store

_BUCKET = "convoy-bench"
# As many at a time as keep this server busy: with more it answers no more a second.
_NUM_READERS = 16
_GETS_A_ROUND = 64


@contextmanager
def swift_copy(images: ImageSet, folder: Path) -> Iterator[str]:
    """The URI of a bucket with the images below `images/`, as long as its server runs, with its data in `folder`.

    The environment points at the server meanwhile.
    """
    # The server is the one of the tests, which are no package.
    sys.path.append(str(Path(__file__).parents[1]))
    from s3_server import OVERRIDING_VARIABLES, running_server  # noqa: PLC0415

    before = dict(os.environ)
    folder.mkdir()
    with running_server(folder) as server:
        for name in OVERRIDING_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(server.environment())
        try:
            boto3.session.Session().client("s3").create_bucket(Bucket=_BUCKET)
            root = f"s3://{_BUCKET}"
            store = open_store(root)
            for path in Path(images.folder).iterdir():
                store.put(f"images/{path.name}", path.read_bytes())
            yield root
        finally:
            os.environ.clear()
            os.environ.update(before)


def gets_per_second(probe_s: float) -> float:
    """Images per second that plain clients read from the bucket in threads, of which nothing else is done."""
    client = boto3.session.Session().client("s3", config=Config(max_pool_connections=_NUM_READERS))
    listed = client.list_objects_v2(Bucket=_BUCKET, Prefix="images/")["Contents"]
    keys = cycle(entry["Key"] for entry in listed)

    def get(key: str) -> int:
        return len(client.get_object(Bucket=_BUCKET, Key=key)["Body"].read())

    num_gets, started_s = 0, time.perf_counter()
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        while time.perf_counter() - started_s < probe_s:
            num_gets += len(list(readers.map(get, islice(keys, _GETS_A_ROUND))))
    return num_gets / (time.perf_counter() - started_s)
