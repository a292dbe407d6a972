import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss, precision_recall_fscore_support, top_k_accuracy_score

from convoy.core.errors import DataError
from convoy.core.metrics import EvaluationCounts, Metrics


def make_rows(num_rows=997, num_classes=12, seed=0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_rows, num_classes)).astype(np.float32) * 2
    return logits, random.integers(0, num_classes, num_rows)


def count(logits, labels, chunk_rows=10**9):
    counts = EvaluationCounts(logits.shape[1])
    for start in range(0, len(labels), chunk_rows):
        counts.add(logits[start : start + chunk_rows], labels[start : start + chunk_rows])
    return counts


def softmax(logits):
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def assert_equal_metrics(first: Metrics, second: Metrics):
    """Counts exactly; sums of floats to rounding, since their order differs."""
    assert first.num_rows == second.num_rows
    assert (first.top1, first.top5, first.per_class) == (second.top1, second.top5, second.per_class)
    assert [b.num_rows for b in first.reliability] == [b.num_rows for b in second.reliability]
    for name in ("nll", "ece", "brier"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-12, abs=1e-15)


def test_agrees_with_scikit_learn():
    logits, labels = make_rows()
    metrics = count(logits, labels, chunk_rows=100).summary()
    probabilities = softmax(logits)
    classes = np.arange(12)
    assert metrics.top1 == (logits.argmax(axis=1) == labels).mean()
    assert metrics.top5 == top_k_accuracy_score(labels, logits, k=5, labels=classes)
    assert metrics.nll == pytest.approx(log_loss(labels, probabilities, labels=classes), rel=1e-9)
    brier = brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False)
    assert metrics.brier == pytest.approx(brier, rel=1e-9)
    expected = precision_recall_fscore_support(labels, logits.argmax(axis=1), labels=classes)
    got = [(c.precision, c.recall, c.f1, c.support) for c in metrics.per_class]
    np.testing.assert_allclose(np.array(got).T, expected, rtol=1e-12)


def test_the_confusion_matrix_has_true_classes_in_rows():
    counts = count(np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), np.array([0, 1, 0]))
    assert counts.confusion_KK.tolist() == [[1, 1], [0, 1]]
    assert counts.confusion_KK.dtype == np.int64


def test_ece_is_the_weighted_gap_of_fifteen_bins_closed_on_the_right():
    # Confidences 0.6 = 9/15 (upper edge of its bin), 0.65 and 0.95; the last bin is all wrong.
    confidence = np.array([0.6, 0.65, 0.95, 0.95])
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1))
    metrics = count(logits, np.array([0, 0, 1, 1])).summary()
    assert metrics.ece == pytest.approx((0.4 + 0.35 + 2 * 0.95) / 4, rel=1e-9)
    filled = {index: b.num_rows for index, b in enumerate(metrics.reliability) if b.num_rows}
    assert sum(filled.values()) == 4
    assert filled[14] == 2
    assert filled[9] >= 1
    last = metrics.reliability[14]
    assert (last.accuracy, last.mean_confidence) == (0.0, pytest.approx(0.95))


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    half = count(np.zeros((1, 3)), np.array([0])).summary()  # confidence is 1/3 = 5/15 exactly
    assert [index for index, b in enumerate(half.reliability) if b.num_rows] == [4]
    assert half.reliability[4].high == pytest.approx(1 / 3)


@settings(max_examples=40)
@given(chunk_rows=st.integers(1, 120), seed=st.integers(0, 5), num_classes=st.integers(1, 9))
def test_chunks_of_any_size_give_the_same_metrics(chunk_rows, seed, num_classes):
    logits, labels = make_rows(num_rows=101, num_classes=num_classes, seed=seed)
    whole = count(logits, labels)
    chunked = count(logits, labels, chunk_rows)
    assert_equal_metrics(chunked.summary(), whole.summary())
    np.testing.assert_array_equal(chunked.confusion_KK, whole.confusion_KK)
    for name in ("nll_N", "brier_N", "calibration_gap_N", "calibration_bin_N"):
        np.testing.assert_array_equal(
            getattr(chunked.row_outcomes(), name), getattr(whole.row_outcomes(), name)
        )


