"""Run the nightly tests area by area and keep the last full result of each.

    python scripts/nightly.py [SEED] [AREA...]

Without areas all are run, in the order of ``AREAS``; without a seed the time is one. An area that
ends replaces its section of benchmarks/results/nightly.txt at once, so that a run that is
interrupted keeps what it has done. An area that fails does not stop the others. Exit status: 0 if
all areas of this run passed, 1 if one failed, 2 for wrong arguments.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from chunkllama.resources import usable_threads

ROOT = Path(__file__).parents[1]
REPORT = "benchmarks/results/nightly.txt"
# A file of tests belongs to the first area that names it or a folder above it.
AREAS: dict[str, tuple[str, ...]] = {
    "simulator": ("tests/simulator", "tests/scheduler", "tests/cache"),
    "attention": ("tests/attention", "tests/backends/test_emulation_attention.py"),
    "emulator": (
        *(f"tests/backends/test_emulation_{part}.py" for part in ("bugs", "gpu_check", "model")),
        *(f"tests/backends/test_emulation_{part}.py" for part in ("ops", "ptx")),
        "tests/backends/test_compile_gate.py",
        "tests/backends/test_gpu_benchmark.py",
        "tests/backends/test_stage_instructions.py",
    ),
    "cpu": ("tests/backends",),
    "models": ("tests/models",),
    "text": ("tests/text", "tests/docs", "tests/repo"),
    "tuning": ("tests/tuning", "tests/verify"),
    "timing": ("tests/engine/test_isolation.py",),
    "engine": ("tests/engine", "tests/cluster"),
    "next-turn": ("tests/server/test_next_turn.py", "tests/server/test_next_turn_elsewhere.py"),
    "routers": ("tests/server/cli/test_routers.py",),
    "commands": ("tests/server/cli",),
    "server": ("tests/server",),
    "cluster": ("tests/system/test_cluster.py", "tests/system/test_cluster_configuration.py"),
    "soak": ("tests/system/test_soak.py",),
    "system": ("tests/system",),
}
# Each test beside no other one: they record times, or need all processors.
ALONE = {"timing", "routers", "cluster", "soak"}
# One file has most of the work: workers divide its tests, in order, so that most share fixtures.
FEW_FILES = {"attention", "emulator", "cpu", "models", "next-turn"}
NUM_SLOWEST = 8


def area_of(path: str) -> str | None:
    """Name the area of a test file, a path relative to the repository."""
    for area, parts in AREAS.items():
        if any(path == part or path.startswith(f"{part}/") for part in parts):
            return area
    return None


def files_of(area: str) -> list[str]:
    """List the area's test files."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return [name for name in names if area_of(name) == area]


def run_area(area: str, seed: int) -> tuple[bool, list[str] | None]:
    """Run an area's tests.

    Returns:
        whether all passed, and the lines of its section: None if the run did not reach its end.
    """
    head = [f"date: {time.strftime('%Y-%m-%d', time.gmtime())}", f"commit: {commit()}", *machine()]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "nightly", f"--junit-xml={results}"]
        command += ["-o", "junit_family=xunit1"]  # names the files
        command += ["--continue-on-collection-errors"]
        if area not in ALONE:
            command += ["-n", "logical", "--maxprocesses", "4"]
            command += ["--dist", "worksteal" if area in FEW_FILES else "loadfile"]
        status = subprocess.run(
            [*command, *files_of(area)],
            cwd=ROOT,
            env={**os.environ, "CHUNKLLAMA_TEST_SEED": str(seed)},
        ).returncode
        if status not in (0, 1):  # interrupted, not started, or no test was found
            return False, None
        section = read_results(results)
    return status == 0, [f"seed: {seed}", *head, *section]


def commit() -> str:
    """Name the commit, and whether files other than results differ from it."""
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{head or 'unknown'}{' with changes' if changed else ''}"


