"""The library of level ``amx`` with tile instructions in C++, on CPUs that have all else it needs.

Tests in a process with ``CHUNKLLAMA_TEST_AMX`` see the level.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from chunkllama.backends.cpu import abi, build
from chunkllama.backends.cpu import backend as native
from chunkllama.resources import data_folder

AMX = next(level for level in build.LEVELS if level.name == "amx")
_TILES = {"amx_tile", "amx_bf16"}
_FOLDER = tempfile.TemporaryDirectory()


def missing() -> str:
    """What this CPU lacks beside tiles; empty if the level can be emulated here."""
    features = {name for level in build.available_levels() for name in level.features}
    return ", ".join(sorted(AMX.features - features - _TILES))


def install(patch: pytest.MonkeyPatch) -> None:
    """Make the level, emulated, the only one of this machine."""
    for module in (build, native):
        patch.setattr(module, "available_levels", lambda: (AMX,))
        patch.setattr(module, "known_levels", lambda: (AMX,))
    patch.setattr(abi, "build", lambda level, sanitizer="": _library())


@functools.cache
def _library() -> Path:
    sources = Path(_FOLDER.name) / "cpu"
    shutil.copytree(data_folder("kernels") / "cpu", sources)
    shutil.copy(Path(__file__).with_name("tile_instructions.h"), sources)
    library = Path(_FOLDER.name) / "amx.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_source_files", lambda: sorted(sources.iterdir()))
        build._compile(build.find_compiler(), AMX, "", library)
    return library
