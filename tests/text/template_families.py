"""The families of ``scripts/document_templates.py``, for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[2] / "scripts/document_templates.py"
_spec = importlib.util.spec_from_file_location("document_templates", _PATH)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)
