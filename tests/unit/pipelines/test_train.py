"""What a training is measured on, which is known before it begins."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.errors import ConfigError, ConvoyError, DataError, RunMismatch
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines import device_settings, probing, train
from convoy.pipelines.distillation import with_begun_teacher
from convoy.pipelines.evaluation import Evaluation, EvaluationTask
from convoy.pipelines.feature_source import LabelledRows
from convoy.pipelines.model_cards import training_card
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_training import TrainedNetwork, open_training, training_identity
from convoy.pipelines.train import TrainReport, measured_on, run_train
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.train_plan import TrainPlan, plan_train
from convoy.pipelines.training_rows import Fold, RowLimit
from convoy.storage.bundles import open_bundle
from convoy.storage.commits import finish
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.feature_cache import FeatureSetSpec
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, RunRecord
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.heads import TensorFeatures
from convoy.vision.weights import state_to_safetensors
from features_here import compute_features_here
from made_advice_rows import frozen_rows
from made_bundles import FP32, made_classifier
from made_devices import made_device
from made_pages import made_evaluation

CLASSES = ("good", "defect")
SETTINGS = {"name": "parts", "dataset": "parts", "backbone": {"arch": "lenet5", "weights": "random"}}
SPLITS = SplitOptions(val_fraction=0.3)
CONFIG = parse_config(TrainConfig, SETTINGS, where="here")


def manifest_of(folder: Path, *splits: Split, unlabelled: tuple[Split, ...] = ()) -> Manifest:
    rows = dict.fromkeys((Split.TRAIN, *splits), (10, 10))
    return frozen_rows(folder, rows, CLASSES, unlabelled=unlabelled)


def test_a_model_is_measured_on_test_or_on_val_where_test_has_no_labels(tmp_path: Path) -> None:
    both = manifest_of(tmp_path / "both", Split.TEST, Split.VAL)
    assert measured_on(both, CONFIG) == (Split.TEST, None)
    mute = manifest_of(tmp_path / "mute", Split.TEST, Split.VAL, unlabelled=(Split.TEST,))
    assert measured_on(mute, CONFIG) == (Split.VAL, None)


def test_a_fold_is_measured_on_unless_the_caller_wants_a_split(tmp_path: Path) -> None:
    fold = Fold(index=0, count=5)
    config = CONFIG.model_copy(update={"rows": RowLimit(fold=fold)})
    assert measured_on(manifest_of(tmp_path / "bare"), config) == (Split.TRAIN, fold)
    whole = manifest_of(tmp_path / "whole", Split.VAL)
    assert measured_on(whole, config, Split.VAL) == (Split.VAL, None)


@pytest.mark.parametrize("splits", [(), (Split.TEST,), (Split.TEST, Split.VAL)])
def test_where_nothing_could_be_measured_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: tuple[Split, ...]
) -> None:
    manifest = manifest_of(tmp_path, *splits, unlabelled=splits)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    monkeypatch.setattr(train, "_train", lambda job: pytest.fail("it was trained"))
    config = CONFIG.model_copy(update={"workspace": str(tmp_path)})
    with pytest.raises(DataError, match="neither test nor val") as caught:
        run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    assert "rows.fold" in str(caught.value.next_step)


@pytest.mark.parametrize("strategy", ["linear_probe", "from_scratch"])
def test_a_single_class_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    manifest = frozen_rows(tmp_path, dict.fromkeys(Split, (10,)), ("data",))
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    monkeypatch.setattr(train, "open_as_begun", lambda *_, **__: (manifest, []))
    monkeypatch.setattr(train, "_train", lambda job: pytest.fail("it was trained"))
    settings = {**SETTINGS, "workspace": str(tmp_path), "strategy": strategy}
    config = parse_config(TrainConfig, settings, where="here")
    with pytest.raises(DataError, match="a single class, data") as caught:
        run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    assert "one folder too high" in str(caught.value.next_step)
    with pytest.raises(DataError, match="a single class, data"):
        plan_train(config)


def test_several_values_of_c_without_rows_to_choose_by_are_refused_before_any_feature_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(tmp_path, Split.TEST)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    monkeypatch.setattr(train, "_train", lambda job: pytest.fail("it was trained"))
    config = CONFIG.model_copy(update={"workspace": str(tmp_path)})
    with pytest.raises(ConfigError, match="7 values of C and no validation rows"):
        run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    with pytest.raises(ConfigError, match="7 values of C and no validation rows"):
        plan_train(config)
    fold = RowLimit(fold=Fold(index=0, count=5))
    assert plan_train(config.model_copy(update={"rows": fold})).num_train_rows == 16


def test_a_head_on_random_weights_learns_from_the_float32_features_by_which_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations of random weights shrink far below what float16 holds."""
    compute_features_here(monkeypatch)
    store = LocalStore(str(tmp_path / "workspace"))
    write_digits(tmp_path / "images", 60)
    freeze_dataset(store, "digits", str(tmp_path / "images"), splits=SPLITS)
    settings = {
        **SETTINGS,
        "workspace": store.root_uri,
        "dataset": "digits",
        "views": 2,
        "head": {"C": [1.0]},
        "extraction": FP32.model_dump(),
    }
    config = parse_config(TrainConfig, settings, where="here")
    report = run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    assert open_bundle(store, report.bundle).read_json("preprocess.json")["dtype"] == "float32"
    specs = [
        FeatureSetSpec.model_validate_json(store.get(f"features/{name}/spec.json").data)
        for name in store.list_folders("features/")
    ]
    assert sorted((spec.view, spec.dtype) for spec in specs) == [(0, "float32"), (1, "float32")]


