"""What a page says of predictions, read part by part: confidences, counts, confusions, and the rows worth a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from convoy.core.config import StrictModel
from convoy.core.metrics import NUM_CALIBRATION_BINS, ReliabilityBin
from convoy.core.statistics import Interval, wilson_interval
from convoy.pipelines.report_images import ShownImage, frozen_rows, show_samples
from convoy.pipelines.stratified_sample import labels_of
from convoy.storage.commits import RunManifest, SliceRecord
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.runs import RunFolder
from convoy.storage.scores import label_of_partition
from convoy.vision.decode_rule import DecodeRule

NUM_SHOWN = 24
# Confusions beyond that are counted, but not kept apart.
_MAX_PAIRS = 100_000
_COLUMNS = (
    "sample_id",
    "uri",
    "label",
    "label_name",
    "pred",
    "pred_name",
    "score",
    "topk_ids",
    "topk_scores",
)


class ShownRow(StrictModel):
    """A prediction to look at: what it says, what is true where that is known, and the image."""

    sample_id: str
    uri: str
    label_name: str | None
    pred_name: str
    score: float
    true_score: float | None
    image: ShownImage


class ConfusedPair(StrictModel):
    """How many rows of a class were taken for another one."""

    label: str
    pred: str
    rows: int


class PredictionSummary(StrictModel):
    """Predictions of a run in numbers. `top1` is of the labelled rows, with Wilson's interval, null without any.

    `scores` and `reliability` are histograms over 0..1 of the score of the predicted class, of all and of the
    labelled rows, null for scores that are no probabilities. `wrong` are the rows whose wrong class had the highest
    score, `unsure` those with the lowest scores. Labelled rows have a label that the model knows; `unknown` more rows
    have one that it does not know.
    """

    rows: int
    labelled: int
    unknown: int = 0
    top1: Interval | None
    predicted: dict[str, int]
    scores: list[int] | None
    reliability: list[ReliabilityBin] | None
    confused: list[ConfusedPair]
    wrong: list[ShownRow]
    unsure: list[ShownRow]


def summarise_predictions(
    folder: RunFolder,
    manifest: RunManifest,
    rule: DecodeRule,
    *,
    classes: Sequence[str] = (),
    are_probabilities: bool = True,
) -> PredictionSummary:
    """All predictions of a run, a part of them in memory at a time; `classes` are the model's, where they are known.

    Scores that are said to be probabilities, but are not within 0..1, are taken for none.
    """
    found = _Found(names=dict(enumerate(classes)), are_probabilities=are_probabilities)
    for record in manifest.slices:
        for table in _tables(folder.store, record):
            found.add(table, record.slice)
    return found.summary(folder, rule)


def _tables(store: ObjectStore, record: SliceRecord) -> Iterator[pa.Table]:
    for output, part in sorted(record.parts.items()):
        if output.startswith(PREDICTIONS):
            file = store.open_parquet(part.key)
            names = set(file.schema_arrow.names)
            table = file.read(columns=[name for name in _COLUMNS if name in names])
            label = label_of_partition(output)
            yield table if label is None else table.append_column("label_name", pa.repeat(label, len(table)))


@dataclass(slots=True)
class _Found:
    """Sums over parts, and the few rows that may be shown."""

    names: dict[int, str]
    are_probabilities: bool
    rows: int = 0
    labelled: int = 0
    unknown: int = 0
    right: int = 0
    predicted: Counter[int] = field(default_factory=Counter)
    confused: Counter[tuple[int, int]] = field(default_factory=Counter)
    bins: np.ndarray = field(default_factory=lambda: np.zeros((4, NUM_CALIBRATION_BINS)))
    wrong: list[dict[str, Any]] = field(default_factory=list)
    unsure: list[dict[str, Any]] = field(default_factory=list)

    def add(self, table: pa.Table, slice_name: str) -> None:
        """Count the rows of a part."""
        labels_N = labels_of(table)
        pred_N, score_N = table["pred"].to_numpy(), table["score"].to_numpy().astype(np.float64)
        known_N, right_N = labels_N >= 0, labels_N == pred_N
        self._learn_names(table)
        self.rows += len(pred_N)
        self.labelled += int(known_N.sum())
        if "label_name" in table.column_names:
            self.unknown += int((table["label_name"].is_valid().to_numpy() & ~known_N).sum())
        self.right += int(right_N.sum())
        self.predicted.update(pred_N.tolist())
        wrong_N = known_N & ~right_N
        pairs = zip(labels_N[wrong_N].tolist(), pred_N[wrong_N].tolist(), strict=True)
        self.confused.update(
            pair for pair in pairs if pair in self.confused or len(self.confused) < _MAX_PAIRS
        )
        self._bin(score_N, known_N, right_N)
        self.wrong = _first(self.wrong, table, np.flatnonzero(wrong_N), -score_N, slice_name)
        self.unsure = _first(self.unsure, table, np.arange(len(pred_N)), score_N, slice_name)

    def summary(self, folder: RunFolder, rule: DecodeRule) -> PredictionSummary:
        """The sums, and the chosen rows with their images."""
        chosen = {row["sample_id"]: row["slice"] for row in [*self.wrong, *self.unsure]}
        by_slice: dict[str, list[str]] = {}
        for sample_id, name in chosen.items():
            by_slice.setdefault(name, []).append(sample_id)
        shown = show_samples(chosen, frozen_rows(folder, by_slice), rule)
        images = {image.sample_id: image for image in shown}
        rows_B, known_B, right_B, score_B = self.bins
        return PredictionSummary(
            rows=self.rows,
            labelled=self.labelled,
            unknown=self.unknown,
            top1=wilson_interval(self.right, self.labelled) if self.labelled else None,
            predicted={self._name(label): count for label, count in self.predicted.most_common()},
            scores=rows_B.astype(int).tolist() if self.are_probabilities else None,
            reliability=_reliability(known_B, right_B, score_B)
            if self.are_probabilities and self.labelled
            else None,
            confused=[
                ConfusedPair(label=self._name(label), pred=self._name(pred), rows=count)
                for (label, pred), count in self.confused.most_common(NUM_SHOWN)
            ],
            wrong=[self._shown(row, images) for row in self.wrong],
            unsure=[self._shown(row, images) for row in self.unsure],
        )

    def _learn_names(self, table: pa.Table) -> None:
        columns = [("pred", "pred_name")]
        if "label_name" in table.column_names:
            columns.append(("label", "label_name"))
        for index, name in columns:
            pairs = table.select([index, name]).group_by([index, name]).aggregate([]).to_pylist()
            self.names |= {
                row[index]: row[name]
                for row in pairs
                if row[index] is not None and row[index] not in self.names
            }

    def _bin(self, score_N: np.ndarray, known_N: np.ndarray, right_N: np.ndarray) -> None:
        if len(score_N) and not (score_N.min() >= 0 and score_N.max() <= 1 + 1e-6):
            self.are_probabilities = False
        edges = np.arange(1, NUM_CALIBRATION_BINS) / NUM_CALIBRATION_BINS
        bins_N = np.searchsorted(edges, score_N, side="left")
        for row, (chosen_N, weights) in enumerate(
            [(known_N | True, None), (known_N, None), (right_N, None), (known_N, score_N[known_N])]
        ):
            self.bins[row] += np.bincount(bins_N[chosen_N], weights, minlength=NUM_CALIBRATION_BINS)

    def _name(self, label: int) -> str:
        return self.names.get(label, f"class {label}")

    def _shown(self, row: Mapping[str, Any], images: Mapping[str, ShownImage]) -> ShownRow:
        label = row["label"]
        scores = dict(zip(row["topk_ids"], row["topk_scores"], strict=True))
        return ShownRow(
            sample_id=row["sample_id"],
            uri=row["uri"],
            label_name=row.get("label_name") if label is None else self._name(label),
            pred_name=row["pred_name"],
            score=row["score"],
            true_score=scores.get(label),
            image=images[row["sample_id"]],
        )


def _first(
    before: list[dict[str, Any]], table: pa.Table, places: np.ndarray, order_N: np.ndarray, slice_name: str
) -> list[dict[str, Any]]:
    """The rows that come first by (order, id) among those of before and those at the places."""
    nearest = places[np.argsort(order_N[places], kind="stable")[:NUM_SHOWN]]
    rows = table.take(pa.array(nearest)).to_pylist()
    added = [
        {**row, "slice": slice_name, "order": order}
        for row, order in zip(rows, order_N[nearest].tolist(), strict=True)
    ]
    return sorted([*before, *added], key=lambda row: (row["order"], row["sample_id"]))[:NUM_SHOWN]


def _reliability(known_B: np.ndarray, right_B: np.ndarray, score_B: np.ndarray) -> list[ReliabilityBin]:
    return [
        ReliabilityBin(
            low=number / NUM_CALIBRATION_BINS,
            high=(number + 1) / NUM_CALIBRATION_BINS,
            num_rows=int(known),
            accuracy=float(right / known) if known else None,
            mean_confidence=float(score / known) if known else None,
        )
        for number, (known, right, score) in enumerate(zip(known_B, right_B, score_B, strict=True))
    ]
