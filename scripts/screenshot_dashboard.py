"""Take the documentation's pictures of /dashboard: light, dark, and on a phone.

    python scripts/screenshot_dashboard.py http://127.0.0.1:8000

Needs Chromium, and a server under load (``chunkllama demo tenants --requests 20``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
# Name, width and height of the window, and Blink's number of the colour scheme.
PICTURES = (
    ("dashboard", 1280, 1280, 1),
    ("dashboard-dark", 1280, 1280, 0),
    ("dashboard-phone", 500, 1600, 1),
)
SECONDS_SHOWN = 8


def take(browser: str, url: str, name: str, width: int, height: int, scheme: int) -> None:
    """Write one picture."""
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={home}", f"--window-size={width},{height}",
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--virtual-time-budget={1000 * SECONDS_SHOWN}",
                f"--screenshot={FOLDER / name}.png",
                f"{url}/dashboard",
            ],
            check=True, capture_output=True, env={**os.environ, "HOME": home},
        )  # fmt: skip


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for picture in PICTURES:
        take(browser, sys.argv[1], *picture)


if __name__ == "__main__":
    main()
