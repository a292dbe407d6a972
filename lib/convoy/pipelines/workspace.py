"""Opening a workspace: where it is, and whether several writers may share it."""

from __future__ import annotations

import os

from convoy.core.errors import ConfigError
from convoy.storage.conditional_put import VERDICT_KEY, known_conditional_put
from convoy.storage.object_store import ONE_WRITER_ADVICE, ConditionalPut, ObjectStore, WriterMode
from convoy.storage.stores import open_store

DEFAULT_WORKSPACE = "./workspace"


def workspace_uri(configured: str | None) -> str:
    """The workspace of a job: what its config says, else CONVOY_WORKSPACE, else ./workspace."""
    return configured or os.environ.get("CONVOY_WORKSPACE") or DEFAULT_WORKSPACE


def workspace_store(configured: str | None) -> ObjectStore:
    """The store of a workspace, for whom it does not matter whether several writers may share it."""
    return open_store(workspace_uri(configured))


def open_workspace(configured: str | None, writers: WriterMode) -> ObjectStore:
    """The store of a workspace that jobs may write to.

    The first job probes whether the store's conditional writes are atomic, and leaves the answer in the workspace;
    so does the first one after the workspace has moved. Where it is not, two jobs at once could both believe that they
    won, so only `writers: single` is accepted.
    """
    store = workspace_store(configured)
    if writers is WriterMode.MANY and known_conditional_put(store) is not ConditionalPut.ATOMIC:
        raise ConfigError(
            "this object store does not keep conditional writes atomic, so two jobs at once could damage each other",
            where=f"{store.root_uri}, by {VERDICT_KEY} in it",
            next_step=f"{ONE_WRITER_ADVICE}; where the store has changed, `convoy doctor` probes it again",
        )
    return store
