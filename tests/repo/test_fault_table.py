"""The table of faults names a test, or a reason, for each of its rows."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "contributing" / "faults.md"


def rows() -> dict[str, list[str]]:
    """The columns of each row, by its number."""
    found = {}
    for line in TABLE.read_text().splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if re.fullmatch(r"F\d+", columns[0]):
            assert columns[0] not in found
            found[columns[0]] = columns
    return found


def test_every_fault_has_a_test_or_a_reason() -> None:
    assert list(rows()) == [f"F{number}" for number in range(1, 39)]
    for number, (_, _, outcome, tests) in rows().items():
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named or "does not apply: " in outcome, number
        for file, name in named:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{number}: {file} has no {name}"


def test_every_numbered_test_is_in_the_table() -> None:
    files = ("test_faults.py", "test_snapshot_faults.py")
    texts = [(ROOT / "tests/server/cli" / file).read_text() for file in files]
    for name in re.findall(r"def (test_f\d\d\w+)", "".join(texts)):
        if "for_minutes" not in name:
            assert any(name in columns[3] for columns in rows().values()), name


TIMED = (
    *("chunkllama/cache", "chunkllama/engine", "chunkllama/scheduler"),
    *("server/chunkllama_server/process", "server/chunkllama_server/transport"),
)


def test_limits_use_the_monotonic_clock() -> None:
    """A wall clock may be set at any time, so no limit in these packages reads one."""
    for folder in TIMED:
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                assert not re.search(r"\btime\.time\(|\bnow\(UTC|datetime\.now\(", line), path
