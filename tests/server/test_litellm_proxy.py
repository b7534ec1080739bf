"""LiteLLM's proxy in front of the server, by openai-python: chat, stream, tool, embedding.

The proxy is an application whose dependencies exclude the server's, so it is no part of an extra:
the test uses the ``litellm`` of the environment that ``make nightly`` makes for it, or of the path
(``pipx install 'litellm[proxy]'``).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import MODEL

CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
TAGGED = f"say(<tool_call>{CALL}</tool_call>)yas"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
SECONDS = 300


def program() -> str:
    """The proxy's command."""
    own = Path(sys.prefix) / "litellm-proxy" / "bin"
    found = shutil.which("litellm", path=os.pathsep.join([str(own), os.environ.get("PATH", "")]))
    assert found, "make nightly installs LiteLLM's proxy; else: pipx install 'litellm[proxy]'"
    return found


@pytest.fixture(scope="module")
def proxy(shared_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    command = program()
    folder = tmp_path_factory.mktemp("litellm")
    shared_server.engine.reset()
    parameters = {"api_base": f"{shared_server.url}/v1", "api_key": "none"}
    names = {
        "chat": f"openai/{MODEL}",
        "messages": f"anthropic/{MODEL}",
        "ollama": f"ollama_chat/{MODEL}",
        "embedding": f"openai/{MODEL}",
    }
    models = [
        {"model_name": name, "litellm_params": {"model": model, **parameters}}
        for name, model in names.items()
    ]
    for entry in models:
        if entry["model_name"] in ("messages", "ollama"):  # their paths are below the root
            entry["litellm_params"]["api_base"] = shared_server.url
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model_list": models}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = f"sk-{secrets.token_hex(32)}"
    environment = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it has no other machine to ask
        "LITELLM_MASTER_KEY": key,
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("DATABASE_URL", None)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [command, "--config", config, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
        )
    try:
        _wait_ready(f"http://127.0.0.1:{port}", process, folder / "log")
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key=key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=False),
        )
    finally:
        process.terminate()
        process.wait(60)


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/liveliness").status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def users(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["chat", "messages", "ollama"])
def test_chat_and_a_stream(proxy, model) -> None:
    answer = proxy.chat.completions.create(model=model, messages=users("say(Paris)yas"))
    assert answer.choices[0].message.content == "Paris"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("Paris") + 1
    chunks = proxy.chat.completions.create(
        model=model, messages=users("say(Paris)yas"), stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris"


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["chat", "messages", "ollama"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_and_its_result(proxy, model, stream) -> None:
    asked = {"model": model, "tools": [TOOL], "messages": users(TAGGED)}
    if stream:
        with proxy.chat.completions.stream(**asked) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = proxy.chat.completions.create(**asked).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call.id, "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}],
    }  # fmt: skip
    result = {"role": "tool", "tool_call_id": call.id, "content": "say(sunny)yas"}
    answer = proxy.chat.completions.create(
        model=model, tools=[TOOL], messages=[*users("Oslo?"), turn, result]
    )
    assert answer.choices[0].message.content == "sunny"


@pytest.mark.nightly
def test_an_embedding(proxy) -> None:
    answer = proxy.embeddings.create(model="embedding", input=["abc", "d"])
    for row in answer.data:
        assert row.embedding[:2] == pytest.approx([0.6, 0.8])
    assert len(answer.data) == 2
    assert answer.usage.prompt_tokens == 4


@pytest.mark.nightly
def test_a_refusal_keeps_its_status(proxy) -> None:
    with pytest.raises(openai.BadRequestError):
        proxy.chat.completions.create(model="chat", messages=users("x" * 5000))
