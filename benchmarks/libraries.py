"""Time own code against the library that could take its place.

    python benchmarks/libraries.py

- streamed decoding: ``IncrementalDetokenizer`` against ``DecodeStream`` of tokenizers, with the
  demo model's tokenizer; also how many texts, cut at each token of a line of long characters,
  each streams as they are decoded whole
- the load test's client: ``Endpoint.stream`` against httpx, processor time of 16 streams
- reading the headers of weights: ``read_header`` against ``safe_open`` of safetensors

Runs alternate; a ratio is the library's time over that of our code. Writes
``results/libraries.json``.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from machine import cpu_name
from safetensors import safe_open
from servers import HOST, free_port
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.decoders import DecodeStream

from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.safetensors import read_header
from chunkllama.text.detokenizer import IncrementalDetokenizer
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer
from chunkllama_server.bench.client import Endpoint, Outcome

RESULTS = Path(__file__).parent / "results" / "libraries.json"
MODEL = "smollm2-135m-instruct"
ROUNDS = 5
STREAMS, EVENTS = 16, 500
CHARACTERS = (
    "naïve café \U0001f999\U0001f3fd 你好，世界 здравствуй привіт नमस्ते 안녕하세요 👩‍👩‍👧 \u0301e"
)
SERVER = f"""
import asyncio, json, sys
event = {{"choices": [{{"index": 0, "delta": {{"content": " word"}}, "finish_reason": None}}]}}
data = b"data: " + json.dumps(event).encode() + b"\\n\\n"
part = b"%x\\r\\n%s\\r\\n" % (len(data), data)
async def answer(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n"
                 b"transfer-encoding: chunked\\r\\n\\r\\n")
    for _ in range({EVENTS}):
        writer.write(part)
        await asyncio.sleep(0.002)
    writer.write(b"e\\r\\ndata: [DONE]\\n\\n\\r\\n0\\r\\n\\r\\n")
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(answer, "{HOST}", int(sys.argv[1]))
    print("ready", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def compare(ours: Callable[[], float], library: Callable[[], float]) -> dict[str, object]:
    """Time both in turns; each call returns its seconds."""
    pairs = []
    for number in range(ROUNDS + 1):  # the first is not counted
        order = (ours, library) if number % 2 else (library, ours)
        seconds = {call: call() for call in order}
        pairs.append((seconds[ours], seconds[library]))
    first, second = zip(*pairs[1:], strict=True)
    ratios = [b / a for a, b in pairs[1:]]
    return {
        "ours_ms": round(1e3 * statistics.median(first), 3),
        "library_ms": round(1e3 * statistics.median(second), 3),
        "ratio": round(statistics.median(ratios), 2),
        "lowest_and_highest_ratio": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    call()
    return clock() - began


def stream_ours(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    return "".join([*(detokenizer.add([i]) for i in ids), detokenizer.finish()])


def stream_library(tokenizer: LibraryTokenizer, ids: list[int]) -> str:
    stream = DecodeStream(skip_special_tokens=True)
    return "".join(stream.step(tokenizer, i) or "" for i in ids)


def decoding(folder: Path) -> dict[str, object]:
    ours, library = load_tokenizer(folder), LibraryTokenizer.from_file(f"{folder}/tokenizer.json")
    ids = ours.encode((Path(__file__).parents[1] / "README.md").read_text())[:4000]
    result = compare(
        lambda: timed(lambda: stream_ours(ours, ids)),
        lambda: timed(lambda: stream_library(library, ids)),
    )
    characters = ours.encode(CHARACTERS)
    equal = {"ours": 0, "library": 0}
    for end in range(1, len(characters) + 1):
        text = characters[:end]
        whole = library.decode(text, skip_special_tokens=True)
        equal["ours"] += stream_ours(ours, text) == whole
        equal["library"] += stream_library(library, text) == whole
    return {"tokens": len(ids), **result, "cut_texts": len(characters), "as_decoded_whole": equal}


async def load_ours(url: str) -> None:
    endpoint = Endpoint(url)
    outcomes = [Outcome(tenant=0, turn=0, started=0) for _ in range(STREAMS)]
    await asyncio.gather(*(endpoint.stream("/v1/chat/completions", {}, o) for o in outcomes))
    assert all(len(o.arrivals) == EVENTS and not o.error for o in outcomes)


async def load_httpx(url: str) -> None:
    async def one(client: httpx.AsyncClient) -> int:
        arrivals = []
        async with client.stream("POST", f"{url}/v1/chat/completions", json={}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and not line.startswith("data: [DONE]"):
                    choice = json.loads(line[6:])["choices"][0]
                    arrivals.append((time.monotonic(), choice["delta"]["content"]))
        return len(arrivals)

    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        counts = await asyncio.gather(*(one(client) for _ in range(STREAMS)))
    assert counts == [EVENTS] * STREAMS


def client() -> dict[str, object]:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            url = f"http://{HOST}:{port}"
            result = compare(
                lambda: timed(lambda: asyncio.run(load_ours(url)), time.process_time),
                lambda: timed(lambda: asyncio.run(load_httpx(url)), time.process_time),
            )
        finally:
            server.terminate()
    return {"events": STREAMS * EVENTS, **result}


def headers(folder: Path) -> dict[str, object]:
    path = folder / "model.safetensors"

    def library() -> None:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                part = file.get_slice(name)
                part.get_shape(), part.get_dtype()

    return {
        "tensors": len(read_header(path)),
        **compare(lambda: timed(lambda: read_header(path)), lambda: timed(library)),
    }


def main() -> None:
    folder = resolve_model(MODEL)
    record = {
        "command": "python benchmarks/libraries.py",
        "machine": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],
        "streamed decoding: DecodeStream of tokenizers": decoding(folder),
        "client of the load test: httpx": client(),
        "headers of weights: safe_open of safetensors": headers(folder),
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
