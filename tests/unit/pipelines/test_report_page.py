"""What pages read of a workspace: a made evaluation of real images, without any job."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from convoy.core.code_revision import CODE
from convoy.core.errors import ConfigError, DataError, ObjectUnreadable
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines import report_index, report_subgroups
from convoy.pipelines.report_data_card import choose_examples
from convoy.pipelines.report_index import find_pages, read_index, write_index
from convoy.pipelines.report_page import PageData, read_page, write_page
from convoy.pipelines.report_target import TargetKind, find_target
from convoy.pipelines.report_writing import write_html
from convoy.report.index_page import draw_index
from convoy.report.page import draw_page
from convoy.storage.commits import read_manifest
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.documents import read_json
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.predictions import read_labelled
from convoy.storage.runs import INPUT, RunFolder
from made_advice_rows import frozen_rows
from made_bundles import made_classifier, write_classifier
from made_evaluations import CLASSES, DATASET, MODEL_DIGEST, RUN, made_workspace
from made_pages import PageParts
from made_sources import write_files


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return made_workspace(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def page(workspace: LocalStore) -> PageData:
    return read_page(workspace, find_target(workspace, RUN), progress=Silent())


def test_a_run_has_all_parts_that_an_evaluation_leaves(page: PageData) -> None:
    assert page.missing == []
    assert page.evaluation is not None
    assert page.rejects is not None
    assert page.rejects.by_code == {"corrupt": 1}
    assert page.rejects.shown[0].reason == "made <b>bad</b>"
    assert page.slices is not None
    assert page.slices.rows == 30
    assert page.slices.under_way_s == 2.0 * page.slices.slices
    assert page.data_card is not None
    assert page.data_card.splits["test"] == 30
    assert sum(page.data_card.splits.values()) == 40


def test_predictions_read_by_part_say_what_the_evaluation_says(page: PageData) -> None:
    found, evaluation = page.predictions, page.evaluation
    assert found is not None
    assert evaluation is not None
    assert found.rows == found.labelled == evaluation.labelled == 29
    assert found.top1 is not None
    assert found.top1.estimate == pytest.approx(evaluation.top1)
    assert found.reliability is not None
    assert evaluation.reliability is not None
    for ours, theirs in zip(found.reliability, evaluation.reliability, strict=True):
        assert ours.num_rows == theirs.num_rows
        if ours.num_rows:
            assert ours.accuracy == pytest.approx(theirs.accuracy)
            assert ours.mean_confidence == pytest.approx(theirs.mean_confidence, rel=1e-5)
    assert found.scores == [one.num_rows for one in evaluation.reliability]


def test_worst_errors_are_the_surest_wrong_rows_of_all_parts(workspace: LocalStore, page: PageData) -> None:
    manifest = read_manifest(RunFolder(workspace, RUN))
    assert manifest is not None
    rows = [
        row
        for table in read_labelled(workspace, manifest, ["sample_id", "label", "pred", "score"])
        for row in table.to_pylist()
    ]
    wrong = sorted((row for row in rows if row["label"] != row["pred"]), key=lambda row: -row["score"])
    assert page.predictions is not None
    assert [row.sample_id for row in page.predictions.wrong] == [row["sample_id"] for row in wrong][:24]
    assert len(wrong) == 5
    least = sorted(rows, key=lambda row: (row["score"], row["sample_id"]))[:24]
    assert [row.sample_id for row in page.predictions.unsure] == [row["sample_id"] for row in least]
    assert all(row.image.jpeg.startswith(b"\xff\xd8") for row in page.predictions.wrong)


def test_lineage_leads_to_data_and_code(page: PageData) -> None:
    by_title = {link.title: link for link in page.lineage}
    assert MODEL_DIGEST in by_title["model"].gap
    assert "no bundle" in by_title["model"].gap
    assert by_title["data"].name == f"dataset {DATASET}"
    assert page.run is not None
    assert by_title["code"].facts["digest of the package"] == page.run.versions[CODE]


def test_images_that_are_gone_are_said_and_the_page_is_made(tmp_path: Path) -> None:
    store = made_workspace(tmp_path)
    for path in (tmp_path / "images").rglob("*.jpg"):
        path.unlink()
    page = read_page(store, find_target(store, RUN), progress=Silent())
    assert page.predictions is not None
    assert {row.image.missing.partition(":")[0] for row in page.predictions.wrong} == {"gone"}
    assert "gone: " in PageParts(draw_page(page)).text


def test_a_lost_input_costs_the_pictures_only(tmp_path: Path) -> None:
    store = made_workspace(tmp_path)
    folder = RunFolder(store, RUN)
    store.delete([info.key for info in store.list_objects(folder.key(INPUT))])
    page = read_page(store, find_target(store, RUN), progress=Silent())
    assert page.predictions is not None
    assert page.predictions.rows == 29
    assert all("frozen input" in row.image.missing for row in page.predictions.wrong)


def test_a_damaged_part_is_said(tmp_path: Path) -> None:
    store = made_workspace(tmp_path)
    folder = RunFolder(store, RUN)
    manifest = read_manifest(folder)
    assert manifest is not None
    store.put(manifest.slices[0].parts["predictions"].key, b"no parquet")
    page = read_page(store, find_target(store, RUN), progress=Silent())
    assert page.predictions is None
    assert any(text.startswith("the predictions: ") for text in page.missing)
    assert page.evaluation is not None


def test_parts_of_a_report_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    store = made_workspace(tmp_path)
    key = RunFolder(store, RUN).key("report.json")
    report = read_json(store, key)
    del report["top5"]
    store.put(key, json.dumps(report | {"history": [{"epoch": 1, "a later key": 2}], "figures": []}).encode())
    page = read_page(store, find_target(store, RUN), progress=Silent())
    assert (page.evaluation, page.history, page.inspection) == (None, [], None)
    assert page.data_card is not None
    said = {text.partition(":")[0]: text for text in page.missing}
    assert set(said) == {"the evaluation", "the epochs", "the inspection"}
    assert "first top5" in said["the evaluation"]
    assert "of its fields are missing or others" in PageParts(draw_page(page)).text
    store.put(key, b"{")
    page = read_page(store, find_target(store, RUN), progress=Silent())
    assert any(text.startswith("its report: the document is damaged") for text in page.missing)
    assert page.predictions is not None


def test_the_page_is_one_harmless_file(workspace: LocalStore, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    report = write_page(workspace.root_uri, RUN, str(output), draw_page, progress=Silent())
    assert report.size_bytes == output.stat().st_size < 500_000
    parts = PageParts(output.read_bytes())
    assert "script" not in parts.tags()
    assert not [name for _, attributes in parts.elements for name in attributes if name.startswith("on")]
    assert parts.json_of("confusion-matrix")["classes"] == list(CLASSES_IN_ORDER)
    assert sum(tag == "img" for tag, _ in parts.elements) > 20


CLASSES_IN_ORDER = sorted(CLASSES)


def test_a_dataset_has_a_page(workspace: LocalStore) -> None:
    page = read_page(workspace, find_target(workspace, DATASET), progress=Silent())
    card = page.data_card
    assert card is not None
    assert card.samples == 40
    assert sum(one.images for one in card.sizes) == 40
    assert card.total_bytes == sum(path.stat().st_size for path in Path(card.source).rglob("*.jpg"))
    assert card.suffixes == {".jpg": 40}
    assert {one.label_name for one in card.examples} == set(CLASSES)
    assert card.duplicates is None
    assert PageParts(draw_page(page)).json_of("classes") == [
        {"name": one.name, **one.by_split} for one in card.classes
    ]


def test_examples_take_turns_over_the_classes(workspace: LocalStore) -> None:
    rows = choose_examples(open_dataset(workspace, DATASET), 7)
    counts = np.bincount(rows["label"].to_numpy())
    assert rows.num_rows == 7
    assert counts.min() >= 2
    assert rows["label"].to_pylist() == sorted(rows["label"].to_pylist())


def test_examples_of_a_data_card_hold_no_other_rows(tmp_path: Path) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (2000, 2000)}, ("cat", "dog"))
    examples = choose_examples(manifest, 6)
    assert examples["label"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert examples.get_total_buffer_size() < 20_000


def test_examples_of_very_many_classes_hold_no_more_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (30,) * 1000}, tuple(str(one) for one in range(1000)))
    rows, held_bytes = manifest.read_table(), []

    def read(*_: object, **__: object) -> Iterator[pa.RecordBatch]:
        """Batches that are slices of the table, so that what is allocated in between is what was kept of them."""
        before = pa.total_allocated_bytes()
        for batch in rows.combine_chunks().to_batches(max_chunksize=600):
            yield batch
            held_bytes.append(pa.total_allocated_bytes() - before)

    monkeypatch.setattr(Manifest, "iter_batches", read)
    assert len(set(choose_examples(manifest, 24)["label"].to_pylist())) == 24
    assert held_bytes[-1] < held_bytes[0] + 500_000


@pytest.mark.parametrize(
    ("reference", "kind"), [(RUN, "run"), (f"run:{RUN}", "run"), (f"dataset:{DATASET}", "dataset")]
)
def test_a_target_is_found_by_its_name(workspace: LocalStore, reference: str, kind: str) -> None:
    assert find_target(workspace, reference).kind == kind


def test_a_name_that_two_have_must_be_decided(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("datasets/pets/current.json", b'{"fingerprint": "f"}')
    store.put("models/pets/latest.json", b'{"digest": "00"}')
    with pytest.raises(ConfigError, match="dataset and a model") as error:
        find_target(store, "pets")
    assert "dataset:pets" in error.value.next_step
    assert find_target(store, "dataset:pets").kind is TargetKind.DATASET


@pytest.mark.parametrize("reference", ["nothing", "", "..", "../pets", "run:..", "dataset:a/b", "run:"])
def test_a_name_that_nothing_has_is_refused(workspace: LocalStore, reference: str) -> None:
    with pytest.raises(ConfigError, match="is no run, dataset or model"):
        find_target(workspace, reference)


def test_a_model_that_does_not_exist_is_refused(workspace: LocalStore) -> None:
    with pytest.raises(DataError):
        find_target(workspace, "model:pets")


def test_a_page_that_cannot_be_written_is_said(workspace: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(workspace.root_uri, RUN, str(tmp_path / "no" / "x.html"), draw_page, progress=Silent())


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(page)
    assert write_html(str(page), b"old") == 3
    assert write_html(str(link), b"older") == 5
    assert link.is_symlink()

    def cut_off(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", cut_off)
    with pytest.raises(ConfigError, match="no space left"):
        write_html(str(page), b"new")
    assert page.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "page.html"]


def test_the_index_links_to_pages_that_lie_beside_it(workspace: LocalStore, tmp_path: Path) -> None:
    strange = tmp_path / "a b#c%20'\"<x>.html"
    write_page(workspace.root_uri, RUN, str(strange), draw_page, progress=Silent())
    (tmp_path / "other.html").write_text("<p>not ours</p>")
    report = write_index(workspace.root_uri, str(tmp_path / "index.html"), draw_index, progress=Silent())
    assert (report.datasets, report.runs, report.models, report.pages) == (1, 1, 0, 1)
    parts = PageParts((tmp_path / "index.html").read_bytes())
    links = [value for value in parts.values_of("href") if not value.startswith(("#", "data:"))]
    assert links == ["./a%20b%23c%2520%27%22%3Cx%3E.html"]
    assert find_pages(tmp_path, workspace.root_uri) == {f"run:{RUN}": strange.name}
    # The index itself, which is there the second time, is no page of the workspace.
    assert (
        write_index(workspace.root_uri, str(tmp_path / "index.html"), draw_index, progress=Silent()).pages
        == 1
    )


def test_the_index_writes_the_pages_that_are_missing_and_says_which_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made_workspace(tmp_path)
    index, kept = str(tmp_path / "index.html"), tmp_path / "kept.html"
    kept.write_text(
        f'<meta name="convoy-target" content="dataset:{DATASET}">'
        f'<meta name="convoy-workspace" content="{store.root_uri}">'
        f'<meta name="convoy-version" content="{open_dataset(store, DATASET).fingerprint}">'
    )
    drawn = []

    def draw(page: PageData) -> bytes:
        drawn.append(page.target)
        return f'<meta name="convoy-target" content="{page.target}">'.encode()

    report = write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw)
    assert (report.pages, report.notes, drawn) == (2, [], [f"run:{RUN}"])
    assert write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw).pages == 2
    assert len(drawn) == 1
    kept.unlink()
    monkeypatch.setattr(report_index, "write_page", _refuse)
    report = write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw)
    assert report.notes == [f"the page of dataset:{DATASET}: it is cut short"]
    assert "it is cut short" in Path(index).read_text()
    monkeypatch.setattr(report_index, "_MAX_WRITTEN", 0)
    report = write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw)
    assert [note.partition(":")[0] for note in report.notes] == ["1 further pages"]


def _refuse(*_: object, **__: object) -> None:
    raise DataError("it is cut short")


def test_the_page_of_a_dataset_that_was_refreshed_is_drawn_anew_in_its_place(tmp_path: Path) -> None:
    store = made_workspace(tmp_path)
    index, own_name = str(tmp_path / "pages" / "index.html"), tmp_path / "pages" / "mine.html"
    own_name.parent.mkdir()
    write_page(store.root_uri, DATASET, str(own_name), draw_page, progress=Silent())
    before = own_name.read_bytes()
    for _call in range(2):
        write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw_page)
        assert own_name.read_bytes() == before
    write_files(tmp_path / "images", "test/new/0.jpg")
    freeze_dataset(store, DATASET, str(tmp_path / "images"))
    write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw_page)
    assert open_dataset(store, DATASET).fingerprint in own_name.read_text()
    pages = [path for path in own_name.parent.iterdir() if b'content="dataset:' in path.read_bytes()]
    assert pages == [own_name]


def test_the_page_of_a_run_that_was_finished_since_is_drawn_anew_in_its_place(tmp_path: Path) -> None:
    store = made_workspace(tmp_path)
    index, run_page = str(tmp_path / "pages" / "index.html"), tmp_path / "pages" / "run.html"
    run_page.parent.mkdir()
    success = RunFolder(store, RUN).key("_SUCCESS")
    store.delete([success])
    write_page(store.root_uri, RUN, str(run_page), draw_page, progress=Silent())
    under_way = run_page.read_bytes()
    write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw_page)
    assert run_page.read_bytes() == under_way
    store.put(success, b"")
    write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw_page)
    finished = run_page.read_bytes()
    assert finished != under_way
    write_index(store.root_uri, index, draw_index, progress=Silent(), draw_page=draw_page)
    assert run_page.read_bytes() == finished


def test_pages_of_another_workspace_are_not_linked(workspace: LocalStore, tmp_path: Path) -> None:
    write_page(workspace.root_uri, DATASET, str(tmp_path / "pets.html"), draw_page, progress=Silent())
    assert find_pages(tmp_path, workspace.root_uri) == {f"dataset:{DATASET}": "pets.html"}
    other = made_workspace(tmp_path / "other")
    assert find_pages(tmp_path, other.root_uri) == {}


def test_of_pages_that_name_no_workspace_those_of_runs_are_linked(tmp_path: Path) -> None:
    for target in (f"run:{RUN}", f"dataset:{DATASET}"):
        page = f'<meta name="convoy-target" content="{target}">'
        (tmp_path / f"{target.partition(':')[0]}.html").write_text(page)
    assert find_pages(tmp_path, "/w") == {f"run:{RUN}": "run.html"}


def test_the_index_says_what_the_workspace_holds(workspace: LocalStore, tmp_path: Path) -> None:
    index = read_index(workspace, tmp_path)
    (run,) = index.runs
    assert (run.run, run.verb, run.dataset) == (RUN, "evaluate", DATASET)
    assert run.top1 is not None
    (dataset,) = index.datasets
    assert (dataset.name, dataset.samples, dataset.classes) == (DATASET, 40, len(CLASSES))
    text = PageParts(draw_index(index)).text
    assert "<img src=x onerror=window.hacked=1>" in text


@pytest.mark.parametrize("data", [b"{", b'{"of": "another version"}'])
def test_the_index_shows_sound_runs_beside_a_damaged_one(tmp_path: Path, data: bytes) -> None:
    store = made_workspace(tmp_path, num_images=40)
    store.put("runs/20990101T000000Z-aaaaaa/run.json", data)
    index = read_index(store, tmp_path)
    assert [run.run for run in index.runs] == [RUN]
    (line,) = index.missing
    assert line.startswith("run 20990101T000000Z-aaaaaa: the document ")
    assert line.endswith("/runs/20990101T000000Z-aaaaaa/run.json]")
    # Nor does it take anything from the pages of the others.
    page = read_page(store, find_target(store, RUN), progress=Silent())
    assert page.data_card is not None
    assert page.lineage is not None


def test_the_index_shows_a_run_whose_report_is_damaged(tmp_path: Path) -> None:
    store = made_workspace(tmp_path, num_images=40)
    store.put(f"runs/{RUN}/report.json", b"{")
    index = read_index(store, tmp_path)
    assert [(run.run, run.top1) for run in index.runs] == [(RUN, None)]
    assert [
        line.startswith(f"the report of run {RUN}: the document is damaged") for line in index.missing
    ] == [True]


def test_the_index_shows_a_run_whose_report_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made_workspace(tmp_path, num_images=40)
    get = LocalStore.get

    def failing(self: LocalStore, key: str, *arguments: Any, **options: Any) -> Any:
        if key.endswith("/report.json"):
            raise ObjectUnreadable("input/output error", where=key, next_step="check the disk")
        return get(self, key, *arguments, **options)

    monkeypatch.setattr(LocalStore, "get", failing)
    index = read_index(store, tmp_path)
    assert [(run.run, run.top1) for run in index.runs] == [(RUN, None)]
    assert index.missing == [f"the report of run {RUN}: input/output error [runs/{RUN}/report.json]"]


def test_an_empty_workspace_has_an_index(tmp_path: Path) -> None:
    index = read_index(LocalStore(str(tmp_path / "new")), tmp_path)
    assert (index.runs, index.datasets, index.models) == ([], [], [])
    assert b"<h1>" in draw_index(index)


def test_the_index_shows_sound_models_beside_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path))
    refs = [write_classifier(store, f"m{number}", made_classifier(store, number)) for number in range(4)]
    store.put(f"{refs[0].folder}README.md", b"edited by hand")
    monkeypatch.setattr(report_index, "MAX_MODELS", 2)
    index = read_index(store, tmp_path)
    assert ([one.model for one in index.models], index.num_models) == ([str(refs[1]), str(refs[2])], 3)
    assert [str(refs[0]) in line and f"{refs[0].uri}/README.md" in line for line in index.missing] == [True]
    assert "The first 2 of 3, by name." in PageParts(draw_index(index)).text


def test_parts_of_the_data_add_up_to_the_whole(tmp_path: Path) -> None:
    store = made_workspace(tmp_path, num_images=90)
    page = read_page(store, find_target(store, RUN), progress=Silent())
    rows: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for path in (tmp_path / "images" / "test").rglob("*.jpg"):
        power = path.stat().st_size.bit_length() - 1
        name = f"{2**power:,} to {2 ** (power + 1):,} bytes"
        # The last row is a reject.
        if path.stem != "0089":
            rows[name] += 1
            right[name] += int(path.stem) % 5 != 4
    expected = {name: (count, right[name] / count) for name, count in rows.items() if count >= 20}
    assert len(expected) > 1
    assert {group.axis for group in page.subgroups} == {"size of the file"}
    found = {group.value: (group.rows, group.top1.estimate) for group in page.subgroups}
    assert found == {name: pytest.approx(value) for name, value in expected.items()}


def test_of_very_many_parts_of_the_data_the_largest_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the names of files end with numbers."""

    def count(_table: object, _inputs: object, rows: Counter[tuple[str, int, str]], _right: object) -> None:
        rows.update({("kind of file", number, f".{number}"): number for number in range(15, 115)})

    monkeypatch.setattr(report_subgroups, "_count", count)
    store = made_workspace(tmp_path, num_images=40)
    found = read_page(store, find_target(store, RUN), progress=Silent()).subgroups
    counted_times = found[-1].rows // 114
    assert [group.value for group in found] == [f".{number}" for number in range(65, 115)]
    assert [group.rows for group in found] == [counted_times * number for number in range(65, 115)]
