"""`convoy evaluate` of ensembles over crops on a real Ray: the right numbers, and nothing lost or computed twice."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from cache_jobs import LENET, freeze
from command_lines import convoy, convoy_here, last_json, settings_arguments
from convoy.core.crop_policies import CropPlan, CropPolicy
from convoy.core.progress import Silent
from convoy.pipelines.backbone_loading import read_backbone_state
from convoy.pipelines.classifier_tensors import Readout
from convoy.pipelines.classifiers import Classifier, read_classifier
from convoy.pipelines.committees import committee_of, open_committee, write_ensemble
from convoy.pipelines.report_page import PageData, read_page
from convoy.pipelines.report_target import find_target
from convoy.storage.bundles import BundleRef, open_bundle
from convoy.storage.commits import read_manifest
from convoy.storage.member_predictions import MemberLogits, read_member_logits
from convoy.storage.runs import RunFolder, run_ids
from convoy.storage.stores import open_store
from convoy.vision.backbones import build_network
from convoy.vision.committee_options import GateOptions
from convoy.vision.readout import LogitsNetwork
from convoy.vision.views import normalise
from convoy.vision.weights import load_weights
from train_jobs import NUM_ROWS, write_splits

pytestmark = pytest.mark.integration

# Larger than the crop of 32 pixels, by an odd difference in width: then the two central crops of `flip` differ.
SIZE_PX = (41, 36)
NUM_TEST = NUM_ROWS["test"]
DAMAGED, SMALL = "test/0/damaged.jpg", "test/0/small.png"
FP32 = "extraction={precision: fp32, dtype: float32, batch_size: 16}"
DOWNWARD = [str(digit) for digit in range(9, -1, -1)]


@dataclass(frozen=True, slots=True)
class Committees:
    """A workspace with digits that are larger than the crop, and two bundles."""

    workspace: str
    settings: tuple[str, ...] = ("dataset=digits", FP32)

    def start(self, *words: str, settings: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        arguments = settings_arguments(*self.settings, *settings)
        return convoy_here("evaluate", *words, "--workspace", self.workspace, *arguments, "--json")

    def run(self, *words: str, settings: tuple[str, ...] = ()) -> dict[str, Any]:
        finished = self.start(*words, settings=settings)
        assert finished.returncode == 0, finished.stderr
        return last_json(finished)

    def predictions(self, run: str) -> pa.Table:
        files = sorted(Path(self.workspace, "runs", run, "predictions").glob("*.parquet"))
        return pa.concat_tables([pq.read_table(file) for file in files]).sort_by("sample_id")

    def logits(self, run: str) -> np.ndarray:
        return np.array(self.predictions(run)["logits"].to_pylist())

    def member_logits(self, run: str) -> MemberLogits:
        store = open_store(self.workspace)
        manifest = read_manifest(RunFolder(store, run))
        assert manifest is not None
        return read_member_logits(store, manifest)

    def page(self, run: str) -> PageData:
        store = open_store(self.workspace)
        return read_page(store, find_target(store, run), progress=Silent())

    def verify(self, run: str) -> dict[str, Any]:
        finished = convoy_here("verify", run, "--workspace", self.workspace, "--json")
        assert finished.returncode == 0, finished.stdout
        return last_json(finished)

    def runs(self) -> set[str]:
        return set(run_ids(open_store(self.workspace)))

    def copied_to(self, folder: Path) -> Committees:
        return replace(self, workspace=str(shutil.copytree(self.workspace, folder / "workspace")))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> Committees:
    folder = tmp_path_factory.mktemp("committees")
    write_splits(folder / "images")
    for path in (folder / "images").rglob("*.jpg"):
        Image.open(path).resize(SIZE_PX).save(path, quality=95)
    (folder / "images" / DAMAGED).write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    Image.new("RGB", (31, 40)).save(folder / "images" / SMALL)
    workspace = str(folder / "workspace")
    assert freeze(folder / "images", workspace)["splits"]["test"] == NUM_TEST + 2
    for seed, name in enumerate(("one", "two")):
        settings = (
            "dataset=digits",
            f"name={name}",
            f"backbone={LENET}",
            f"backbone.seed={seed}",
            "tap=f6",
            "head.C=[0.1]",
            FP32,
        )
        finished = convoy_here("train", "--workspace", workspace, *settings_arguments(*settings))
        assert finished.returncode == 0, finished.stderr
    return Committees(workspace)


@pytest.fixture(scope="module")
def ten(job: Committees) -> dict[str, Any]:
    """The report of both models over ten crops, of which everything is kept."""
    return job.run("--ensemble", "one", "--ensemble", "two", "--crops", "ten", settings=("keep=views",))


@pytest.fixture(scope="module")
def both(job: Committees) -> BundleRef:
    """Both models as a bundle, at two crops, behind a gate."""
    store = open_store(job.workspace)
    members = [open_committee(store, name).members[0] for name in ("one", "two")]
    gate = GateOptions(members=(0,), policy=CropPolicy.CENTER, threshold=0.8)
    committee = committee_of(members, plan=CropPlan(policy=CropPolicy.FLIP), gate=gate)
    return write_ensemble(store, "both", committee, metrics={"measured": {"top1": 0.5}}, card="# both\n")


def plain_network(job: Committees, name: str) -> tuple[Classifier, LogitsNetwork]:
    store = open_store(job.workspace)
    classifier = read_classifier(store, open_bundle(store, name))
    network = build_network(classifier.backbone.config)
    load_weights(network, read_backbone_state(store, classifier.backbone))
    axis, readout = classifier.backbone.axis, Readout(classifier).module
    return classifier, LogitsNetwork(network, axis, tap=classifier.tap, readout=readout).eval()


@torch.no_grad()
def plain_view_logits(job: Committees, name: str, paths: list[str]) -> np.ndarray:
    """The logits_VNK of a bundle, one image at a time through torchvision's ten crops."""
    classifier, network = plain_network(job, name)
    images = Path(job.workspace).parent / "images"
    logits = []
    for path in paths:
        pixels_CHW = functional.pil_to_tensor(Image.open(images / path).convert("RGB"))
        crops_VCHW = torch.stack(functional.ten_crop(pixels_CHW, [32, 32]))
        logits.append(network(normalise(crops_VCHW, classifier.backbone.preset)))
    return torch.stack(logits, dim=1).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def test_logits_are_those_of_a_plain_loop_over_models_and_crops(job: Committees, ten: dict[str, Any]) -> None:
    kept = job.member_logits(ten["run"])
    order = np.argsort(kept.sample_ids)
    paths = [kept.sample_ids[place] for place in order]
    wanted_MVNK = np.stack([plain_view_logits(job, name, paths) for name in ("one", "two")])
    # Pillow and our decoder may differ by a grey level in a few pixels.
    np.testing.assert_allclose(kept.logits_MVNK[:, :, order], wanted_MVNK, atol=0.05)
    joint_NK = softmax(kept.logits_MVNK[:, :, order]).mean(axis=(0, 1))
    assert job.predictions(ten["run"])["sample_id"].to_pylist() == paths
    np.testing.assert_allclose(np.exp(job.logits(ten["run"])), joint_NK, atol=1e-6)


