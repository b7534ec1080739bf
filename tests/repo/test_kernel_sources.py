"""The C++ and CUDA sources: width of lines; .clang-format has the style."""

from __future__ import annotations

from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
SOURCES = sorted(p for p in KERNELS.rglob("*") if p.suffix in {".h", ".cpp", ".cuh"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_lines_have_at_most_100_columns(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []
