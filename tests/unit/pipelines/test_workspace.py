from __future__ import annotations

from pathlib import Path

import pytest

from convoy.core.errors import ConfigError
from convoy.pipelines.workspace import DEFAULT_WORKSPACE, open_workspace, workspace_uri
from convoy.storage.object_store import WriterMode


def test_config_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVOY_WORKSPACE", raising=False)
    assert workspace_uri(None) == DEFAULT_WORKSPACE
    monkeypatch.setenv("CONVOY_WORKSPACE", "/from/environment")
    assert workspace_uri(None) == "/from/environment"
    assert workspace_uri("/from/config") == "/from/config"


def test_folder_is_probed_once_and_accepted(tmp_path: Path) -> None:
    open_workspace(str(tmp_path), WriterMode.MANY)
    probe = tmp_path / ".convoy" / "conditional_put.json"
    written = probe.stat().st_mtime_ns
    open_workspace(str(tmp_path), WriterMode.MANY)
    assert probe.stat().st_mtime_ns == written


def test_racy_store_asks_for_a_single_writer(tmp_path: Path) -> None:
    probe = tmp_path / ".convoy" / "conditional_put.json"
    probe.parent.mkdir()
    probe.write_text('{"conditional_put":"racy"}')
    with pytest.raises(ConfigError, match="writers=single"):
        open_workspace(str(tmp_path), WriterMode.MANY)
    assert open_workspace(str(tmp_path), WriterMode.SINGLE).root_uri == str(tmp_path)