def test_report_counts_members_and_cost(job: Committees, ten: dict[str, Any]) -> None:
    kept = job.member_logits(ten["run"])
    members = ten["members"]
    assert [member["name"].split("@")[0] for member in members] == ["one", "two"]
    assert [member["weight"] for member in members] == [0.5, 0.5]
    for member, logits_VNK in zip(members, kept.logits_MVNK, strict=True):
        alone = softmax(logits_VNK).mean(axis=0).argmax(axis=1) == kept.labels_N
        assert member["top1"] == pytest.approx(alone.mean())
        assert member["top1_interval"]["low"] < member["top1"] < member["top1_interval"]["high"]
    assert ten["top1"] == np.mean(job.logits(ten["run"]).argmax(axis=1) == sorted_labels(kept))
    assert (ten["crops"], ten["mode"], ten["averaging"]) == ("ten", "exact", "probabilities")
    assert ten["cost"]["passes_per_image"] == 20
    one = job.run("one")
    assert (one["cost"], one["members"], one["crops"]) == (None, [], "center")


def sorted_labels(kept: MemberLogits) -> np.ndarray:
    return np.asarray(kept.labels_N[np.argsort(kept.sample_ids)])


def test_the_page_of_the_run_has_all_that_was_measured(job: Committees, ten: dict[str, Any]) -> None:
    page = job.page(ten["run"])
    assert page.evaluation is not None
    assert (page.evaluation.top1, page.evaluation.confusion) == (ten["top1"], ten["confusion"])
    assert page.committee is not None
    assert [one.model_dump(mode="json") for one in page.committee.members] == ten["members"]
    assert page.missing == []


