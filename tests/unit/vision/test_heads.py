import logging
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch.nn.functional import cross_entropy

from convoy.core.errors import ConfigError, DataError, TrainingError
from convoy.vision import head_fitting, head_path
from convoy.vision.head_config import HeadConfig, HeadKind, HeadSpec, MlpConfig, Selection, Standardisation
from convoy.vision.head_fitting import choose_head, evaluate_head, fit_head, fit_path
from convoy.vision.head_objectives import LinearObjective, measure_features, softmax_loss, squared_hinge_loss
from convoy.vision.head_path import KeptPoints
from convoy.vision.heads import Head, TensorFeatures, head_from_state, head_to_state

LINEAR_KINDS = [HeadKind.SOFTMAX, HeadKind.LINEAR_SVM]
SMALL_MLP = MlpConfig(hidden_width=32, epochs=30, patience_epochs=3, batch_rows=64, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These matrices are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    """Features [1797, 64] and labels of scikit-learn's digits: train is the first 1,200 rows."""
    loaded = load_digits()
    return torch.from_numpy(loaded.data.astype(np.float32)), torch.from_numpy(loaded.target)


def train_of(digits, **kwargs):
    return TensorFeatures(digits[0][:1200], digits[1][:1200], **kwargs)


def val_of(digits):
    return TensorFeatures(digits[0][1200:], digits[1][1200:])


def logits_of(head, features):
    with torch.inference_mode():
        return head(features).double().numpy()


def probabilities_of(head, features):
    return torch.softmax(torch.from_numpy(logits_of(head, features)), dim=1).numpy()


def relative_change(first, second):
    """Of the first layer's weights, against their own norm."""
    before, after = second.input_layer.weight.detach(), first.input_layer.weight.detach()
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_softmax_agrees_with_scikit_learn_on_real_features(digits, c):
    features, labels = digits
    fitted = fit_head(HeadConfig(C=(c,)), train_of(digits), None, num_classes=10)
    scaler = StandardScaler().fit(features[:1200].double().numpy())
    reference = LogisticRegression(C=c, tol=1e-9, max_iter=5000)
    reference.fit(scaler.transform(features[:1200].double().numpy()), labels[:1200].numpy())
    expected = reference.predict_proba(scaler.transform(features.double().numpy()))
    assert fitted.converged
    np.testing.assert_allclose(probabilities_of(fitted.head, features), expected, atol=1e-3)


@pytest.mark.parametrize("c", [1e-3, 1e-1])
def test_linear_svm_agrees_with_scikit_learn_on_real_features(digits, c):
    features, labels = digits
    config = HeadConfig(kind=HeadKind.LINEAR_SVM, C=(c,))
    fitted = fit_head(config, train_of(digits), None, num_classes=10)
    scaler = StandardScaler().fit(features[:1200].double().numpy())
    # liblinear penalises the intercept; a large scaling makes that negligible.
    reference = LinearSVC(C=c, dual=False, intercept_scaling=100, tol=1e-8, max_iter=50_000)
    reference.fit(scaler.transform(features[:1200].double().numpy()), labels[:1200].numpy())
    expected = reference.decision_function(scaler.transform(features.double().numpy()))
    np.testing.assert_allclose(logits_of(fitted.head, features), expected, atol=5e-3)


def test_two_classes_equal_scikit_learns_single_column_at_twice_the_c(digits):
    features, labels = digits[0][digits[1] < 2], digits[1][digits[1] < 2]
    config = HeadConfig(C=(0.01,), standardisation=Standardisation.NONE)
    fitted = fit_head(config, TensorFeatures(features, labels), None, num_classes=2)
    reference = LogisticRegression(C=0.02, tol=1e-9, max_iter=5000).fit(features.numpy(), labels.numpy())
    expected = reference.predict_proba(features.numpy())
    np.testing.assert_allclose(probabilities_of(fitted.head, features), expected, atol=1e-3)


@pytest.mark.parametrize("row_loss", [softmax_loss, squared_hinge_loss])
def test_the_gradient_is_that_of_the_value(digits, row_loss):
    features, labels = digits[0][:50], digits[1][:50]
    source = TensorFeatures(features + 100.0, labels, torch.rand(50), batch_rows=16)
    scale = measure_features(source, num_classes=10, standardisation=Standardisation.MEAN_STD)
    objective = LinearObjective(source, scale, row_loss, num_classes=10)
    random = np.random.default_rng(0)
    parameters = random.normal(size=objective.num_parameters)
    direction = random.normal(size=objective.num_parameters)
    above, below = (
        objective.value_and_gradient(parameters + step * direction, 0.5)[0] for step in (1e-6, -1e-6)
    )
    slope = objective.value_and_gradient(parameters, 0.5)[1] @ direction
    assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_stream_in_batches_of_seven_gives_the_head_that_memory_gives(digits, kind):
    config = HeadConfig(kind=kind, C=(1e-3, 1e-2))
    whole = fit_head(config, train_of(digits, batch_rows=5000), val_of(digits), num_classes=10)
    streamed = fit_head(config, train_of(digits, batch_rows=7), val_of(digits), num_classes=10)
    assert streamed.chosen.C == whole.chosen.C
    assert relative_change(streamed.head, whole.head) < 1e-3


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_row_of_weight_two_is_two_rows(digits, kind):
    """So more views of a sample, given as more rows, weigh as much as they are many."""
    features, labels = digits[0][:300], digits[1][:300]
    weights = torch.ones(300)
    weights[100:200] = 2.0
    twice = torch.arange(100, 200)
    doubled = TensorFeatures(torch.cat([features, features[twice]]), torch.cat([labels, labels[twice]]))
    config = HeadConfig(kind=kind, C=(1e-2,), gradient_tolerance=1e-8)
    weighted = fit_head(config, TensorFeatures(features, labels, weights), None, num_classes=10)
    repeated = fit_head(config, doubled, None, num_classes=10)
    assert relative_change(weighted.head, repeated.head) < 1e-4
    assert (weighted.num_train_rows, repeated.num_train_rows) == (300, 400)


def test_rows_of_weight_zero_do_not_matter(digits):
    features, labels = digits[0][:300].clone(), digits[1][:300]
    config = HeadConfig(C=(1e-2,))
    kept = fit_head(config, TensorFeatures(features[:250], labels[:250]), None, num_classes=10)
    features[250:] = 1e6
    weights = torch.cat([torch.ones(250), torch.zeros(50)])
    masked = fit_head(config, TensorFeatures(features, labels, weights), None, num_classes=10)
    assert relative_change(masked.head, kept.head) < 1e-4


def test_standardisation_is_folded_and_survives_constant_and_far_features(digits):
    features, labels = digits
    moved = torch.cat([features * 3.0 + 1000.0, torch.full((len(features), 1), 0.1)], dim=1)
    config = HeadConfig(C=(1e-2,))
    plain = fit_head(config, TensorFeatures(features, labels), None, num_classes=10)
    far = fit_head(config, TensorFeatures(moved, labels), None, num_classes=10)
    np.testing.assert_allclose(
        probabilities_of(far.head, moved), probabilities_of(plain.head, features), atol=2e-3
    )


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_the_path_goes_from_strong_to_weak_and_the_best_on_validation_is_chosen(digits, kind):
    config = HeadConfig(kind=kind, C=(1e-1, 1e-6, 1e-3, 1e-1))
    fitted = fit_head(config, train_of(digits), val_of(digits), num_classes=10)
    assert [trial.C for trial in fitted.trials] == [1e-6, 1e-3, 1e-1]
    ranked = sorted(fitted.trials, key=lambda trial: (-trial.val.top1, trial.val.nll))
    assert fitted.chosen == ranked[0]
    assert evaluate_head(fitted.head, val_of(digits)).summary() == fitted.chosen.val


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_whoever_chooses_among_the_heads_of_a_path_finds_the_fitted_one(digits, kind):
    config = HeadConfig(kind=kind, C=(1e-5, 1e-2, 1e-1))
    heads = fit_path(config, train_of(digits), num_classes=10)
    assert len(heads) == 3
    chosen = choose_head(heads, val_of(digits), config.selection)
    fitted = fit_head(config, train_of(digits), val_of(digits), num_classes=10)
    assert torch.equal(chosen.input_layer.weight, fitted.head.input_layer.weight)
    assert not torch.equal(heads[0].input_layer.weight, heads[1].input_layer.weight)


class PointsInMemory(KeptPoints):
    def __init__(self, most=100):
        self.points, self.most = {}, most

    def get(self, fit, c):
        return self.points.get((fit, c))

    def put(self, fit, c, point):
        if len(self.points) == self.most:
            raise KeyboardInterrupt
        self.points[fit, c] = point


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_fit_that_was_ended_goes_on_at_the_next_c_to_the_same_head(digits, kind, monkeypatch):
    config = HeadConfig(kind=kind, C=(1e-3, 1e-2, 1e-1, 1.0))
    whole = fit_head(config, train_of(digits), val_of(digits), num_classes=10)
    kept = PointsInMemory(most=2)
    with pytest.raises(KeyboardInterrupt):
        fit_head(config, train_of(digits), val_of(digits), num_classes=10, kept=kept)
    solved, minimize = [], head_path.minimize

    def counted(*args, **kwargs):
        solved.append(kwargs["args"])
        return minimize(*args, **kwargs)

    monkeypatch.setattr(head_path, "minimize", counted)
    kept.most = 100
    resumed = fit_head(config, train_of(digits), val_of(digits), num_classes=10, kept=kept)
    assert solved == [(1e-1,), (1.0,)]
    for name, tensor in head_to_state(whole.head).items():
        assert torch.equal(tensor, head_to_state(resumed.head)[name])
    assert [(one.C, one.num_iterations, one.converged, one.val) for one in resumed.trials] == [
        (one.C, one.num_iterations, one.converged, one.val) for one in whole.trials
    ]
    # What the first process spent on them is part of the fit.
    assert [one.kept_s > 0 for one in resumed.trials] == [True, True, False, False]
    assert resumed.seconds > sum(one.kept_s for one in resumed.trials)


def test_points_of_other_rows_or_another_config_are_not_taken(digits):
    kept = PointsInMemory()
    config = HeadConfig(C=(1e-3,))
    fit_head(config, train_of(digits), None, num_classes=10, kept=kept)
    fit_head(config, val_of(digits), None, num_classes=10, kept=kept)
    fit_head(
        config.model_copy(update={"max_iterations": 7}), train_of(digits), None, num_classes=10, kept=kept
    )
    assert len(kept.points) == 3


def test_an_mlp_has_no_path(digits):
    with pytest.raises(ConfigError, match="no path"):
        fit_path(HeadConfig(kind=HeadKind.MLP), train_of(digits), num_classes=10)


def test_selection_may_prefer_nll(digits):
    config = HeadConfig(C=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), selection=Selection.NLL_THEN_TOP1)
    fitted = fit_head(config, train_of(digits), val_of(digits), num_classes=10)
    assert fitted.chosen.val.nll == min(trial.val.nll for trial in fitted.trials)


