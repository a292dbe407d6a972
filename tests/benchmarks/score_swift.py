"""A copy of the images on an S3 server of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from images import ImageSet

from convoy.storage.stores import open_store

_BUCKET = "convoy-bench"


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
