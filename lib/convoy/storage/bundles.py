"""Bundles: trained models as immutable folders `models/<name>/<digest>/` of a workspace.

The digest in the path is over the files that determine predictions, so equal models share one folder.
`digests.json` is written last: a folder without it is unfinished, and writing the same model again completes
it. `models/<name>/latest.json` names the digest written last; it is a plain put, so of two writers at once
the later wins. Scheduled jobs that must not race name a digest or an alias instead (see `registry`).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convoy.core.errors import (
    ChecksumMismatch,
    ConfigError,
    DataError,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
)
from convoy.core.fingerprints import canonical_json, digest, digest_bytes
from convoy.core.statistics import Interval
from convoy.storage.documents import exists
from convoy.storage.object_store import ObjectStore, put_looking_first
from convoy.storage.registry import ALIASES, aliased_digest

BUNDLE_FORMAT_VERSION = 1
MODELS_PREFIX = "models/"
DIGESTS_FILE = "digests.json"
CARD_FILE = "README.md"
METRICS_FILE = "metrics.json"
MODEL_FILE = "model.safetensors"
# In place of tensors an ensemble names the bundles that it is made of.
ENSEMBLE_FILE = "ensemble.json"
REQUIRED_FILES = frozenset({"config.json", "preprocess.json", "classes.json", METRICS_FILE, CARD_FILE})

# They describe a model and leave its predictions alone; every other file counts in the bundle's digest.
_DESCRIPTIVE_FILES = frozenset({METRICS_FILE, CARD_FILE})
# Lower case only: some file systems cannot tell the cases apart.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_CLASSES_ON_CARD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRef:
    """Where a bundle is: `uri` is its folder, `digest` 32 hex digits."""

    uri: str
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"

    @property
    def folder(self) -> str:
        """The prefix of the keys of its files."""
        return f"{MODELS_PREFIX}{self.name}/{self.digest}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A complete bundle whose bytes were all verified; `files` does not hold `digests.json`."""

    ref: BundleRef
    files: Mapping[str, bytes]

    def read_json(self, file: str) -> Any:
        """One of its files as JSON; DataError if the bundle has no such file or it is not JSON."""
        try:
            return json.loads(self.files[file])
        except KeyError:
            raise DataError(f"the bundle has no {file}", where=self.ref.uri) from None
        except ValueError as error:
            raise DataError(f"{file} is not JSON: {error}", where=self.ref.uri) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What README.md tells of a model. `split_rows` are rows by split, `metrics` are measured on `split`."""

    name: str
    summary: str
    strategy: str
    dataset: str
    dataset_fingerprint: str
    split_rows: Mapping[str, int]
    classes: Sequence[str]
    split: str
    metrics: Mapping[str, Interval]
    intended_use: str
    limits: Sequence[str]
    lineage: Mapping[str, str]


def write_bundle(store: ObjectStore, name: str, files: Mapping[str, bytes]) -> BundleRef:
    """Store a model, point `latest` at it, and return where it is; the same call again changes nothing.

    Where the model is already stored, the metrics and the card it was first stored with stay. Raises
    ConfigError for a bad name, DataError for missing or badly named files, ChecksumMismatch if a file of the
    folder holds other bytes.
    """
    check_bundle_name(name)
    _check_files(files)
    ref = _ref(store, name, bundle_digest(files))
    if not exists(store, f"{ref.folder}{DIGESTS_FILE}"):
        _write_files(store, ref, files)
    store.put(_latest_key(name), canonical_json({"digest": ref.digest}))
    return ref


def open_bundle(store: ObjectStore, reference: str) -> Bundle:
    """Read and verify a bundle given as `name` (the one written last), `name@digest`, `name@alias`, or its URI.

    Raises ConfigError for a reference that is none of these, DataError for a bundle that does not exist or
    is incomplete, ChecksumMismatch that names the file whose bytes differ.
    """
    ref = resolve_bundle(store, reference)
    return Bundle(ref=ref, files=_read_verified(store, ref))


def peek_bundle(store: ObjectStore, ref: BundleRef) -> Bundle:
    """A bundle but for its tensors, for those who look at many. The errors are those of `open_bundle`."""
    return Bundle(ref=ref, files=_read_verified(store, ref, leave_out=frozenset({MODEL_FILE})))


def resolve_bundle(store: ObjectStore, reference: str) -> BundleRef:
    """Where a reference points, without reading the bundle; the errors are those of `open_bundle`."""
    root = store.uri(MODELS_PREFIX)
    separator = "/" if reference.startswith(root) else "@"
    name, found, wanted = reference.removeprefix(root).rstrip("/").partition(separator)
    if not found:
        check_bundle_name(name)
        wanted = _latest_digest(store, name)
    elif separator == "@" and wanted in ALIASES and _NAME.fullmatch(name):
        wanted = aliased_digest(store, name, wanted)
    if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(wanted):
        raise ConfigError(
            "this is no reference to a model of the workspace",
            where=reference,
            next_step=f"give name, name@digest, name@champion, or {root}<name>/<digest>; see `convoy models list`",
        )
    return _ref(store, name, wanted)


def check_bundle_name(name: str) -> None:
    """Raise ConfigError for a name that no bundle can have: for jobs that write theirs only at the end."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "a model's name is made of a-z, 0-9, '.', '_' and '-'",
            where=name,
            next_step="choose another name",
        )