def test_a_tie_goes_to_the_stronger_regularisation():
    # Nothing to learn: the best weights are zero at every C, so all candidates are the same head.
    features, labels = torch.zeros(40, 3), torch.arange(40) % 4
    source = TensorFeatures(features, labels)
    fitted = fit_head(HeadConfig(C=(10.0, 0.1, 1.0)), source, source, num_classes=4)
    assert fitted.chosen.C == 0.1


def test_a_fit_that_was_cut_short_says_so(digits, caplog):
    with caplog.at_level(logging.WARNING):
        fitted = fit_head(HeadConfig(C=(1.0,), max_iterations=2), train_of(digits), None, num_classes=10)
    assert not fitted.converged
    assert fitted.chosen.num_iterations == 2
    assert "did not converge" in caplog.text


def test_an_mlp_stops_early_and_keeps_its_best_epoch(digits):
    fitted = fit_head(
        HeadConfig(kind=HeadKind.MLP, mlp=SMALL_MLP), train_of(digits), val_of(digits), num_classes=10
    )
    best = min(fitted.trials, key=lambda trial: (-trial.val.top1, trial.val.nll))
    assert fitted.converged
    assert fitted.chosen == best
    assert len(fitted.trials) == best.num_iterations + SMALL_MLP.patience_epochs
    assert evaluate_head(fitted.head, val_of(digits)).summary() == best.val
    assert best.val.top1 > 0.9


