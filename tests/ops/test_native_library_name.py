"""A library's name is the same in every process: an image built once finds its libraries again."""

from __future__ import annotations

import os
import subprocess
import sys


def test_names_do_not_depend_on_the_hash_seed():
    code = (
        "from chunkllama.ops.native_build import LEVELS, _source_hash;"
        "print([_source_hash(level, '') for level in LEVELS])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1
