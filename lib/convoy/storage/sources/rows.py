"""What a source gives: rows with the label's name, how their content is identified, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import pyarrow as pa

from convoy.core.batching import batched
from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.fingerprints import digest_bytes
from convoy.storage.manifests import MANIFEST_SCHEMA
from convoy.storage.object_store import ObjectInfo

NUM_EXAMPLES = 5
_NUM_BAD_ROWS_SHOWN = 20
_ROWS_PER_CHUNK = 65_536


class SourceKind(StrEnum):
    """How samples are laid out at a source."""

    FOLDERS = "folders"
    IMAGES = "images"
    LIST = "list"
    PARQUET = "parquet"
    TARS = "tars"
    INVENTORY = "inventory"


class LabelRule(StrEnum):
    """Where labels come from: `folders`, or what else the kind of source has for them; or `none`."""

    FOLDERS = "folders"
    NONE = "none"


class ReadingOptions(StrictModel):
    """How a source is read; what is null is found by looking at the source.

    `kind`: `folders` (one folder a class), `images` (any folder, unlabelled), `list` (CSV, JSONL or parquet with
    paths), `parquet` (with image bytes), `tars` (WebDataset), `inventory` (a report of S3 Inventory). A single
    parquet file with a column `path`, `uri` or `file_name` is a list, unless its images are in a column of Hugging
    Face's layout, in one named `image`, or in the `image_column`. A list's relative paths begin at `images_root`,
    else at the folder of the list; of an inventory's objects those below `images_root` are samples, else all of the
    bucket. With `labels` none, samples have no label, whatever the source says. `image_column` chooses among several
    columns of a parquet file or several images of a tar's samples; `label_column` chooses the label of a parquet file
    or a list. `id_column` of parquet files has a text or integer that is unique in its file: with it a sample keeps
    its id, and with that its split, whatever rows of the file come or go; without it the row's number is the id.
    Files are read fastest where ids ascend with the rows.
    """

    kind: SourceKind | None = None
    images_root: str | None = None
    labels: LabelRule = LabelRule.FOLDERS
    image_column: str | None = None
    label_column: str | None = None
    id_column: str | None = None


# As the manifest, but with the label's name, and null where the source names no split.
_LABEL, _SPLIT = pa.field("label", pa.string()), pa.field("split", pa.string())
SOURCE_SCHEMA = pa.schema(
    [{"label": _LABEL, "split": _SPLIT}.get(field.name, field) for field in MANIFEST_SCHEMA]
)


class SourceRow(NamedTuple):
    """One row of SOURCE_SCHEMA."""

    sample_id: str
    uri: str
    etag: str
    size_bytes: int | None
    content_id: bytes
    offset_bytes: int | None = None
    row_index: int | None = None
    container_field: str | None = None
    checksum: str | None = None
    label: str | None = None
    split: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceScan:
    """All samples of a source, as rows of SOURCE_SCHEMA in any order.

    `classes` are the class names where the source declares them in an order; `skipped` counts by reason the
    objects that are no samples, `skipped_in` those inside of containers by their URI; `incomplete` are URIs of
    containers that the next refresh must read again.
    """

    samples: pa.Table
    classes: tuple[str, ...] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_in: dict[str, dict[str, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()


def tabulate(rows: Iterable[SourceRow]) -> pa.Table:
    """The rows as a table; of the Python objects only one chunk is alive at a time.

    Raises DataError for text that is not UTF-8, such as the member names of some old tars.
    """
    types = [SOURCE_SCHEMA.field(name).type for name in SourceRow._fields]
    schema = pa.schema([SOURCE_SCHEMA.field(name) for name in SourceRow._fields])
    batches = []
    for chunk in batched(rows, _ROWS_PER_CHUNK):
        try:
            columns = list(map(pa.array, zip(*chunk, strict=True), types))
        except UnicodeEncodeError as error:
            raise DataError(
                f"a name or label is not UTF-8: {error.object!r}", next_step="rename it, and freeze again"
            ) from None
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    return pa.Table.from_batches(batches, schema=schema).select(SOURCE_SCHEMA.names)


def object_content_id(uri: str, info: ObjectInfo, *, checksum: str | None = None) -> bytes:
    """16 bytes, equal only for equal content: from a known checksum, else from place and version."""
    known = checksum or info.checksum
    # Of the joined fields only the last is free text, so different fields never join to the same bytes.
    fields = ("checksum", info.size_bytes, known) if known else ("version", info.size_bytes, info.etag, uri)
    return digest_bytes("\x1f".join(map(str, fields)).encode())


def part_content_id(container: bytes, *position: int | str) -> bytes:
    """The content id of a part of a container with a content id, at a position that no other part has."""
    return digest_bytes("\x1f".join(["part", container.hex(), *map(str, position)]).encode())


class Skips:
    """Counts what is no sample, by reason, and remembers some examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, key: str, count: int = 1) -> None:
        """Count an object, or so many for which one key stands."""
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(printable(key))

    def add_all(self, reason: str, keys: pa.Array) -> None:
        """Count objects, if there are any."""
        for key in keys[:NUM_EXAMPLES].to_pylist():
            self.add(reason, key)
        if len(keys) > NUM_EXAMPLES:
            self.counts[reason] += len(keys) - NUM_EXAMPLES

    def update(self, other: Skips) -> None:
        """Add the counts and examples of another."""
        self.counts.update(other.counts)
        for reason, keys in other.examples.items():
            examples = self.examples.setdefault(reason, [])
            examples.extend(keys[: NUM_EXAMPLES - len(examples)])

    def describe(self, reason: str) -> str:
        """The count and examples of a reason, such as "12 (a.txt, b.txt, ...)"."""
        return describe_examples(self.counts[reason], self.examples.get(reason, []))


class BadRows:
    """Collects all rows that cannot be used, to report them at once."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._problems: dict[int, list[str]] = {}

    def add(self, line: int, problem: str) -> None:
        """Note a row by its line (or row) number, from 1."""
        self._problems.setdefault(line, []).append(problem)

    def raise_any(self, advice: str = "correct these rows") -> None:
        """Raise DataError that names the count and the first bad rows, if there is one, and gives the advice."""
        if not self._problems:
            return
        first = sorted(self._problems.items())[:_NUM_BAD_ROWS_SHOWN]
        shown = [f"  line {line}: {'; '.join(problems)}" for line, problems in first]
        rest = len(self._problems) - len(shown)
        more = [f"  and {rest} more"] if rest else []
        raise DataError(
            "\n".join([f"{len(self._problems)} rows cannot be used", *shown, *more]),
            where=self._where,
            next_step=f"{advice}; nothing was frozen",
            num_bad_rows=len(self._problems),
        )


def printable(name: str) -> str:
    """A name for people and documents, whose bytes need not be UTF-8, as in a tar."""
    return name.encode("utf-8", "backslashreplace").decode()


def describe_examples(count: int, examples: Iterable[str]) -> str:
    """Such as "12 (a, b, ...)": a count and some of what was counted."""
    shown = list(examples)[:NUM_EXAMPLES]
    dots = ", ..." if count > len(shown) else ""
    return f"{count} ({', '.join(shown)}{dots})" if shown else str(count)