def test_central_view_is_what_the_feature_cache_gives(job: Committees, ten: dict[str, Any]) -> None:
    """Two ways to the same logits: cached features under the head, and the scoring operator."""
    cached_NK = job.logits(job.run("two")["run"])
    kept = job.member_logits(ten["run"])
    np.testing.assert_allclose(kept.logits_MVNK[1, 4][np.argsort(kept.sample_ids)], cached_NK, atol=1e-4)


def test_unusable_images_are_rejects_in_exactly_one_place(job: Committees, ten: dict[str, Any]) -> None:
    assert (ten["samples"], ten["results"], ten["rejects"]) == (NUM_TEST + 2, NUM_TEST, 2)
    files = Path(job.workspace, "runs", ten["run"], "rejects").glob("*.parquet")
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    found = {row["sample_id"]: (row["stage"], row["code"]) for row in rows}
    assert len(rows) == 2
    assert found[SMALL] == ("decode", "too_small")
    assert found[DAMAGED][0] == "decode"
    proof = job.verify(ten["run"])
    assert (proof["ok"], proof["inputs"], proof["results"], proof["rejects"]) == (True, 62, 60, 2)


def test_the_same_evaluation_again_computes_nothing(job: Committees, ten: dict[str, Any]) -> None:
    words = ("--ensemble", "one", "--ensemble", "two", "--crops", "ten")
    before = job.runs()
    for keep in ("views", "members", "none"):
        again = job.run(*words, settings=(f"keep={keep}",))
        assert (again["run"], again["top1"], again["members"]) == (ten["run"], ten["top1"], ten["members"])
    assert job.runs() == before
    anew = job.run("--new-run", *words, settings=("keep=views",))
    assert anew["run"] not in before
    assert job.verify(anew["run"])["rows_digest"] == job.verify(ten["run"])["rows_digest"]


def test_predictions_do_not_depend_on_batches_slices_and_workers(
    job: Committees, ten: dict[str, Any]
) -> None:
    words = ("--new-run", "--ensemble", "one", "--ensemble", "two", "--crops", "ten")
    other = "extraction={precision: fp32, batch_size: 5, slice_rows: 10, num_workers: 2}"
    report = job.run(*words, settings=("keep=none", other))
    assert report["run"] != ten["run"]
    first, second = (job.predictions(run) for run in (ten["run"], report["run"]))
    for column in ("sample_id", "label", "pred_name"):
        assert first[column].to_pylist() == second[column].to_pylist()
    np.testing.assert_allclose(job.logits(ten["run"]), job.logits(report["run"]), atol=1e-5)


def test_members_with_classes_in_other_orders_are_matched_by_name(job: Committees) -> None:
    downward = {"backbone": LENET, "classes": json.dumps(DOWNWARD)}
    member = f"{{backbone: {downward['backbone']}, classes: {downward['classes']}}}"
    ensemble = f"ensemble={{members: [{{bundle: one}}, {member}]}}"
    report = job.run(settings=(ensemble, "keep=views", "crops=flip"))
    alone = job.run(settings=(f"model={{backbone: {LENET}, classes: {json.dumps(DOWNWARD)}}}",))
    kept = job.member_logits(report["run"])
    names = [report["classes"][place] for place in kept.logits_MVNK[1, 0].argmax(axis=1)]
    predicted = job.predictions(alone["run"])
    assert dict(zip(kept.sample_ids, names, strict=True)) == dict(
        zip(predicted["sample_id"].to_pylist(), predicted["pred_name"].to_pylist(), strict=True)
    )
    assert alone["classes"] == DOWNWARD != report["classes"]
    assert report["members"][1]["top1"] == pytest.approx(
        np.mean(softmax(kept.logits_MVNK[1]).mean(axis=0).argmax(axis=1) == kept.labels_N)
    )


