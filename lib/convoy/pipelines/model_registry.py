"""`convoy models promote`, `rollback` and `diff`, and how a retraining's decision moves aliases."""

from __future__ import annotations

from typing import Any

from convoy.core.config import StrictModel
from convoy.core.differences import Difference, differences
from convoy.core.errors import DataError
from convoy.pipelines.workspace import open_workspace, workspace_store
from convoy.storage.bundles import (
    ENSEMBLE_FILE,
    METRICS_FILE,
    Bundle,
    check_bundle_name,
    peek_bundle,
    resolve_bundle,
)
from convoy.storage.object_store import ObjectStore, WriterMode
from convoy.storage.registry import (
    Alias,
    AliasDecision,
    AliasMove,
    AliasRecord,
    HistoryEntry,
    move_aliases,
    read_aliases,
)

PROMOTED, ROLLED_BACK, HELD = "promoted", "rolled_back", "held"


class AliasReport(StrictModel):
    """The aliases of a model after a command, and whether it moved any."""

    model: str
    changed: bool
    aliases: dict[Alias, str]
    revision: int
    last: HistoryEntry | None


class RegisteredModel(StrictModel):
    """A model's aliases as they stand, by name; null for one that names nothing. `bundles` are URIs by digest."""

    name: str
    workspace: str
    revision: int
    aliases: dict[str, str | None]
    bundles: dict[str, str]


class ModelDiff(StrictModel):
    """In what two bundles differ. With `same_predictions` they are one model under two names."""

    first: str
    second: str
    same_predictions: bool
    config: list[Difference]
    classes_only_first: list[str]
    classes_only_second: list[str]
    preprocess: list[Difference]
    metrics: list[Difference]


def promote_model(
    workspace: str | None, name: str, *, digest: str | None, reason: str, writers: WriterMode
) -> AliasReport:
    """Make a version the champion, by default the candidate; the champion so far becomes the previous one.

    Raises DataError for a version that does not exist or is incomplete. The same again moves nothing.
    """
    store = open_workspace(workspace, writers)
    check_bundle_name(name)
    # The digest may be given as another alias.
    wanted = _require_version(store, name, digest or Alias.CANDIDATE.value)

    def decide(record: AliasRecord) -> AliasMove | None:
        if record.aliases.get(Alias.CHAMPION) == wanted:
            return None
        return AliasMove(action=PROMOTED, moves=_to_champion(record, wanted), reason=reason)

    return _moved(store, name, decide, writers)


def rollback_model(workspace: str | None, name: str, *, reason: str, writers: WriterMode) -> AliasReport:
    """Make the previous version the champion again; the two change places.

    Raises DataError where there is no previous version, or it is not complete any more.
    """
    store = open_workspace(workspace, writers)
    check_bundle_name(name)

    def decide(record: AliasRecord) -> AliasMove | None:
        previous = record.aliases.get(Alias.PREVIOUS)
        if previous is None:
            raise DataError(
                f"model '{name}' has no previous champion to go back to",
                where=store.root_uri,
                next_step=f"name a version: convoy models promote {name} --digest DIGEST --reason ...",
            )
        _require_version(store, name, previous)
        return AliasMove(action=ROLLED_BACK, moves=_to_champion(record, previous), reason=reason)

    return _moved(store, name, decide, writers)


def registered_model(workspace: str | None, name: str) -> RegisteredModel:
    """The aliases of a model, for registries elsewhere; none of them names anything where it was never promoted."""
    store = workspace_store(workspace)
    check_bundle_name(name)
    record = read_aliases(store, name)
    aliases = {alias.value: record.aliases.get(alias) for alias in Alias}
    digests = {digest for digest in aliases.values() if digest is not None}
    return RegisteredModel(
        name=name,
        workspace=store.root_uri,
        revision=record.revision,
        aliases=aliases,
        bundles={digest: resolve_bundle(store, f"{name}@{digest}").uri for digest in digests},
    )


def diff_models(workspace: str | None, first: str, second: str) -> ModelDiff:
    """In what two bundles differ; the errors are those of `open_bundle`."""
    store = workspace_store(workspace)
    bundles = [peek_bundle(store, resolve_bundle(store, reference)) for reference in (first, second)]
    classes = [bundle.read_json("classes.json") for bundle in bundles]
    return ModelDiff(
        first=str(bundles[0].ref),
        second=str(bundles[1].ref),
        same_predictions=bundles[0].ref.digest == bundles[1].ref.digest,
        config=differences(*(_config(bundle) for bundle in bundles)),
        classes_only_first=[one for one in classes[0] if one not in classes[1]],
        classes_only_second=[one for one in classes[1] if one not in classes[0]],
        preprocess=differences(*(bundle.read_json("preprocess.json") for bundle in bundles)),
        metrics=differences(*(_scalars(bundle.read_json(METRICS_FILE)) for bundle in bundles)),
    )


def record_decision(
    store: ObjectStore,
    name: str,
    move: AliasMove,
    *,
    expected_champion: str | None,
    writers: WriterMode,
) -> HistoryEntry:
    """Make the move of a retraining once; returns the entry of the history that says what became of it.

    A run that moved before is not moved again. A champion that was changed meanwhile stays: then the move is held, and
    only its candidate is taken.
    """

    def decide(record: AliasRecord) -> AliasMove | None:
        if record.move_by(move.run) is not None:
            return None
        if Alias.CHAMPION not in move.moves or record.aliases.get(Alias.CHAMPION) == expected_champion:
            return move
        kept = {alias: digest for alias, digest in move.moves.items() if alias is Alias.CANDIDATE}
        reason = f"the champion was changed while this ran; it would have been {move.action}: {move.reason}"
        return move.model_copy(update={"action": HELD, "moves": kept, "reason": reason})

    record = move_aliases(store, name, decide, writers=writers)
    entry = record.move_by(move.run)
    assert entry is not None
    return entry


def _to_champion(record: AliasRecord, digest: str) -> dict[Alias, str | None]:
    former = record.aliases.get(Alias.CHAMPION)
    return {Alias.CHAMPION: digest, **({} if former is None else {Alias.PREVIOUS: former})}


def _require_version(store: ObjectStore, name: str, version: str) -> str:
    """The digest of a version, of which all bytes but the tensors' were read: an alias must lead to no broken one."""
    return peek_bundle(store, resolve_bundle(store, f"{name}@{version}")).ref.digest


def _moved(store: ObjectStore, name: str, decide: AliasDecision, writers: WriterMode) -> AliasReport:
    moves: list[AliasMove] = []

    def watched(record: AliasRecord) -> AliasMove | None:
        move = decide(record)
        if move is not None:
            moves.append(move)
        return move

    record = move_aliases(store, name, watched, writers=writers)
    return AliasReport(
        model=name,
        changed=bool(moves),
        aliases=record.aliases,
        revision=record.revision,
        last=record.history[-1] if record.history else None,
    )


def _config(bundle: Bundle) -> dict[str, Any]:
    config: dict[str, Any] = bundle.read_json("config.json")
    return (
        {**config, "ensemble": bundle.read_json(ENSEMBLE_FILE)} if ENSEMBLE_FILE in bundle.files else config
    )


def _scalars(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without the tables, which would drown the figures."""
    measured = metrics.get("measured", metrics)
    kept = {key: value for key, value in measured.items() if not isinstance(value, list | dict)}
    return {**kept, "intervals": measured.get("intervals", {})}
