"""What a page is about: a run, a dataset or a model of the workspace, by whatever name it was given."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from convoy.core.errors import ConfigError, ConvoyError
from convoy.storage.bundles import MODELS_PREFIX, BundleRef, resolve_bundle
from convoy.storage.datasets import list_datasets
from convoy.storage.documents import exists
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, run_ids


class TargetKind(StrEnum):
    """What can have a page."""

    RUN = "run"
    DATASET = "dataset"
    MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a page is about; `name` is the run's id, the dataset's name, or `name@digest` of a model."""

    kind: TargetKind
    name: str
    bundle: BundleRef | None = None

    def __str__(self) -> str:
        return f"{self.kind.value}:{self.name}"


def find_target(store: ObjectStore, reference: str) -> Target:
    """What a reference means: a run id, a dataset, or a model as `name`, `name@digest`, `name@alias` or its URI.

    `run:`, `dataset:` or `model:` before it decide where two have one name. Raises ConfigError for that and for a
    name that nothing has, and what `resolve_bundle` raises.
    """
    kind, separator, name = reference.partition(":")
    if separator and kind in set(TargetKind):
        return _known(store, TargetKind(kind), name)
    if "@" in reference or reference.startswith(store.uri(MODELS_PREFIX)):
        return _model(store, reference)
    if "/" in reference:
        raise _unknown(store, reference)
    candidates = [kind for kind in TargetKind if _exists(store, kind, reference)]
    if len(candidates) > 1:
        raise ConfigError(
            f"'{reference}' is a {' and a '.join(candidates)}",
            where=store.root_uri,
            next_step=f"say which: {' or '.join(f'{kind}:{reference}' for kind in candidates)}",
        )
    if not candidates:
        raise _unknown(store, reference)
    return _known(store, candidates[0], reference)


def _known(store: ObjectStore, kind: TargetKind, name: str) -> Target:
    if kind is TargetKind.MODEL:
        return _model(store, name)
    if not _exists(store, kind, name):
        raise _unknown(store, name)
    return Target(kind=kind, name=name)


def _model(store: ObjectStore, reference: str) -> Target:
    ref = resolve_bundle(store, reference)
    return Target(kind=TargetKind.MODEL, name=str(ref), bundle=ref)


def _exists(store: ObjectStore, kind: TargetKind, name: str) -> bool:
    if name in {"", ".", ".."} or "/" in name:
        return False
    key = {
        TargetKind.RUN: RunFolder(store, name).key("run.json"),
        TargetKind.DATASET: f"datasets/{name}/current.json",
        TargetKind.MODEL: f"{MODELS_PREFIX}{name}/latest.json",
    }[kind]
    try:
        return exists(store, key)
    except ConvoyError:
        return False


def _unknown(store: ObjectStore, reference: str) -> ConfigError:
    known = [*run_ids(store)[-3:], *list_datasets(store)[:5], *store.list_folders(MODELS_PREFIX)[:5]]
    names = ", ".join(name for name in known if name != "backbones")
    return ConfigError(
        f"'{reference}' is no run, dataset or model of this workspace",
        where=store.root_uri,
        next_step=f"name one, such as {names}; convoy report --index shows all"
        if names
        else "run a job first",
    )
