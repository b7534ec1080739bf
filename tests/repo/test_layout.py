"""Check the repository rules that a program can check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for line in listing.splitlines() if (path := ROOT / line).is_file()]


def test_no_python_under_kernels() -> None:
    """A module there would shadow the package `kernels` that transformers probes for."""
    assert not tracked("kernels/*.py", "kernels/**/*.py")


@pytest.mark.parametrize(("where", "limit"), [("chunkllama", 400), ("server", 400), ("tests", 600)])
def test_files_stay_small(where: str, limit: int) -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked(f"{where}/*.py", f"{where}/**/*.py")
        if (lines := len(path.read_text().splitlines())) > limit
    }
    assert not long, f"files over {limit} lines, split them: {long}"


def test_nothing_unfinished_or_private_is_committed() -> None:
    patterns = {
        "unfinished": re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError"),
        "a path of one machine": re.compile(r"(?<![\w.])/(?:home|root|work)/[\w.]"),
    }
    found = [
        f"{path.relative_to(ROOT)}:{number}: {what}: {line.strip()}"
        for path in tracked("*.py", "*.md", "*.cpp", "*.h", "*.cuh", "*.yaml", "*.toml", "*.sh")
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for what, pattern in patterns.items()
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_light() -> None:
    heavy = "torch transformers cupy fastapi numpy tokenizers"
    code = (
        f"import sys, chunkllama; print([m for m in {heavy.split()!r} if m in sys.modules]);"
        "chunkllama.__version__"
    )
    assert run_python(code) == "[]"


def test_the_api_process_does_not_import_torch() -> None:
    code = (
        "import sys, chunkllama_server.api.app, chunkllama_server.cli, chunkllama.engine.process,"
        "chunkllama.text.tokenizer,"
        "chunkllama.text.chat_template, chunkllama.models.loading.hub, chunkllama.engine.grammar;"
        "print('torch' in sys.modules)"
    )
    assert run_python(code) == "False"


def test_the_server_package_has_few_modules_beside_its_folders() -> None:
    modules = {path.stem for path in (ROOT / "server/chunkllama_server").glob("*.py")}
    assert modules - {"__init__"} == {"cli", "console"}
