"""Reuse the server fixtures of the command line's tests: a real server on the tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "cli_fixtures", ROOT / "tests/server/cli/conftest.py"
)
assert _spec is not None and _spec.loader is not None
cli_fixtures = importlib.util.module_from_spec(_spec)
sys.modules["cli_fixtures"] = cli_fixtures
_spec.loader.exec_module(cli_fixtures)

tiny_model = cli_fixtures.tiny_model
chunkllama = cli_fixtures.chunkllama
start = cli_fixtures.start
served = cli_fixtures.served
