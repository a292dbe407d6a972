"""Samples in WebDataset tar shards: members whose names are equal up to the first dot belong together."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa

from convoy.core.errors import DataError
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.parquet_files import BUFFER_BYTES, buffered_reader
from convoy.storage.sources.containers import (
    KnownContainers,
    open_containers,
    read_containers,
    with_splits,
)
from convoy.storage.sources.listing import SourceRoot, is_hidden
from convoy.storage.sources.rows import (
    SOURCE_SCHEMA,
    LabelRule,
    ReadingOptions,
    Skips,
    SourceRow,
    SourceScan,
    object_content_id,
    part_content_id,
    printable,
    tabulate,
)

# fmt: off
_IMAGE_SUFFIXES = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm",
    "avif", "heic", "heif", "jxl", "img", "image",
))
# fmt: on
_NO_IMAGE, _LINK, _SPARSE, _HIDDEN = "no_image", "link", "sparse", "hidden"
# The first that a sample has is its label.
_LABEL_SUFFIXES = ("cls", "json", "txt")
_BLOCK_BYTES = 512


@dataclass(slots=True)
class _Sample:
    image: tarfile.TarInfo | None = None
    # Or why it is none, which matters only where no other comes first.
    labels: dict[str, str | DataError] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        first = next((self.labels[suffix] for suffix in _LABEL_SUFFIXES if suffix in self.labels), None)
        if isinstance(first, DataError):
            raise first
        return first


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    rows: pa.Table
    skips: Skips = field(default_factory=Skips)
    loss: str = ""


def read_tars(root: SourceRoot, options: ReadingOptions, known: KnownContainers) -> SourceScan:
    """All samples of a tar shard, or of all below a root; a sample's id is `<shard's key>#<sample's key>`.

    The label is the text of a `.cls` member, else "label" of a `.json`, else the text of a `.txt`. Only
    headers and labels are looked at, through a buffer of 1 MiB. That much moves in about the latency of one
    request: so small members come many to a request, large ones are stepped over, and neither takes more than
    twice the best time. Shards that are known in the same version are not read. Of a shard that is cut off
    the whole samples are kept, of joined archives those of the first, and a warning names the loss. Raises
    DataError for a file that is no tar, two images in a sample, or a label that cannot be read. A hard link to
    an earlier member is read there; other links are counted, and so are samples whose image is a sparse file,
    which lies in pieces.
    """
    skips = Skips()
    store, infos = open_containers(root, ".tar", skips)
    if not infos:
        return SourceScan(samples=SOURCE_SCHEMA.empty_table(), skipped=dict(skips.counts))

    def read(info: ObjectInfo) -> _Shard:
        uri = store.uri(info.key)
        rows = known.rows_of(uri, info.etag)
        if rows is None:
            return _read_shard(store, info, options)
        skipped = Skips()
        for reason, count in known.skipped_in.get(uri, {}).items():
            skipped.add(reason, info.key, count)
        return _Shard(rows=rows, skips=skipped)

    shards = list(read_containers(infos, read))
    for shard in shards:
        skips.update(shard.skips)
    losses = [(info, shard.loss) for info, shard in zip(infos, shards, strict=True) if shard.loss]
    warnings = [f"{info.key} {loss}" for info, loss in losses]
    if skips.counts[_NO_IMAGE]:
        warnings.append(f"samples without an image were left out: {skips.describe(_NO_IMAGE)}")
    if skips.counts[_LINK]:
        warnings.append(
            f"links were left out: {skips.describe(_LINK)}; `tar --dereference` packs the files themselves"
        )
    if skips.counts[_SPARSE]:
        warnings.append(
            f"images packed as sparse files were left out: {skips.describe(_SPARSE)}; "
            "write the shard again without `tar -S` (`--sparse`)"
        )
    return SourceScan(
        samples=with_splits(store, infos, [shard.rows for shard in shards]),
        skipped=dict(skips.counts),
        skipped_in={
            store.uri(info.key): dict(shard.skips.counts)
            for info, shard in zip(infos, shards, strict=True)
            if shard.skips.counts
        },
        warnings=tuple(warnings),
        incomplete=tuple(store.uri(info.key) for info, _ in losses),
    )


def _read_shard(store: ObjectStore, info: ObjectInfo, options: ReadingOptions) -> _Shard:
    samples: dict[str, _Sample] = {}
    files: dict[str, tarfile.TarInfo] = {}
    skips = Skips()
    uri = store.uri(info.key)
    tail = b""
    with buffered_reader(store, info.key) as stream, _open_tar(stream, uri) as archive:
        try:
            for member in archive:
                name = _member_name(member.name)
                # tar writes a file once: its further names are hard links to the first.
                file = files.get(_member_name(member.linkname)) if member.islnk() else member
                if file is not None and file.isreg():
                    files[name] = file
                    if is_hidden(name):
                        skips.add(_HIDDEN, f"{info.key}#{name}")
                    else:
                        _add_member(samples, archive, name, file, uri, options)
                elif (member.islnk() or member.issym()) and not is_hidden(name):
                    skips.add(_LINK, f"{info.key}#{name}")
            tail = _read_tail(stream, archive.offset)
        except tarfile.ReadError:
            pass
    loss = ""
    # tarfile takes a missing, cut or damaged header for the end; the true end is a block of zeros.
    if not tail.startswith(bytes(_BLOCK_BYTES)):
        last_key = next(reversed(samples), "")
        samples.pop(last_key, None)
        loss = (
            f"is cut off: {archive.offset:,} of {info.size_bytes:,} bytes are readable, "
            f"and the sample there ('{printable(last_key)}') and all behind it were left out"
        )
    elif behind_end := tail.lstrip(b"\0"):
        end = archive.offset + len(tail) - len(behind_end)
        loss = (
            f"goes on behind its end: what follows byte {end:,} of {info.size_bytes:,} was left out; "
            "join archives with `tar --concatenate`, or keep them apart"
        )
    return _Shard(rows=tabulate(_to_rows(uri, info, samples, skips)), skips=skips, loss=loss)


def _open_tar(stream: BinaryIO, uri: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=stream, mode="r:")
    except tarfile.ReadError as error:
        raise DataError(
            f"this is not a tar file ({error})",
            where=uri,
            next_step="write it again without compression, or move it away",
        ) from None


def _read_tail(stream: BinaryIO, offset_bytes: int) -> bytes:
    """What lies behind the last member, as far as zeros fill up an archive: tar writes 10 KiB at a time."""
    stream.seek(offset_bytes)
    return stream.read(BUFFER_BYTES)


def _member_name(name: str) -> str:
    return name.removeprefix("./")


def _add_member(
    samples: dict[str, _Sample],
    archive: tarfile.TarFile,
    path: str,
    file: tarfile.TarInfo,
    uri: str,
    options: ReadingOptions,
) -> None:
    folder, slash, name = path.rpartition("/")
    stem, _, suffix = name.partition(".")
    key, suffix = f"{folder}{slash}{stem}", suffix.lower()
    # Kept in the order of the shard, so that the sample at a cut is the last.
    sample = samples.pop(key, None) or _Sample()
    samples[key] = sample
    if suffix in _LABEL_SUFFIXES:
        label = _read_label(archive, file, suffix, uri) if options.labels is not LabelRule.NONE else None
        if label:
            sample.labels[suffix] = label
    elif _is_image(suffix, options):
        if sample.image is not None:
            raise DataError(
                f"the sample '{key}' has two images, {sample.image.name} and {path}",
                where=uri,
                next_step="name the right one with reading.image_column, such as input.jpg",
            )
        sample.image = file


def _is_image(suffix: str, options: ReadingOptions) -> bool:
    if options.image_column is not None:
        return suffix == options.image_column.lower()
    return suffix.rpartition(".")[2] in _IMAGE_SUFFIXES


def _read_label(
    archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, uri: str
) -> str | DataError | None:
    file = archive.extractfile(member)
    content = file.read() if file else b""
    try:
        if suffix != "json":
            return content.decode().strip() or None
        label = json.loads(content).get("label")
    except (ValueError, AttributeError, RecursionError) as error:
        return DataError(f"the label cannot be read ({error})", where=f"{member.name} in {uri}")
    if label is None or isinstance(label, str | int):
        return None if label is None else str(label)
    return DataError(f"{label!r} is no label", where=f"{member.name} in {uri}")


def _to_rows(uri: str, info: ObjectInfo, samples: dict[str, _Sample], skips: Skips) -> Iterator[SourceRow]:
    container = object_content_id(uri, info)
    for key, sample in samples.items():
        sample_id = f"{info.key}#{key}"
        if sample.image is None:
            skips.add(_NO_IMAGE, sample_id)
            continue
        if sample.image.issparse():
            # Without its holes: no range of the shard is the image.
            skips.add(_SPARSE, sample_id)
            continue
        offset_bytes, size_bytes = sample.image.offset_data, sample.image.size
        yield SourceRow(
            sample_id=sample_id,
            uri=uri,
            etag=info.etag,
            size_bytes=size_bytes,
            content_id=part_content_id(container, offset_bytes, size_bytes),
            offset_bytes=offset_bytes,
            label=sample.label,
        )
