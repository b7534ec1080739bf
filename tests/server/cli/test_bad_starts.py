"""Every start of ``bad_start_table.py`` is refused with one line and exit code 2.

They run in this process, up to the engine's start, which must not be reached; the nightly test runs
each as a user does.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bad_start_table import BAD_STARTS, BadStart, Machine

from chunkllama.engine import size
from chunkllama.engine.supervisor import SupervisedEngineClient
from chunkllama_server.commands import run
from chunkllama_server.process import launch

by_name = pytest.mark.parametrize("start", BAD_STARTS, ids=lambda start: start.name)


@pytest.fixture
def machine(tmp_path: Path, tiny_model: Path) -> Iterator[Machine]:
    folder = tmp_path / "folder"
    folder.mkdir()
    model = shutil.copytree(tiny_model, tmp_path / "model")
    with ExitStack() as resources:
        yield Machine(model, folder, resources)


def check(start: BadStart, code: int, errors: str) -> None:
    (line,) = [x for x in errors.splitlines() if x.split()[1:2] not in (["INFO"], ["WARNING"])]
    assert line.startswith("chunkllama: error: "), errors
    assert re.search(start.pattern, line), line
    assert code == 2


def test_there_are_sixty_with_names_of_their_own() -> None:
    assert len({start.name for start in BAD_STARTS}) == len(BAD_STARTS) >= 60


@by_name
def test_a_bad_start_is_one_line(
    start: BadStart,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    reached = []

    async def begin(*_: object, **__: object) -> None:
        reached.append(start)
        await asyncio.sleep(0)  # while the text side refuses the model, which ends this task
        raise AssertionError("the start was not refused")

    monkeypatch.setattr(SupervisedEngineClient, "start", begin)
    monkeypatch.setattr(launch.start_signals, "install", lambda: None)
    monkeypatch.setattr(launch, "configure_logging", lambda *_: None)
    monkeypatch.setattr(size, "may_have_gpu", lambda: False)
    monkeypatch.setattr(launch, "may_have_gpu", lambda: False)
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))
    arguments = [str(word) for word in start.arguments(machine)]
    for key, value in machine.environment.items():
        monkeypatch.setenv(key, value)
    code = run(["serve", *arguments])
    check(start, code, capsys.readouterr().err)
    assert bool(reached) == start.needs_tokenizer


def test_engine_settings_are_refused_without_torch(machine: Machine) -> None:
    """The whole path of starts that are refused for their model or their engine's settings."""
    code = (
        "import sys\nfrom chunkllama_server.commands import run\n"
        "words = ['serve', '--model', sys.argv[1], '--port', '0', '--device', 'cpu']\n"
        "flags = ['--max-model-len', '9999'], ['--kv-cache-memory', '1k'], ['--backend', 'cuda']\n"
        "codes = {run([*words, *more]) for more in flags}\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'tokenizers', 'gguf'} & set(sys.modules)\n"
        "sys.exit(f'{codes}: {heavy}')"
    )
    command = [sys.executable, "-c", code, str(machine.model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *errors, last = done.stderr.splitlines()
    assert last == "{2}: set()", done.stderr
    assert sum(line.startswith("chunkllama: error: ") for line in errors) == 3


def test_files_of_the_text_side_are_refused_without_the_http_layer(machine: Machine) -> None:
    code = (
        "import asyncio, sys\nfrom chunkllama.engine.supervisor import SupervisedEngineClient\n"
        "from chunkllama_server.commands import run\n"
        "async def begin(*_, **__):\n    await asyncio.sleep(600)\n"
        "SupervisedEngineClient.start = begin\n"
        "words = ['serve', '--model', sys.argv[1], '--port', '0', '--device', 'cpu']\n"
        "flags = ['--chat-template', '/nowhere'], ['--public-prefixes', '/nowhere']\n"
        "codes = {run([*words, *more]) for more in flags}\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'gguf'} & set(sys.modules)\n"
        "sys.exit(f'{codes}: {heavy}')"
    )
    command = [sys.executable, "-c", code, str(machine.model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "{2}: set()", done.stderr


@pytest.mark.nightly
@by_name
def test_a_bad_start_of_a_process_is_one_line(
    start: BadStart, machine: Machine, chunkllama, tmp_path: Path
) -> None:
    arguments = start.arguments(machine)
    cache = {"CHUNKLLAMA_CACHE": str(tmp_path / "cache")}
    done = chunkllama("serve", *arguments, **cache, **machine.environment)
    check(start, done.returncode, done.stderr)