def test_members_with_other_classes_are_refused_before_anything_runs(job: Committees) -> None:
    before = job.runs()
    classes = json.dumps([*DOWNWARD[:9], "ten"])
    member = f"{{backbone: {LENET}, classes: {classes}}}"
    finished = job.start(settings=(f"ensemble={{members: [{{bundle: one}}, {member}]}}",))
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "members of an ensemble need the same classes" in finished.stderr
    assert "alone knows 0" in finished.stderr
    assert "class_map" in finished.stderr
    assert job.runs() == before


def test_a_member_whose_outputs_get_the_names_of_the_others_is_the_same_member(job: Committees) -> None:
    others = [*DOWNWARD[:9], "ten"]
    names = json.dumps(dict(zip(others, DOWNWARD, strict=True)))
    members = [
        f"{{backbone: {LENET}, classes: {json.dumps(DOWNWARD)}}}",
        f"{{backbone: {LENET}, classes: {json.dumps(others)}, class_map: {names}}}",
    ]
    plain, mapped = (
        job.run(settings=(f"ensemble={{members: [{{bundle: one}}, {member}]}}",)) for member in members
    )
    assert mapped["top1"] == plain["top1"]
    assert mapped["members"][1]["top1"] == plain["members"][1]["top1"]
    assert mapped["model_digest"] != plain["model_digest"]


def test_views_of_a_single_model_are_kept_where_they_are_asked_for(job: Committees) -> None:
    report = job.run("one", settings=("keep=views",))
    assert job.member_logits(report["run"]).logits_MVNK.shape[:2] == (1, 1)
    assert report["top1"] == job.run("one")["top1"]


def test_an_ensemble_bundle_is_evaluated_at_its_own_crops_or_others(
    job: Committees, both: BundleRef, ten: dict[str, Any]
) -> None:
    own = job.run("both")
    assert (own["crops"], own["cost"]["passes_per_image"]) == ("flip", 4)
    assert [member["name"] for member in own["members"]] == [member["name"] for member in ten["members"]]
    named = job.run("--ensemble", str(both))
    assert named["run"] == own["run"]
    # The same members over the same crops are the same committee, however it was named.
    other = job.run("both", "--crops", "ten", settings=("keep=views",))
    assert (other["crops"], other["model_digest"]) == ("ten", ten["model_digest"])


def test_a_gated_evaluation_is_measured_against_the_exact_one(job: Committees, both: BundleRef) -> None:
    exact = job.run("both")
    gated = job.run("both", "--mode", "gated")
    effect = gated["effect"]
    assert effect["exact_run"] == exact["run"]
    shown = job.page(gated["run"]).committee
    assert shown is not None
    assert shown.effect is not None
    assert shown.effect.model_dump(mode="json") == effect
    assert effect["top1_change"] == pytest.approx(gated["top1"] - exact["top1"])
    same = job.logits(gated["run"]).argmax(axis=1) == job.logits(exact["run"]).argmax(axis=1)
    assert effect["agreement"] == pytest.approx(same.mean())
    assert effect["speedup"] == pytest.approx(4 / gated["cost"]["passes_per_image"])
    # Both members are of one architecture.
    assert effect["macs_ratio"] == pytest.approx(effect["speedup"])
    assert exact["cost"]["macs_per_image"] / gated["cost"]["macs_per_image"] == pytest.approx(
        effect["speedup"], rel=1e-3
    )
    # Every row is looked at once, and those in doubt by all four passes.
    sure = (4 - gated["cost"]["passes_per_image"]) / 3 * NUM_TEST
    assert sure == pytest.approx(round(sure))
    assert 0 < sure < NUM_TEST
    careful = "gate={members: [0], policy: center, threshold: 1.1}"
    never_sure = job.run("both", "--mode", "gated", settings=(careful,))
    assert never_sure["effect"]["agreement"] == 1
    np.testing.assert_allclose(job.logits(never_sure["run"]), job.logits(exact["run"]), atol=1e-5)


def test_a_gate_goes_with_its_crops(job: Committees, both: BundleRef) -> None:
    finished = job.start("both", "--crops", "ten", "--mode", "gated")
    assert finished.returncode == 2
    assert "no gate that was calibrated for its crops" in finished.stderr