def test_an_mlp_is_a_function_of_its_seed_alone(digits):
    def fit(seed, batch_rows):
        torch.rand(batch_rows)  # the state of torch's own generator must not matter
        mlp = SMALL_MLP.model_copy(update={"seed": seed, "epochs": 2})
        config = HeadConfig(kind=HeadKind.MLP, mlp=mlp)
        return fit_head(config, train_of(digits, batch_rows=batch_rows), val_of(digits), num_classes=10).head

    first, again, other = (
        fit(seed, rows).input_layer.weight for seed, rows in ((1, 400), (1, 400), (2, 400))
    )
    streamed = fit(1, 7).input_layer.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(streamed, first, rtol=1e-4, atol=1e-6)


def test_no_row_of_an_mlp_is_a_step_of_its_own(digits, monkeypatch):
    """The row that is left over of full batches would count as much as all rows of one of them."""
    sizes = []

    def note_size(logits_BK, labels_B, **options):
        sizes.append(len(labels_B))
        return cross_entropy(logits_BK, labels_B, **options)

    monkeypatch.setattr(head_fitting, "cross_entropy", note_size)
    for num_rows, expected in ((129, [43, 43, 43]), (128, [64, 64]), (50, [50])):
        sizes.clear()
        train = TensorFeatures(digits[0][:num_rows], digits[1][:num_rows])
        mlp = SMALL_MLP.model_copy(update={"epochs": 1})
        fit_head(HeadConfig(kind=HeadKind.MLP, mlp=mlp), train, None, num_classes=10)
        assert sizes == expected


