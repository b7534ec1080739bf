"""Run the documentation's commands as a reader does, and compare their output with what is shown.

A block of output (``text`` or ``json``) that follows a block of commands or a program, with prose
alone between them, is what the last command prints. Numbers, times, names of processors and
instruction sets, ids and ``...`` match any other of their kind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cli_fixtures import Served, free_port

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$|^#+ [^\n]*$", re.MULTILINE | re.DOTALL)
COMMANDS = ("sh", "python")
# Beginnings of commands that are not run here, and why.
NOT_RUN = {
    "make ": "network",
    ".ci/run": "runs these tests",
    "pip ": "network",
    "docker ": "container",
    "sed ": "container",
    "kubectl ": "container",
    "chunkllama verify --model smollm2": "a minute; test_verify_says_what_the_readme_shows runs it",
    ".venv/bin/python tests/soak.py": "minutes; tests/system/test_soak.py runs it shorter",
    "CHUNKLLAMA_MAX_MESSAGES=": "a setting that the page shows how to add",
}
# Names of a reader's own files and keys.
OWN = {"path/to/model": "tiny", "smollm2-135m-instruct": "tiny"}
LEVELS = r"(?:amx|avx512_bf16|avx512|avx2|baseline)"
LOOSE = {
    rf"{LEVELS}(?:, {LEVELS})*": r"[\w, ]+",
    r"\d[\d,.]*\d(?:\+\w+)?|\d": r"\d[\d,.]*(?:\+\w+)?",
    r"Intel\(R\)[^;\n]*": r"[^;\n]*",
    r"\.\.\.": r".*?",
}
VOLATILE = {"id", "created", "system_fingerprint", "since"}


@dataclass
class Step:
    """Commands or a program, and the output shown for it."""

    page: Path
    language: str
    text: str
    shown: str = ""
    shown_as: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        return not any(line.startswith(tuple(NOT_RUN)) for line in self.lines)


def steps(page: Path) -> list[Step]:
    """The commands and programs of a page in order."""
    found: list[Step] = []
    last: Step | None = None
    for match in BLOCK.finditer(page.read_text()):
        language, text = match[1], match[2]
        if language in COMMANDS:
            joined = text.replace("\\\n", " ")
            lines = [line for line in joined.splitlines() if line and line[0] not in " #}"]
            last = Step(page, language, text, lines=lines)
            found.append(last)
        elif language in ("text", "json") and last is not None:
            last.shown, last.shown_as = text, language
            last = None
        else:
            last = None
    return found


def agree(shown: object, printed: object, key: str = "") -> bool:
    """Whether two JSON values are equal, apart from numbers and what differs in each run."""
    if isinstance(shown, dict) and isinstance(printed, dict):
        return list(shown) == list(printed) and all(agree(shown[k], printed[k], k) for k in shown)
    if isinstance(shown, list) and isinstance(printed, list):
        return len(shown) == len(printed) and all(map(agree, shown, printed))
    if key in VOLATILE:
        return type(shown) is type(printed)
    if isinstance(shown, int | float) and not isinstance(shown, bool):
        return isinstance(printed, int | float) and not isinstance(printed, bool)
    return shown == printed


def pattern(shown: str) -> str:
    """A regular expression for a shown text."""
    loose = re.compile("|".join(f"({kind})" for kind in LOOSE))
    kinds = list(LOOSE.values())
    parts, at = [], 0
    for match in loose.finditer(shown):
        parts += [re.escape(shown[at : match.start()]), kinds[(match.lastindex or 1) - 1]]
        at = match.end()
    return "".join([*parts, re.escape(shown[at:])])


def check(step: Step, printed: str) -> None:
    """Assert that a step has printed what the page shows for it."""
    if step.shown_as == "json":
        assert agree(json.loads(step.shown), json.loads(printed)), printed
    elif step.shown:
        wanted = re.compile(pattern(step.shown.strip()), re.DOTALL)
        assert wanted.fullmatch(printed.strip()), printed


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CHUNKLLAMA_")}
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**clean, "PATH": programs, "PYTHONPATH": "", "COLUMNS": "200", **extra}


def run(command: list[str], folder: Path, **extra: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(**extra), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_prints_what_it_shows(start: Callable[..., Served], tmp_path: Path) -> None:
    served = start("--model", "smollm2-135m-instruct", "--backend", "auto", "--num-chunks", "256")
    compared = 0
    for step in steps(ROOT / "README.md"):
        if not step.is_run:
            continue
        text = step.text.replace("http://127.0.0.1:8000", served.url)
        if step.language == "python":
            printed = run([sys.executable, "-c", text], tmp_path)
        else:
            printed = run(["bash", "-euc", text.replace("curl ", "curl -sS ")], tmp_path)
        check(step, printed)
        compared += bool(step.shown)
    assert compared >= 4


@pytest.mark.nightly
def test_verify_says_what_the_readme_shows(tmp_path: Path) -> None:
    """The same comparisons with the same results; numbers and the widths of cells may differ."""
    (step,) = (x for x in steps(ROOT / "README.md") if x.text.startswith("chunkllama verify"))
    printed = run(["bash", "-euc", step.text], tmp_path)

    def rows(text: str) -> list[list[str]]:
        cells = [re.split(r"\s*[│┃]\s*", line)[1:4] for line in text.splitlines()]
        return [row for row in cells if row and row[0]]

    assert rows(printed) == rows(step.shown)
    assert len(rows(step.shown)) == 9
    assert printed.splitlines()[-1] == step.shown.splitlines()[-1]


def test_what_needs_a_network_or_a_container_is_not_run() -> None:
    """``NOT_RUN`` names every block that begins a line with such a program."""
    programs = {
        "docker",
        "podman",
        "pip",
        "git",
        "kubectl",
        "npm",
        "npx",
        "wget",
        "apt-get",
        "make",
    }
    for page in PAGES:
        for step in steps(page):
            for line in step.lines if step.language == "sh" and step.is_run else []:
                words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
                assert not {*words[:1]} & programs, f"{page.name}: {line}"


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("ready in 2.5 s\n", "ready in 31.25 s", True),
        ("level amx, 17,000 MiB ...", "level avx2, 4 MiB free of 8", True),
        ("levels: amx, avx2, baseline", "levels: avx2, baseline", True),
        ("error: no file x", "error: no file y", False),
        ("one\ntwo", "one", False),
    ],
)
def test_texts_match_by_kind(shown: str, printed: str, expected: bool) -> None:
    assert bool(re.fullmatch(pattern(shown.strip()), printed, re.DOTALL)) == expected


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ({"id": "a", "n": 1}, {"id": "b", "n": 2}, True),
        ({"id": "a", "x": "y"}, {"id": "b", "x": "z"}, False),
        ({"a": [1, "x"]}, {"a": [1]}, False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": None}, {"a": 1}, False),
    ],
)
def test_json_matches_by_kind(shown: object, printed: object, expected: bool) -> None:
    assert agree(shown, printed) == expected


class Reader:
    """Follows the pages of the documentation in one folder, with one server at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.admin_port = free_port(), free_port()
        self._server: subprocess.Popen[bytes] | None = None

    def follow(self, step: Step) -> str:
        """Run a step; returns what its last command prints."""
        text = step.text
        for name, own in OWN.items():
            text = text.replace(name, own)
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        text = text.replace("127.0.0.1:9000", f"127.0.0.1:{self.admin_port}")
        if step.language == "python":
            return run([sys.executable, "-c", text], self.folder)
        before, serve, _ = text.partition("chunkllama serve")
        if serve:
            run(["bash", "-euc", before if before.endswith("\n") else ""], self.folder)
            self.serve(text[len(before) if before.endswith("\n") else 0 :])
            return ""
        if f":{self.port}" in text and self._server is None:
            self.serve("chunkllama serve")
        return run(["bash", "-euc", text.replace("curl ", "curl -sS ")], self.folder)

    def serve(self, command: str) -> None:
        self.stop()
        settings = {"PORT": self.port, "ADMIN_PORT": self.admin_port, "NUM_CHUNKS": 256}
        settings["FILES_DIR"] = self.folder / "files"
        extra = {f"CHUNKLLAMA_{key}": str(value) for key, value in settings.items()}
        if "--config" not in command:
            extra["CHUNKLLAMA_MODEL"] = "tiny"
        self._server = subprocess.Popen(
            ["bash", "-euc", f"exec {command.strip()}" if command[:1] == "c" else command],
            cwd=self.folder,
            env=environment(**extra),
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{self.port}"
        for _ in range(600):
            health = ["chunkllama", "health", "--url", url]
            if subprocess.run(health, env=environment(), capture_output=True).returncode == 0:
                return
            assert self._server.poll() is None, f"{command} has ended"
        raise AssertionError(f"{command} does not become ready")

    def stop(self) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGINT)
            assert self._server.wait(timeout=60) == 0
            self._server = None


@pytest.fixture
def reader(tmp_path: Path, tiny_model: Path) -> Iterator[Reader]:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "keys.txt").write_text("product:KEY1\ntrial:KEY2\n")
    row = {"at": 0.1, "tenant": "a", "prompt_token_ids": [*range(200)], "max_tokens": 4}
    (tmp_path / "requests.jsonl").write_text(f"{json.dumps(row)}\n" * 5)
    reader = Reader(tmp_path)
    yield reader
    reader.stop()


FOLLOWED = [page for page in PAGES if page.name != "README.md" and any(steps(page))]


@pytest.mark.nightly
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.name)
def test_a_page_prints_what_it_shows(page: Path, reader: Reader) -> None:
    for text in re.findall(r"^```yaml\n(# ([\w.]+)\n.*?)^```$", page.read_text(), re.M | re.S):
        (reader.folder / text[1]).write_text(text[0])
    programs = [step.text for step in steps(page) if step.language == "python"]
    if programs and "contributing" not in page.parts:  # the blocks of a page are one program
        run([sys.executable, "-c", "\n".join(programs)], reader.folder)
    for step in steps(page):
        if step.language == "sh" and step.is_run:
            printed = reader.follow(step)
            if "serve" not in step.text:
                check(step, printed)
