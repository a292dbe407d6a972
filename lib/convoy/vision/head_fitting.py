"""Fitting a head on features, and choosing among candidates on validation rows."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convoy.core.epochs import EpochPlan
from convoy.core.errors import ConfigError, DataError, TrainingError
from convoy.core.large_arrays import large_array
from convoy.core.metrics import EvaluationCounts, Metrics
from convoy.core.randomness import generator, position_digest
from convoy.vision.head_config import HeadConfig, HeadKind, HeadSpec, MlpConfig, Selection, check_choice
from convoy.vision.head_objectives import (
    FeatureScale,
    LinearObjective,
    checked_batches,
    measure_features,
    softmax_loss,
    squared_hinge_loss,
    unstandardise,
)
from convoy.vision.head_path import KeptPoints, path_points
from convoy.vision.heads import FeatureBatch, FeatureSource, Head, empty_head

# Multiplications of one evaluation of the objective below which a second thread costs more than it brings.
_SMALL_OBJECTIVE = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTrial:
    """One candidate: a value of C on the path of a linear head, or an epoch of an MLP (C is None).

    `num_iterations`: of L-BFGS since the candidate before, or epochs in all. `converged`: whether L-BFGS
    reached the gradient's tolerance, or float64's resolution, within `max_iterations`; None for an epoch.
    `kept_s` is what an earlier process took for it, if that kept it.
    """

    C: float | None
    num_iterations: int
    converged: bool | None
    val: Metrics | None
    kept_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedHead:
    """A head in eval mode that acts on features as they are, and how it was found.

    `trials` are in the order tried. `converged`: for a linear head that of the chosen trial, for an MLP
    whether validation stopped improving before the epochs ran out (never known without validation rows).
    """

    head: Head
    chosen: HeadTrial
    trials: tuple[HeadTrial, ...]
    converged: bool
    num_train_rows: int
    seconds: float


def fit_head(
    config: HeadConfig,
    train: FeatureSource,
    val: FeatureSource | None,
    *,
    num_classes: int,
    kept: KeptPoints | None = None,
) -> FittedHead:
    """The best head by the config's selection on `val`, fitted on the CPU; equal inputs give equal heads.

    Of a linear head each finished C is `kept`, and not fitted again by a call with equal inputs; its seconds count.
    See `KeptPoints` for what the caller vouches for.

    A linear head reads `train` once an evaluation of its objective and holds one batch; an MLP keeps all
    train rows in memory (4 * N * D bytes) to shuffle them. Without `val` an MLP trains all its epochs.
    Raises ConfigError where several C have no validation rows to choose by, DataError for features or labels
    that cannot be fitted (a class without train rows among them), TrainingError if an MLP diverges.
    """
    started_s = time.monotonic()
    _check_request(config, train, val, num_classes)
    scale = measure_features(train, num_classes=num_classes, standardisation=config.standardisation)
    fit = _mlp_epochs if config.kind is HeadKind.MLP else partial(_linear_path, kept=kept)
    with _few_threads(train.num_rows * train.num_features * num_classes):
        candidates = fit(config, train, val, scale=scale, num_classes=num_classes)
        head, chosen = next(candidates)
        trials, trials_since_chosen = [chosen], 0
        for candidate, trial in candidates:
            trials.append(trial)
            trials_since_chosen += 1
            if _is_better(trial, chosen, config.selection):
                head, chosen, trials_since_chosen = candidate, trial, 0
            elif config.kind is HeadKind.MLP and trials_since_chosen >= config.mlp.patience_epochs:
                break
    return FittedHead(
        head=head,
        chosen=chosen,
        trials=tuple(trials),
        converged=_report_convergence(config, chosen, trials_since_chosen),
        num_train_rows=scale.num_rows,
        seconds=time.monotonic() - started_s + sum(trial.kept_s for trial in trials),
    )


def fit_path(config: HeadConfig, train: FeatureSource, *, num_classes: int) -> list[Head]:
    """A linear head for each C, from strong to weak regularisation, before anything chooses among them.

    They are those that `fit_head` tries. Raises ConfigError for an MLP, and what `fit_head` raises.
    """
    if config.kind is HeadKind.MLP:
        raise ConfigError("an MLP has no path", where="head.kind", next_step="choose softmax or linear_svm")
    scale = measure_features(train, num_classes=num_classes, standardisation=config.standardisation)
    with _few_threads(train.num_rows * train.num_features * num_classes):
        path = _linear_path(config, train, None, scale=scale, num_classes=num_classes)
        return [head for head, _ in path]


def choose_head(heads: Sequence[Head], val: FeatureSource, selection: Selection) -> Head:
    """The best of some heads on validation rows; of equals the first."""
    return min(heads, key=lambda head: _badness(evaluate_head(head, val).summary(), selection))


@contextmanager
def _few_threads(multiplications: int) -> Iterator[None]:
    """One thread for L-BFGS's own vectors, and one for the objective where it is small.

    Two pools of threads that spin for work, BLAS and OpenMP, make 600 rows of 84 features a hundred times slower.
    """
    num_threads = torch.get_num_threads()
    with threadpool_limits(limits=1, user_api="blas"):
        if multiplications < _SMALL_OBJECTIVE:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


def evaluate_head(head: Head, source: FeatureSource) -> EvaluationCounts:
    """The counts of a head in eval mode over all rows of a source, in its order, whatever their weights."""
    counts = EvaluationCounts(head.spec.num_classes)
    with torch.inference_mode():
        for batch in source:
            counts.add(head(batch.features_BD.float()).numpy(), batch.labels_B.numpy())
    return counts


def _linear_path(
    config: HeadConfig,
    train: FeatureSource,
    val: FeatureSource | None,
    *,
    scale: FeatureScale,
    num_classes: int,
    kept: KeptPoints | None = None,
) -> Iterator[tuple[Head, HeadTrial]]:
    """One head for each C, from strong to weak regularisation, each started from the one before."""
    row_loss = softmax_loss if config.kind is HeadKind.SOFTMAX else squared_hinge_loss
    objective = LinearObjective(train, scale, row_loss, num_classes=num_classes)
    spec = HeadSpec(kind=config.kind, num_features=train.num_features, num_classes=num_classes)
    for c, point, is_kept in path_points(config, objective, scale, kept):
        head = empty_head(spec)
        _set_layer(head.input_layer, *objective.raw_layer(point.parameters_P))
        trial = HeadTrial(
            C=c,
            num_iterations=point.num_iterations,
            converged=point.converged,
            val=None if val is None else evaluate_head(head, val).summary(),
            kept_s=point.seconds if is_kept else 0.0,
        )
        yield head, trial


def _mlp_epochs(
    config: HeadConfig,
    train: FeatureSource,
    val: FeatureSource | None,
    *,
    scale: FeatureScale,
    num_classes: int,
) -> Iterator[tuple[Head, HeadTrial]]:
    """The head after each epoch. Initialisation, order and dropout are pure functions of (seed, epoch)."""
    rows = _standardised_rows(train, scale, num_classes)
    spec = HeadSpec(
        kind=HeadKind.MLP,
        num_features=train.num_features,
        num_classes=num_classes,
        hidden_width=config.mlp.hidden_width,
        dropout=config.mlp.dropout,
    )
    with _seeded_torch(config.mlp.seed, "init"):
        model = Head(spec)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.mlp.learning_rate, weight_decay=config.mlp.weight_decay
    )
    for epoch in range(config.mlp.epochs):
        with _seeded_torch(config.mlp.seed, "dropout", epoch):
            _train_epoch(model, optimizer, rows, config=config.mlp, epoch=epoch)
        head = copy.deepcopy(model).eval()
        first = head.input_layer
        _set_layer(first, *unstandardise(first.weight, first.bias, scale))
        trial = HeadTrial(
            C=None,
            num_iterations=epoch + 1,
            converged=None,
            val=None if val is None else evaluate_head(head, val).summary(),
        )
        yield head, trial


def _train_epoch(
    model: Head, optimizer: torch.optim.Optimizer, rows: FeatureBatch, *, config: MlpConfig, epoch: int
) -> None:
    model.train()
    num_rows = len(rows.labels_B)
    order_N = torch.from_numpy(generator(config.seed, "head_order", epoch).permutation(num_rows))
    plan = EpochPlan(num_rows=num_rows, batch_size=min(config.batch_rows, num_rows))
    for step in range(plan.num_steps):
        part = plan.batch(step)
        batch_B = order_N[part.start : part.stop]
        logits_BK = model(rows.features_BD[batch_B])
        loss_B = cross_entropy(logits_BK, rows.labels_B[batch_B], reduction="none")
        optimizer.zero_grad()
        (loss_B * rows.weights_B[batch_B]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise TrainingError(
            "the MLP head diverged", where=f"epoch {epoch}", next_step="lower head.mlp.learning_rate"
        )


def _standardised_rows(source: FeatureSource, scale: FeatureScale, num_classes: int) -> FeatureBatch:
    """All rows as one batch, on disk where memory is short (`core.large_arrays`); weights are scaled to a mean of 1."""
    features_ND = torch.from_numpy(large_array((scale.num_rows, source.num_features), np.float32))
    labels_N = torch.empty(scale.num_rows, dtype=torch.int64)
    weights_N = torch.empty(scale.num_rows)
    start = 0
    for batch in checked_batches(source, num_classes=num_classes):
        rows = slice(start, start + len(batch.labels_B))
        features_ND[rows] = (batch.features_BD.double() - scale.mean_D) / scale.std_D
        labels_N[rows] = batch.labels_B
        weights_N[rows] = batch.weights_B * (scale.num_rows / scale.total_weight)
        start = rows.stop
    return FeatureBatch(features_BD=features_ND, labels_B=labels_N, weights_B=weights_N)


@contextmanager
def _seeded_torch(seed: int, *position: str | int) -> Iterator[None]:
    """Seed torch's own generators for a position, and give that of the CPU, the one used, back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(position_digest(seed, "head", *position)[:8], "big"))
        yield


