"""Serve OpenVINO GenAI with the subset of the OpenAI API that benchmarks/compare.py uses.

Run it in its own environment (openvino-genai, aiohttp; see README.md in this folder):
    python openvino_server.py FOLDER --port 8103
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import threading

import numpy as np
import openvino
import openvino_genai as genai
from aiohttp import web


class Engine:
    """OpenVINO's ContinuousBatchingPipeline, stepped in a thread of its own."""

    def __init__(self, folder: str, cache_gb: int, loop: asyncio.AbstractEventLoop) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = cache_gb
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = 64
        self._pipeline = genai.ContinuousBatchingPipeline(
            folder,
            scheduler,
            "CPU",
            {"KV_CACHE_PRECISION": "bf16", "INFERENCE_PRECISION_HINT": "bf16"},
        )
        self._loop = loop
        self._live: dict[int, tuple[object, asyncio.Queue]] = {}
        self._ids = itertools.count()
        self._work = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, ids: list[int], max_tokens: int) -> asyncio.Queue:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        inbox: asyncio.Queue = asyncio.Queue()
        with self._work:
            number = next(self._ids)
            tensor = openvino.Tensor(np.array([ids], dtype=np.int64))
            self._live[number] = (self._pipeline.add_request(number, tensor, config), inbox)
            self._work.notify()
        return inbox

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._live:
                    self._work.wait()
                if self._pipeline.has_non_finished_requests():
                    self._pipeline.step()
                for number, (handle, inbox) in list(self._live.items()):
                    done = handle.get_status() != genai.GenerationStatus.RUNNING
                    count = 0
                    while handle.can_read():
                        count += sum(len(out.generated_ids) for out in handle.read().values())
                    if count or done:
                        self._loop.call_soon_threadsafe(inbox.put_nowait, (count, done))
                    if done:
                        del self._live[number]


async def completions(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    inbox = request.app["engine"].add(body["prompt"], body["max_tokens"])
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    done, total = False, 0
    while not done:
        count, done = await inbox.get()
        total += count
        choice = {"index": 0, "text": "x" * count, "finish_reason": "length" if done else None}
        for _ in range(max(count, 1)):
            await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": total}
    await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "smollm2", "object": "model"}]})


async def version(request: web.Request) -> web.Response:
    return web.json_response({"version": genai.__version__})


async def make_app(folder: str, cache_gb: int) -> web.Application:
    app = web.Application(client_max_size=1 << 24)
    app["engine"] = Engine(folder, cache_gb, asyncio.get_running_loop())
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/version", version)
    app.router.add_get("/health", models)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8103)
    parser.add_argument("--cache-gb", type=int, default=4)
    arguments = parser.parse_args()
    web.run_app(
        make_app(arguments.folder, arguments.cache_gb), host="127.0.0.1", port=arguments.port
    )
