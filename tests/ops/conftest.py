"""Makes ``kernel_emulator`` (the emulator's build and launcher) importable from the op tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