def list_bundles(store: ObjectStore) -> list[BundleRef]:
    """All complete bundles of a workspace, by name, then digest."""
    refs = []
    for info in store.list_objects(MODELS_PREFIX):
        match info.key.removeprefix(MODELS_PREFIX).split("/"):
            case [name, folder, file] if file == DIGESTS_FILE and _DIGEST.fullmatch(folder):
                refs.append(_ref(store, name, folder))
    return sorted(refs, key=lambda ref: (ref.name, ref.digest))


def bundle_digest(files: Mapping[str, bytes]) -> str:
    """The digest, 32 hex digits, over the names and bytes of all files that determine predictions."""
    return _digest_of_digests({file: digest_bytes(data).hex() for file, data in files.items()})


def model_card(card: ModelCard) -> str:
    """README.md of a bundle, in Markdown with the front matter that model hubs read."""
    shown = card.classes[:_CLASSES_ON_CARD]
    classes = ", ".join(shown) + (" and more" if len(card.classes) > len(shown) else "")
    rows = [f"| {split} | {count:,} |" for split, count in card.split_rows.items()]
    metrics = [
        f"| {name} | {value.estimate:.4f} | {value.low:.4f} to {value.high:.4f} ({value.confidence:.0%}) |"
        for name, value in card.metrics.items()
    ]
    sections = {
        f"# {card.name}": [card.summary],
        "## Strategy": [card.strategy],
        "## Data": [
            f"`{card.dataset}`, fingerprint `{card.dataset_fingerprint}`.",
            f"{len(card.classes)} classes: {classes}.",
            "",
            *("| split | rows |", "| --- | ---: |", *rows),
        ],
        "## Metrics": [
            f"On the {card.split} split.",
            "",
            *("| metric | value | interval |", "| --- | ---: | --- |", *metrics),
        ],
        "## Intended use": [card.intended_use],
        "## Limits": [f"- {limit}" for limit in card.limits],
        "## Lineage": [f"- {what}: `{value}`" for what, value in card.lineage.items()],
    }
    front_matter = "---\nlibrary_name: convoy\npipeline_tag: image-classification\n---\n"
    body = "\n\n".join("\n".join([title, "", *lines]) for title, lines in sections.items())
    return f"{front_matter}\n{body}\n"


def _digest_of_digests(digests: Mapping[str, str]) -> str:
    return digest({file: one for file, one in digests.items() if file not in _DESCRIPTIVE_FILES})


