"""A real server process over the random Llama of ``tiny_model``."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from fake_engine import MODEL
from tiny_model import MAX_MODEL_LEN


@dataclass(frozen=True)
class TinyServer:
    """Where it answers, and the folder of its model."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[TinyServer]:
    """The server while the block runs; it must end by itself when asked to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "chunkllama_server.cli", "serve", "--model", str(folder)),
        *("--served-model-name", MODEL, "--port", str(port)),
        *("--num-chunks", "64", "--max-model-len", str(MAX_MODEL_LEN), "--threads", "1"),
        *("--files-dir", str(folder / "files")),
    ]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_ready(url, process, folder / "log")
        yield TinyServer(url, folder, process)
    finally:
        process.terminate()
        assert process.wait(timeout=600) == 0


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())
