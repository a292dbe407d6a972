"""The rows of a retraining: what was held out for good, what is new, and whether the new data can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.drift import EmbeddingShift, class_shift, embedding_shift
from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.feature_source import gather_features
from convoy.pipelines.retrain_config import DataChecks, NewData, WhenFound
from convoy.pipelines.retrain_gate import ModelScores
from convoy.pipelines.retrain_scoring import CachedScorer, NamedRows
from convoy.storage.feature_cache import content_id_array
from convoy.storage.manifests import Manifest, label_names
from convoy.storage.retrains import HOLDOUT_SCHEMA, RetrainFolder

_COLUMNS = ("sample_id", "content_id", "label", "split", "weight")
# Embeddings of each side of a shift: its noise is far below any limit then.
_EMBEDDINGS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RetrainRows:
    """A version of a dataset as a retraining sees it; some 80 bytes a row.

    `table` has the columns of the manifest that count here and `class`, the class name or null. `is_new_N` marks rows
    whose content and class were not in the version that the champion was made from, and `held_N` tells by date those
    of them that came with a version whose data was objected to. `holdout` are rows of the frozen holdout that the
    version still has, with the classes that were frozen; `frozen_by_class` counts all that were frozen, and `joined`
    those that a date added.
    """

    manifest: Manifest
    table: pa.Table
    is_new_N: NDArray[np.bool_]
    is_held_out_N: NDArray[np.bool_]
    held_N: dict[str, NDArray[np.bool_]]
    holdout: NamedRows
    frozen_by_class: Counter[str]
    joined: Counter[str]
    num_before: int
    num_removed: int
    shared_classes: tuple[str, ...]

    def training(self, split: Split) -> pa.Table:
        """The labelled rows of a split that are no rows of the holdout, nor equal to one."""
        wanted = pc.and_(pc.equal(self.table["split"], split.value), pc.is_valid(self.table["label"]))
        return self.table.filter(pc.and_(wanted, pa.array(~self.is_held_out_N)))

    @property
    def num_leaks(self) -> int:
        """Rows of the train split that are, or equal, rows of the holdout."""
        in_train_N = _mask(pc.equal(self.table["split"], Split.TRAIN.value))
        return int((in_train_N & self.is_held_out_N).sum())

    @property
    def newest(self) -> NamedRows:
        """New labelled rows that no training ever sees: of the test split, and equal to no row that is elsewhere."""
        return _named(_unseen(self.table, self.is_new_N & ~self.is_held_out_N))

    def chosen(self, is_chosen_N: NDArray[np.bool_]) -> pa.Table:
        """The rows of a mask."""
        return self.table.filter(pa.array(is_chosen_N))


def open_rows(
    manifest: Manifest,
    previous: Manifest | None,
    folder: RetrainFolder,
    held: Mapping[str, Manifest] | None = None,
    *,
    date: str,
    champion_classes: Sequence[str] = (),
    min_class_rows: int = 1,
) -> RetrainRows:
    """The rows of a version. The first time, its labelled test rows become the holdout for good.

    Later, each class that the champion knows and of which fewer than `min_class_rows` are frozen is filled up to that
    by test rows that were test rows already in the version that the champion was made from: no model was trained on
    them, and neither today's data nor what was objected to can choose its judges.

    `held` are versions since `previous` whose data was objected to, by date and oldest first. Raises
    DataError where no test row is labelled, or nothing of the holdout is left.
    """
    table = _read(manifest)
    pairs = _pairs(table)
    learnt = table.slice(0, 0) if previous is None else _read(previous)
    before = set(_pairs(learnt))
    is_new_N = np.array([pair not in before for pair in pairs], np.bool_)
    holdout = folder.holdout()
    if holdout is None:
        folder.freeze_holdout(_first_holdout(table, manifest))
    elif folder.joined_holdout(date) is None:
        were_unseen = set(_pairs(_unseen(learnt)))
        is_trusted_N = np.array([pair in were_unseen for pair in pairs], np.bool_)
        unseen = _unseen(table, is_trusted_N & ~_is_held_out(table, holdout))
        frozen = _counts(holdout)
        joining = _some_of_each(unseen, {name: min_class_rows - frozen[name] for name in champion_classes})
        if joining.num_rows:
            folder.extend_holdout(date, joining.select(HOLDOUT_SCHEMA.names))
    holdout, joined = folder.holdout(), folder.joined_holdout(date)
    assert holdout is not None
    kept = _still_there(table, holdout)
    if not kept.num_rows:
        raise DataError(
            "nothing of the model's frozen holdout is left in the dataset",
            where=manifest.uri,
            next_step="bring those images back, or retrain under another name",
        )
    return RetrainRows(
        manifest=manifest,
        table=table,
        is_new_N=is_new_N,
        is_held_out_N=_is_held_out(table, holdout),
        held_N=_held_back(pairs, is_new_N, held or {}),
        holdout=NamedRows.of(kept["content_id"], kept["class"].to_pylist()),
        frozen_by_class=_counts(holdout),
        joined=Counter() if joined is None else _counts(joined),
        num_before=len(before),
        num_removed=len(before - set(pairs)),
        shared_classes=tuple(dict.fromkeys([*manifest.classes, *holdout["class"].to_pylist()])),
    )


@dataclass(slots=True)
class Findings:
    """What checks found, sorted by what it does."""

    notes: list[str] = field(default_factory=list)
    objections: list[str] = field(default_factory=list)

    def add(self, found: bool, text: str, when: WhenFound) -> None:
        """Keep a text if it was found."""
        if found:
            (self.objections if when is WhenFound.HOLD else self.notes).append(text)


def examine_new_data(
    rows: RetrainRows,
    scorer: CachedScorer,
    checks: DataChecks,
    *,
    set_id: str,
    champion: CommitteeRecord | None,
    on_holdout: ModelScores | None,
) -> NewData:
    """Whether the new rows look like data to learn from; `set_id` holds the embeddings that are compared."""
    findings = Findings()
    new, old = rows.chosen(rows.is_new_N), rows.chosen(~rows.is_new_N)
    is_usable_N = scorer.known_content(set_id).has_rows(new["content_id"].combine_chunks())
    num_usable = int(is_usable_N.sum())
    new_classes = sorted({*new["class"].drop_null().to_pylist()} - {*champion.classes} if champion else ())
    shift = class_shift(_counts(new), _counts(old))
    if new.num_rows >= checks.min_rows:
        text = f"the classes of the new rows are {shift:.2f} away from those before"
        findings.add(shift > checks.max_class_shift, text, checks.when_classes_shift)
    text = f"{len(new_classes)} new classes: {', '.join(new_classes[:5])}"
    findings.add(bool(new_classes), text, checks.when_new_classes)
    embeddings = _embedding_shift(scorer, set_id, new, old, checks, findings)
    agreement = _agreement(rows, new, scorer, champion, on_holdout)
    top1 = _examine_batches(rows, is_usable_N, agreement, checks, findings)
    look_for_losses(rows, checks, champion, findings)
    empty = _empty_classes(rows)
    findings.add(bool(empty), f"no training image can be used of: {', '.join(empty[:5])}", WhenFound.HOLD)
    return NewData(
        rows=new.num_rows,
        removed=rows.num_removed,
        usable=num_usable,
        by_class=dict(sorted(_counts(new).items())),
        new_classes=new_classes,
        class_shift=shift,
        embedding_shift=embeddings,
        champion_top1=top1,
        notes=findings.notes,
        objections=findings.objections,
    )


def _embedding_shift(
    scorer: CachedScorer,
    set_id: str,
    new: pa.Table,
    old: pa.Table,
    checks: DataChecks,
    findings: Findings,
) -> EmbeddingShift | None:
    """The shift of the new rows' embeddings, by evenly spaced rows of both sides; None for too few of them."""
    sides = []
    for table in (new, old):
        ids_N = content_id_array(table["content_id"])
        chosen_N = (
            ids_N[np.unique(np.linspace(0, len(ids_N) - 1, _EMBEDDINGS).astype(int))] if len(ids_N) else ids_N
        )
        features_ND, found_N = gather_features(scorer.cache, set_id, chosen_N)
        sides.append(features_ND[found_N])
    if min(len(side) for side in sides) < checks.min_rows:
        return None
    found = embedding_shift(sides[0], sides[1])
    text = f"the new images lie {found.shift:.2f} spreads away from those before (by chance {found.by_chance:.2f})"
    is_shifted = found.shift > checks.max_embedding_shift + found.by_chance
    findings.add(is_shifted, text, checks.when_embeddings_shift)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Agreement:
    """Which new rows have labels that the champion knows, where it agrees, and its top-1 on the holdout's."""

    judged_N: NDArray[np.bool_]
    agrees_N: NDArray[np.bool_]
    usual: float