def _set_layer(layer: nn.Linear, weights_KD: Tensor, bias_K: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weights_KD)
        layer.bias.copy_(bias_K)


def _is_better(trial: HeadTrial, best: HeadTrial, selection: Selection) -> bool:
    if trial.val is None or best.val is None:
        return True  # nothing to choose by: the last epoch is the head
    return _badness(trial.val, selection) < _badness(best.val, selection)


def _badness(val: Metrics, selection: Selection) -> tuple[float, float]:
    if selection is Selection.TOP1_THEN_NLL:
        return -val.top1, val.nll
    return val.nll, -val.top1


def _report_convergence(config: HeadConfig, chosen: HeadTrial, trials_since_chosen: int) -> bool:
    if config.kind is HeadKind.MLP:
        converged = trials_since_chosen >= config.mlp.patience_epochs
        advice = "raise head.mlp.epochs"
    else:
        converged = bool(chosen.converged)
        advice = "raise head.max_iterations, or leave out the largest C"
    if not converged:
        logging.getLogger(__name__).warning("the %s head did not converge; %s", config.kind, advice)
    return converged


def _check_request(
    config: HeadConfig, train: FeatureSource, val: FeatureSource | None, num_classes: int
) -> None:
    if num_classes < 2:
        raise ConfigError("a head needs at least two classes", where=f"num_classes={num_classes}")
    check_choice(config, has_val=val is not None)
    if val is not None and (val.num_features != train.num_features or val.num_rows == 0):
        raise DataError(
            f"validation has {val.num_rows} rows of {val.num_features} features, "
            f"train has rows of {train.num_features}",
            next_step="cache both splits with the same backbone and tap",
        )
