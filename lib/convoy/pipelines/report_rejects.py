"""What a page says of rejects: how many of each reason, some rows of each, and what of these can still be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow.compute as pc

from convoy.core.config import StrictModel
from convoy.core.records import RejectCode
from convoy.pipelines.report_images import ShownImage, frozen_rows, show_samples
from convoy.storage.commits import RunManifest
from convoy.storage.runs import RunFolder
from convoy.vision.decode_rule import DecodeRule

_MAX_REJECTS_A_CODE, _MAX_REJECT_FILES = 20, 200
_REJECT_COLUMNS = ["sample_id", "uri", "stage", "code", "reason"]
# Images that a run's rule or its network refused, but which decode. Of the other codes there are no bytes or no image;
# what ended workers would end this process too.
_MAY_BE_DRAWN = (
    RejectCode.TOO_SMALL,
    RejectCode.TOO_LARGE,
    RejectCode.UNSUPPORTED_FORMAT,
    RejectCode.NOT_FINITE,
)
_MAX_DRAWN_A_CODE = 6
# Whatever limits the run had: the usual ones of pixels, and few enough bytes to read one for each picture.
_DRAWN_BY = DecodeRule(min_side_px=1, max_bytes=16 << 20)


class ShownReject(StrictModel):
    """A row that could not be used, and why."""

    sample_id: str
    uri: str
    stage: str
    code: str
    reason: str


class DrawnReject(StrictModel):
    """A row that could not be used, but can be looked at."""

    code: str
    image: ShownImage


class RejectSummary(StrictModel):
    """Rejects of a run by code, some rows of each, and pictures of those among them that can be decoded."""

    rows: int
    by_code: dict[str, int]
    shown: list[ShownReject]
    drawn: list[DrawnReject]


def summarise_rejects(folder: RunFolder, manifest: RunManifest) -> RejectSummary:
    """The rejects of a run; their tables are read until there are some of each code."""
    by_code: Counter[str] = Counter()
    for record in manifest.slices:
        by_code.update(record.reject_codes)
    wanted = dict.fromkeys(by_code, _MAX_REJECTS_A_CODE)
    shown: list[ShownReject] = []
    slices: dict[str, str] = {}
    files = [(record.slice, record.rejects.key) for record in manifest.slices if record.rejects]
    for name, key in files[:_MAX_REJECT_FILES]:
        table = folder.store.open_parquet(key).read(columns=_REJECT_COLUMNS)
        for code in pc.unique(table["code"]).to_pylist():
            room = wanted.get(code, _MAX_REJECTS_A_CODE)
            rows = table.filter(pc.equal(table["code"], code)).slice(0, room).to_pylist()
            shown += [ShownReject(**row) for row in rows]
            slices |= {row["sample_id"]: name for row in rows}
            wanted[code] = room - len(rows)
        if not any(wanted.values()):
            break
    return RejectSummary(
        rows=manifest.num_rejects,
        by_code=dict(by_code.most_common()),
        shown=shown,
        drawn=_draw(folder, shown, slices),
    )


def _draw(folder: RunFolder, shown: Sequence[ShownReject], slices: Mapping[str, str]) -> list[DrawnReject]:
    """Pictures of a few rejects of each code that allows it; `slices` are those of samples."""
    codes: dict[str, str] = {}
    for code in _MAY_BE_DRAWN:
        some = [one.sample_id for one in shown if one.code == code][:_MAX_DRAWN_A_CODE]
        codes |= dict.fromkeys(some, code)
    by_slice: dict[str, list[str]] = {}
    for sample_id in codes:
        by_slice.setdefault(slices[sample_id], []).append(sample_id)
    images = show_samples(codes, frozen_rows(folder, by_slice), _DRAWN_BY)
    return [DrawnReject(code=codes[one.sample_id], image=one) for one in images if one.jpeg]
