import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from convoy.core.errors import ChecksumMismatch, ConfigError, DataError
from convoy.core.statistics import Interval, wilson_interval
from convoy.storage.bundles import (
    BundleRef,
    ModelCard,
    bundle_digest,
    list_bundles,
    model_card,
    open_bundle,
    resolve_bundle,
    write_bundle,
)
from convoy.storage.local_store import LocalStore


@pytest.fixture
def store(tmp_path):
    return LocalStore(str(tmp_path))


def make_files(**changed):
    files = {
        "model.safetensors": b"\x00weights\xff" * 100,
        "config.json": b'{"strategy":"linear_probe"}',
        "preprocess.json": b'{"crop_px":224}',
        "classes.json": b'["cat","dog"]',
        "metrics.json": b'{"top1":0.9}',
        "README.md": b"# pets\n",
    }
    return files | {name.replace("__", "."): data for name, data in changed.items()}


def path_of(ref, file):
    return os.path.join(ref.uri, file)


def test_a_bundle_comes_back_as_it_was_written(store):
    ref = write_bundle(store, "pets", make_files())
    bundle = open_bundle(store, "pets")
    assert bundle.ref == ref
    assert bundle.files == make_files()
    assert bundle.read_json("classes.json") == ["cat", "dog"]
    assert ref.uri == store.uri(f"models/pets/{ref.digest}")


def test_a_reference_is_a_name_a_digest_or_a_uri(store):
    first = write_bundle(store, "pets", make_files())
    second = write_bundle(store, "pets", make_files(config__json=b"{}"))
    assert resolve_bundle(store, "pets") == second
    assert resolve_bundle(store, str(first)) == first
    assert resolve_bundle(store, first.uri) == first
    assert resolve_bundle(store, f"{first.uri}/") == first
    assert resolve_bundle(store, store.uri("models/pets")) == second


def test_equal_models_share_a_digest_whatever_was_measured_on_them(store):
    first = write_bundle(store, "pets", make_files())
    again = write_bundle(store, "pets", make_files(metrics__json=b"{}", README__md=b"# other"))
    assert again == first
    assert open_bundle(store, "pets").files == make_files()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "preprocess.json", "classes.json"])
def test_whatever_changes_predictions_changes_the_digest(file):
    changed = make_files() | {file: b"[]"}
    assert bundle_digest(changed) != bundle_digest(make_files())


def test_further_files_are_kept_and_count_in_the_digest(store):
    ref = write_bundle(store, "pets", make_files() | {"members/1/config.json": b"{}"})
    assert ref.digest != bundle_digest(make_files())
    assert open_bundle(store, ref.uri).files["members/1/config.json"] == b"{}"


def test_writing_again_moves_latest_back_and_rewrites_no_file(store):
    first = write_bundle(store, "pets", make_files())
    before = os.stat(path_of(first, "model.safetensors"))
    write_bundle(store, "pets", make_files(config__json=b"{}"))
    write_bundle(store, "pets", make_files())
    after = os.stat(path_of(first, "model.safetensors"))
    assert resolve_bundle(store, "pets") == first
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("file", sorted(make_files()))
def test_one_flipped_byte_is_found_and_its_file_named(store, file):
    ref = write_bundle(store, "pets", make_files())
    damaged = bytearray(make_files()[file])
    damaged[-1] ^= 1
    with open(path_of(ref, file), "wb") as out:
        out.write(damaged)
    with pytest.raises(ChecksumMismatch) as caught:
        open_bundle(store, "pets")
    assert caught.value.fields["file"] == file
    assert file in str(caught.value)


def test_a_bundle_under_the_digest_of_another_is_refused(store):
    ref = write_bundle(store, "pets", make_files())
    elsewhere = "0" * 32
    os.rename(ref.uri, store.uri(f"models/pets/{elsewhere}"))
    with pytest.raises(ChecksumMismatch, match=r"digests\.json"):
        open_bundle(store, f"pets@{elsewhere}")


def test_a_record_that_leaves_a_file_out_is_refused(store):
    ref = write_bundle(store, "pets", make_files())
    with open(path_of(ref, "digests.json"), "r+", encoding="utf-8") as file:
        record = json.load(file)
        del record["files"]["preprocess.json"]
        file.seek(0)
        file.truncate()
        json.dump(record, file)
    with pytest.raises(ChecksumMismatch, match=r"digests\.json"):
        open_bundle(store, "pets")


def test_an_unreadable_record_is_refused(store):
    ref = write_bundle(store, "pets", make_files())
    store.put(f"models/pets/{ref.digest}/digests.json", b"{")
    with pytest.raises(ChecksumMismatch, match=r"digests\.json"):
        open_bundle(store, "pets")


def test_a_newer_format_asks_for_a_newer_convoy(store):
    ref = write_bundle(store, "pets", make_files())
    store.put(f"models/pets/{ref.digest}/digests.json", b'{"format_version": 99}')
    with pytest.raises(DataError, match="upgrade Convoy"):
        open_bundle(store, "pets")


def test_a_lost_file_is_named(store):
    ref = write_bundle(store, "pets", make_files())
    os.remove(path_of(ref, "classes.json"))
    with pytest.raises(DataError, match=r"lost classes\.json"):
        open_bundle(store, "pets")


