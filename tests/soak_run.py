"""One run of a soak: load, fuzzer, faults and checks at once against one server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from soak_client import NEAR_TIE, Answer, Case, ask
from soak_faults import DEFAULT_FAULTS, POISON, FaultInjector, send_poison, stay_idle
from soak_server import Oracle, Server


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run: for ``minutes``, or until so many whole streams and faults.

    Attributes:
        fault_seconds: the mean pause between two faults; without one, the next fault comes as soon
            as every stream has gained a token.
        idle_sockets: connections that are kept open and send nothing.
    """

    seed: int
    faults: tuple[str, ...] = DEFAULT_FAULTS
    minutes: float = 0.0
    streams: int = 0
    num_faults: int = 0
    fault_seconds: float = 0.0
    concurrency: int = 16
    num_cases: int = 70
    max_tokens: int = 200
    cancels: bool = True
    idle_sockets: int = 0
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
    """Counts, and a line for each failure.

    Attributes:
        memory: (seconds since the start, MB of the API process, MB of the engine process).
    """

    whole: int = 0
    left: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    fuzzed: int = 0
    near_ties: int = 0
    sampled: int = 0
    tokens: int = 0
    most_streams: int = 0
    most_descriptors: int = 0
    gaps: list[float] = field(default_factory=list)
    silence: float = 0.0
    memory: list[tuple[float, float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def drift(self) -> float:
        """MB that the API process has grown by from the second tenth of the run to the last."""
        tenth = len(self.memory) // 10
        if not tenth:
            return 0.0
        first, last = self.memory[tenth : 2 * tenth], self.memory[-tenth:]
        return statistics.median(m[1] for m in last) - statistics.median(m[1] for m in first)


class Soak:
    """One run against one server; see ``run``."""

    def __init__(
        self,
        options: Options,
        server: Server,
        marks: Path,
        oracle: Oracle,
        expected: dict[Case, Answer],
    ) -> None:
        self._options = options
        self._server = server
        self._marks = marks
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
        others = [self._inject(), self._fuzz(), self._check_counters(), self._watch_processes()]
        watchers = [asyncio.create_task(other) for other in others]
        idle = [
            asyncio.create_task(stay_idle(self._server.port, bool(number % 2)))
            for number in range(self._options.idle_sockets)
        ]
        seeds = range(self._options.concurrency)
        try:
            await asyncio.gather(*(self._load(seed) for seed in seeds))
            await asyncio.gather(*watchers)
        finally:
            for task in (*watchers, *idle):
                task.cancel()
            await asyncio.gather(*watchers, *idle, return_exceptions=True)

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
            self.outcome.silence = max(self.outcome.silence, answer.silence)
            await self._compare(case, answer)
            return

    @contextlib.contextmanager
    def _streaming(self) -> Iterator[Live]:
        live = Live(Answer())
        self._live.add(live)
        self.outcome.most_streams = max(self.outcome.most_streams, len(self._live))
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

    # -- fuzzer, faults and memory ------------------------------------------------------------

    async def _fuzz(self) -> None:
        rng = random.Random(f"{self._options.seed}-fuzz")
        while not self.is_over():
            if failure := await send_poison(self._server.port, rng.choice(POISON)):
                self._fail(failure)
            self.outcome.fuzzed += 1
            await asyncio.sleep(0.02)

    async def _inject(self) -> None:
        options = self._options
        rng = random.Random(f"{options.seed}-faults")
        injector = FaultInjector(self._server, self._marks, rng)
        kinds = itertools.cycle(rng.sample(options.faults, len(options.faults)))
        watched: set[Live] = set()  # those that were live when the last fault was over
        while options.faults and not self.is_over():
            if not options.minutes and self._faults_are_over():
                return
            engine = self._server.engine()
            waits = any(live in self._live and not live.gained for live in watched)
            if engine is None or waits or not any(live.gained for live in self._live):
                await asyncio.sleep(0.002)
                continue
            kind = await injector.end(engine, next(kinds), self.is_over)
            self.outcome.faults[kind] += 1
            # What the process had sent before its end has arrived by now.
            watched = set(self._live)
            for live in watched:
                live.at_fault = live.answer.num_tokens
            if options.fault_seconds:
                await asyncio.sleep(rng.expovariate(1 / options.fault_seconds))

    async def _watch_processes(self) -> None:
        began, api = time.monotonic(), psutil.Process(self._server.process.pid)
        while not self.is_over():
            engine, of_engine = self._server.engine(), 0.0
            with contextlib.suppress(psutil.Error):
                of_engine = engine.memory_info().rss / 2**20 if engine is not None else 0.0
            seconds = time.monotonic() - began
            self.outcome.memory.append((seconds, api.memory_info().rss / 2**20, of_engine))
            self.outcome.most_descriptors = max(self.outcome.most_descriptors, api.num_fds())
            await asyncio.sleep(1.0)