def test_an_mlp_heeds_row_weights(digits):
    """Rows with wrong labels spoil the head, unless they weigh nothing."""
    features, labels = digits[0][:1200], digits[1][:1200]
    both = torch.cat([features, features]), torch.cat([labels, (labels + 1) % 10])
    config = HeadConfig(kind=HeadKind.MLP, mlp=SMALL_MLP.model_copy(update={"epochs": 6}))
    silenced = TensorFeatures(*both, torch.cat([torch.ones(1200), torch.zeros(1200)]))
    heeded = fit_head(config, silenced, val_of(digits), num_classes=10).chosen.val.top1
    spoiled = fit_head(config, TensorFeatures(*both), val_of(digits), num_classes=10).chosen.val.top1
    assert heeded > 0.85 > spoiled


@pytest.mark.parametrize("kind", [HeadKind.SOFTMAX, HeadKind.MLP])
def test_fitting_leaves_torchs_generator_as_it_was(digits, kind):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    config = HeadConfig(kind=kind, C=(1e-3,), mlp=SMALL_MLP.model_copy(update={"epochs": 1}))
    fit_head(config, train_of(digits), None, num_classes=10)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_mlp_without_validation_trains_all_its_epochs(digits):
    config = HeadConfig(kind=HeadKind.MLP, mlp=SMALL_MLP.model_copy(update={"epochs": 5}))
    fitted = fit_head(config, train_of(digits), None, num_classes=10)
    assert fitted.chosen.num_iterations == len(fitted.trials) == 5
    assert not fitted.converged


def test_an_mlp_that_diverges_is_an_error(digits):
    config = HeadConfig(kind=HeadKind.MLP, mlp=SMALL_MLP.model_copy(update={"learning_rate": 1e20}))
    with pytest.raises(TrainingError, match="diverged"):
        fit_head(config, train_of(digits), None, num_classes=10)


