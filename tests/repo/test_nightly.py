"""``make nightly``: every nightly test has an area, and the report tells what its runs found."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nightly(tmp_path, monkeypatch):
    """The script in a repository whose simulator and soak have one test each."""
    spec = spec_from_file_location("nightly", ROOT / "scripts" / "nightly.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  nightly: full size\n")
    for name in ("simulator", "system"):
        (tmp_path / "tests" / name).mkdir(parents=True)
    write_test(tmp_path, "simulator/test_steps.py", "assert True")
    write_test(tmp_path, "system/test_soak.py", "assert True")
    return module


def write_test(root: Path, name: str, body: str) -> None:
    text = f"import pytest\n\n@pytest.mark.nightly\ndef test_all():\n    {body}\n"
    (root / "tests" / name).write_text(text)


def report(module) -> str:
    return (module.ROOT / module.REPORT).read_text()


def test_each_nightly_test_has_an_area() -> None:
    spec = spec_from_file_location("nightly", ROOT / "scripts" / "nightly.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    found = [name for area in module.AREAS for name in module.files_of(area)]
    assert sorted(found) == sorted(names)
    listed = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert listed == [*module.AREAS]


def test_a_rerun_of_an_area_replaces_its_section_alone(nightly) -> None:
    write_test(nightly.ROOT, "simulator/test_steps.py", "assert 1 == 2")
    assert nightly.main(["7", "simulator", "soak"]) == 1, "the failure does not stop the next area"
    first = report(nightly)
    assert "Not all of" in first and ": 1 passed, 1 failed, " in first
    assert "failed: tests/simulator/test_steps.py::test_all" in first
    write_test(nightly.ROOT, "simulator/test_steps.py", "pytest.skip('no device')")
    assert nightly.main(["8", "simulator"]) == 0
    second = report(nightly)
    assert "skipped: 1, no device" in second and "failed: tests" not in second
    assert second.count("== simulator ==") == second.count("== soak ==") == 1
    assert second.count("seed: 7") == second.count("seed: 8") == 1
    assert first.partition("== soak ==")[2] == second.partition("== soak ==")[2]


def test_a_file_that_cannot_be_read_fails_its_area_and_stops_no_other_file(nightly) -> None:
    for name in ("cluster", "cluster_configuration"):
        write_test(nightly.ROOT, f"system/test_{name}.py", "assert True")
    assert nightly.main(["7", "cluster"]) == 0
    (nightly.ROOT / "tests" / "system" / "test_cluster.py").write_text("import no_such_module\n")
    assert nightly.main(["8", "cluster"]) == 1
    second = report(nightly)
    assert "seed: 8" in second and "tests: 1 passed, 1 failed, 0 skipped" in second
    assert "failed: tests/system/test_cluster.py" in second


def test_a_run_that_does_not_end_leaves_the_section(nightly, capsys) -> None:
    assert nightly.main(["7", "soak"]) == 0
    before = report(nightly)
    write_test(nightly.ROOT, "system/test_soak.py", "raise KeyboardInterrupt")
    assert nightly.main(["8", "soak"]) == 1
    (nightly.ROOT / "tests" / "system" / "test_soak.py").write_text("# no test\n")
    assert nightly.main(["8", "soak"]) == 1
    assert report(nightly) == before
    assert "did not reach its end" in capsys.readouterr().err


def test_all_areas_passed_is_said_of_all_alone(nightly) -> None:
    section = ["seed: 1", "date: 2026-01-02", "commit: a", "result: passed", "tests: 1, in 2.0 min"]
    sections = dict.fromkeys(nightly.AREAS, section)
    assert "areas passed, of one commit." in nightly.write_report(sections)
    other = [line.replace("commit: a", "commit: b") for line in section]
    mixed = nightly.write_report({**sections, "soak": other})
    assert "areas passed, of 2 commits." in mixed
    assert nightly.read_sections(mixed) == {**sections, "soak": other}
    del sections["soak"]
    assert "0 failed, 1 no result." in nightly.write_report(sections)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("soak", "the seed comes first"), ("1 sok", "no area 'sok'; areas: simulator, ")],
)
def test_wrong_arguments_are_one_line(arguments, message) -> None:
    command = [sys.executable, ROOT / "scripts" / "nightly.py", *arguments.split()]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and message in ran.stderr and ran.stderr.count("\n") == 1