@pytest.mark.parametrize(
    ("balance", "num_defects", "total_weights", "note"),
    [
        ("none", 20, [60, 20], None),
        ("weights", 20, [40, 40], "classes are balanced by weights: 20 to 60 images"),
        ("sampling", 20, [40, 40], "classes are balanced by sampling: 20 to 60 images"),
        ("auto", 20, [40, 40], "classes are balanced by weights: 20 to 60 images"),
        ("auto", 21, [60, 21], None),
    ],
)
def test_the_fit_of_a_probe_weighs_classes_as_the_recipe_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    balance: str,
    num_defects: int,
    total_weights: list[float],
    note: str | None,
) -> None:
    store = LocalStore(str(tmp_path))
    rows = {Split.TRAIN: (60, num_defects), Split.VAL: (5, 5), Split.TEST: (5, 5)}
    manifest = frozen_rows(tmp_path, rows, CLASSES)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    learnt: list[LabelledRows] = []

    class Job:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def ensure(self, **_: object) -> SimpleNamespace:
            return SimpleNamespace(share_computed=1.0)

        def set_id(self, *_: object) -> str:
            return "set"

    def open_features(_cache: object, _sets: object, rows: LabelledRows) -> TensorFeatures:
        learnt.append(rows)
        features_ND = torch.randn(len(rows), 2)
        return TensorFeatures(features_ND, torch.from_numpy(rows.labels_N), torch.from_numpy(rows.weights_N))

    monkeypatch.setattr(probing, "FeatureJob", Job)
    monkeypatch.setattr(probing, "open_features", open_features)
    monkeypatch.setattr(train, "evaluate_classifier", lambda *_, **__: made_evaluation(CLASSES))
    settings = {
        **SETTINGS,
        "workspace": store.root_uri,
        "head": {"C": [1.0]},
        "recipe": {"balance": balance},
        "extraction": FP32.model_dump(),
    }
    config = parse_config(TrainConfig, settings, where="here")
    report = run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    totals = np.bincount(learnt[0].labels_N, learnt[0].weights_N)
    assert totals == pytest.approx(total_weights, rel=1e-6)
    for notes in (report.notes, plan_train(config).notes):
        assert [one for one in notes if "balanced" in one] == ([] if note is None else [note])


def test_a_fine_tuning_whose_head_no_rows_can_choose_trains_it_through_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(tmp_path, Split.TEST)
    monkeypatch.setattr(train, "open_as_begun", lambda *_, **__: (manifest, []))

    def planned(**changes: Any) -> TrainPlan:
        settings = {**SETTINGS, "workspace": str(tmp_path), "strategy": "fine_tune"}
        recipe = {"recipe": {"batch_size": 10}}
        return plan_train(parse_config(TrainConfig, {**settings, **recipe, **changes}, where="here"))

    plan = planned()
    assert [phase.name for phase in plan.phases] == ["head", "body"]
    assert any("no validation rows could choose among 7 values of C" in note for note in plan.notes)
    for changes in ({"head": {"C": [1.0]}}, {"rows": {"fold": {"index": 0, "count": 5}}}):
        chosen = planned(**changes)
        assert [phase.name for phase in chosen.phases] == ["body"]
        assert not any("through the network" in note for note in chosen.notes)
    with pytest.raises(ConfigError, match="7 values of C and no validation rows"):
        planned(head_source="cache")