def _agreement(
    rows: RetrainRows,
    new: pa.Table,
    scorer: CachedScorer,
    champion: CommitteeRecord | None,
    on_holdout: ModelScores | None,
) -> _Agreement | None:
    """What the champion says of the new labels of classes that it knows; None where nothing can be compared."""
    is_labelled_N = _mask(pc.is_valid(new["label"]))
    if champion is None or on_holdout is None or not is_labelled_N.any():
        return None
    scores = scorer.scores(champion, _named(new.filter(pa.array(is_labelled_N))), rows.shared_classes)
    known = [rows.shared_classes.index(name) for name in champion.classes if name in rows.shared_classes]
    comparable_N = on_holdout.found_N & np.isin(on_holdout.labels_N, known)
    if not comparable_N.any():
        return None
    judged_N, agrees_N = np.zeros(new.num_rows, np.bool_), np.zeros(new.num_rows, np.bool_)
    judged_N[is_labelled_N] = scores.found_N & np.isin(scores.labels_N, known)
    agrees_N[is_labelled_N] = scores.correct_N
    return _Agreement(judged_N, agrees_N, float(on_holdout.correct_N[comparable_N].mean()))


def _examine_batches(
    rows: RetrainRows,
    is_usable_N: NDArray[np.bool_],
    agreement: _Agreement | None,
    checks: DataChecks,
    findings: Findings,
) -> float | None:
    """Rejects and labels of the new rows, and of those that were held before: good rows of later days hide no bad ones.

    The masks are of the new rows. Returns the champion's top-1 on all of them, or None where it was not measured.
    """
    batches = {
        "": np.ones(len(is_usable_N), np.bool_),
        **{f" that were held on {date}": one_N[rows.is_new_N] for date, one_N in rows.held_N.items()},
    }
    top1 = []
    for which, is_chosen_N in batches.items():
        num_rows = int(is_chosen_N.sum())
        if num_rows >= checks.min_rows:
            rate = 1 - float(is_usable_N[is_chosen_N].mean())
            text = f"{rate:.1%} of the {num_rows} new rows{which} cannot be used"
            findings.add(rate > checks.max_reject_rate, text, checks.when_rejects)
        top1.append(_examine_labels(is_chosen_N, agreement, checks, findings, which))
    return top1[0]


