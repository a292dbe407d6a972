from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from convoy.core.errors import ConfigError
from convoy.pipelines.workspace import DEFAULT_WORKSPACE, open_workspace, workspace_uri
from convoy.storage import conditional_put
from convoy.storage.conditional_put import VERDICT_KEY, StoreVerdict
from convoy.storage.object_store import ConditionalPut, ObjectStore, WriterMode


def test_config_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVOY_WORKSPACE", raising=False)
    assert workspace_uri(None) == DEFAULT_WORKSPACE
    monkeypatch.setenv("CONVOY_WORKSPACE", "/from/environment")
    assert workspace_uri(None) == "/from/environment"
    assert workspace_uri("/from/config") == "/from/config"


def test_folder_is_probed_once_and_accepted(tmp_path: Path) -> None:
    open_workspace(str(tmp_path), WriterMode.MANY)
    probe = tmp_path / VERDICT_KEY
    written = probe.stat().st_mtime_ns
    open_workspace(str(tmp_path), WriterMode.MANY)
    assert probe.stat().st_mtime_ns == written


def put_verdict(folder: Path, found: ConditionalPut, **of: str) -> None:
    path = folder / VERDICT_KEY
    path.parent.mkdir(parents=True)
    path.write_text(StoreVerdict(conditional_put=found, **of).model_dump_json(exclude_unset=True))


def test_racy_store_asks_for_a_single_writer_and_names_the_file_that_says_so(tmp_path: Path) -> None:
    put_verdict(tmp_path, ConditionalPut.RACY, root_uri=str(tmp_path))
    with pytest.raises(ConfigError, match="writers=single") as caught:
        open_workspace(str(tmp_path), WriterMode.MANY)
    assert VERDICT_KEY in caught.value.where
    assert "`convoy models`: --writers single" in caught.value.next_step
    assert open_workspace(str(tmp_path), WriterMode.SINGLE).root_uri == str(tmp_path)


def test_a_verdict_of_before_versions_were_raced_is_not_believed(tmp_path: Path) -> None:
    """Under its old name: a store may keep If-None-Match and ignore If-Match."""
    put_verdict(tmp_path, ConditionalPut.RACY, root_uri=str(tmp_path))
    (tmp_path / VERDICT_KEY).rename(tmp_path / ".convoy" / "conditional_put.json")
    assert open_workspace(str(tmp_path), WriterMode.MANY).root_uri == str(tmp_path)


@pytest.mark.parametrize(
    "of",
    [
        pytest.param({}, id="by an older Convoy"),
        pytest.param({"root_uri": "s3://bucket/convoy"}, id="of another root"),
        pytest.param({"root_uri": "HERE", "endpoint_url": "http://minio:9000"}, id="of another server"),
    ],
)
@pytest.mark.parametrize("found", [ConditionalPut.ATOMIC, ConditionalPut.RACY])
def test_a_verdict_that_came_with_the_workspace_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: dict[str, str], found: ConditionalPut
) -> None:
    """A workspace that is copied from a racy store to an atomic one, or the other way round."""
    put_verdict(tmp_path, found, **{key: value.replace("HERE", str(tmp_path)) for key, value in of.items()})
    true = ConditionalPut.RACY if found is ConditionalPut.ATOMIC else ConditionalPut.ATOMIC
    probes: list[str] = []

    def probe(store: ObjectStore) -> ConditionalPut:
        probes.append(store.root_uri)
        return true

    monkeypatch.setattr(conditional_put, "probe_conditional_put", probe)
    for _ in range(2):
        try:
            open_workspace(str(tmp_path), WriterMode.MANY)
            accepted = ConditionalPut.ATOMIC
        except ConfigError:
            accepted = ConditionalPut.RACY
        assert accepted is true
    assert probes == [str(tmp_path)]
    known = json.loads((tmp_path / VERDICT_KEY).read_text())
    assert (known["root_uri"], known["endpoint_url"]) == (str(tmp_path), "")
    assert datetime.fromisoformat(known["probed_utc"]).tzinfo == UTC
