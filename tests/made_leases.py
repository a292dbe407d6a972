"""Leases as drivers on other machines would leave them."""

from __future__ import annotations

from convoy.core.fingerprints import canonical_json
from convoy.core.processes import ProcessIdentity
from convoy.storage.leases import LEASE, LeaseRecord
from convoy.storage.runs import RunFolder

ELSEWHERE = ProcessIdentity(host="elsewhere", place="another boot", pid=1, started="1")


def put_lease(
    folder: RunFolder,
    *,
    holder: ProcessIdentity | None = ELSEWHERE,
    token: int = 7,
    renewals: int = 0,
    ttl_s: float = 60.0,
) -> None:
    """Write a lease, whoever holds the run."""
    record = LeaseRecord(
        lease_id="theirs",
        token=token,
        holder=holder,
        since_utc="2026-01-01T00:00:00+00:00",
        renewals=renewals,
        ttl_s=ttl_s,
    )
    folder.store.put(folder.key(LEASE), canonical_json(record))