def _examine_labels(
    is_chosen_N: NDArray[np.bool_],
    agreement: _Agreement | None,
    checks: DataChecks,
    findings: Findings,
    which: str,
) -> float | None:
    """The champion's top-1 on some of the new rows, or None for too few that it can be asked about."""
    if agreement is None:
        return None
    judged_N = is_chosen_N & agreement.judged_N
    if judged_N.sum() < checks.min_rows:
        return None
    top1 = float(agreement.agrees_N[judged_N].mean())
    text = (
        f"the champion agrees with {top1:.1%} of the new labels{which} and with {agreement.usual:.1%} of the"
        " holdout's: the new labels look wrong, or the new images are of another kind"
    )
    findings.add(agreement.usual - top1 > checks.max_label_drop, text, checks.when_labels_disagree)
    return top1


def look_for_losses(
    rows: RetrainRows, checks: DataChecks, champion: CommitteeRecord | None, findings: Findings
) -> None:
    """Rows and classes that are gone: a model without them may well be better on what is left."""
    gone = (
        [] if champion is None else [name for name in champion.classes if name not in rows.manifest.classes]
    )
    text = f"the dataset has no {', '.join(gone[:5])} any more, which the champion knows"
    findings.add(bool(gone), text, checks.when_classes_gone)
    kept = Counter(rows.holdout.names_N)
    counts = {
        "rows that the champion was made from, with their classes,": (rows.num_before, rows.num_removed),
        "rows of the frozen holdout": (
            rows.frozen_by_class.total(),
            rows.frozen_by_class.total() - kept.total(),
        ),
        **{
            f"rows of {name} in the frozen holdout": (count, count - kept[name])
            for name, count in rows.frozen_by_class.items()
            if name not in gone
        },
    }
    for what, (num_before, num_gone) in counts.items():
        if num_before >= checks.min_rows:
            text = f"{num_gone} of the {num_before} {what} are gone"
            findings.add(num_gone > checks.max_removed_rate * num_before, text, checks.when_rows_removed)


