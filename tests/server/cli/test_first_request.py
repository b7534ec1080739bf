"""What would stop all clients of a server for a tenth of a second is done before its port opens."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx

NOTES = """
import gc, os, socket, sys

def note(name, text):
    with open(os.path.join({folder!r}, name), "a") as file:
        file.write(text)

def freeze_and_note(freeze=gc.freeze):
    freeze()
    kind = "engine" if "chunkllama.engine.process" in sys.orig_argv else "api"
    note(kind, f"{{gc.get_freeze_count()}} {{len(gc.get_objects())}}")

def listen_and_note(sock, *backlog, listen=socket.socket.listen):
    import pydantic
    build = pydantic.TypeAdapter.__init__
    def build_and_note(*arguments, **options):
        note("schemas", f"{{arguments[1]}}\\n")
        build(*arguments, **options)
    note("ports", "1")
    pydantic.TypeAdapter.__init__ = build_and_note
    listen(sock, *backlog)

gc.freeze, socket.socket.listen = freeze_and_note, listen_and_note
"""


def test_nothing_is_built_and_no_heap_is_searched_while_clients_wait(start, tmp_path: Path) -> None:
    """FastAPI builds a route's schemas when it is first looked for; a full garbage collection
    visits all that a process has loaded."""
    (tmp_path / "sitecustomize.py").write_text(NOTES.format(folder=str(tmp_path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        admin = probe.getsockname()[1]
    server = start("--admin-port", admin, PYTHONPATH=str(tmp_path))
    assert server.chat(max_tokens=2).status_code == 200
    for path in ("/health/live", "/v1/models", "/dashboard", "/nowhere"):
        server.get(path)
    for path in ("/metrics", "/health/ready", "/nowhere"):
        httpx.get(f"http://127.0.0.1:{admin}{path}", timeout=120)
    assert (tmp_path / "ports").exists()
    assert not (tmp_path / "schemas").exists()
    for kind in ("api", "engine"):
        frozen, others = map(int, (tmp_path / kind).read_text().split())
        assert frozen > 50_000 and frozen > 2 * others, kind
