"""Run the command line in real processes, with a tiny random model to serve."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file
from tiny_model import byte_tokenizer

from chunkllama.models.config import read_spec
from chunkllama.models.tensors import expected_shapes
from chunkllama_server.commands import run

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 258,
}


@pytest.fixture(autouse=True, scope="session")
def default_hangup() -> Iterator[None]:
    """Let no child inherit an ignored SIGHUP from tests that run under nohup: it would stay so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def write_model(folder: Path) -> Path:
    """A complete model folder: random weights, a byte-level tokenizer, a ChatML template."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.normal(0, 0.1, shape) if len(shape) > 1 else np.ones(shape)).astype(np.float32)
        for name, shape in expected_shapes(read_spec(folder))
    }
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def broken_model(tmp_path: Path) -> Path:
    """A model folder of one's own to damage."""
    return write_model(tmp_path / "broken")


Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CHUNKLLAMA_")}
    return {**clean, "OMP_NUM_THREADS": "1", **extra}


@pytest.fixture
def chunkllama() -> Run:
    """Run one command line to its end."""

    def run(*arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "chunkllama_server.cli", *map(str, arguments)],
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command line in this process: each process of its own imports everything again."""

    def call(*arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
        for name, value in extra.items():
            monkeypatch.setenv(name, value)
        words = [str(argument) for argument in arguments]
        code = run(words)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, out, err)

    return call


@dataclass
class Served:
    """A server process."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    model: str

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=120, **options)

    def chat(self, content: str = "hi", **fields: object) -> httpx.Response:
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)

    @contextlib.contextmanager
    def paused_engine(self) -> Iterator[psutil.Process]:
        """Stop the engine process, so that it receives everything sent meanwhile at once."""
        (engine,) = psutil.Process(self.process.pid).children()
        engine.suspend()
        try:
            yield engine
        finally:
            engine.resume()

    def resume_engine(self) -> None:
        """Wait until the engine of ``start_stopping`` has stopped, then let it go on."""
        (engine,) = psutil.Process(self.process.pid).children()
        while engine.status() != psutil.STATUS_STOPPED:
            time.sleep(0.005)
        engine.resume()

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return self.process.wait(timeout=120)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def starting(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Yield what starts ``chunkllama serve`` on the tiny model and waits until it is ready."""
    running: list[Served] = []

    def begin(
        *flags: object, scheme: str = "http", log: Path | None = None, **extra: str
    ) -> Served:
        port = free_port()
        folder = tmp_path_factory.mktemp("serve")
        log = log or folder / "log"
        command = [sys.executable, "-m", "chunkllama_server.cli", "serve", "--port", str(port)]
        command += ["--files-dir", str(folder / "files")]
        command += ["--model", str(tiny_model), "--num-chunks", "64", "--backend", "reference"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *map(str, flags)], env=environment(**extra), stdout=file, stderr=file
            )
        served = Served(process, f"{scheme}://127.0.0.1:{port}", log, "tiny")
        running.append(served)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            try:
                if served.get("/health/ready", verify=False).status_code == 200:
                    return served
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    yield begin
    for served in running:
        if served.process.poll() is None:
            served.stop()


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Start servers with flags of one's own; they end with the module."""
    with starting(tiny_model, tmp_path_factory) as begin:
        yield begin


@pytest.fixture(scope="session")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with default settings, which no test may end or change."""
    with starting(tiny_model, tmp_path_factory) as begin:
        yield begin()


@pytest.fixture
def start_stopping(start: Callable) -> Callable:
    """As ``start``, but the engine stops before it sends what its 20th step has computed.

    Until it is resumed, no request of more tokens can end, however long a test takes.
    """

    def begin(*flags: object, **extra: str) -> Served:
        faults = {"CHUNKLLAMA_TEST_MODE": "1", "CHUNKLLAMA_FAULTS": "send:stop@20"}
        return start(*flags, "--engine-hang-seconds", 3600, **faults, **extra)

    return begin
