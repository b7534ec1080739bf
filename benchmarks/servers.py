"""Start a server of this checkout for a benchmark."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HOST = "127.0.0.1"


def free_port() -> int:
    """Return a port of this machine that no program listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started_server(model: str, *flags: str, seconds: float = 180.0) -> Iterator[tuple[int, int]]:
    """Serve a model by the name ``m`` while the block runs; yields port and process id.

    Args:
        flags: of ``chunkllama serve``.
        seconds: until it must be ready.

    Raises:
        SystemExit: with the end of its log, when it does not start or has ended by itself.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "chunkllama_server.cli", "serve", "--model", model),
        *("--served-model-name", "m", "--port", str(port), "--log-level", "error", *flags),
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            end = time.monotonic() + seconds
            while not _is_ready(port):
                if server.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start: {log.read_text()[-500:]}")
                time.sleep(0.1)
            yield port, server.pid
            if server.poll() is not None:
                raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(60)
            if server.poll() is None:
                server.kill()
                server.wait()


def _is_ready(port: int) -> bool:
    url = f"http://{HOST}:{port}/health/ready"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False