def test_a_chunk_larger_than_a_slice_is_counted_whole():
    logits, labels = make_rows(num_rows=700, num_classes=3000)
    large, small = count(logits, labels), count(logits, labels, chunk_rows=50)
    assert large.num_rows == 700
    assert_equal_metrics(large.summary(), small.summary())


def test_of_equal_scores_the_lower_index_ranks_first():
    counts = count(np.zeros((8, 8)), np.arange(8))
    outcomes = counts.row_outcomes()
    assert outcomes.correct1_N.tolist() == [True] + [False] * 7
    assert outcomes.correct5_N.tolist() == [True] * 5 + [False] * 3


def test_top5_is_certain_with_five_classes_or_fewer():
    logits, labels = make_rows(num_classes=5)
    assert count(logits, labels).summary().top5 == 1.0


def test_row_outcomes_give_the_metrics_again():
    logits, labels = make_rows()
    counts = count(logits, labels, chunk_rows=64)
    rows, metrics = counts.row_outcomes(), counts.summary()
    assert rows.correct1_N.mean() == metrics.top1
    assert rows.correct5_N.mean() == metrics.top5
    assert rows.nll_N.mean(dtype=np.float64) == pytest.approx(metrics.nll, rel=1e-6)
    assert rows.brier_N.mean(dtype=np.float64) == pytest.approx(metrics.brier, rel=1e-6)
    totals = np.bincount(rows.calibration_bin_N, rows.calibration_gap_N.astype(np.float64))
    assert np.abs(totals).sum() / len(labels) == pytest.approx(metrics.ece, rel=1e-5)


def test_recall_has_the_interval_of_a_rate():
    logits, labels = make_rows()
    for row in count(logits, labels).summary().per_class:
        assert row.recall_interval.estimate == pytest.approx(row.recall)
        assert row.recall_interval.low < row.recall < row.recall_interval.high
    unseen = count(np.array([[1.0, 0.0]]), np.array([0])).summary().per_class[1]
    assert unseen.recall_interval is None


def test_ratios_without_rows_are_undefined_rather_than_zero():
    metrics = count(np.array([[1.0, 0.0, 0.0]]), np.array([1])).summary()
    first, second, third = metrics.per_class
    assert (first.precision, first.recall, first.f1) == (0.0, None, 0.0)
    assert (second.precision, second.recall, second.f1) == (None, 0.0, 0.0)
    assert (third.precision, third.recall, third.f1) == (None, None, None)


def test_confident_mistakes_cost_exact_nll_without_overflow():
    metrics = count(np.array([[2000.0, 0.0]], np.float32), np.array([1])).summary()
    assert metrics.nll == 2000.0
    assert metrics.brier == pytest.approx(2.0)


def test_half_precision_logits_are_widened_before_they_are_summed():
    logits, labels = make_rows()
    half = logits.astype(np.float16)
    assert count(half, labels).summary() == count(half.astype(np.float64), labels).summary()


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ([[0.0, 1.0], [0.0, math.nan]], [0, 0]),
        ([[0.0, 1.0], [0.0, math.inf]], [0, 0]),
        ([[0.0, 1.0], [0.0, 1.0]], [0, 2]),
        ([[0.0, 1.0], [0.0, 1.0]], [0, -1]),
        ([[0.0, 1.0], [0.0, 1.0]], [0.0, 1.0]),
        ([[0.0, 1.0]], [0, 1]),
        ([[0.0, 1.0, 2.0]], [0]),
    ],
)
def test_a_bad_row_is_refused_and_nothing_of_its_chunk_is_counted(logits, labels):
    counts = EvaluationCounts(2)
    with pytest.raises(DataError):
        counts.add(np.array(logits), np.array(labels))
    assert counts.num_rows == 0
    assert counts.confusion_KK.sum() == 0


def test_no_rows_are_an_error():
    with pytest.raises(DataError, match="without rows"):
        EvaluationCounts(3).summary()


def test_counts_survive_pickling_and_metrics_survive_json():
    logits, labels = make_rows()
    counts = count(logits, labels)
    metrics = pickle.loads(pickle.dumps(counts)).summary()
    assert metrics == counts.summary()
    assert Metrics.model_validate_json(metrics.model_dump_json()) == metrics
