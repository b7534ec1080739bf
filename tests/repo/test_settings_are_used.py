"""Check that every setting is read by code other than its definition."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chunkllama_server.config.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = {ROOT / "chunkllama/config.py", ROOT / "server/chunkllama_server/config/settings.py"}
READERS = [p for folder in ("chunkllama", "server") for p in (ROOT / folder).rglob("*.py")]
SOURCE = "\n".join(p.read_text() for p in READERS if p not in DEFINITIONS)
# Settings itself reads the keys, to mask them.
OWN = {"api_key", "api_key_file"}


@pytest.mark.parametrize("key", sorted(set(Settings.model_fields) - OWN))
def test_the_setting_is_read(key):
    assert re.search(rf"\.{key}\b", SOURCE)
