"""`convoy inspect` on a real Ray: what it shows is there, is true, and is drawn once."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cache_jobs import freeze, write_digits
from command_lines import convoy, convoy_here, last_json, settings_arguments
from convoy.core.crash_points import CrashPoint
from convoy.pipelines.committees import committee_of, open_committee, write_ensemble
from convoy.pipelines.inspect_config import Section
from convoy.pipelines.inspect_report import InspectionReport
from convoy.storage.stores import open_store
from convoy.vision.head_config import HeadKind
from made_bundles import made_classifier, write_classifier

pytestmark = pytest.mark.integration

NUM_TEST = 80
SETTINGS = (
    "sample={num_images: 90, num_shown: 4, num_maps: 1}",
    "num_channels=3",
    "num_classes=9",
    "maximisation={steps: 12}",
)
# The same digit under another label and in another split, compressed anew.
ORIGINAL, PLANTED = "test/7/00007.jpg", "train/1/planted.jpg"


@dataclass(frozen=True, slots=True)
class Inspection:
    """A workspace with digits, one of them there twice, one damaged, and bundles of random networks."""

    workspace: str

    def arguments(self, bundle: str, *settings: str) -> list[str]:
        words = ["inspect", bundle, "--dataset", "digits", "--workspace", self.workspace, "--json"]
        return [*words, *settings_arguments(*SETTINGS, *settings)]

    def run(self, bundle: str, *settings: str) -> InspectionReport:
        finished = convoy_here(*self.arguments(bundle, *settings))
        assert finished.returncode == 0, finished.stderr
        return InspectionReport.model_validate(last_json(finished))

    def read(self, key: str) -> bytes:
        return Path(self.workspace, key).read_bytes()

    def data(self, report: InspectionReport, kind: str) -> list[dict[str, Any]]:
        """What is written beside the pictures of a kind."""
        found = [json.loads(self.read(figure.data)) for figure in report.figures if figure.kind == kind]
        assert all(one["kind"] == kind for one in found)
        return [one["data"] for one in found]

    def num_runs(self) -> int:
        return len([path for path in Path(self.workspace, "runs").iterdir() if path.name != "open"])


def made_inspection(folder: Path) -> Inspection:
    images = folder / "images"
    write_digits(images / "test", NUM_TEST)
    write_digits(images / "train", 60, start=NUM_TEST)
    with Image.open(images / ORIGINAL) as original:
        original.save(images / PLANTED, quality=80)
    (images / "test" / "0" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    workspace = str(folder / "workspace")
    freeze(images, workspace)
    store = open_store(workspace)
    write_classifier(store, "network", made_classifier(store, 0))
    write_classifier(store, "probe", made_classifier(store, 1, head=HeadKind.SOFTMAX))
    committee = committee_of([open_committee(store, name).members[0] for name in ("network", "probe")])
    write_ensemble(store, "both", committee, metrics={}, card="# made\n")
    return Inspection(workspace)


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> Inspection:
    return made_inspection(tmp_path_factory.mktemp("inspect"))


def test_all_sections_are_drawn_once_with_their_data(inspection: Inspection) -> None:
    report = inspection.run("network", "near_duplicates={scope: dataset}")
    assert (report.samples, report.results, report.rejects) == (NUM_TEST + 1, NUM_TEST, 1)
    assert {figure.kind for figure in report.figures} == {section.value for section in Section}
    for figure in report.figures:
        with Image.open(io.BytesIO(inspection.read(figure.picture))) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 60

    units = [unit for data in inspection.data(report, "classes") for unit in data["units"]]
    assert [unit["name"] for unit in units] == [str(digit) for digit in range(9)]
    assert all(unit["end"] > unit["start"] for unit in units)
    assert any("9 of 10 classes" in note for note in report.notes)

    points = inspection.data(report, "embedding")[0]["points"]
    correct = [point["correct"] for point in points]
    assert len(points) == NUM_TEST
    # The reject counts among those of its class that the others stand for.
    assert report.top1 == pytest.approx(sum(correct) / NUM_TEST, abs=0.01)
    assert report.top1_interval is not None
    assert report.top1_interval.low < report.top1 < report.top1_interval.high
    looks = [look for data in inspection.data(report, "cams") for look in data["looks"]]
    wrong_ids = {point["sample_id"] for point in points if not point["correct"]}
    # Of an error, the class that it is labelled as is shown too.
    assert len(looks) == 4 + len({look["sample_id"] for look in looks} & wrong_ids)
    (line, *_) = inspection.data(report, "neighbours")[0]["lines"]
    assert len(line["sample_ids"]) == 7

    assert report.near_duplicates is not None
    assert report.near_duplicates.compared == NUM_TEST + 61
    worst = report.near_duplicates.examples[0]
    assert {one.sample_id for one in worst.samples} == {ORIGINAL, PLANTED}
    assert report.near_duplicates.across_splits >= 1

    verified = convoy_here("verify", report.run, "--workspace", inspection.workspace, "--json")
    assert last_json(verified)["ok"], verified.stdout
    num_runs = inspection.num_runs()
    assert inspection.run("network", "near_duplicates={scope: dataset}") == report
    assert inspection.num_runs() == num_runs


def test_a_probe_is_looked_into_through_its_head(inspection: Inspection) -> None:
    report = inspection.run(
        "probe", "stages=[c1, c3, f6]", "sections=[cams, feature_maps]", f"sample.sample_ids=[{ORIGINAL}]"
    )
    (data,) = inspection.data(report, "cams")
    assert {look["sample_id"] for look in data["looks"]} == {ORIGINAL}
    assert all(set(look["stages"]) == {"c1", "c3"} for look in data["looks"])
    assert any(not stage["is_empty"] for look in data["looks"] for stage in look["stages"].values())
    assert report.notes == ["no Grad-CAM at f6: it gives a vector an image, and no maps"]
    assert report.near_duplicates is None


def test_what_cannot_be_inspected_is_said_before_anything_is_drawn(inspection: Inspection) -> None:
    num_runs = inspection.num_runs()
    refused = {
        "both": ((), "this is an ensemble"),
        "network": (("stages=[c9]",), "no stage 'c9'"),
        "probe": (("sections=[classes]", "classes=[eleven]"), "no class 'eleven'"),
    }
    for bundle, (settings, words) in refused.items():
        finished = convoy_here(*inspection.arguments(bundle, *settings))
        assert finished.returncode == 2, finished.stderr
        assert words in finished.stderr
    assert inspection.num_runs() == num_runs


def test_a_damaged_picture_is_found_and_drawn_again(inspection: Inspection) -> None:
    settings = ("sections=[filters, cams]",)
    report = inspection.run("network", *settings)
    (filters,) = [figure for figure in report.figures if figure.kind == "filters"]
    path = Path(inspection.workspace, filters.picture)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    verified = last_json(convoy_here("verify", report.run, "--workspace", inspection.workspace, "--json"))
    assert (verified["ok"], len(verified["problems"])) == (False, 1)
    repaired = convoy_here(
        "runs", "repair", report.run, "--apply", "--workspace", inspection.workspace, "--json"
    )
    assert repaired.returncode == 0, repaired.stderr
    again = inspection.run("network", *settings)
    assert again.run == report.run
    (drawn,) = [figure for figure in again.figures if figure.kind == "filters"]
    assert inspection.read(drawn.picture) == whole


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(
    "point", [CrashPoint.RECORD_WRITTEN, CrashPoint.SLICE_COLLECTED, CrashPoint.MANIFEST_PUBLISHED]
)
def test_a_killed_inspection_goes_on(tmp_path: Path, point: CrashPoint) -> None:
    inspection = made_inspection(tmp_path)
    # The features first, whose run has crash points of its own.
    arguments = inspection.arguments("network", "sections=[filters, classes, cams, neighbours]")
    inspection_only = {"CONVOY_CRASH_POINT": f"{point.value}:{_ARRIVALS[point]}:{tmp_path / 'crash'}"}
    convoy(*inspection.arguments("network", "sections=[neighbours]"))
    killed = convoy(*arguments, environment=inspection_only)
    assert (tmp_path / "crash").stat().st_size >= _ARRIVALS[point]
    finished = killed if killed.returncode == 0 else convoy(*arguments)
    report = InspectionReport.model_validate(last_json(finished))
    assert {figure.kind for figure in report.figures} == {"filters", "classes", "cams", "neighbours"}
    verified = last_json(convoy("verify", report.run, "--workspace", inspection.workspace, "--json"))
    assert verified["ok"]


_ARRIVALS = {CrashPoint.RECORD_WRITTEN: 2, CrashPoint.SLICE_COLLECTED: 2, CrashPoint.MANIFEST_PUBLISHED: 1}