def _write_files(store: ObjectStore, ref: BundleRef, files: Mapping[str, bytes]) -> None:
    """Each file once, then the record of what is really there: a racing writer finds and records the same."""
    stored = {}
    for file, data in sorted(files.items()):
        stored[file] = _put_once(store, ref.folder + file, data)
        if file not in _DESCRIPTIVE_FILES and stored[file] != data:
            raise _mismatch(ref, file)
    record = {
        "format_version": BUNDLE_FORMAT_VERSION,
        "name": ref.name,
        "digest": ref.digest,
        "algorithm": "blake2b-128",
        "files": {
            file: {"digest": digest_bytes(data).hex(), "size_bytes": len(data)}
            for file, data in stored.items()
        },
    }
    wanted = canonical_json(record)
    if _put_once(store, ref.folder + DIGESTS_FILE, wanted) != wanted:
        raise _mismatch(ref, DIGESTS_FILE)


def _put_once(store: ObjectStore, key: str, data: bytes) -> bytes:
    """The bytes under the key: ours, or those that were there first."""
    try:
        put_looking_first(store, key, data)
    except PreconditionFailed:
        return store.get(key).data
    return data


def _read_verified(
    store: ObjectStore, ref: BundleRef, leave_out: Collection[str] = frozenset()
) -> dict[str, bytes]:
    digests = _recorded_digests(store, ref)
    files = {}
    for file, expected in digests.items():
        if file in leave_out:
            continue
        try:
            data = store.get(ref.folder + file).data
        except ObjectNotFound:
            raise DataError(f"the bundle has lost {file}", where=ref.uri, next_step="train again") from None
        if digest_bytes(data).hex() != expected:
            raise _mismatch(ref, file)
        files[file] = data
    if _digest_of_digests(digests) != ref.digest:
        raise _mismatch(ref, DIGESTS_FILE)
    return files


def _recorded_digests(store: ObjectStore, ref: BundleRef) -> dict[str, str]:
    """The digest of each file, from the record that makes a bundle complete."""
    try:
        record = json.loads(store.get(ref.folder + DIGESTS_FILE).data)
        version = record["format_version"]
        if version == BUNDLE_FORMAT_VERSION:
            return {file: entry["digest"] for file, entry in record["files"].items()}
    except ObjectNotFound:
        raise DataError(
            "the bundle is incomplete or does not exist",
            where=ref.uri,
            next_step="run the job that writes it again, or see `convoy models list`",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _mismatch(ref, DIGESTS_FILE) from None
    raise DataError(
        f"the bundle has format {version}, this Convoy reads {BUNDLE_FORMAT_VERSION}",
        where=ref.uri,
        next_step="upgrade Convoy",
    )


def _latest_digest(store: ObjectStore, name: str) -> str:
    try:
        return str(json.loads(store.get(_latest_key(name)).data)["digest"])
    except ObjectNotFound:
        nearest = difflib.get_close_matches(name, store.list_folders(MODELS_PREFIX), n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else "see `convoy models list` for those that exist"
        raise DataError(f"there is no model '{name}'", where=store.root_uri, next_step=hint) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            "latest.json cannot be read",
            where=store.uri(_latest_key(name)),
            next_step=f"name the model as {name}@<digest>",
        ) from None


def _ref(store: ObjectStore, name: str, wanted: str) -> BundleRef:
    return BundleRef(uri=store.uri(f"{MODELS_PREFIX}{name}/{wanted}"), name=name, digest=wanted)


def _latest_key(name: str) -> str:
    return f"{MODELS_PREFIX}{name}/latest.json"


def _mismatch(ref: BundleRef, file: str) -> StorageError:
    return ChecksumMismatch(
        f"{file} does not hold the bytes that were recorded",
        where=f"{ref.uri}/{file}",
        next_step="delete this folder and write the bundle again",
        file=file,
    )


def _check_files(files: Mapping[str, bytes]) -> None:
    missing = sorted(REQUIRED_FILES - files.keys())
    if MODEL_FILE not in files and ENSEMBLE_FILE not in files:
        missing.append(f"{MODEL_FILE} or {ENSEMBLE_FILE}")
    unusable = sorted(file for file in files if not _FILE.fullmatch(file) or file == DIGESTS_FILE)
    if missing or unusable:
        raise DataError(
            f"these files do not make a bundle: missing {missing}, unusable names {unusable}",
            next_step=f"give {sorted(REQUIRED_FILES)}, and {MODEL_FILE} or {ENSEMBLE_FILE}",
        )