@pytest.mark.parametrize(("head_source", "is_told"), [("network", True), ("auto", False)])
def test_a_plan_tells_of_a_classifier_that_begins_anew_unless_a_fit_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_source: str, is_told: bool
) -> None:
    manifest = manifest_of(tmp_path, Split.TEST, Split.VAL)
    monkeypatch.setattr(train, "open_as_begun", lambda *_, **__: (manifest, []))
    backbone = BackboneConfig(arch="lenet5", weights="random", num_classes=2)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(state_to_safetensors(build_network(backbone).state_dict()))
    settings = {**SETTINGS, "workspace": str(tmp_path), "strategy": "fine_tune", "head_source": head_source}
    preset = {"resize_px": 32, "crop_px": 32}
    settings["backbone"] = {"arch": "lenet5", "weights": str(path), "num_classes": 2, "preset": preset}
    settings["recipe"] = {"batch_size": 10}
    plan = plan_train(parse_config(TrainConfig, settings, where="here"))
    assert any("the classifier begins anew" in note for note in plan.notes) == is_told


BF16_NOTE = "precision bf16: NVIDIA H100 computes bf16 natively"


@pytest.mark.parametrize(
    ("trained_in", "extraction", "served_in", "notes"),
    [
        ("fp32", "auto", "fp32", []),
        ("bf16", "auto", "bf16", []),
        # The training says why it is bf16: once is enough.
        ("auto", "auto", "bf16", [BF16_NOTE]),
        ("fp16", "auto", "bf16", [f"measured and served in {BF16_NOTE}"]),
        ("bf16", "fp32", "fp32", []),
    ],
)
def test_a_network_is_measured_and_served_in_the_precision_that_its_recipe_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained_in: str,
    extraction: str,
    served_in: str,
    notes: list[str],
) -> None:
    store = LocalStore(str(tmp_path))
    monkeypatch.setattr(train, "open_as_begun", lambda *_, **__: (manifest_of(tmp_path, Split.TEST), []))
    monkeypatch.setattr(train, "ray_session", nullcontext)
    monkeypatch.setattr(device_settings, "known_device", made_device)
    measured_in = []

    def measure(_store: object, _manifest: object, task: EvaluationTask, **_: object) -> Evaluation:
        measured_in.append(task.extraction.precision.value)
        return made_evaluation(CLASSES)

    network = TrainedNetwork(
        backbone=made_classifier(store, 0, classes=CLASSES).backbone,
        setup=SimpleNamespace(head=None, plan=SimpleNamespace(phases=())),
        num_train_images=20,
        num_train_rows=20,
        history=(),
        reject_codes={},
        num_val_rows=0,
        val_rejects=0,
        notes=(BF16_NOTE,) if trained_in == "auto" else (),
    )
    training = SimpleNamespace(
        folder=RunFolder(store, "run-1"), run=lambda _: network, finish=lambda *_: None
    )
    monkeypatch.setattr(train, "evaluate_classifier", measure)
    monkeypatch.setattr(train, "network_training", lambda *_, **__: nullcontext(training))
    config = network_in(store, recipe={"precision": trained_in}, extraction={"precision": extraction})
    report = run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    served = open_bundle(store, report.bundle).read_json("preprocess.json")["precision"]
    assert [served, *measured_in] == [served_in, served_in]
    assert report.notes == notes


