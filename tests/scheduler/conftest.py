"""The simulated engine and its fake model drive the scheduler's tests too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "simulator"))
