"""The folder of snapshots: one that cannot be used is not kept locked."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkllama.packs.file import loading_mark
from chunkllama_server.config.settings import Settings
from chunkllama_server.process.snapshots import open_snapshots


@pytest.mark.parametrize("name", ["namespace.key", loading_mark(Path("snapshot.ckpack")).name])
def test_a_folder_that_cannot_be_used_is_not_kept_locked(tmp_path: Path, name: str) -> None:
    settings = Settings(snapshot_dir=tmp_path)
    (tmp_path / name).mkdir()
    assert open_snapshots(settings, None) is None
    (tmp_path / name).rmdir()
    assert open_snapshots(settings, None) is not None
