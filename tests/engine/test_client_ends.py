"""The engine's process and thread: how they begin, and how programs that use them end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import psutil
import pytest

from chunkllama.config import EngineConfig
from chunkllama.engine import process as engine_process
from chunkllama.engine.process import EngineProcess, ProcessEngineClient
from chunkllama.errors import ConfigError
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 9]


def request(name: str, **sampling: object) -> EngineRequest:
    defaults = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
    params = SamplingParams(**{**defaults, **sampling})
    return EngineRequest(request_id=name, prompt_token_ids=PROMPT, sampling=params)


def test_the_engine_loads_while_its_client_is_busy(tiny_model) -> None:
    """It has its configuration before the client's event loop turns again."""

    async def scenario() -> None:
        config = EngineConfig.from_flat(model=str(tiny_model[0]), num_chunks=8, threads=1)
        starting = asyncio.create_task(ProcessEngineClient.start(config))
        await asyncio.sleep(0)
        (child,) = [
            p for p in psutil.Process().children() if "chunkllama.engine.process" in p.cmdline()
        ]
        deadline = time.monotonic() + 600
        while not any("libtorch" in entry.path for entry in child.memory_maps()):
            assert time.monotonic() < deadline, "the engine waits for its client"
            time.sleep(0.05)
        await (await starting).close()

    asyncio.run(scenario())


def test_an_engine_that_cannot_start_says_why_in_one_line(tmp_path) -> None:
    async def scenario() -> str:
        with pytest.raises(ConfigError) as failed:
            await ProcessEngineClient.start(EngineConfig.from_flat(model=str(tmp_path)))
        return str(failed.value)

    message = asyncio.run(scenario())
    assert "config.json" in message and "\n" not in message


UNCLOSED = """
import asyncio, sys
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.in_process import InProcessEngineClient
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

async def main():
    core = build_engine(EngineConfig.from_flat(model=sys.argv[1], dtype="float32", threads=1))
    client = InProcessEngineClient(core)
    sampling = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True, seed=1)
    # no stream, whose end would abort it
    client._send(EngineRequest(request_id="long", prompt_token_ids=[70], sampling=sampling))
    while not (await client.stats()).generation_tokens_total:
        pass
    return client

client = asyncio.run(main())
"""


def test_a_program_that_does_not_close_its_engine_ends_well(tiny_model) -> None:
    """The engine's thread is inside a step then; returning from torch would abort the program."""
    assert end_of(UNCLOSED, tiny_model) == (0, "")


HANGING = """
import threading
import chunkllama.engine.in_process
chunkllama.engine.in_process._EXIT_SECONDS = 0.1
from chunkllama.engine.core import EngineCore
is_reached = threading.Event()
def hang(self):
    is_reached.set()
    threading.Event().wait()
EngineCore.step = hang
"""
HANGING += UNCLOSED.replace(
    "not (await client.stats()).generation_tokens_total", "not is_reached.is_set()"
)


def test_a_step_that_hangs_does_not_keep_a_program(tiny_model) -> None:
    assert end_of(HANGING, tiny_model) == (0, "")


def end_of(program: str, tiny_model) -> tuple[int, str]:
    """The exit code of a program and its errors."""
    command = [sys.executable, "-c", program, str(tiny_model[0])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return ended.returncode, ended.stderr


def test_an_engine_process_whose_client_has_gone_ends_well(tiny_model) -> None:
    async def scenario() -> int:
        config = EngineConfig.from_flat(model=str(tiny_model[0]), num_chunks=32, threads=1)
        process, _ = await EngineProcess.start(config)
        process.send([request("long", max_tokens=400, seed=1)])
        await process.receive()
        process._writer.transport.abort()
        return await asyncio.to_thread(process.child.wait, 300)

    assert asyncio.run(scenario()) == 0


@pytest.mark.parametrize(
    ("end", "code"), [(None, 0), (2, 2), (SystemExit(0), 0), (RuntimeError("planted"), 1)], ids=str
)
def test_an_engine_process_ends_in_one_way(monkeypatch, end, code) -> None:
    def run(_: object) -> int:
        if isinstance(end, BaseException):
            raise end
        return end or 0

    codes = list[int]()
    monkeypatch.setattr(engine_process, "_run", run)
    monkeypatch.setattr(os, "_exit", codes.append)
    engine_process.main()
    assert codes == [code]
