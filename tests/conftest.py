"""What every test stands on: one printed seed, and markers that say what was not run.

The helper modules that ``_Helpers`` names are importable from every test module.
"""

from __future__ import annotations

import functools
import os
import ssl
import sys
import zlib
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

# Taken out of the environment: servers under test would refuse it as an unknown setting.
SEED = int(os.environ.pop("CHUNKLLAMA_TEST_SEED", "0"))


class _Helpers(MetaPathFinder):
    """Finds helper modules of tests by name.

    They are loaded when a test imports them: the tests of the server must not import torch through
    this file, and ``inspect``, which torch uses while it is imported, loads lazy modules.
    """

    paths: ClassVar[dict[str, Path]] = {
        "bad_start_table": Path(__file__).parent / "server" / "cli" / "bad_start_table.py",
        "attention_plans": Path(__file__).parent / "attention" / "plans.py",
        "plan_checks": Path(__file__).parent / "attention" / "plan_checks.py",
        "hostile_files": Path(__file__).parent / "models" / "hostile_files.py",
        "tiny_forms": Path(__file__).parent / "models" / "tiny_forms.py",
        "soak": Path(__file__).parent / "soak.py",
        "soak_faults": Path(__file__).parent / "soak_faults.py",
        "soak_run": Path(__file__).parent / "soak_run.py",
        "soak_server": Path(__file__).parent / "soak_server.py",
        "soak_client": Path(__file__).parent / "soak_client.py",
        "moved_chunks": Path(__file__).parent / "engine" / "moved_chunks.py",
        "supervised": Path(__file__).parent / "engine" / "supervised.py",
        "adapter_files": Path(__file__).parent / "adapter_files.py",
        "mask_draws": Path(__file__).parent / "mask_draws.py",
        "tiny_model": Path(__file__).parent / "tiny_model.py",
        "malformed_requests": Path(__file__).parents[1] / "benchmarks" / "malformed_requests.py",
        "native_models": Path(__file__).parent / "backends" / "native_models.py",
        "gguf_files": Path(__file__).parent / "models" / "gguf_files.py",
        "model_families": Path(__file__).parent / "models" / "families.py",
        "template_families": Path(__file__).parent / "text" / "template_families.py",
        "random_texts": Path(__file__).parent / "text" / "random_texts.py",
        "byte_pairs": Path(__file__).parent / "text" / "byte_pairs.py",
        "verify_models": Path(__file__).parent / "verify" / "verify_models.py",
        "registry_files": Path(__file__).parent / "text" / "registry_files.py",
    }

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        found = self.paths.get(fullname)
        return None if found is None else spec_from_file_location(fullname, found)


sys.meta_path.append(_Helpers())

_make_context = ssl.create_default_context


@functools.cache
def _trusting(cafile: str) -> ssl.SSLContext:
    return _make_context(cafile=cafile)


def _shared_context(*arguments: Any, cafile: str | None = None, **options: Any) -> ssl.SSLContext:
    """Read a store of certificates once: clients read it, most of them for a single request."""
    if cafile is None or arguments or options:
        return _make_context(*arguments, cafile=cafile, **options)
    return _trusting(cafile)


ssl.create_default_context = _shared_context


def pytest_report_header() -> str:
    return f"seed: {SEED} (CHUNKLLAMA_TEST_SEED)"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test alone, the same in every run with one seed."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment of a pytest started by a test, which is to use the same seed."""
    return {**os.environ, "CHUNKLLAMA_TEST_SEED": str(SEED)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out (as "deselected") what needs a missing device, and full sizes unless asked for."""
    left_out: set[pytest.Item] = set()
    kinds = ("nightly", "routers", "ray")
    asked_for = [name for name in kinds if name in config.option.markexpr]
    for item in items:
        if item.get_closest_marker("nightly") and not any(map(item.get_closest_marker, asked_for)):
            left_out.add(item)
    gpu = {item for item in items if item.get_closest_marker("gpu")}
    if gpu and not _cuda_device():
        left_out |= gpu
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _cuda_device() -> bool:
    import torch

    return torch.cuda.is_available()