def test_an_unfinished_bundle_is_no_bundle_until_the_same_write_completes_it(store):
    digest = bundle_digest(make_files())
    unfinished = BundleRef(uri=store.uri(f"models/pets/{digest}"), name="pets", digest=digest)
    store.put(f"models/pets/{digest}/model.safetensors", make_files()["model.safetensors"])
    store.put(f"models/pets/{digest}/metrics.json", b'{"seconds": 1}')
    assert list_bundles(store) == []
    with pytest.raises(DataError, match="incomplete"):
        open_bundle(store, f"pets@{digest}")
    assert write_bundle(store, "pets", make_files()) == unfinished
    assert open_bundle(store, "pets").files == make_files(metrics__json=b'{"seconds": 1}')


def test_a_folder_that_holds_other_weights_is_not_completed(store):
    store.put(f"models/pets/{bundle_digest(make_files())}/model.safetensors", b"other")
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors"):
        write_bundle(store, "pets", make_files())
    assert list_bundles(store) == []


def test_racing_writers_of_one_model_leave_one_verified_bundle(store):
    def write(index):
        return write_bundle(store, "pets", make_files(metrics__json=b'{"writer":%d}' % index))

    with ThreadPoolExecutor(8) as pool:
        refs = set(pool.map(write, range(24)))
    assert len(refs) == 1
    assert open_bundle(store, "pets").ref in refs


def test_bundles_are_listed_by_name_and_only_when_complete(store):
    refs = [
        write_bundle(store, name, make_files(config__json=config))
        for name in ("pets", "birds")
        for config in (b"{}", b'{"a":1}')
    ]
    store.put("models/pets/notes.txt", b"not a bundle")
    assert list_bundles(store) == sorted(refs, key=lambda ref: (ref.name, ref.digest))


def test_an_unknown_name_is_answered_with_the_nearest(store):
    write_bundle(store, "flowers", make_files())
    with pytest.raises(DataError, match="did you mean 'flowers'"):
        open_bundle(store, "flower")
    with pytest.raises(DataError, match="does not exist"):
        open_bundle(store, f"flowers@{'0' * 32}")


@pytest.mark.parametrize(
    "reference", ["", "Pets", "pets@", "pets@123", "../pets", "pets@../../x", "/elsewhere/models/pets"]
)
def test_what_is_no_reference_is_refused(store, reference):
    with pytest.raises(ConfigError):
        open_bundle(store, reference)


def test_bad_names_and_files_are_refused_before_anything_is_written(store):
    with pytest.raises(ConfigError, match="name"):
        write_bundle(store, "my pets", make_files())
    with pytest.raises(DataError, match=r"missing \['README\.md'\]"):
        write_bundle(store, "pets", {file: b"" for file in make_files() if file != "README.md"})
    for file in ("digests.json", "../x", "/x", "a//b", ".hidden"):
        with pytest.raises(DataError, match="unusable"):
            write_bundle(store, "pets", make_files() | {file: b""})
    assert list(store.list_objects()) == []


def test_reading_what_is_not_there_or_not_json_is_an_error(store):
    write_bundle(store, "pets", make_files())
    bundle = open_bundle(store, "pets")
    with pytest.raises(DataError, match=r"no extra\.json"):
        bundle.read_json("extra.json")
    with pytest.raises(DataError, match="not JSON"):
        bundle.read_json("README.md")


def make_card(num_classes=2, metrics=None):
    return ModelCard(
        name="pets",
        summary="Tells cats from dogs.",
        strategy="linear_probe on resnet18 features",
        dataset="pets-2024",
        dataset_fingerprint="ab" * 16,
        split_rows={"train": 12_000, "val": 1000},
        classes=[f"class{index}" for index in range(num_classes)],
        split="val",
        metrics=metrics if metrics is not None else {"top-1": wilson_interval(900, 1000)},
        intended_use="Photos of pets.",
        limits=["No drawings."],
        lineage={"weights": "cd" * 16},
    )


def test_a_model_card_tells_what_it_is_and_how_sure_that_is():
    card = model_card(make_card())
    _, front_matter, body = card.split("---\n", 2)
    assert yaml.safe_load(front_matter)["pipeline_tag"] == "image-classification"
    for expected in (
        "# pets\n\nTells cats from dogs.",
        f"`pets-2024`, fingerprint `{'ab' * 16}`",
        "| train | 12,000 |",
        "2 classes: class0, class1.",
        "| top-1 | 0.9000 | 0.8798 to 0.9171 (95%) |",
        "- No drawings.",
        f"- weights: `{'cd' * 16}`",
    ):
        assert expected in body


def test_a_model_card_names_some_of_many_classes():
    body = model_card(make_card(num_classes=1000))
    assert "1000 classes: class0," in body
    assert "class19 and more." in body


def test_a_model_card_is_equal_for_equal_facts():
    metrics = {"nll": Interval(estimate=0.3, low=0.2, high=0.4, confidence=0.9)}
    assert model_card(make_card(metrics=metrics)) == model_card(make_card(metrics=dict(metrics)))
