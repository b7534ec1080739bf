"""No full garbage collection of what a server keeps, which would stop all threads of a process."""

from __future__ import annotations

from pathlib import Path

NOTE = """
import gc, os, sys

def freeze_and_note(freeze=gc.freeze):
    freeze()
    kind = "engine" if "chunkllama.engine.process" in sys.orig_argv else "api"
    with open(os.path.join({folder!r}, kind), "w") as file:
        file.write(f"{{gc.get_freeze_count()}} {{len(gc.get_objects())}}")

gc.freeze = freeze_and_note
"""


def test_what_a_server_has_loaded_is_exempt_from_collections(start, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTE.format(folder=str(tmp_path)))
    server = start(PYTHONPATH=str(tmp_path))
    assert server.chat(max_tokens=2).status_code == 200
    for kind in ("api", "engine"):
        frozen, others = map(int, (tmp_path / kind).read_text().split())
        assert frozen > 50_000 and frozen > 2 * others, kind
