"""A real uvicorn server over a fake engine and a byte-level tokenizer, driven by real clients."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from tiny_model import write_tiny_model, write_tokenizer

from chunkllama.text.chat_template import ChatTemplate, load_chat_template
from chunkllama.text.tokenizer import load_tokenizer
from chunkllama_server.api.app import create_app
from chunkllama_server.api.common.structured_outputs import GrammarChecker
from chunkllama_server.api.common.text_service import TextService
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.auth import Tenants
from chunkllama_server.transport.http_protocol import HttpLimits, make_protocol


def _load(name: str) -> Any:
    """A module of this folder, importable from its tests."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fake_engine = _load("fake_engine")
tiny_server_module = _load("tiny_server")
_load("anthropic_helpers")
_load("batch_helpers")
_load("dialect_helpers")
_load("grammar_checks")
_load("in_process")
_load("next_turns")
_load("odd_requests")
_load("openai_checks")
_load("response_helpers")
_load("tool_corpus")

MODEL = fake_engine.MODEL


def allow_all(spec: Any) -> None:
    """Stands for the grammar compiler; refuses what says so."""
    from chunkllama.errors import InvalidRequestError

    if "REFUSE" in spec.text:
        raise InvalidRequestError("the grammar says REFUSE")
    if "SLOW" in spec.text:
        time.sleep(0.4)


@dataclass
class Server:
    """A server that runs in a thread, and its engine."""

    url: str
    engine: Any
    app: Any
    stop: Callable[[], None]

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        # verify: reading the certificate store would take longer than most tests.
        http = openai.DefaultHttpxClient(verify=False)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=http, **options
        )

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, verify=False, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body, headers=headers)

    def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        """POST a one-message chat."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return self.post("/v1/chat/completions", body)


StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def tokenizer_writer() -> Callable[[Path], None]:
    """Writes the tests' tokenizer into a folder."""
    return write_tokenizer


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real server process over a tiny random model (``tiny_server.TinyServer``)."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    with tiny_server_module.serve(folder) as server:
        yield server


@pytest.fixture(scope="session")
def text_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    return tokenizer, load_chat_template(folder, tokenizer)


def make_app(
    parts: tuple[Any, Any], files: Path, template_source: str | None = None, **settings: Any
) -> tuple[Any, Any]:
    """An engine and the application over it.

    Args:
        parts: tokenizer and chat template.
        files: a folder that does not exist yet.
        template_source: of another chat template.
    """
    tokenizer, template = parts
    if template_source is not None:
        template = ChatTemplate(template_source, tokenizer)
    engine = fake_engine.FakeEngine(tokenizer)
    if settings.pop("is_held", False):  # a job that is continued begins before a test can
        engine.gate.clear()
    tenants = Tenants(
        settings.pop("api_keys", {}),
        settings.get("isolation"),
        operator_keys=settings.pop("operator_keys", ()),
        clock=settings.pop("clock", time.monotonic),
    )
    tenants.set_quotas(settings.pop("quotas", {}))
    defaults = settings.pop("generation_defaults", None)
    fork_tokens = settings.pop("fork_tokens", None)
    tracing = settings.pop("tracing", None)
    responses = settings.pop("responses", None)
    # Its requests come when nothing else runs, so a test that counts requests must ask for it.
    settings.setdefault("idle_prefill", False)
    settings.setdefault("files_dir", files)
    configured = Settings(served_model_name=(MODEL, "alias"), **settings)
    app = create_app(
        engine,
        TextService(
            tokenizer,
            template,
            make_template=lambda source: ChatTemplate(source, tokenizer),
            limits=configured,
        ),
        configured,
        tenants,
        GrammarChecker(lambda: allow_all, configured),
        generation_defaults=defaults,
        tracing=tracing,
        responses=responses,
    )
    app.state.context.fork_tokens = fork_tokens
    return engine, app


@contextlib.contextmanager
def starting(
    text_parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartServer]:
    """Yield what starts servers; all of them end with the block."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(
        limits: HttpLimits | None = None, parts: tuple[Any, Any] = text_parts, **settings: Any
    ) -> Server:
        engine, app = make_app(parts, tmp_path_factory.mktemp("files") / "folder", **settings)
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            log_level="warning",
            http=make_protocol(limits or HttpLimits()),
            ws="none",
            loop="asyncio",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        running.append((server, thread))

        def stop() -> None:
            server.should_exit = True
            thread.join()

        return Server(f"http://127.0.0.1:{port}", engine, app, stop)

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(timeout=120)


@pytest.fixture(scope="session")
def app_maker(
    text_parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, Any]]:
    """Makes engines and applications that no server serves, as ``make_app``."""

    def make(**settings: Any) -> tuple[Any, Any]:
        return make_app(text_parts, tmp_path_factory.mktemp("files") / "folder", **settings)

    return make


@pytest.fixture(scope="module")
def start_server(
    text_parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartServer]:
    """Start servers with settings of one's own; they end with the module."""
    with starting(text_parts, tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def shared_server(
    text_parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Serve with default settings until the session ends."""
    with starting(text_parts, tmp_path_factory) as start:
        yield start()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The ordinary server, its engine as new."""
    shared_server.engine.reset()
    return shared_server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
