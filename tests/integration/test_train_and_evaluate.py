"""`convoy train` and `convoy evaluate` on a real Ray: heads on cached features, bundles, and honest numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cache_jobs import LENET, cached_features, freeze, write_digits
from command_lines import convoy_here, convoy_json_here, last_json, report_of, settings_arguments
from convoy.storage.bundles import open_bundle
from convoy.storage.feature_cache import FeatureSetSpec
from convoy.storage.stores import open_store

pytestmark = pytest.mark.integration

NUM_ROWS = {"train": 600, "val": 200, "test": 400}
# A network whose outputs are the digits from nine to zero: labels must be matched by name.
PROBE = ("name=digits", f"backbone={LENET}", "tap=f6")
DOWNWARD = [str(digit) for digit in range(9, -1, -1)]


@dataclass(frozen=True, slots=True)
class Digits:
    """A workspace with a frozen dataset of digits in three splits; jobs run on the Ray that is open in this process."""

    workspace: str

    def start(self, verb: str, *settings: str) -> subprocess.CompletedProcess[str]:
        arguments = settings_arguments("dataset=digits", *settings)
        return convoy_here(verb, "--workspace", self.workspace, *arguments, "--json")

    def run(self, verb: str, *settings: str) -> dict[str, Any]:
        return report_of(self.start(verb, *settings))

    def evaluate(self, *words: str) -> dict[str, Any]:
        return convoy_json_here("evaluate", *words, "--workspace", self.workspace)

    def train(self, *settings: str) -> dict[str, Any]:
        return self.run("train", "name=digits", f"backbone={LENET}", "tap=f6", *settings)

    def predictions(self, run: str, columns: str) -> tuple[Any, ...]:
        """One row of aggregates of the predictions of a run, read by DuckDB."""
        files = f"{self.workspace}/runs/{run}/predictions/*.parquet"
        (row,) = duckdb.sql(f"SELECT {columns} FROM read_parquet('{files}')").fetchall()
        return tuple(row)

    def sets(self) -> dict[tuple[str, int], str]:
        """The ids of the feature sets by tap and view."""
        store = open_store(self.workspace)
        specs = [
            FeatureSetSpec.model_validate_json(store.get(f"features/{name}/spec.json").data)
            for name in store.list_folders("features/")
        ]
        return {(spec.tap, spec.view): spec.set_id for spec in specs}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> Digits:
    folder = tmp_path_factory.mktemp("digits")
    start = 0
    for split, num_rows in NUM_ROWS.items():
        write_digits(folder / "images" / split, num_rows, start=start)
        start += num_rows
    digits = Digits(str(folder / "workspace"))
    assert freeze(folder / "images", digits.workspace)["splits"] == NUM_ROWS
    return digits


@pytest.fixture(scope="module")
def softmax(digits: Digits) -> dict[str, Any]:
    return digits.train()


@pytest.fixture
def unused(digits: Digits, softmax: dict[str, Any], tmp_path: Path) -> Digits:
    """A workspace that has the dataset and the bundle, but no features, no runs and no networks of its own."""
    for folder in ("datasets", "models/digits"):
        shutil.copytree(Path(digits.workspace, folder), tmp_path / "workspace" / folder)
    return replace(digits, workspace=str(tmp_path / "workspace"))


@pytest.fixture
def spoilt(digits: Digits, softmax: dict[str, Any], tmp_path: Path) -> Digits:
    """A workspace of its own, with the bundle and with a dataset whose images may be spoilt (`spoil`)."""
    shutil.copytree(Path(digits.workspace).parent / "images", tmp_path / "images")
    shutil.copytree(Path(digits.workspace, "models/digits"), tmp_path / "workspace" / "models/digits")
    return Digits(str(tmp_path / "workspace"))


def spoil(digits: Digits, split: str, *, number: int) -> dict[Path, bytes]:
    """Freeze the dataset with so many images of a split that are none; returns what they were."""
    images = Path(digits.workspace).parent / "images"
    whole = {path: path.read_bytes() for path in sorted((images / split).glob("*/*.jpg"))[:number]}
    for path in whole:
        path.write_bytes(b"no image")
    freeze(images, digits.workspace)
    return whole


def split_features(digits: Digits, tap: str, split: str) -> tuple[np.ndarray, list[int]]:
    """The cached features of a split and the digits that they show, in the order of the sample ids."""
    features = cached_features(digits.workspace, digits.sets()[tap, 0])
    names = sorted(name for name in features if name.startswith(f"{split}/"))
    rows = np.stack([features[name].astype(np.float64) for name in names])
    return rows, [int(name.split("/")[1]) for name in names]


def test_linear_probe_reports_a_model_and_its_search(softmax: dict[str, Any]) -> None:
    assert (softmax["strategy"], softmax["tap"], softmax["num_train_rows"]) == ("linear_probe", "f6", 600)
    assert (softmax["splits"], softmax["samples"], softmax["labelled"]) == (["test"], 400, 400)
    assert (softmax["rejects"], softmax["converged"]) == (0, True)
    interval = softmax["intervals"]["top1"]
    assert 0.7 < interval["low"] < interval["estimate"] == softmax["top1"] < interval["high"] < 1
    assert sum(map(sum, softmax["confusion"])) == 400
    assert softmax["intervals"]["ece"]["low"] <= softmax["ece"] <= softmax["intervals"]["ece"]["high"]
    recalls = [(one["recall"], one["recall_interval"]) for one in softmax["per_class"]]
    assert all(interval["low"] < recall < interval["high"] or recall == 1 for recall, interval in recalls)
    assert [trial["C"] for trial in softmax["trials"]] == [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10]


def test_softmax_head_is_as_good_as_logistic_regression(digits: Digits, softmax: dict[str, Any]) -> None:
    chosen = min(softmax["trials"], key=lambda trial: (-trial["val_top1"], trial["val_nll"]))
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=chosen["C"], max_iter=5000))
    peer.fit(*split_features(digits, "f6", "train"))
    assert abs(peer.score(*split_features(digits, "f6", "val")) - chosen["val_top1"]) <= 0.01
    assert abs(peer.score(*split_features(digits, "f6", "test")) - softmax["top1"]) <= 0.01


def test_predictions_are_one_row_a_sample_and_agree_with_the_report(
    digits: Digits, softmax: dict[str, Any]
) -> None:
    columns = "count(*), count(DISTINCT sample_id), avg((pred = label)::INT), min(model_digest), min(run_id)"
    rows, samples, top1, model_digest, run = digits.predictions(softmax["run"], columns)
    assert (rows, samples) == (400, 400)
    assert top1 == pytest.approx(softmax["top1"], abs=1e-12)
    assert (model_digest, run) == (softmax["model_digest"], softmax["run"])
    assert softmax["bundle"] == f"digits@{model_digest}"
    assert convoy_json_here("verify", run, "--workspace", digits.workspace)["ok"]


def test_a_file_of_predictions_names_its_classes(digits: Digits, softmax: dict[str, Any]) -> None:
    (path, *_) = Path(f"{digits.workspace}/runs/{softmax['run']}/predictions").glob("*.parquet")
    assert json.loads(pq.read_schema(path).metadata[b"convoy.classes"]) == softmax["classes"]


def test_evaluated_bundle_is_worth_what_train_reported(digits: Digits, softmax: dict[str, Any]) -> None:
    report = digits.run("evaluate", f"bundle={softmax['bundle']}")
    same = ("model_digest", "top1", "top5", "nll", "brier", "ece", "intervals", "confusion", "cache_run")
    for name in same:
        assert report[name] == softmax[name], name
    assert report["run"] != softmax["run"]


def test_bundle_and_dataset_can_be_words_that_override_the_config(
    digits: Digits, softmax: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"dataset: another\nsplits: [val]\nmodel: {{backbone: {LENET}}}\n")
    report = digits.evaluate("digits", "--dataset", "digits", "--config", str(config))
    assert (report["model_digest"], report["splits"]) == (softmax["model_digest"], ["val"])
    chosen = min(softmax["trials"], key=lambda trial: (-trial["val_top1"], trial["val_nll"]))
    assert report["top1"] == pytest.approx(chosen["val_top1"])


def test_two_bundles_are_compared_row_by_row(digits: Digits, softmax: dict[str, Any]) -> None:
    worse = digits.train("head.C=[1e-7]", "name=worse")
    report = digits.evaluate("--compare", "digits", "worse", "--dataset", "digits")
    assert [model["bundle"] for model in report["models"]] == [softmax["bundle"], worse["bundle"]]
    assert (report["pairs"], report["only_first"], report["only_second"]) == (400, 0, 0)
    assert report["top1"] == pytest.approx([softmax["top1"], worse["top1"]])
    assert report["nll"] == pytest.approx([softmax["nll"], worse["nll"]], rel=1e-6)
    difference = report["top1_difference"]
    assert 0 < difference["low"] < softmax["top1"] - worse["top1"] < difference["high"]
    assert difference["estimate"] == pytest.approx(softmax["top1"] - worse["top1"])
    first, second = (
        f"read_parquet('{digits.workspace}/runs/{model['run']}/predictions/*.parquet')"
        for model in report["models"]
    )
    (joined,) = duckdb.sql(
        "SELECT count(*) FILTER (a.pred = a.label AND b.pred <> b.label),"
        " count(*) FILTER (a.pred <> a.label AND b.pred = b.label), avg((a.pred_name = b.pred_name)::INT)"
        f" FROM {first} a JOIN {second} b USING (sample_id)"
    ).fetchall()
    mcnemar = report["mcnemar"]
    found = (mcnemar["only_first_correct"], mcnemar["only_second_correct"], report["agreement"])
    assert found == pytest.approx(joined)
    assert mcnemar["mid_p"] < 0.05


def test_two_bundles_without_compare_are_a_usage_error(digits: Digits) -> None:
    finished = convoy_here(
        "evaluate", "digits", "worse", "--dataset", "digits", "--workspace", digits.workspace
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "--compare" in finished.stderr


def test_exported_bundle_agrees_on_held_out_images(
    digits: Digits, softmax: dict[str, Any], tmp_path: Path
) -> None:
    where = (
        "--output",
        str(tmp_path / "digits.onnx"),
        "--dataset",
        "digits",
        "--workspace",
        digits.workspace,
    )
    report = convoy_json_here("models", "export", "digits", "--to", "onnx", *where)
    assert (report["bundle"], report["checked_on"]) == (softmax["bundle"], "digits, test split")
    assert (report["num_images"], report["top1_agreement"]) == (64, 1.0)
    assert json.loads((tmp_path / "digits.onnx.json").read_bytes())["classes"] == softmax["classes"]
    # The job's predictions come from features in bf16 where the machine has it.
    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx", providers=["CPUExecutionProvider"])
    files = sorted(Path(digits.workspace).parent.glob("images/test/*/*.jpg"))
    images_BCHW = np.stack([np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1) for file in files])
    (logits_BK,) = session.run(["logits"], {"images": images_BCHW})
    top1 = np.mean([int(file.parent.name) for file in files] == logits_BK.argmax(axis=1))
    assert abs(top1 - softmax["top1"]) <= 0.01


def test_same_command_gives_the_same_bundle_and_computes_no_feature(
    digits: Digits, softmax: dict[str, Any]
) -> None:
    again = digits.train()
    assert (again["bundle"], again["top1"]) == (softmax["bundle"], softmax["top1"])
    assert again["cache_run"] == softmax["cache_run"]


def test_bundle_brings_its_network_where_the_workspace_lost_it(
    softmax: dict[str, Any], unused: Digits
) -> None:
    """The features are computed anew, with the weights inside the bundle."""
    report = unused.run("evaluate", f"bundle={softmax['bundle']}")
    for name in ("model_digest", "top1", "nll"):
        assert report[name] == softmax[name], name
    assert open_store(unused.workspace).list_folders("models/backbones/")


@pytest.mark.parametrize(
    ("head", "gives_probabilities"), [("{kind: linear_svm, C: [0.001, 0.01]}", False), ("{kind: mlp}", True)]
)
def test_other_heads_on_the_same_features(
    digits: Digits, softmax: dict[str, Any], head: str, gives_probabilities: bool
) -> None:
    report = digits.train(f"head={head}", "name=other")
    assert report["top1"] > 0.7
    assert report["cache_run"] == softmax["cache_run"]
    assert report["model_digest"] != softmax["model_digest"]
    # The margins of an SVM are no probabilities, and neither are their softmax.
    for name in ("nll", "brier", "ece", "reliability"):
        assert (report[name] is not None) is gives_probabilities
    for name in ("nll", "brier"):
        assert (name in report["intervals"]) is gives_probabilities
    card = open_bundle(open_store(digits.workspace), report["bundle"]).files["README.md"].decode()
    assert ("no probabilities" in card) is not gives_probabilities
    assert ("| brier |" in card) is gives_probabilities


def test_early_layer_probe_computes_only_its_tap(digits: Digits, softmax: dict[str, Any]) -> None:
    report = digits.train("strategy=early_layer_probe", "tap=c3", "head.C=[0.1]", "name=early")
    assert (report["strategy"], report["tap"]) == ("early_layer_probe", "c3")
    assert report["cache_run"] != softmax["cache_run"]
    features, _ = split_features(digits, "c3", "train")
    assert features.shape == (600, 16)
    # What one image in ten would give by chance, three times.
    assert report["top1"] > 0.3


def test_views_multiply_the_train_rows_and_no_others(digits: Digits, softmax: dict[str, Any]) -> None:
    policy = "augmentation={mirror: null, crop: {area: [0.8, 1.0]}}"
    report = digits.train("views=2", policy, "head.C=[0.1]", "name=views")
    assert (report["num_train_rows"], report["labelled"]) == (1200, 400)
    assert report["model_digest"] != softmax["model_digest"]
    drawn = cached_features(digits.workspace, digits.sets()["f6", 1])
    assert {name.split("/")[0] for name in drawn} == {"train"}
    assert len(drawn) == 600


def test_images_of_val_that_cannot_be_used_count_towards_the_error_budget(
    spoilt: Digits, softmax: dict[str, Any]
) -> None:
    spoil(spoilt, "val", number=30)
    finished = spoilt.start("train", *PROBE, "error_budget={rate: 0, rows: 20}")
    assert finished.returncode == 3, finished.stderr
    report = last_json(finished)
    assert (report["val_rejects"], report["train_rejects"], report["rejects"]) == (30, {}, 0)
    assert report["head"]["val_rejects"] == 30


def test_a_probe_with_no_usable_image_to_choose_by_says_so(spoilt: Digits) -> None:
    spoil(spoilt, "val", number=200)
    finished = spoilt.start("train", *PROBE)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "none of 200 images has features: 200 not_an_image" in finished.stderr


def test_an_evaluation_without_any_result_exits_with_3_and_measures_once_images_are_there(
    spoilt: Digits, softmax: dict[str, Any]
) -> None:
    whole = spoil(spoilt, "test", number=400)
    for _attempt in range(2):
        finished = spoilt.start("evaluate", f"bundle={softmax['bundle']}")
        assert finished.returncode == 3, finished.stderr
        assert (
            "no labelled image has a result, so nothing can be measured: 400 not_an_image" in finished.stderr
        )
    for path, data in whole.items():
        path.write_bytes(data)
    freeze(Path(spoilt.workspace).parent / "images", spoilt.workspace)
    report = spoilt.run("evaluate", f"bundle={softmax['bundle']}")
    assert (report["results"], report["top1"]) == (400, softmax["top1"])


def test_network_as_it_is_matches_classes_by_name(unused: Digits) -> None:
    report = unused.run("evaluate", f"model.backbone={LENET}", f"model.classes={json.dumps(DOWNWARD)}")
    assert (report["classes"], report["samples"], report["labelled"]) == (DOWNWARD, 400, 400)
    digit = "split_part(sample_id, '/', 2)::INT"
    columns = (
        f"bool_and(label = 9 - {digit}), bool_and(pred_name = (9 - pred)::TEXT), avg((pred = label)::INT)"
    )
    assert unused.predictions(report["run"], columns) == (True, True, pytest.approx(report["top1"]))


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        (None, "do not say what their classes are"),
        (DOWNWARD[1:], "9 class names for 10 outputs"),
        ([f"digit {name}" for name in DOWNWARD], "does not know 10 classes of the dataset: 0, 1, 2, 3, 4"),
    ],
)
def test_wrong_classes_are_refused_before_anything_is_computed(
    unused: Digits, classes: list[str] | None, problem: str
) -> None:
    finished = unused.start("evaluate", f"model.backbone={LENET}", f"model.classes={json.dumps(classes)}")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert problem in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not open_store(unused.workspace).list_folders("features/")


def test_unlabelled_dataset_is_refused_before_anything_is_computed(unused: Digits, tmp_path: Path) -> None:
    write_digits(tmp_path / "images", 2)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "images").rglob("*.jpg"):
        path.rename(flat / path.name)
    freeze(flat, unused.workspace, name="unlabelled")
    finished = unused.start("evaluate", "bundle=digits", "splits=[test]", "dataset=unlabelled")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "no labelled sample in split test" in finished.stderr
    assert not open_store(unused.workspace).list_folders("features/")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["strategy=distil"], "strategy: Input should be 'as_is', 'linear_probe'"),
        (["strategy=as_is"], "do not say what their classes are"),
        (["strategy=early_layer_probe", "tap=null"], "early_layer_probe needs a tap"),
        (["name=No Name"], "a model's name is made of a-z"),
    ],
)
def test_unusable_train_settings_are_refused_before_anything_is_computed(
    unused: Digits, settings: list[str], problem: str
) -> None:
    wanted = ["name=digits", f"backbone={LENET}", "tap=f6", *settings]
    finished = unused.start("train", *wanted)
    assert finished.returncode == 2, finished.stderr
    assert problem in finished.stderr
    assert not open_store(unused.workspace).list_folders("features/")
