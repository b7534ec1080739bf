"""Load, fuzzer, fault injector and checker in one program, against one real server.

    python tests/soak.py --seed 1 --minutes 10 --faults kill,stop,memory,raise

Every stream's token ids are compared with those of a serial oracle: the same request, alone, on a
server that shares and caches nothing. A sampled stream may leave the oracle where the draw was
nearly a tie. Counters and pool are checked while it runs and when it is idle. The outcome is one
JSON object; with a failure the exit code is 1, and the command with its seed repeats the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from soak_client import (
    MODEL,
    NEAR_TIE,
    Answer,
    Case,
    ask,
    draw_margin,
    make_cases,
)
from tiny_model import write_tiny_model

FAULTS = ("kill", "stop", "memory", "raise")
PLANTED = "step:raise@p=0.002,commit:raise@p=0.002,send:kill@p=0.001"
MAX_MODEL_LEN = 1024
POISON = [
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n{,}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 12\r\n\r\n" + b'{"model":[]}',
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"BREW /pot HTTP/9.9\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"",
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run: for ``minutes``, or until so many whole streams and faults."""

    seed: int
    faults: tuple[str, ...] = FAULTS
    minutes: float = 0.0
    streams: int = 0
    num_faults: int = 0
    concurrency: int = 16
    num_cases: int = 70
    max_tokens: int = 200
    cancels: bool = True
    flags: tuple[str, ...] = ()


@dataclass(eq=False)
class Live:
    """A stream in progress; ``gained`` since the last fault."""

    answer: Answer
    at_fault: int = 0

    @property
    def gained(self) -> bool:
        return self.answer.num_tokens > self.at_fault


@dataclass
class Outcome:
    """Counts, and a line for each failure."""

    whole: int = 0
    left: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    fuzzed: int = 0
    near_ties: int = 0
    sampled: int = 0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


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
        return draw_margin(case, index, at, logprobs)

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