@pytest.mark.parametrize("kind", list(HeadKind))
def test_a_head_comes_back_from_safetensors_and_json(digits, kind):
    config = HeadConfig(kind=kind, C=(1e-2,), mlp=SMALL_MLP.model_copy(update={"epochs": 1}))
    head = fit_head(config, train_of(digits), None, num_classes=10).head
    tensors = safetensors.torch.load(safetensors.torch.save(head_to_state(head)))
    spec = HeadSpec.model_validate_json(head.spec.model_dump_json())
    restored = head_from_state(spec, tensors)
    assert not restored.training
    assert torch.equal(restored(digits[0]), head(digits[0]))


def test_tensors_of_another_head_are_refused():
    spec = HeadSpec(kind=HeadKind.SOFTMAX, num_features=4, num_classes=3)
    wider = Head(HeadSpec(kind=HeadKind.SOFTMAX, num_features=5, num_classes=3))
    with pytest.raises(DataError, match="do not fit"):
        head_from_state(spec, head_to_state(wider))


@pytest.mark.parametrize(("kind", "hidden_width"), [("softmax", 8), ("mlp", None)])
def test_only_an_mlp_has_a_hidden_width(kind, hidden_width):
    with pytest.raises(ValidationError, match="hidden_width"):
        HeadSpec(kind=kind, num_features=4, num_classes=3, hidden_width=hidden_width)


def test_several_c_without_validation_rows_say_what_to_do(digits):
    with pytest.raises(ConfigError, match=r"head\.C=\[1\.0\]"):
        fit_head(HeadConfig(), train_of(digits), None, num_classes=10)


def test_a_class_without_train_rows_is_named(digits):
    with pytest.raises(DataError, match=r"classes \[10, 11\]"):
        fit_head(HeadConfig(C=(1.0,)), train_of(digits), None, num_classes=12)


def broken(features=None, labels=None, weights=None):
    plain = torch.arange(12.0).view(6, 2), torch.arange(6) % 2, torch.ones(6)
    changed = [tensor.clone() for tensor in plain]
    for tensor, value in zip(changed, (features, labels, weights), strict=True):
        if value is not None:
            tensor[3] = value
    return TensorFeatures(*changed)


@pytest.mark.parametrize("kind", [HeadKind.SOFTMAX, HeadKind.MLP])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (broken(features=float("nan")), "features must be finite"),
        (broken(labels=2), r"labels must be 0\.\.1"),
        (broken(labels=-1), r"labels must be 0\.\.1"),
        (broken(weights=-1.0), "weights must be"),
        (broken(weights=float("nan")), "weights must be"),
    ],
)
def test_rows_that_cannot_be_fitted_are_refused(kind, source, message):
    with pytest.raises(DataError, match=message):
        fit_head(HeadConfig(kind=kind, C=(1.0,)), source, None, num_classes=2)


def test_a_source_that_gives_fewer_rows_than_it_promised_is_refused(digits):
    class Short(TensorFeatures):
        @property
        def num_rows(self):
            return 1000

        def __iter__(self):
            return iter(list(super().__iter__())[:1])

    with pytest.raises(DataError, match="promised 1000 rows and gave 512"):
        fit_head(HeadConfig(C=(1.0,)), Short(*digits), None, num_classes=10)


def test_validation_of_other_features_is_refused(digits):
    other = TensorFeatures(digits[0][:, :32], digits[1])
    with pytest.raises(DataError, match="rows of 32 features"):
        fit_head(HeadConfig(), train_of(digits), other, num_classes=10)


def test_a_weaker_penalty_never_fits_the_train_rows_worse(digits):
    fitted = fit_head(
        HeadConfig(C=(1e-4, 1e-3, 1e-2, 1e-1)), train_of(digits), train_of(digits), num_classes=10
    )
    nlls = [trial.val.nll for trial in fitted.trials]
    assert all(weaker < stronger for stronger, weaker in pairwise(nlls))
