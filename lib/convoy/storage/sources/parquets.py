"""Samples in parquet files with image bytes, in the layout of Hugging Face or as a plain binary column."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from convoy.core.errors import DataError
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.row_groups import image_bytes_by_group
from convoy.storage.sources.containers import (
    KnownContainers,
    open_containers,
    read_containers,
    with_splits,
)
from convoy.storage.sources.listing import SourceRoot
from convoy.storage.sources.rows import (
    SOURCE_SCHEMA,
    LabelRule,
    ReadingOptions,
    Skips,
    SourceRow,
    SourceScan,
    describe_examples,
    object_content_id,
    part_content_id,
    tabulate,
)

_LABEL_NAMES = ("label", "labels")
# A row group is read whole, for one of its images too, by each slice that has rows of it.
_LARGE_GROUP_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageColumns:
    """Where a parquet file keeps images, labels and ids. `classes` are the names that integer labels index."""

    image_field: str
    label: str | None = None
    id: str | None = None
    classes: tuple[str, ...] | None = None


def read_parquets(root: SourceRoot, options: ReadingOptions, known: KnownContainers) -> SourceScan:
    """All rows of a parquet file, or of all below a root; a sample's id is `<key>#<row>`, or `<key>#<id>`.

    Only footers, label and id columns are read, and of files that are known in the same version nothing but the
    footer of one. Sizes are not known; files that are read are warned of where their row groups are large. Raises
    DataError where the columns, the class names or a label are unclear, and where files differ in them.
    """
    skips = Skips()
    store, files = open_containers(root, ".parquet", skips)
    if not files:
        return SourceScan(samples=SOURCE_SCHEMA.empty_table(), skipped=dict(skips.counts))

    def known_rows(info: ObjectInfo) -> pa.Table | None:
        return known.rows_of(store.uri(info.key), info.etag)

    # Known files are alike, so one of them speaks for all: what is read anew must be like it.
    example = next((info for info in files if known_rows(info) is not None), files[0])
    columns = _open_columns(store, example, options)[1]
    large_groups: dict[str, int] = {}

    def read(info: ObjectInfo) -> pa.Table:
        if (rows := known_rows(info)) is not None:
            return rows
        uri = store.uri(info.key)
        file, own_columns = _open_columns(store, info, options)
        if own_columns != columns:
            raise DataError(
                f"the files differ in their columns or class names: {own_columns} here, {columns} in {example.key}",
                where=uri,
                next_step="freeze them as datasets of their own, or write them alike",
            )
        group_bytes = max(image_bytes_by_group(file.metadata, columns.image_field), default=0)
        if group_bytes > _LARGE_GROUP_BYTES:
            large_groups[info.key] = group_bytes
        return tabulate(_read_rows(file, columns, info, uri))

    tables = list(read_containers(files, read))
    rewritten = [info.key for info in files if known.has_other_version(store.uri(info.key), info.etag)]
    return SourceScan(
        samples=with_splits(store, files, tables),
        classes=columns.classes,
        skipped=dict(skips.counts),
        warnings=(
            *_warn_of_large_groups(large_groups),
            *([] if columns.id else _warn_of_moved_rows(rewritten)),
        ),
    )


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that may hold image bytes: binary ones, and structs with a binary `bytes`."""
    return [field.name for field in schema if _is_binary(field.type) or _is_binary(_bytes_type(field.type))]


def sure_image_columns(schema: pa.Schema) -> list[str]:
    """Those that tell it themselves: declared an image or laid out as one of Hugging Face's, or named `image`."""
    told = {*_declared_images(schema), "image"}
    return [name for name in image_columns(schema) if name in told or not _is_binary(schema.field(name).type)]


def _warn_of_large_groups(large_groups: Mapping[str, int]) -> Iterator[str]:
    """What reading will suffer from; of some files their largest row group in bytes, by key."""
    if not large_groups:
        return
    most_mb = max(large_groups.values()) / 1e6
    yield (
        f"row groups of up to {most_mb:,.0f} MB of images, which are read whole for a single one:"
        f" {describe_examples(len(large_groups), sorted(large_groups))};"
        " write these files anew with row groups of a few hundred images (row_group_size of pyarrow)"
    )


def _open_columns(store: ObjectStore, info: ObjectInfo, options: ReadingOptions) -> tuple[Any, ImageColumns]:
    file = store.open_parquet(info.key)
    return file, _choose_columns(file.schema_arrow, options, store.uri(info.key))