class Soak:
    """One run against one server; see ``run``."""

    def __init__(
        self, options: Options, server: Server, oracle: Oracle, expected: dict[Case, Answer]
    ) -> None:
        self._options = options
        self._server = server
        self._oracle = oracle
        self._expected = expected
        self._cases = list(expected)
        self._live: set[Live] = set()
        self._ends_at = time.monotonic() + options.minutes * 60
        self.outcome = Outcome()

    def is_over(self) -> bool:
        """Nothing new is to begin."""
        options, outcome = self._options, self.outcome
        if outcome.failures:
            return True
        if options.minutes:
            return time.monotonic() >= self._ends_at
        return outcome.whole >= options.streams and self._faults_are_over()

    def _faults_are_over(self) -> bool:
        return sum(self.outcome.faults.values()) >= self._options.num_faults

    async def run(self) -> None:
        """Load until ``is_over``; then every stream may end."""
        others = [self._inject(), self._fuzz(), self._check_counters()]
        others_tasks = [asyncio.create_task(other) for other in others]
        seeds = range(self._options.concurrency)
        try:
            await asyncio.gather(*(self._load(seed) for seed in seeds))
            await asyncio.gather(*others_tasks)
        finally:
            for task in others_tasks:
                task.cancel()

    def _fail(self, what: str) -> None:
        self.outcome.failures.append(what)

    # -- load ---------------------------------------------------------------------------------

    async def _load(self, number: int) -> None:
        rng = random.Random(f"{self._options.seed}-{number}")
        while not self.is_over():
            case = rng.choice(self._cases)
            how = rng.random() if self._options.cancels else 1.0
            if how < 0.15:
                await self._leave_after_tokens(case, rng.randrange(1, 20))
            elif how < 0.3:
                await self._leave_after_seconds(case, rng.random() * 0.03)
            await self._read_whole(case)

    async def _leave_after_tokens(self, case: Case, count: int) -> None:
        with self._streaming() as live:
            await ask(self._server.port, case.path, case.body, live.answer, stop_after=count)
        self._check_refusal(case, live.answer)
        self.outcome.left += 1

    async def _leave_after_seconds(self, case: Case, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await ask(self._server.port, case.path, case.body, Answer())
        self.outcome.left += 1

    async def _read_whole(self, case: Case) -> None:
        while not self.outcome.failures:
            with self._streaming() as live:
                answer = await ask(self._server.port, case.path, case.body, live.answer)
            code = (answer.error or {}).get("code")
            if answer.status in (429, 503) or code == "grammar_too_complex":  # on a slow machine
                self.outcome.refused[str(answer.status)] += 1
                await asyncio.sleep(0.05)
                continue
            self.outcome.gaps.append(max(answer.gaps, default=0.0))
            await self._compare(case, answer)
            return

    @contextlib.contextmanager
    def _streaming(self) -> Iterator[Live]:
        live = Live(Answer())
        self._live.add(live)
        try:
            yield live
        finally:
            self._live.discard(live)

    # -- checks -------------------------------------------------------------------------------

    def _check_refusal(self, case: Case, answer: Answer) -> None:
        code = (answer.error or {}).get("code")
        is_refused = answer.status in (0, 429, 503) or code == "grammar_too_complex"
        if not is_refused and (answer.status != 200 or answer.error):
            self._fail(f"{case.name}: status {answer.status}, {answer.error}")

    async def _compare(self, case: Case, answer: Answer) -> None:
        right = self._expected[case]
        if answer.status != 200 or answer.error is not None or not answer.is_done:
            self._fail(f"{case.name}: status {answer.status}, done {answer.is_done}, "
                       f"error {answer.error}")  # fmt: skip
            return
        self.outcome.whole += 1
        self.outcome.sampled += case.is_sampled
        self.outcome.tokens += answer.num_tokens
        if answer.usage["completion_tokens"] != answer.num_tokens and case.kind != "stop":
            self._fail(f"{case.name}: usage {answer.usage}, {answer.num_tokens} tokens sent")
        if answer.tokens == right.tokens:
            same = answer.text == right.text and answer.reasons == right.reasons
            pairs = zip(answer.logprobs.get(0, []), right.logprobs.get(0, []), strict=True)
            if not same or any(abs(a - b) > 1e-3 for a, b in pairs):
                self._fail(
                    f"{case.name}: equal tokens, but another text, reason or log-probability"
                )
            return
        await self._explain(case, answer, right)

    async def _explain(self, case: Case, answer: Answer, right: Answer) -> None:
        """A draw that was nearly a tie may go either way; anything else is wrong."""
        for index, expected in right.tokens.items():
            got = answer.tokens.get(index, [])
            differs = [at for at, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b]
            if got == expected:
                continue
            margin = None
            if case.is_sampled and differs:
                at = differs[0]
                margin = await self._oracle.margin(case, index, at, expected, got[at])
            if margin is None or margin > NEAR_TIE:
                at = differs[0] if differs else min(len(got), len(expected))
                self._fail(f"{case.name}: choice {index} differs at {at}, margin {margin}: "
                           f"{got[at:at + 5]} for {expected[at:at + 5]}")  # fmt: skip
                return
        self.outcome.near_ties += 1

    async def _check_counters(self) -> None:
        while not self.is_over():
            await self._check_metrics(await self._server.metrics())
            await asyncio.sleep(0.5)

    async def _check_metrics(self, metrics: dict[str, float]) -> None:
        ended = sum(v for k, v in metrics.items() if k.startswith("request_finished_total"))
        if metrics["request_accepted_total"] != ended + metrics["requests_live"]:
            self._fail(f"I1: {metrics['request_accepted_total']} accepted, {ended} ended, "
                       f"{metrics['requests_live']} live")  # fmt: skip
        chunks = sum(v for k, v in metrics.items() if k.startswith("kv_chunks{"))
        if chunks != metrics["kv_chunks_capacity"]:
            self._fail(f"I2: {chunks} chunks of {metrics['kv_chunks_capacity']}")
        if metrics["invariant_violations"]:
            self._fail(f"{metrics['invariant_violations']} invariants violated")

    async def check_idle(self) -> dict[str, float]:
        """Wait until nothing runs; returns the metrics of then."""
        while True:
            metrics = await self._server.metrics()
            names = ("requests_live", "requests_running", "requests_waiting")
            busy = [metrics[name] for name in names]
            if not any(busy) and metrics["engine_stats_age_seconds"] < 0.5:
                break
            await asyncio.sleep(0.05)
        await self._check_metrics(metrics)
        for state in ("private", "referenced"):
            if held := metrics[f'kv_chunks{{state="{state}"}}']:
                self._fail(f"I2: {held} {state} chunks in an idle server")
        return metrics

    # -- fuzzer and faults --------------------------------------------------------------------

    async def _fuzz(self) -> None:
        rng = random.Random(f"{self._options.seed}-fuzz")
        while not self.is_over():
            raw = rng.choice(POISON)
            reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
            try:
                writer.write(raw)
                status = await asyncio.wait_for(reader.readline(), 1.0) if raw else b""
            except (TimeoutError, ConnectionError):
                status = b""
            finally:
                writer.transport.abort()
            if status and int(status.split()[1]) not in (400, 404, 405, 408, 413, 431, 503):
                self._fail(f"fuzzer: {status!r} for {raw[:60]!r}")
            self.outcome.fuzzed += 1
            await asyncio.sleep(0.02)

    async def _inject(self) -> None:
        rng = random.Random(f"{self._options.seed}-faults")
        kinds = [kind for kind in self._options.faults if kind != "raise"]
        if not kinds:
            return
        watched: set[Live] = set()  # those that were live when the last fault was over
        while not self.is_over() and (self._options.minutes or not self._faults_are_over()):
            engine = self._server.engine()
            waits = any(live in self._live and not live.gained for live in watched)
            if engine is None or waits or not any(live.gained for live in self._live):
                await asyncio.sleep(0.002)
                continue
            kind = rng.choice(kinds)
            restarts = (await self._server.metrics())["engine_restarts_total"]
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                _harm(engine, kind)
            self.outcome.faults[kind] += 1
            if kind != "memory":  # which may go unnoticed for long
                while (await self._server.metrics())["engine_restarts_total"] <= restarts:
                    await asyncio.sleep(0.02)
                await self._server.wait_ready()
            # What the process had sent before its end has arrived by now.
            watched = set(self._live)
            for live in watched:
                live.at_fault = live.answer.num_tokens


def _harm(engine: psutil.Process, kind: str) -> None:
    if kind == "memory":
        size = engine.memory_info().vms
        resource.prlimit(engine.pid, resource.RLIMIT_AS, (size, size))
    else:
        os.kill(engine.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


async def soak(options: Options, folder: Path) -> dict[str, Any]:
    """Run everything in ``folder``, which holds the model and the logs."""
    write_tiny_model(folder, MAX_MODEL_LEN)
    alone = Server(folder, folder / "oracle.log", "--num-chunks", "64", "--max-num-seqs", "1",
                   "--no-enable-prefix-caching")  # fmt: skip
    planted = "raise" in options.faults
    variables = {"CHUNKLLAMA_TEST_MODE": "1", "CHUNKLLAMA_FAULTS": PLANTED} if planted else {}
    server = Server(folder, folder / "server.log", "--num-chunks", "320", "--engine-hang-seconds",
                    "3", *options.flags, **variables)  # fmt: skip
    try:
        await asyncio.gather(alone.wait_ready(), server.wait_ready())
        oracle = Oracle(alone)
        expected: dict[Case, Answer] = {}
        for case in make_cases(options.seed, options.num_cases, options.max_tokens):
            if (answer := await oracle.answer(case)) is not None:
                expected[case] = answer
        return await _run(options, server, oracle, expected)
    finally:
        for each in (alone, server):
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()


async def _run(
    options: Options, server: Server, oracle: Oracle, expected: dict[Case, Answer]
) -> dict[str, Any]:
    run = Soak(options, server, oracle, expected)
    api = psutil.Process(server.process.pid)
    began, descriptors, memory = time.monotonic(), api.num_fds(), api.memory_info().rss
    await run.run()
    outcome = run.outcome
    if outcome.failures:
        return _summary(options, outcome, server)
    metrics = await run.check_idle()
    grown = (api.memory_info().rss - memory) / 2**20
    await _wait_until(lambda: api.num_fds() <= descriptors + 2, outcome, "descriptors are left")
    family = [api, *api.children(recursive=True)]
    if (code := await asyncio.to_thread(server.stop)) != 0:
        outcome.failures.append(f"exit code {code} after SIGTERM")
    if alive := psutil.wait_procs(family[1:], timeout=10)[1]:
        outcome.failures.append(f"processes are left: {alive}")
    flips = outcome.near_ties / max(outcome.sampled, 1)
    if outcome.near_ties > 1 and flips > 0.01:
        outcome.failures.append(f"{flips:.2%} of the sampled streams left the oracle at a near tie")
    numbers = {
        "seconds": round(time.monotonic() - began, 1),
        "engine_restarts": metrics["engine_restarts_total"],
        "replayed_requests": metrics["replayed_requests_total"],
        "watchdog_kills": metrics["watchdog_kills_total"],
        "preemptions": metrics["preemptions_total"],
        "api_memory_grown_mb": round(grown, 1),
    }
    return _summary(options, outcome, server) | numbers


async def _wait_until(condition: Callable[[], bool], outcome: Outcome, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    outcome.failures.append(what)


def _summary(options: Options, outcome: Outcome, server: Server) -> dict[str, Any]:
    gaps = sorted(outcome.gaps) or [0.0]
    summary = {
        "seed": options.seed,
        "faults": dict(outcome.faults),
        "whole_streams": outcome.whole,
        "left_streams": outcome.left,
        "sampled_streams": outcome.sampled,
        "near_ties": outcome.near_ties,
        "tokens": outcome.tokens,
        "refused": dict(outcome.refused),
        "fuzzed": outcome.fuzzed,
        "longest_gap_p50": round(gaps[len(gaps) // 2], 3),
        "longest_gap_p99": round(gaps[int(0.99 * (len(gaps) - 1))], 3),
        "longest_gap": round(gaps[-1], 3),
        "failures": outcome.failures[:20],
    }
    if outcome.failures:
        summary["log"] = server.log.read_text()[-3000:]
    return summary


def run(options: Options) -> dict[str, Any]:
    """Run a soak in a temporary folder; ``failures`` of the result is empty if all was right."""
    with tempfile.TemporaryDirectory(prefix="chunkllama-soak-") as folder:
        return asyncio.run(soak(options, Path(folder)))


def main() -> int:
    """Read the command line, run, print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--num-faults", type=int, default=0)
    parser.add_argument("--faults", default=",".join(FAULTS), help="of kill, stop, memory, raise")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--no-cancels", action="store_true")
    parser.add_argument("--flags", default="", help="more flags of the server, as one word")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    faults = tuple(fault for fault in given.faults.split(",") if fault)
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"unknown faults: {', '.join(sorted(unknown))}")
    outcome = run(
        Options(
            seed=given.seed, faults=faults, minutes=given.minutes, streams=given.streams,
            num_faults=given.num_faults, concurrency=given.concurrency,
            max_tokens=given.max_tokens, cancels=not given.no_cancels,
            flags=tuple(given.flags.split()),
        )
    )  # fmt: skip
    outcome["command"] = " ".join(["python", "tests/soak.py", *sys.argv[1:]])
    text = json.dumps(outcome, indent=1)
    print(text)
    if given.save is not None:
        given.save.write_text(text + "\n")
    return 1 if outcome["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
