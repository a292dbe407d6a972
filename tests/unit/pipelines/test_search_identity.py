"""Which search a config means, when one answers, and that a refusal leaves none behind."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytest

from convoy.cluster.search_plan import Concurrency
from convoy.cluster.training import TrialWorkers
from convoy.core.errors import ConfigError, RunMismatch
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Silent
from convoy.pipelines import tune, tune_plan
from convoy.pipelines.search_identity import search_identity
from convoy.pipelines.tune import _Search, run_tune
from convoy.pipelines.tune_config import TuneConfig
from convoy.storage.datasets import open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import OpenRun
from convoy.vision.engine_options import Precision
from made_devices import made_device
from made_ensembles import made_candidates, made_report
from made_searches import DRAW, config_in, store_of_digits, write_lenet, write_teacher

OPERATIONAL: dict[str, Any] = {
    "workers": {"num_workers": 1},
    "local_cache": {"max_gb": 2},
    "checkpoint_steps": 50,
    "checkpoint_minutes": 5,
    "extraction": {"num_workers": 2, "cpus_per_worker": 1, "num_fetch_threads": 4, "stall_minutes": 5},
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return store_of_digits(tmp_path)


@pytest.mark.parametrize(
    ("base", "is_same"),
    [
        *(({key: value}, True) for key, value in OPERATIONAL.items()),
        (OPERATIONAL, True),
        ({"extraction": {"num_workers": 2, "precision": "bf16"}}, False),
        ({"epochs": 3}, False),
        # Each trial has stored whether it kept to it.
        ({"error_budget": {"rate": 0.1}}, False),
    ],
)
def test_how_fast_trials_train_makes_no_other_search(
    store: LocalStore, base: dict[str, Any], is_same: bool
) -> None:
    manifest = open_dataset(store, "digits")
    one, other = (digest(search_identity(manifest, config_in(store, **each))) for each in ({}, base))
    assert (one == other) is is_same


def test_a_search_whose_record_still_counts_how_fast_it_trains_goes_on(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_plan, "find_device", lambda: made_device(Precision.FP32))
    monkeypatch.setattr(tune, "ray_session", stop)

    def search(config: TuneConfig) -> str:
        with pytest.raises(KeyboardInterrupt):
            run_tune(config, progress=Silent(), draw=DRAW)
        folder = OpenRun(store, verb="tune", target=digest([config.name])).current()
        assert folder is not None
        return folder.run_id

    begun = config_in(store, **OPERATIONAL)
    run_id = search(begun)
    folder = OpenRun(store, verb="tune", target=digest(["search"])).current()
    assert folder is not None
    record = folder.record()
    assert record is not None
    config = {**record.identity["config"], "base": begun.base}
    earlier = record.model_copy(update={"identity": {**record.identity, "config": config}})
    store.put(folder.key("run.json"), canonical_json(earlier))
    for changed in (begun, config_in(store), config_in(store, workers={"num_workers": 2})):
        assert search(changed) == run_id
    with pytest.raises(RunMismatch, match="epochs"):
        run_tune(config_in(store, epochs=3), progress=Silent(), draw=DRAW)


WHOLE = {"arch": "lenet5", "weights": "random", "preset": {"resize_px": None, "crop_px": 32}}
OF_TEN = {"ensemble": {"crops": ["ten"]}}
A_SECOND = {"budget": {"hours": 1 / 3600}}


@pytest.mark.parametrize(
    ("refused", "corrected", "words"),
    [
        ({"search": OF_TEN}, {"search": {**OF_TEN, "crops": "ten"}}, "keep no views of ten"),
        ({"search": A_SECOND, "epochs": 10**9}, {"search": A_SECOND, "epochs": 1}, "too small for one trial"),
        ({"search": A_SECOND, "epochs": 10**9}, {"epochs": 10**9}, "too small for one trial"),
    ],
)
def test_the_config_that_corrects_a_refused_search_is_taken(
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    refused: dict[str, Any],
    corrected: dict[str, Any],
    words: str,
) -> None:
    share = Concurrency(max_concurrent=1, workers=TrialWorkers(on_gpus=False))

    def search_on(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_plan, "find_device", lambda: made_device(Precision.FP32))
    monkeypatch.setattr(tune, "ray_session", nullcontext)
    monkeypatch.setattr(tune, "plan_trials", lambda *_, **__: share)
    monkeypatch.setattr(tune, "alive_nodes", lambda: [{"CPU": 2.0, "GPU": 0.0}])
    monkeypatch.setattr(tune, "run_search", search_on)
    for _ in range(2):
        with pytest.raises(ConfigError, match=words):
            run_tune(config_in(store, backbone=WHOLE, **refused), progress=Silent(), draw=DRAW)
    with pytest.raises(KeyboardInterrupt):
        run_tune(config_in(store, backbone=WHOLE, **corrected), progress=Silent(), draw=DRAW)


def test_a_finished_search_does_not_answer_for_another_teacher_or_other_weights(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, num_classes = tmp_path / "lenet.safetensors", len(open_dataset(store, "digits").classes)
    backbone = {"arch": "lenet5", "weights": str(file), "num_classes": num_classes}
    distill = {"teacher": "photos"}
    monkeypatch.setattr(tune_plan, "find_device", lambda: made_device(Precision.FP32))
    monkeypatch.setattr(tune, "ray_session", nullcontext)
    monkeypatch.setattr(_Search, "run", lambda *_: [])
    monkeypatch.setattr(_Search, "build_ensemble", lambda *_: made_report(made_candidates(1.0, 1.2)))

    def answer(budget: dict[str, Any] | None = None) -> tuple[str, list[str]]:
        search = {} if budget is None else {"budget": budget}
        config = config_in(
            store, search=search, strategy="fine_tune", epochs=1, backbone=backbone, distill=distill
        )
        report = run_tune(config, progress=Silent(), draw=DRAW)
        return report.run, [note for note in report.notes if note.startswith("a new search")]

    write_lenet(file, 0, num_classes=num_classes)
    write_teacher(store, 0)
    first, notes = answer()
    assert notes == []
    assert answer() == (first, [])
    write_lenet(file, 1, num_classes=num_classes)
    larger = {"trials": 9}
    assert answer(larger) == (first, []), "it goes on with what its trials began with"
    second, (note,) = answer(larger)
    assert second != first
    assert note == f"a new search, as since {first} a file of weights has other contents"
    teacher = write_teacher(store, 1)
    third, (note,) = answer(larger)
    assert third not in (first, second)
    assert note == f"a new search, as since {second} the teacher photos is {teacher}"
    assert answer(larger) == (third, [])
    file.unlink()
    assert answer(larger) == (third, []), "what was found stays"