def _choose_columns(schema: pa.Schema, options: ReadingOptions, where: str) -> ImageColumns:
    features = _features(schema)
    images = _declared_images(schema) or image_columns(schema)
    image = _choose(options.image_column, images, schema, where, "image")
    if image is None:
        raise DataError("no column holds image bytes", where=where, next_step="set reading.image_column")
    if image not in image_columns(schema):
        raise DataError(
            f"the column '{image}' of {schema.field(image).type} holds no image bytes",
            where=where,
            next_step="write it as binary, or as a struct with binary `bytes`",
        )
    image_field = image if _is_binary(schema.field(image).type) else f"{image}.bytes"
    id_column = _choose(options.id_column, (), schema, where, "id")
    if options.labels is LabelRule.NONE:
        return ImageColumns(image_field=image_field, id=id_column)
    class_labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    labels = class_labels or [name for name in _LABEL_NAMES if name in schema.names]
    label = _choose(options.label_column, labels, schema, where, "label")
    classes = features.get(label or "", {}).get("names")
    if isinstance(classes, Mapping):
        classes = [classes[str(index)] for index in range(len(classes))]
    return ImageColumns(
        image_field=image_field,
        label=label,
        id=id_column,
        classes=tuple(classes) if classes else None,
    )


def _choose(
    wanted: str | None, candidates: Sequence[str], schema: pa.Schema, where: str, role: str
) -> str | None:
    if wanted is not None and wanted not in schema.names:
        raise DataError(f"there is no column '{wanted}', only {', '.join(schema.names)}", where=where)
    if wanted is None and len(candidates) > 1:
        raise DataError(
            f"several columns could be the {role}: {', '.join(candidates)}",
            where=where,
            next_step=f"choose one with reading.{role}_column",
        )
    return wanted or next(iter(candidates), None)


def _declared_images(schema: pa.Schema) -> list[str]:
    return [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The features that the `datasets` library writes into its files, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return pa.null()
    return kind.field("bytes").type


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read_rows(file: Any, columns: ImageColumns, info: ObjectInfo, uri: str) -> Iterator[SourceRow]:
    container = object_content_id(uri, info)
    labels = _read_column(file, columns.label)
    ids = range(file.metadata.num_rows) if columns.id is None else _read_column(file, columns.id)
    for row, (label, row_id) in enumerate(zip(labels, ids, strict=True)):
        yield SourceRow(
            sample_id=f"{info.key}#{_id_text(row_id, columns, uri)}",
            uri=uri,
            etag=info.etag,
            size_bytes=None,
            content_id=part_content_id(container, row, columns.image_field),
            row_index=row,
            container_field=columns.image_field,
            label=_label_name(label, columns, uri),
        )


def _read_column(file: Any, name: str | None) -> Iterator[Any]:
    """The values of a column, or as many nulls as there are rows."""
    if name is None:
        yield from (None for _ in range(file.metadata.num_rows))
        return
    for batch in file.iter_batches(columns=[name]):
        yield from batch.column(0).to_pylist()


def _id_text(value: Any, columns: ImageColumns, uri: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        # Nine digits: so ids sort as the rows do, and a slice of the manifest needs few row groups.
        return f"{value:09d}"
    if isinstance(value, str) and value:
        return value
    raise DataError(
        f"{value!r} is no id",
        where=f"column {columns.id} of {uri}",
        next_step="give each row a text or an integer there, or name another column with reading.id_column",
    )


def _warn_of_moved_rows(rewritten: Sequence[str]) -> Iterator[str]:
    if rewritten:
        yield (
            f"rewritten files: {describe_examples(len(rewritten), rewritten)}; a row's number is its id, so rows"
            " behind one that was removed or put in take the ids and splits of others, and `test` may hold what was"
            " trained on. Rows added at the end move none, and none moves where reading.id_column names a unique"
            " column, best from the first freeze of a dataset on"
        )


def _label_name(value: Any, columns: ImageColumns, uri: str) -> str | None:
    # The `datasets` library writes -1 for the hidden labels of a test split.
    if value is None or value == "" or (columns.classes and value == -1):
        return None
    if columns.classes is None and isinstance(value, str | int):
        return str(value)
    if columns.classes is not None and isinstance(value, int) and 0 <= value < len(columns.classes):
        return columns.classes[value]
    raise DataError(
        f"{value!r} is no label",
        where=f"column {columns.label} of {uri}",
        next_step=f"use 0 to {len(columns.classes) - 1}" if columns.classes else "use texts or integers",
    )
