"""Whether the new data of a retraining can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.drift import EmbeddingShift, class_shift, embedding_shift
from convoy.core.records import Split
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.feature_source import gather_features
from convoy.pipelines.retrain_config import DataChecks, NewData, WhenFound
from convoy.pipelines.retrain_gate import ModelScores
from convoy.pipelines.retrain_rows import RetrainRows, as_mask, class_counts, named_rows
from convoy.pipelines.retrain_scoring import CachedScorer
from convoy.storage.feature_cache import KnownContent, content_id_array

# Embeddings of each side of a shift: its noise is far below any limit then.
_EMBEDDINGS = 4096


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
    known = scorer.known_content(set_id)
    is_usable_N = known.has_rows(new["content_id"])
    num_usable = int(is_usable_N.sum())
    new_classes = sorted({*new["class"].drop_null().to_pylist()} - {*champion.classes} if champion else ())
    shift = class_shift(class_counts(new), class_counts(old))
    if new.num_rows >= checks.min_rows:
        text = f"the classes of the new rows are {shift:.2f} away from those before"
        findings.add(shift > checks.max_class_shift, text, checks.when_classes_shift)
    text = f"{len(new_classes)} new classes: {', '.join(new_classes[:5])}"
    findings.add(bool(new_classes), text, checks.when_new_classes)
    embeddings = _embedding_shift(scorer, set_id, new, old, checks, findings)
    agreement = _agreement(rows, new, scorer, champion, on_holdout)
    top1 = _examine_batches(rows, is_usable_N, agreement, checks, findings)
    look_for_losses(rows, checks, champion, findings)
    empty = _empty_classes(rows, known)
    findings.add(bool(empty), f"no training image can be used of: {', '.join(empty[:5])}", WhenFound.HOLD)
    return NewData(
        rows=new.num_rows,
        removed=rows.num_removed,
        usable=num_usable,
        by_class=dict(sorted(class_counts(new).items())),
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
    is_labelled_N = as_mask(pc.is_valid(new["label"]))
    if champion is None or on_holdout is None or not is_labelled_N.any():
        return None
    scores = scorer.scores(champion, named_rows(new.filter(pa.array(is_labelled_N))), rows.shared_classes)
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
    classes = [*rows.frozen_by_class]
    counts = {
        "rows that the champion was made from, with their classes,": (rows.num_before, rows.num_removed),
        "rows of the frozen holdout": _judges_gone(rows, kept, classes, checks),
        **{
            f"rows of {name} in the frozen holdout": _judges_gone(rows, kept, [name], checks)
            for name in classes
            if name not in gone
        },
    }
    for what, (num_before, num_gone) in counts.items():
        if num_before >= checks.min_rows:
            text = f"{num_gone} of the {num_before} {what} are gone"
            findings.add(num_gone > checks.max_removed_rate * num_before, text, checks.when_rows_removed)


def _judges_gone(
    rows: RetrainRows, kept: Counter[str], classes: Sequence[str], checks: DataChecks
) -> tuple[int, int]:
    """Of how many frozen rows of some classes how many are gone.

    All that were frozen count, so that many promotions, each after a small loss, hide no large one. But where the
    champion was made after a loss that the check objects to, a person accepted that: then what remained counts.
    """
    frozen, remained, lost, left = (
        sum(counts[name] for name in classes)
        for counts in (rows.frozen_by_class, rows.remained_by_class, rows.lost_by_class, kept)
    )
    if frozen - remained > checks.max_removed_rate * frozen:
        return remained, lost
    return frozen, frozen - left


def _empty_classes(rows: RetrainRows, known: KnownContent) -> list[str]:
    """The classes that no head could be fitted for: none of their training images is usable and has a weight."""
    train = rows.training(Split.TRAIN)
    counts_N = known.has_rows(train["content_id"]) & (train["weight"].to_numpy() > 0)
    present = class_counts(train.filter(pa.array(counts_N)))
    return [name for name in rows.manifest.classes if name not in present]