def test_dense_evaluation_takes_the_whole_square_where_the_network_can(job: Committees) -> None:
    preset = "preset: {resize_px: 40, crop_px: 32}"
    able = f"{{arch: cifar_resnet20, weights: random, num_classes: 10, {preset}}}"
    classes = json.dumps(DOWNWARD)
    report = job.run("--mode", "dense", settings=(f"model={{backbone: {able}, classes: {classes}}}",))
    assert (report["mode"], report["crops"]) == ("dense", "flip")
    assert report["effect"]["speedup"] == 0.5
    assert report["effect"]["macs_ratio"] == pytest.approx(0.5 * (32 / 40) ** 2, rel=1e-3)
    assert -1 <= report["effect"]["top1_change"] <= 1
    unable = f"{{arch: lenet5, weights: random, {preset}}}"
    finished = job.start("--mode", "dense", settings=(f"model={{backbone: {unable}, classes: {classes}}}",))
    assert finished.returncode == 2
    assert "the network does not take images of 40 pixels" in finished.stderr


def test_ensembles_stand_on_either_side_of_a_comparison(job: Committees, both: BundleRef) -> None:
    report = job.run("--compare", "both", "one")
    assert [model["bundle"].split("@")[0] for model in report["models"]] == ["both", "one"]
    assert (report["pairs"], report["only_first"], report["only_second"]) == (NUM_TEST, 0, 0)
    swapped = job.run("--compare", "one", "both")
    assert swapped["top1"] == report["top1"][::-1]
    assert swapped["top1_difference"]["estimate"] == pytest.approx(-report["top1_difference"]["estimate"])


def test_an_ensemble_is_listed_and_shown_and_exported(job: Committees, both: BundleRef) -> None:
    where = ("--workspace", job.workspace)
    listed = last_json(convoy_here("models", "list", *where, "--json"))["models"]
    assert [(model["model"].split("@")[0], model["strategy"]) for model in listed] == [
        ("both", "ensemble"),
        ("one", "linear_probe"),
        ("two", "linear_probe"),
    ]
    shown = last_json(convoy_here("models", "show", "both", *where, "--json"))
    assert [member["network"] for member in shown["members"]] == ["lenet5", "lenet5"]
    assert shown["crops"]["policy"] == "flip"
    target = str(Path(job.workspace, "both.onnx"))
    exported = convoy_here("models", "export", "both", "--to", "onnx", "--output", target, *where, "--json")
    assert exported.returncode == 0, exported.stderr
    report = last_json(exported)
    assert (report["num_classes"], report["top1_agreement"]) == (10, 1)
    assert Path(target).stat().st_size == report["size_bytes"]


def test_an_ensemble_whose_member_is_gone_is_a_clear_error(
    job: Committees, both: BundleRef, tmp_path: Path
) -> None:
    copy = job.copied_to(tmp_path)
    shutil.rmtree(Path(copy.workspace, "models", "two"))
    finished = copy.start("both")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "a member of the ensemble cannot be opened" in finished.stderr
    assert "bring two@" in finished.stderr


def test_two_models_at_once_are_a_usage_error(job: Committees) -> None:
    finished = job.start("one", "--ensemble", "two")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "name all by --ensemble" in finished.stderr


def test_a_killed_evaluation_goes_on_to_the_same_rows(
    job: Committees, ten: dict[str, Any], tmp_path: Path
) -> None:
    copy = job.copied_to(tmp_path)
    arguments = settings_arguments(*copy.settings, "keep=views", "crops=ten")
    words = ("evaluate", "--ensemble", "two", "--ensemble", "one", "--workspace", copy.workspace, *arguments)
    counter = tmp_path / "arrivals"
    killed = convoy(*words, environment={"CONVOY_CRASH_POINT": f"slice_collected:2:{counter}"})
    assert (killed.returncode, counter.stat().st_size) == (-9, 2)
    (left,) = copy.runs() - job.runs()
    kept = sorted(path.name for path in Path(copy.workspace, "runs", left, "records").iterdir())
    assert len(kept) >= 2

    report = copy.run("--ensemble", "two", "--ensemble", "one", "--crops", "ten", settings=("keep=views",))
    assert report["run"] == left
    records = [path.name for path in Path(copy.workspace, "runs", left, "records").iterdir()]
    assert set(kept) <= set(records), "a finished slice was computed again"
    assert copy.verify(left)["ok"]
    np.testing.assert_allclose(copy.logits(left), copy.logits(ten["run"]), atol=1e-6)