def git(*arguments: str) -> str:
    """Return what a git command prints; nothing where there is no repository."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def machine() -> list[str]:
    """Describe the processor and the versions that results depend on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    return [
        f"machine: {usable_threads()} threads, {names[0] if names else platform.machine()}",
        f"versions: Python {platform.python_version()}, {', '.join(versions)}",
    ]


def read_results(path: Path) -> list[str]:
    """Return lines of counts, skipped, failed and slowest tests from pytest's file of results."""
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    failed, skipped = set(), Counter[str]()
    seconds: Counter[str] = Counter()
    for case in suite.iter("testcase"):
        name = f"{case.get('file')}::{case.get('name')}"
        seconds[name] += float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
        for skip in case.iter("skipped"):
            skipped[skip.get("message", "").splitlines()[0]] += 1
    passed = len(seconds) - len(failed) - skipped.total()
    counts = f"tests: {passed} passed, {len(failed)} failed, {skipped.total()} skipped"
    lines = [f"result: {'failed' if failed else 'passed'}"]
    lines += [f"{counts}, in {float(suite.get('time', 0)) / 60:.1f} min"]
    lines += [f"skipped: {count}, {reason}" for reason, count in sorted(skipped.items())]
    lines += [f"failed: {name}" for name in sorted(failed)]
    lines += [f"{value:8.1f} s  {name}" for name, value in seconds.most_common(NUM_SLOWEST)]
    return lines


def read_sections(text: str) -> dict[str, list[str]]:
    """Read the sections of a report; those of areas that no longer exist are left out."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("== "):
            lines = sections[line.strip("= ")] = []
        elif line:
            lines.append(line)
    return {area: sections[area] for area in AREAS if area in sections}


def write_report(sections: dict[str, list[str]]) -> str:
    """Return the report: whether all areas passed, a line for each area, then the sections."""
    table, results, commits = [], Counter[str](), set()
    for area in AREAS:
        values = dict(line.split(": ", 1) for line in sections.get(area, ()) if ": " in line)
        result = values.get("result", "no result")
        results[result] += 1
        if result == "no result":
            table.append(f"{area:10} {result}")
        else:
            commits.add(values["commit"])
            minutes = values["tests"].rpartition(", in ")[2]
            table.append(
                f"{area:10} {result:9} {minutes:>10}  {values['date']}  {values['commit']}"
            )
    if results["passed"] == len(AREAS):
        where = "of one commit" if len(commits) == 1 else f"of {len(commits)} commits"
        verdict = f"All {len(AREAS)} areas passed, {where}."
    else:
        counts = ", ".join(f"{results[name]} {name}" for name in ("passed", "failed", "no result"))
        verdict = f"Not all of {len(AREAS)} areas passed: {counts}."
    head = ["The last full result of each area of `make nightly`.", verdict, "", *table]
    for area in AREAS:
        if area in sections:
            head += ["", f"== {area} ==", *sections[area]]
    return "\n".join(head) + "\n"


def main(arguments: Iterable[str]) -> int:
    """Run the areas that the arguments name; returns the exit status."""
    seed, *areas = [*arguments] or [str(int(time.time()))]
    if not seed.isdecimal():
        print(f"nightly: the seed comes first and is a number, not {seed!r}", file=sys.stderr)
        return 2
    if unknown := [area for area in areas if area not in AREAS]:
        print(f"nightly: no area {unknown[0]!r}; areas: {', '.join(AREAS)}", file=sys.stderr)
        return 2
    report = ROOT / REPORT
    failed: list[str] = []
    for area in areas or AREAS:
        print(f"nightly: {area}, seed {seed}", flush=True)
        passed, section = run_area(area, int(seed))
        failed += [] if passed else [area]
        if section is None:
            print(f"nightly: {area} did not reach its end; its section is kept", file=sys.stderr)
            continue
        sections = read_sections(report.read_text() if report.exists() else "")
        sections[area] = section
        report.write_text(
            write_report({name: sections[name] for name in AREAS if name in sections})
        )
    print(f"nightly: {'failed: ' + ', '.join(failed) if failed else 'all passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
