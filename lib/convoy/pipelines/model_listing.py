"""`convoy models list` and `convoy models show`: what the bundles of a workspace are, without reading a tensor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.crop_policies import Averaging, CropPlan
from convoy.core.errors import ConvoyError, CredentialsRefused, DataError, StoreUnavailable
from convoy.pipelines.workspace import workspace_store
from convoy.storage.bundles import (
    ENSEMBLE_FILE,
    METRICS_FILE,
    Bundle,
    BundleRef,
    list_bundles,
    peek_bundle,
    resolve_bundle,
)
from convoy.storage.object_store import ObjectStore
from convoy.storage.registry import AliasRecord, HistoryEntry, read_aliases
from convoy.vision.committee_options import GateOptions

ENSEMBLE = "ensemble"
_THREADS = 8


class ListedModel(StrictModel):
    """A bundle in a line. `strategy` is `ensemble` for a bundle of bundles; `top1` was measured on `rows`."""

    model: str
    is_latest: bool
    aliases: list[str]
    strategy: str
    networks: list[str]
    num_classes: int
    top1: float | None
    rows: str


class UnreadableModel(StrictModel):
    """A bundle, or the aliases of a name, that cannot be read: what is wrong, and where."""

    model: str
    what: str
    where: str


class ModelList(StrictModel):
    """All complete bundles of a workspace, by name, then digest, and those that cannot be read."""

    models: list[ListedModel]
    unreadable: list[UnreadableModel] = Field(default_factory=list)


class ListedMember(StrictModel):
    """A member of an ensemble; `network` is null where its bundle has left the workspace."""

    bundle: str
    network: str | None
    weight: float
    temperature: float


class ModelDescription(ListedModel):
    """A bundle in full, and the moves of aliases that named it. The last fields are those of an ensemble."""

    uri: str
    classes: list[str]
    history: list[HistoryEntry]
    members: list[ListedMember] = Field(default_factory=list)
    crops: CropPlan | None = None
    averaging: Averaging | None = None
    temperature: float | None = None
    gate: GateOptions | None = None


def list_models(workspace: str | None) -> ModelList:
    """The bundles of a workspace; their small files are read and verified.

    One that is damaged hides no other; a store that does not answer is an error.
    """
    store = workspace_store(workspace)
    refs = list_bundles(store)
    names = sorted({ref.name for ref in refs})
    unreadable: list[UnreadableModel] = []

    def read_names(name: str) -> tuple[BundleRef | None, AliasRecord]:
        try:
            return _latest(store, name), read_aliases(store, name)
        except ConvoyError as error:
            unreadable.append(_unreadable(name, error))
            return None, AliasRecord()

    def read_model(ref: BundleRef) -> ListedModel | None:
        latest, aliases = names_of[ref.name]
        try:
            return _listed(store, peek_bundle(store, ref), aliases, is_latest=ref == latest)
        except ConvoyError as error:
            unreadable.append(_unreadable(str(ref), error))
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        names_of = dict(zip(names, pool.map(read_names, names), strict=True))
        models = [model for model in pool.map(read_model, refs) if model is not None]
    return ModelList(models=models, unreadable=sorted(unreadable, key=lambda one: one.model))


def show_model(workspace: str | None, reference: str) -> ModelDescription:
    """What one bundle is; the errors are those of `open_bundle`."""
    store = workspace_store(workspace)
    ref = resolve_bundle(store, reference)
    bundle = peek_bundle(store, ref)
    aliases = read_aliases(store, ref.name)
    described = {
        **_listed(store, bundle, aliases, is_latest=_latest(store, ref.name) == ref).model_dump(),
        "uri": ref.uri,
        "history": [entry for entry in aliases.history if ref.digest in entry.moves.values()],
        "classes": bundle.read_json("classes.json"),
    }
    if ENSEMBLE_FILE in bundle.files:
        written = bundle.read_json(ENSEMBLE_FILE)
        described |= {name: written[name] for name in ("crops", "averaging", "temperature", "gate")}
        described["members"] = [
            {**member, "network": _network_of(store, member["bundle"])} for member in written["members"]
        ]
    return ModelDescription.model_validate(described)


def _listed(store: ObjectStore, bundle: Bundle, aliases: AliasRecord, *, is_latest: bool) -> ListedModel:
    metrics = bundle.read_json(METRICS_FILE)
    if ENSEMBLE_FILE in bundle.files:
        members = bundle.read_json(ENSEMBLE_FILE)["members"]
        strategy = ENSEMBLE
        networks = [_network_of(store, member["bundle"]) or member["bundle"] for member in members]
        measured = metrics.get("measured", {})
    else:
        config = bundle.read_json("config.json")
        strategy, networks = config["strategy"], [config["backbone"]["arch"]]
        measured = {**metrics, "rows": metrics.get("rows") or ", ".join(metrics.get("splits", ()))}
    return ListedModel(
        model=str(bundle.ref),
        is_latest=is_latest,
        aliases=aliases.aliases_of(bundle.ref.digest),
        strategy=strategy,
        networks=networks,
        num_classes=len(bundle.read_json("classes.json")),
        top1=measured.get("top1"),
        rows=measured.get("rows", ""),
    )


def _unreadable(model: str, error: ConvoyError) -> UnreadableModel:
    if isinstance(error, (StoreUnavailable, CredentialsRefused)):
        # Of the store, not of this model.
        raise error
    return UnreadableModel(model=model, what=error.what, where=error.where)


def _network_of(store: ObjectStore, reference: str) -> str | None:
    try:
        bundle = peek_bundle(store, resolve_bundle(store, reference))
    except DataError:
        return None
    arch: str = bundle.read_json("config.json")["backbone"]["arch"]
    return arch


def _latest(store: ObjectStore, name: str) -> BundleRef | None:
    """The bundle of a name that was written last; None where its writer died before it said so."""
    try:
        return resolve_bundle(store, name)
    except DataError:
        return None
