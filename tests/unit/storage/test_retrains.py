"""What the folder of a model's retrainings knows of its dates."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoy.storage.local_store import LocalStore
from convoy.storage.retrains import RetrainFolder, RetrainPlan


def test_decided_dates_are_found_by_listing_them_not_by_a_request_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RetrainFolder(LocalStore(str(tmp_path)), "digits")
    for date in ("2026-01-02", "2026-01-01", "2026-01-03"):
        plan = RetrainPlan(
            date=date, fingerprint="0" * 32, previous_fingerprint=None, champion=None, config={}
        )
        folder.write_plan(plan)
        if date < "2026-01-03":
            folder.write_decision(date, {"date": date})
    RetrainFolder(folder.store, "digits-too").write_decision("2026-01-04", {})
    monkeypatch.setattr(LocalStore, "head", lambda *_: pytest.fail("a request for one date"))
    assert folder.decided_dates() == ["2026-01-01", "2026-01-02"]
