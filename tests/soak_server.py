"""The server process of a soak, and the oracle that its answers are compared with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from soak_client import MODEL, NEAR_TIE, Answer, Case, ask, draw_margin


class Server:
    """A server process on the tiny model."""

    def __init__(self, folder: Path, log: Path, *flags: str, **variables: str) -> None:
        self.port, self.admin_port = _free_port(), _free_port()
        command = [sys.executable, "-m", "chunkllama_server.cli", "serve", "--model", str(folder)]
        command += ["--served-model-name", MODEL, "--port", str(self.port), "--threads", "1"]
        command += ["--admin-port", str(self.admin_port), "--log-level", "warning", *flags]
        self.log = log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command, stdout=sink, stderr=sink, env={**os.environ, **variables}
            )

    def get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.admin_port}{path}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read().decode()

    async def metrics(self) -> dict[str, float]:
        text = await asyncio.to_thread(self.get, "/metrics")
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("chunkllama_"): float(value) for name, _, value in lines}

    async def wait_ready(self) -> None:
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{self.log.read_text()}")
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.get, "/health/ready")
                return
            await asyncio.sleep(0.05)

    def engine(self) -> psutil.Process | None:
        """The engine process that runs now; None between two."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                is_engine = "chunkllama.engine.process" in child.cmdline()
                if is_engine and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        return None

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Oracle:
    """Answers of an undisturbed server that runs one request at a time and shares nothing."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def answer(self, case: Case) -> Answer | None:
        """The case's answer; None if a greedy choice in it is nearly a tie."""
        answer = await self._ask(case.path, case.body)
        assert answer.is_done and answer.error is None, (case, answer)
        if case.kind not in ("greedy", "logprobs", "stop", "chat"):
            return answer
        wanted = {"logprobs": True, "top_logprobs": 2} if case.kind == "chat" else {"logprobs": 2}
        body = {**case.body, **wanted, "return_tokens_as_token_ids": True, "stream": False}
        del body["stream_options"]
        logprobs = (await self._whole(case.path, body))["choices"][0]["logprobs"]
        tops = logprobs.get("top_logprobs") or [
            {entry["token"]: entry["logprob"] for entry in position["top_logprobs"]}
            for position in logprobs["content"]
        ]
        for top in tops:
            best, second = sorted(top.values(), reverse=True)[:2]
            if best - second < 2 * NEAR_TIE:
                return None
        return answer

    async def margin(self, case: Case, index: int, at: int, right: list[int], token: int) -> float:
        """By how much ``right[at]`` won the draw against ``token``."""
        logprobs = {}
        for candidate in (right[at], token):
            ids = [*case.body["prompt"], *right[:at], candidate]
            body = {"model": MODEL, "prompt": ids, "max_tokens": 0, "prompt_logprobs": 0}
            whole = await self._whole(case.path, body)
            entry = whole["choices"][0]["prompt_logprobs"][-1]
            logprobs[candidate] = entry[str(candidate)]["logprob"]
        seed, temperature = case.body["seed"], case.body["temperature"]
        return draw_margin(seed, temperature, index, at, logprobs)

    async def _ask(self, path: str, body: dict[str, Any]) -> Answer:
        return await ask(self._server.port, path, body, Answer())

    async def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        def post() -> dict[str, Any]:
            url = f"http://127.0.0.1:{self._server.port}{path}"
            request = urllib.request.Request(
                url, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read())

        return await asyncio.to_thread(post)