def _empty_classes(rows: RetrainRows) -> list[str]:
    present = set(rows.training(Split.TRAIN)["class"].to_pylist())
    return [name for name in rows.manifest.classes if name not in present]


def _counts(table: pa.Table) -> Counter[str]:
    return Counter(table["class"].drop_null().to_pylist())


def _read(manifest: Manifest) -> pa.Table:
    table = manifest.read_table(_COLUMNS)
    return table.append_column("class", label_names(table, manifest.classes)).combine_chunks()


def _first_holdout(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The test rows: training chooses by val rows, which could judge no model fairly."""
    wanted = pc.and_(pc.equal(table["split"], Split.TEST.value), pc.is_valid(table["label"]))
    rows = table.filter(wanted).select(HOLDOUT_SCHEMA.names)
    if not rows.num_rows:
        raise DataError(
            "no sample of the test split is labelled, so models could not be compared",
            where=manifest.uri,
            next_step="give the dataset a test split: --set splits.test_fraction=0.1",
        )
    return rows


def _is_held_out(table: pa.Table, holdout: pa.Table) -> NDArray[np.bool_]:
    """Which rows are, or equal, rows of the holdout."""
    same_id_N = _mask(pc.is_in(table["sample_id"], holdout["sample_id"]))
    return same_id_N | np.isin(content_id_array(table["content_id"]), content_id_array(holdout["content_id"]))


def _unseen(table: pa.Table, is_wanted_N: NDArray[np.bool_] | None = None) -> pa.Table:
    """The labelled test rows (among the wanted ones) that no training ever sees: equal to no row of another split."""
    in_test_N = _mask(pc.equal(table["split"], Split.TEST.value))
    is_chosen_N = in_test_N & _mask(pc.is_valid(table["label"]))
    chosen = table.filter(pa.array(is_chosen_N if is_wanted_N is None else is_chosen_N & is_wanted_N))
    elsewhere = table["content_id"].filter(pa.array(~in_test_N))
    is_learnt_N = np.isin(content_id_array(chosen["content_id"]), content_id_array(elsewhere))
    return chosen.filter(pa.array(~is_learnt_N))


def _some_of_each(table: pa.Table, wanted: Mapping[str, int]) -> pa.Table:
    """At most so many rows of each class and no content twice, by the order of their content ids: as good as random."""
    order = table.sort_by("content_id")
    left = Counter({name: count for name, count in wanted.items() if count > 0})
    taken: list[int] = []
    before = None
    for row, (content, name) in enumerate(_pairs(order)):
        if left[str(name)] > 0 and content != before:
            taken.append(row)
            left[str(name)] -= 1
            before = content
    return order.take(pa.array(taken, pa.int64()))


def _still_there(table: pa.Table, holdout: pa.Table) -> pa.Table:
    """The rows of the holdout whose sample still has the same content."""
    position = pc.index_in(holdout["sample_id"], table["sample_id"])
    present = holdout.filter(pc.is_valid(position))
    now = table["content_id"].take(position.drop_null())
    return present.filter(pc.equal(present["content_id"], now))


def _held_back(
    pairs: Sequence[tuple[bytes, str | None]], is_new_N: NDArray[np.bool_], held: Mapping[str, Manifest]
) -> dict[str, NDArray[np.bool_]]:
    """Masks of the new rows that came with each of some versions, by date; a row is that of the first one."""
    batches = {}
    left_N = is_new_N.copy()
    for date, version in held.items():
        known = set(_pairs(_read(version)))
        came_N = left_N & np.array([pair in known for pair in pairs], np.bool_)
        left_N &= ~came_N
        if came_N.any():
            batches[date] = came_N
    return batches


def _pairs(table: pa.Table) -> list[tuple[bytes, str | None]]:
    return list(zip(table["content_id"].to_pylist(), table["class"].to_pylist(), strict=True))


def _named(table: pa.Table) -> NamedRows:
    return NamedRows.of(table["content_id"], table["class"].to_pylist())


def _mask(values: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(
        values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy(), np.bool_
    )
