"""Check that every setting is read by code other than its definition."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from chunkllama.scheduler.limits import SchedulerLimits
from chunkllama_server.config.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "server/chunkllama_server/config"
DEFINITIONS = {ROOT / "chunkllama/config.py", CONFIG / "settings.py", CONFIG / "limits.py"}
READERS = [p for folder in ("chunkllama", "server") for p in (ROOT / folder).rglob("*.py")]
SOURCE = "\n".join(p.read_text() for p in READERS if p not in DEFINITIONS)
# Settings itself reads these: the keys to mask them, the names to add the default.
OWN = {"api_key", "api_key_file", "served_model_name"}


@pytest.mark.parametrize("key", sorted(set(Settings.model_fields) - OWN))
def test_the_setting_is_read(key):
    # A limit is also read by its name, together with its message.
    assert re.search(rf'\.{key}\b|"{key}"', SOURCE)


def test_a_default_stands_in_one_place():
    """The scheduler's limits take the values of settings, and have no defaults of their own."""
    defaults = {field.name for field in fields(SchedulerLimits) if field.default is not MISSING}
    assert not defaults & (set(Settings.model_fields) | {"policy"})
