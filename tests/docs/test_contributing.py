"""The how-to pages of docs/contributing fit today's code."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/contributing").glob("*.md"))
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page, which stand in lists, without their indentation."""
    found = BLOCK.findall(page.read_text())
    return [textwrap.dedent(text) for kind, text in found if kind == language]


@pytest.fixture(scope="module")
def source_lines() -> set[str]:
    """Every line of the source files, without its indentation."""
    listing = subprocess.run(
        ["git", "ls-files", "chunkllama/*.py", "server/*.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    texts = [(ROOT / name).read_text() for name in listing.splitlines()]
    return {line.strip() for text in texts for line in text.splitlines()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_diff_fits_the_code(page: Path, source_lines: set[str]) -> None:
    """What surrounds the added lines is there; the examples of model.md have been added."""
    for diff in blocks(page, "diff"):
        for line in diff.splitlines():
            is_added, text = line.startswith("+"), line.removeprefix("+").strip()
            if text not in ("", "...") and (not is_added or page.stem == "model"):
                assert text in source_lines, line