@pytest.fixture
def begun(tmp_path: Path) -> RunFolder:
    """An unfinished training of a network, whose dataset has two more images since."""
    store = LocalStore(str(tmp_path / "workspace"))
    write_digits(tmp_path / "images", 30)
    freeze_dataset(store, "digits", str(tmp_path / "images"), splits=SPLITS)
    folder, config = open_training(store, "network").start(), network_in(store)
    manifest = open_dataset(store, "digits")
    pretrained = fetch_backbone(store, train.first_network(config, manifest))
    record = RunRecord.new(
        folder.run_id,
        verb="train",
        identity=training_identity(manifest, pretrained, config),
        config=config.model_dump(mode="json"),
        outputs={},
        groups=(),
    )
    folder.write_record(record)
    write_digits(tmp_path / "images", 2, start=30)
    freeze_dataset(store, "digits", str(tmp_path / "images"), splits=SPLITS)
    return folder


def network_in(store: ObjectStore, **changes: Any) -> TrainConfig:
    settings = {
        "workspace": store.root_uri,
        "name": "network",
        "dataset": "digits",
        "strategy": "from_scratch",
        "backbone": {"arch": "lenet5", "weights": "random"},
        "recipe": {"batch_size": 8},
    }
    return parse_config(TrainConfig, {**settings, **changes}, where="test")


def test_a_dry_run_names_the_unfinished_training_and_not_one_that_only_did_not_close_its_pointer(
    begun: RunFolder,
) -> None:
    assert plan_train(network_in(begun.store)).unfinished_run == begun.run_id
    finish(begun, {})
    assert plan_train(network_in(begun.store)).unfinished_run is None


def test_a_dry_run_refuses_what_the_unfinished_training_would(begun: RunFolder) -> None:
    longer = network_in(begun.store, epochs=99)
    with pytest.raises(RunMismatch, match=r"config\.epochs.*99"):
        plan_train(longer)
    assert plan_train(longer, new_run=True).phases[0].epochs == 99
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        plan_train(network_in(begun.store, recipe={"batch_size": 8, "precision": "fp16"}), new_run=True)


