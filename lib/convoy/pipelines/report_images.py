"""Images for pages: a few rows of a manifest or of a run's frozen input, fetched and made small. None is ever fatal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.core.records import SampleRejected
from convoy.storage.manifests import MANIFEST_SCHEMA
from convoy.storage.runs import RunFolder
from convoy.storage.samples import SampleReader
from convoy.vision.decode_rule import DecodeRule

THUMBNAIL_PX = 128
_THREADS = 8


class ShownImage(StrictModel):
    """A small JPEG of a sample, and the size of the whole image; or why there is none."""

    sample_id: str
    jpeg: bytes = b""
    width_px: int = 0
    height_px: int = 0
    missing: str = ""


def show_images(rows: pa.Table, rule: DecodeRule | None = None) -> list[ShownImage]:
    """An image for each row of MANIFEST_SCHEMA, in their order. Those that cannot be had say why."""
    if not rows.num_rows:
        return []
    # Imports torch, which a page without images need not wait for.
    from convoy.vision.decoding import quiet_decoders  # noqa: PLC0415

    quiet_decoders()
    rule = rule or DecodeRule()
    ids = rows["sample_id"].to_pylist()
    shown: list[ShownImage] = []
    try:
        for row, data in SampleReader(num_threads=_THREADS, max_bytes=rule.max_bytes).read(rows):
            shown.append(_show(ids[row], data, rule))
    except ConvoyError as error:
        shown += [ShownImage(sample_id=one, missing=error.what) for one in ids[len(shown) :]]
    return shown


def frozen_rows(folder: RunFolder, ids_by_slice: Mapping[str, Sequence[str]]) -> dict[str, pa.Table]:
    """The rows of MANIFEST_SCHEMA of some samples of a run's frozen input, a slice at a time; lost ones are missing."""
    found: dict[str, pa.Table] = {}
    for name, ids in ids_by_slice.items():
        try:
            table = folder.read_slice(name)
        except (ConvoyError, OSError):
            continue
        table = table.filter(pc.is_in(table["sample_id"], value_set=pa.array(ids, pa.string())))
        found |= {one: table.slice(row, 1) for row, one in enumerate(table["sample_id"].to_pylist())}
    return found


def show_samples(
    ids: Iterable[str], rows: Mapping[str, pa.Table], rule: DecodeRule | None = None
) -> list[ShownImage]:
    """The images of samples by their ids, given the rows that are known of them."""
    ids = list(ids)
    known = [rows[one].select(MANIFEST_SCHEMA.names) for one in ids if one in rows]
    shown = show_images(pa.concat_tables(known), rule) if known else []
    by_id = {one.sample_id: one for one in shown}
    lost = "the run's frozen input, which says where its bytes lie, is gone"
    return [by_id.get(one) or ShownImage(sample_id=one, missing=lost) for one in ids]


def _show(sample_id: str, data: bytes | SampleRejected, rule: DecodeRule) -> ShownImage:
    from convoy.vision.thumbnails import make_thumbnail  # noqa: PLC0415

    try:
        if isinstance(data, SampleRejected):
            raise data
        thumbnail = make_thumbnail(data, rule, side_px=THUMBNAIL_PX)
    except SampleRejected as rejected:
        return ShownImage(sample_id=sample_id, missing=f"{rejected.code.value}: {rejected.reason}")
    except MemoryError:
        return ShownImage(sample_id=sample_id, missing="there was no memory to decode it")
    return ShownImage(
        sample_id=sample_id,
        jpeg=thumbnail.jpeg,
        width_px=thumbnail.width_px,
        height_px=thumbnail.height_px,
    )


def read_rule(config: Mapping[str, object]) -> DecodeRule:
    """The decode rule of a run's config, or the default where it has none that this version reads."""
    extraction = config.get("extraction")
    decode = extraction.get("decode") if isinstance(extraction, dict) else None
    try:
        return DecodeRule.model_validate(decode or {})
    except ValueError:
        return DecodeRule()
