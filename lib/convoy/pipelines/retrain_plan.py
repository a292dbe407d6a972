"""What a date of a retraining is about, and whether that leaves anything to decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from convoy.core.differences import describe_changes
from convoy.core.errors import ConfigError, DataError
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.retrain_config import Decision, RetrainConfig, RetrainReport
from convoy.pipelines.training_rows import has_labels
from convoy.storage.bundles import METRICS_FILE, resolve_bundle
from convoy.storage.datasets import freeze_dataset, open_dataset, refuse_made_otherwise
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore
from convoy.storage.registry import Alias, read_aliases
from convoy.storage.retrains import RetrainFolder, RetrainPlan
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from convoy.vision.head_config import check_choice

# What may differ between two calls for one date: where, how fast and who hears of it, not what.
_FREE_KEYS = ("workspace", "writers", "date", "mirror")
# Decisions that another setting may turn into a promotion.
_OPEN = (Decision.HELD, Decision.SHADOW, Decision.NOTHING_NEW)


def plan_retrain(
    store: ObjectStore, folder: RetrainFolder, config: RetrainConfig, progress: Progress
) -> RetrainPlan:
    """Freeze what the date of a config is about.

    ConfigError for a dataset that is not the one of the dates before, or was made otherwise than the config says.
    """
    if config.source is not None:
        progress.stage(f"looking at {config.source}")
        # A path in a config is meant from where the command runs, as in `convoy dataset`.
        source = config.source if "://" in config.source else open_store(config.source).root_uri
        freeze_dataset(
            store,
            config.dataset,
            source,
            reading=config.reading,
            splits=config.splits,
            check=refuse_made_otherwise,
        )
    champion = read_aliases(store, config.name).aliases.get(Alias.CHAMPION)
    past = _since_champion(_newest_first(folder), f"{config.name}@{champion}")
    learnt = previous = None
    if champion is not None:
        learnt = past.learnt or _version_of_bundle(store, config.dataset, f"{config.name}@{champion}")
        previous = learnt or past.trusted
    _require_versions(store, config, [*past.held.values(), *([] if previous is None else [previous])])
    return RetrainPlan(
        date=config.logical_date,
        fingerprint=open_dataset(store, config.dataset).fingerprint,
        previous_fingerprint=previous,
        is_champions_version=champion is None or learnt is not None,
        champion=champion,
        held=past.held,
        config=_settings(config),
    )


def _version_of_bundle(store: ObjectStore, dataset: str, reference: str) -> str | None:
    """The version of a dataset that a model was made from, by its bundle; None where that names no such version."""
    metrics = read_json(store, f"{resolve_bundle(store, reference).folder}{METRICS_FILE}") or {}
    fingerprint = metrics.get("dataset_fingerprint")
    if fingerprint is None:
        # As bundles were before: those of an ensemble name the run below its evaluation.
        run_id = metrics.get("run") or (metrics.get("evaluation") or {}).get("run")
        record = None if run_id is None else RunFolder(store, run_id).record()
        fingerprint = None if record is None else record.identity.get("dataset_fingerprint")
    try:
        return None if fingerprint is None else open_dataset(store, dataset, fingerprint).fingerprint
    except DataError:
        return None


def _require_versions(store: ObjectStore, config: RetrainConfig, fingerprints: Iterable[str]) -> None:
    """ConfigError where the dataset lacks a version that what is new is told from."""
    for fingerprint in fingerprints:
        try:
            open_dataset(store, config.dataset, fingerprint)
        except DataError as error:
            raise ConfigError(
                f"the champion of '{config.name}' was made from other data: {error.what}",
                where="dataset",
                next_step="name the dataset as before, or retrain on the new one under another name of the model",
            ) from None


def refuse_unchosen_head(store: ObjectStore, plan: RetrainPlan, config: RetrainConfig) -> None:
    """ConfigError where the first model would need validation rows to choose its head by, and there are none.

    To be asked before the date is begun: from then on its settings stay as they are.
    """
    if plan.champion is None:
        manifest = open_dataset(store, config.dataset, plan.fingerprint)
        check_choice(config.head, has_val=has_labels(manifest, Split.VAL))


def refuse_date(folder: RetrainFolder, date: str) -> None:
    """ConfigError for a date before one that was decided, or one that is not there yet in any time zone."""
    dates = folder.decided_dates()
    if dates and date < dates[-1]:
        raise ConfigError(
            f"{dates[-1]} was decided already, and {date} is before it",
            where="date",
            next_step="retrain for a later date: it takes all that is new since then",
        )
    latest = (datetime.now(UTC) + timedelta(days=1)).date().isoformat()
    if date > latest:
        raise ConfigError(
            f"{date} is not there yet, and once it was decided no earlier date could be",
            where="date",
            next_step="name the date of the data, or leave it out for today",
        )


def refuse_other_settings(plan: RetrainPlan, config: RetrainConfig) -> None:
    """ConfigError where a date was begun with settings that decide otherwise."""
    changes = describe_changes(plan.config, _settings(config))
    if changes:
        raise ConfigError(
            f"the retraining of {plan.date} was begun with other settings:\n" + "\n".join(changes),
            where=f"retrains/{config.name}/{plan.date}",
            next_step="restore them to finish that date, or take the next date for the new ones",
        )


def settled_report(folder: RetrainFolder, plan: RetrainPlan) -> RetrainReport | None:
    """The report of a date that has nothing to decide, or None.

    What was held stays held until the data, the settings or the champion are others.
    """
    last = _last_examined(_newest_first(folder), plan.fingerprint)
    if plan.champion is None or last is None:
        return None
    nothing_new = RetrainReport(
        decision=Decision.NOTHING_NEW,
        reason="the dataset is the one that was decided about last",
        recomputed=0,
        date=plan.date,
        model=folder.name,
        dataset_fingerprint=plan.fingerprint,
        champion=f"{folder.name}@{plan.champion}",
    )
    # A champion from elsewhere met its own version on the first date: what was decided there may be open.
    is_decided = (last.dataset_fingerprint, last.champion) == (plan.fingerprint, nothing_new.champion)
    if plan.fingerprint == plan.previous_fingerprint and plan.is_champions_version and not is_decided:
        reason = "the dataset is the one that the champion was chosen on"
        return nothing_new.model_copy(update={"reason": reason})
    if plan.fingerprint != last.dataset_fingerprint:
        return None
    if last.decision in _OPEN and not _asks_the_same(plan, folder.plan(last.date)):
        return None
    if last.decision is Decision.HELD:
        return last.model_copy(update={"date": plan.date, "recomputed": 0})
    return nothing_new


def _newest_first(folder: RetrainFolder) -> Iterator[RetrainReport]:
    """The decisions so far, each read as it is asked for: there may be years of them."""
    for date in reversed(folder.decided_dates()):
        yield RetrainReport.model_validate(folder.decision(date))


def _last_examined(newest_first: Iterable[RetrainReport], fingerprint: str) -> RetrainReport | None:
    """The last decision but for those that only found a version as the date before them had left it."""
    return next(
        (one for one in newest_first if one.data is not None or one.dataset_fingerprint != fingerprint), None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    """What earlier dates say of versions of the dataset.

    `learnt` is the one that the champion was made from, or None where no date made it; `trusted` that of the last date
    that was not held. `held` are those that were objected to since the champion, or since the last promotion, by date.
    """

    learnt: str | None
    trusted: str | None
    held: dict[str, str]


def _since_champion(newest_first: Iterable[RetrainReport], champion: str) -> _Past:
    """What the dates since a champion say, or all of them where no date made it."""
    trusted: str | None = None
    # By version: the oldest date that was about one is the last to be put down.
    held: dict[str, str] = {}
    held_since_promoted: dict[str, str] | None = None
    for report in newest_first:
        if report.candidate == champion:
            return _Past(learnt=report.dataset_fingerprint, trusted=trusted, held=_by_date(held))
        if report.data is not None and report.data.objections and report.decision is Decision.HELD:
            held[report.dataset_fingerprint] = report.date
        if trusted is None and report.decision is not Decision.HELD:
            trusted = report.dataset_fingerprint
        if held_since_promoted is None and report.decision is Decision.PROMOTED:
            held_since_promoted = dict(held)
    since = held if held_since_promoted is None else held_since_promoted
    return _Past(learnt=None, trusted=trusted, held=_by_date(since))


def _by_date(dates: Mapping[str, str]) -> dict[str, str]:
    """Versions by their dates, oldest first, from dates by version."""
    return dict(sorted((date, fingerprint) for fingerprint, date in dates.items()))


def _settings(config: RetrainConfig) -> dict[str, object]:
    """What a date is decided by."""
    settings = config.model_dump(mode="json")
    return {name: value for name, value in settings.items() if name not in _FREE_KEYS}


def _asks_the_same(plan: RetrainPlan, before: RetrainPlan | None) -> bool:
    if before is None or plan.champion != before.champion:
        return False
    # A setting that an older Convoy had not is none that was changed.
    return not describe_changes(before.config, plan.config)