def test_a_cut_off_training_is_ended_on_the_images_on_which_it_began(
    begun: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []

    def run(job: train._Job) -> TrainReport:
        trained.append(job.manifest.num_samples)
        return TrainReport.model_construct(notes=["its own"])

    monkeypatch.setattr(train, "ray_session", nullcontext)
    monkeypatch.setattr(train, "_run", run)
    config = network_in(begun.store)
    newest = open_dataset(begun.store, "digits").fingerprint

    def notes(config: TrainConfig, **options: Any) -> list[str]:
        return run_train(config, progress=Silent(), draw_curves=lambda *_: b"", **options).notes

    plan = plan_train(config)
    begun_note, own_note = notes(config)
    assert begun_note.startswith("an unfinished run goes on, with version ")
    assert (own_note, plan.notes[0]) == ("its own", begun_note)
    # Who asks for something else gets it: another run, a version, a training that no run is kept of.
    assert notes(config, new_run=True) == notes(config, fingerprint=newest) == ["its own"]
    probe = network_in(begun.store, strategy="linear_probe", tap="f6")
    assert notes(probe) == ["its own"]
    open_training(begun.store, "network").close(begun)
    assert notes(config) == ["its own"]
    assert trained == [30, 32, 32, 32, 32]
    assert plan_train(config).num_train_rows > plan.num_train_rows


def test_an_unfinished_training_goes_on_with_the_teacher_that_it_began_with(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    taught = network_in(store, distill={"teacher": "elder"})
    open_run = open_training(store, taught.name)
    folder = open_run.start()
    assert with_begun_teacher(taught, open_run) == (taught, [])
    begun = network_in(store, distill={"teacher": f"elder@{'a' * 32}"})
    folder.write_record(
        RunRecord.new(
            folder.run_id,
            verb="train",
            identity={},
            config=begun.model_dump(mode="json"),
            outputs={},
            groups=(),
        )
    )
    for asked in ("elder", "elder@champion"):
        wanted = network_in(store, distill={"teacher": asked})
        found, (note,) = with_begun_teacher(wanted, open_run)
        assert found.distill == begun.distill
        assert f"elder@{'a' * 32}" in note
        assert with_begun_teacher(wanted, open_run, new_run=True) == (wanted, [])
    for asked in (f"elder@{'b' * 32}", "other", "elder-2"):
        wanted = network_in(store, distill={"teacher": asked})
        assert with_begun_teacher(wanted, open_run) == (wanted, [])
    open_run.close(folder)
    assert with_begun_teacher(taught, open_run) == (taught, [])


FORGOTTEN = {"epochs": 10, "learning_rate": 0.01, "freeze_depth": "layer3", "recipe": {"mixup_alpha": 0.2}}


def test_keys_of_another_strategy_are_named_in_the_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(tmp_path, Split.TEST, Split.VAL)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    config = parse_config(TrainConfig, {**SETTINGS, **FORGOTTEN, "workspace": str(tmp_path)}, where="here")
    (note,) = plan_train(config).notes
    assert "without effect under linear_probe, the default where no strategy is named" in note
    assert note.endswith(": epochs, freeze_depth, learning_rate, recipe.mixup_alpha")


def test_the_report_names_keys_of_another_strategy_and_the_bundle_the_version_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(tmp_path, Split.TEST)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    monkeypatch.setattr(train, "evaluate_classifier", lambda *_, **__: made_evaluation(CLASSES))
    settings = {
        **SETTINGS,
        "workspace": str(tmp_path),
        "strategy": "as_is",
        "backbone": {"arch": "lenet5", "weights": "random", "num_classes": 2},
        "classes": CLASSES,
        "epochs": 10,
    }
    report = run_train(
        parse_config(TrainConfig, settings, where="here"), progress=Silent(), draw_curves=lambda *_: b""
    )
    assert report.notes == ["without effect under as_is: epochs"]
    metrics = open_bundle(LocalStore(str(tmp_path)), report.bundle).read_json("metrics.json")
    assert metrics["dataset_fingerprint"] == manifest.fingerprint


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"backbone": {"arch": "torchvision:resnet81"}}, "resnet81"),
        ({"backbone": {"arch": "resnet18"}}, "resnet18"),
        ({"strategy": "early_layer_probe", "tap": "layer99"}, "layer99"),
        ({"strategy": "as_is", "backbone": {"arch": "lenet5", "weights": "/nosuch.th"}}, "nosuch.th"),
        ({"strategy": "as_is"}, "do not say what their classes are"),
        (
            {"strategy": "as_is", "classes": [*"0123456789"]},
            "lenet5 does not know 2 classes of the dataset: good, defect\n.*`classes` names all in order, `class_map`",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_job_refuses_of_backbone_tap_and_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], error: str
) -> None:
    manifest = manifest_of(tmp_path, Split.TEST, Split.VAL)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    config = parse_config(TrainConfig, {**SETTINGS, "workspace": str(tmp_path), **settings}, where="here")
    for job in (plan_train, partial(run_train, progress=Silent(), draw_curves=lambda *_: b"")):
        with pytest.raises(ConvoyError, match=error):
            job(config)


def test_a_network_as_it_is_needs_no_training_rows_in_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = frozen_rows(tmp_path, {Split.TEST: (10, 10)}, CLASSES)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    backbone = {"arch": "lenet5", "weights": "random", "num_classes": 2}
    settings = {**SETTINGS, "strategy": "as_is", "backbone": backbone, "classes": CLASSES}
    plan = plan_train(parse_config(TrainConfig, {**settings, "workspace": str(tmp_path)}, where="here"))
    assert (plan.num_train_rows, plan.images_by_class) == (0, {})


