"""Advice that was given already is read from its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoy.core.config import load_config
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines import advise
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.storage.commits import finish
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from made_advice import made_advice
from made_advice_rows import frozen_rows


def test_advice_that_is_known_is_judged_by_the_error_budget_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The made advice has one reject among 100 images."""
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (10, 10)}, ("good", "defect"))
    record = BackboneRecord.model_construct(weights_digest="a" * 32)
    monkeypatch.setattr(advise, "open_dataset", lambda *_: manifest)
    monkeypatch.setattr(advise, "fetch_backbone", lambda *_: record)
    base = ["dataset=parts", "candidates=[{backbone: {arch: lenet5}}]", f"workspace={tmp_path}"]
    configs = [
        load_config(AdviseConfig, None, [*base, f"error_budget={{rows: {rows}, rate: 0}}"]) for rows in (0, 1)
    ]
    store, identity = LocalStore(str(tmp_path)), advise._identity(manifest, configs[0], [record])
    finish(RunFolder(store, "r"), made_advice().model_dump(mode="json"))
    store.put(f"advice/{digest(identity)}.json", canonical_json({"run_id": "r"}))
    given = [advise.run_advise(one, progress=Silent(), draw_curves=lambda *_: b"") for one in configs]
    assert [one.within_error_budget for one in given] == [False, True]
