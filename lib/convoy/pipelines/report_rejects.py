"""What a page says of rejects: how many of each reason, and some rows of each."""

from __future__ import annotations

from collections import Counter

import pyarrow.compute as pc

from convoy.core.config import StrictModel
from convoy.storage.commits import RunManifest
from convoy.storage.object_store import ObjectStore

_MAX_REJECTS_A_CODE, _MAX_REJECT_FILES = 20, 200
_REJECT_COLUMNS = ["sample_id", "uri", "stage", "code", "reason"]


class ShownReject(StrictModel):
    """A row that could not be used, and why."""

    sample_id: str
    uri: str
    stage: str
    code: str
    reason: str


class RejectSummary(StrictModel):
    """Rejects of a run by code, and some rows of each."""

    rows: int
    by_code: dict[str, int]
    shown: list[ShownReject]


def summarise_rejects(store: ObjectStore, manifest: RunManifest) -> RejectSummary:
    """The rejects of a run; their tables are read until there are some of each code."""
    by_code: Counter[str] = Counter()
    for record in manifest.slices:
        by_code.update(record.reject_codes)
    wanted = dict.fromkeys(by_code, _MAX_REJECTS_A_CODE)
    shown: list[ShownReject] = []
    files = [record.rejects.key for record in manifest.slices if record.rejects]
    for key in files[:_MAX_REJECT_FILES]:
        table = store.open_parquet(key).read(columns=_REJECT_COLUMNS)
        for code in pc.unique(table["code"]).to_pylist():
            room = wanted.get(code, _MAX_REJECTS_A_CODE)
            rows = table.filter(pc.equal(table["code"], code)).slice(0, room).to_pylist()
            shown += [ShownReject(**row) for row in rows]
            wanted[code] = room - len(rows)
        if not any(wanted.values()):
            break
    return RejectSummary(rows=manifest.num_rejects, by_code=dict(by_code.most_common()), shown=shown)