ONLY_HEAD = {"name": "only", "epochs": 2, "freeze_depth": "body", "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        ({}, ["body"]),
        ({"head_source": "network"}, ["head", "body"]),
        ({"phases": [ONLY_HEAD]}, ["only"]),
        ({"phases": [ONLY_HEAD], "head_source": "cache"}, []),
        ({"strategy": "from_scratch", "epochs": 3}, ["train"]),
    ],
)
def test_a_dry_run_counts_no_phase_that_is_a_fit_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], phases: list[str]
) -> None:
    manifest = manifest_of(tmp_path, Split.TEST, Split.VAL)
    monkeypatch.setattr(train, "open_as_begun", lambda *_, **__: (manifest, []))
    config = {**SETTINGS, "workspace": str(tmp_path), "strategy": "fine_tune", "recipe": {"batch_size": 10}}
    plan = plan_train(parse_config(TrainConfig, {**config, **settings}, where="here"))
    assert [phase.name for phase in plan.phases] == phases
    assert plan.num_steps == 2 * sum(phase.epochs for phase in plan.phases)
    assert {phase for stage in plan.stages for phase in stage.frozen_in} <= set(phases)
    assert any("is a fit from the feature cache" in note for note in plan.notes) == (phases in ([], ["body"]))


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"strategy": "fine_tune", **FORGOTTEN, "views": 2}, []),
        ({"strategy": "from_scratch", "tap": "layer2"}, ["tap"]),
        ({"strategy": "from_scratch", "views": 2, "head": {"C": [1.0]}}, ["head", "views"]),
        ({"strategy": "linear_probe", "augmentation": "none"}, ["augmentation"]),
        ({"strategy": "linear_probe", "views": 2, "augmentation": "light", "tap": "layer2"}, []),
        ({"strategy": "as_is", "class_map": {"tabby": "cat"}, "head": {"kind": "linear_svm"}}, ["head"]),
        ({"strategy": "linear_probe", "epochs": None, "workers": {}}, []),
        ({"strategy": "linear_probe", "recipe": {"balance": "auto"}}, []),
        (
            {"strategy": "linear_probe", "epochs": 3, "recipe": {"balance": "auto", "batch_size": 8}},
            ["epochs", "recipe.batch_size"],
        ),
        ({"strategy": "as_is", "recipe": {"balance": "auto"}}, ["recipe"]),
        ({"strategy": "as_is", "rows": {"max_per_class": 5}}, ["rows.max_per_class"]),
        ({"strategy": "as_is", "rows": {"max_per_class": 5, "fold": {"index": 0, "count": 2}}}, []),
        ({"strategy": "linear_probe", "rows": {"max_per_class": 5}}, []),
    ],
)
def test_a_note_names_what_is_set_for_another_strategy(settings: dict[str, Any], unused: list[str]) -> None:
    config = parse_config(TrainConfig, {**SETTINGS, **settings}, where="here")
    written_out = TrainConfig.model_validate_json(config.model_dump_json())
    for one in (config, written_out):
        notes = one.unused_keys_notes
        assert [note.rpartition(": ")[2] for note in notes] == ([", ".join(unused)] if unused else [])
        assert "default" not in "".join(notes)


@pytest.mark.parametrize("key", [{"class_map": {"tabby": "cat"}}, {"classes": ["tabby", "pug"]}])
def test_classes_of_the_network_are_refused_where_those_of_the_dataset_are_learnt(
    key: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match="for as_is: under linear_probe the classes are the dataset's"):
        parse_config(TrainConfig, {**SETTINGS, **key}, where="here")
    parse_config(TrainConfig, {**SETTINGS, **key, "strategy": "as_is"}, where="here")


def test_a_model_that_was_measured_on_a_fold_says_so_beside_its_top1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(tmp_path)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    evaluation = made_evaluation(CLASSES).model_copy(update={"splits": ["train"]})
    monkeypatch.setattr(train, "evaluate_classifier", lambda *_, **__: evaluation)
    settings = {
        **SETTINGS,
        "workspace": str(tmp_path),
        "strategy": "as_is",
        "backbone": {"arch": "lenet5", "weights": "random", "num_classes": 2},
        "classes": CLASSES,
        "rows": {"fold": {"index": 0, "count": 5}},
    }
    config = parse_config(TrainConfig, settings, where="here")
    report = run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    bundle = open_bundle(LocalStore(str(tmp_path)), report.bundle)
    assert report.rows == bundle.read_json("metrics.json")["rows"] == "train (fold 1 of 5)"
    assert b"On the train (fold 1 of 5) split." in bundle.files["README.md"]


@pytest.mark.parametrize(("strategy", "initial"), [("from_scratch", "random"), ("fine_tune", "DEFAULT")])
def test_a_card_names_the_weights_that_the_training_began_with(
    tmp_path: Path, strategy: str, initial: str
) -> None:
    settings = {**SETTINGS, "strategy": strategy, "backbone": {"arch": "resnet18"}}
    card = training_card(
        parse_config(TrainConfig, settings, where="here"),
        manifest_of(tmp_path, Split.TEST),
        made_classifier(LocalStore(str(tmp_path)), 0, classes=CLASSES),
        made_evaluation(CLASSES),
        measured_fold=None,
        notes=(),
    )
    assert card.lineage["initial weights"] == initial
