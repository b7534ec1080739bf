"""An engine client that answers what the prompt tells it to, so that tests of the HTTP layer are
exact.

``say(text)`` in the last message makes it answer ``text``; otherwise it answers "Paris". It honours
n, max_tokens, min_tokens, ignore_eos and logprobs, remembers prompts per namespace for cached-token
counts, and records aborts.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from chunkllama.adapter_messages import AdapterInfo
from chunkllama.errors import ConfigError, EngineDeadError, InvalidRequestError
from chunkllama.messages import (
    CacheExplanation,
    ChoiceDelta,
    EngineReady,
    EngineRequest,
    EngineStats,
    SetTenants,
    TokenDelta,
    TokenLogprob,
)
from chunkllama.tuning_messages import StartTuning

MODEL = "org/tiny"
MAX_MODEL_LEN = 2048
MAX_PROMPTS = 32  # that it remembers: each request is compared with all of them
# Seconds it says a request has waited, and has taken for its prompt and for each later delta.
DURATIONS = (0.25, 0.5, 0.125)


def _as_text(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


def logprob_of(token_id: int, num_top: int) -> TokenLogprob:
    top = [((token_id + i) % 256, -0.25 * (i + 1)) for i in range(num_top)]
    return TokenLogprob(token_id, -0.25, 1, top)


class FakeEngine:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.info = EngineReady(
            model_name="tiny",
            vocab_size=tokenizer.vocab_size,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=list(tokenizer.eos_token_ids),
            num_chunks=64,
            chunk_size=64,
            max_request_tokens=MAX_MODEL_LEN,
            device="cpu",
            backend="fake",
            dtype="bfloat16",
        )
        self.reset()

    def reset(self) -> None:
        self.is_ready = True
        self.adapters: dict[str, AdapterInfo] = {}
        self.tunings: list[StartTuning] = []
        self.stopped_tunings: list[str] = []
        self.delay = 0.0
        self.tokens_per_delta = 1
        self.gate = threading.Event()  # closed, no delta from number ``gate_at`` on is sent
        self.gate.set()
        self.gate_at = 0
        self.writes_special = False
        self.fail_with: Exception | None = None
        self.fail_after: tuple[int, Exception] | None = None
        self.requests: list[EngineRequest] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.live: set[str] = set()
        self.prompts: dict[str, deque[str]] = {}  # each token a character
        self.statistics = EngineStats(chunks_total=64, chunks_free=64)

    def reply(self, request: EngineRequest) -> list[int]:
        prompt = self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        match = re.findall(r"say\((.*?)\)yas", prompt, re.DOTALL)
        text = match[-1] if match else "Paris"
        return self.tokenizer.encode(text, allow_special=self.writes_special)

    def _cached(self, request: EngineRequest) -> int:
        best = self._longest_match(request.namespace, request.prompt_token_ids)
        latest = self.prompts.setdefault(request.namespace, deque(maxlen=MAX_PROMPTS))
        latest.append(_as_text(request.prompt_token_ids[: self._stored(request)]))
        return min(best, len(request.prompt_token_ids) - 1)

    def _longest_match(self, namespace: str, prompt_token_ids: list[int]) -> int:
        """Tokens that the prompt has in common with the earlier one most like it."""
        prompt, best = _as_text(prompt_token_ids), 0
        for earlier in self.prompts.get(namespace, ()):
            most = min(len(earlier), len(prompt))
            if best == most or earlier[: best + 1] != prompt[: best + 1]:
                continue
            best += 1
            while best < most:  # halve what is left: a loop over the tokens takes most of a test
                middle = (best + most + 1) // 2
                if earlier[:middle] == prompt[:middle]:
                    best = middle
                else:
                    most = middle - 1
        return best

    @staticmethod
    def _stored(request: EngineRequest) -> int:
        until, most = request.cache_until, len(request.prompt_token_ids)
        return most if until is None else min(until, most)

    async def generate(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        self.requests.append(request)
        if self.gate_at == 0:
            await self._opened()
        if self.fail_with is not None:
            raise self.fail_with
        self.live.add(request.request_id)
        number = 0
        try:
            async for delta in self._deltas(request):
                await asyncio.sleep(self.delay)
                if number >= self.gate_at:
                    await self._opened()
                number += 1
                yield delta
            self.live.discard(request.request_id)
        finally:
            if request.request_id in self.live:
                self.live.discard(request.request_id)
                self.aborted.append((request.request_id, None))

    async def _opened(self) -> None:
        while not self.gate.is_set():
            await asyncio.sleep(0.002)

    async def _deltas(self, request: EngineRequest) -> AsyncIterator[TokenDelta]:
        sampling = request.sampling
        num_cached = self._cached(request)
        first: dict[str, Any] = {
            "num_cached_tokens": num_cached,
            "num_cache_write_tokens": max(self._stored(request) - num_cached, 0),
            "pin_refused": request.pin_seconds > 3600,
        }
        if request.explain:
            first["explanation"] = self.explanation(request.prompt_token_ids, num_cached)
        queue_seconds, prefill_seconds, per_delta = DURATIONS
        timing = {"queue_seconds": queue_seconds, "prefill_seconds": prefill_seconds}
        if request.wants_hidden_states:
            yield TokenDelta(
                request_id=request.request_id,
                choices=[ChoiceDelta(index=0, token_ids=[], finish_reason="stop")],
                embedding=[3.0, 4.0] + [0.0] * 6,
                **first,
                **timing,
            )
            return
        if sampling.prompt_logprobs is not None:
            first["prompt_logprobs"] = [
                None if i == 0 else logprob_of(token, sampling.prompt_logprobs)
                for i, token in enumerate(request.prompt_token_ids)
            ]
        reply = self.reply(request)
        eos = self.info.eos_token_ids[0]
        reply = [*reply, eos] if not sampling.ignore_eos else reply * 1000
        if len(reply) - 1 < sampling.min_tokens:
            reply = [*(reply[:-1] * 1000)[: sampling.min_tokens], eos]
        limit = sampling.max_tokens
        if limit is None:
            limit = MAX_MODEL_LEN - len(request.prompt_token_ids)
        tokens = reply[:limit]
        predicted = request.prediction_token_ids
        right = sum(a == b for a, b in zip(predicted, tokens, strict=False))
        first["num_accepted_predicted"] = right
        first["num_rejected_predicted"] = len(predicted) - right
        if limit == 0:
            choices = [
                ChoiceDelta(index=i, token_ids=[], finish_reason="length")
                for i in range(sampling.num_sequences)
            ]
            yield TokenDelta(request_id=request.request_id, choices=choices, **first, **timing)
        count = sampling.n if sampling.beam_width > 1 else sampling.num_sequences
        for start in range(0, len(tokens), self.tokens_per_delta):
            if self.fail_after is not None and start >= self.fail_after[0]:
                raise self.fail_after[1]
            part = tokens[start : start + self.tokens_per_delta]
            is_last = start + len(part) == len(tokens)
            stops = is_last and part[-1] == eos
            reason = None if not is_last else ("stop" if stops else "length")
            logprobs = None
            if sampling.logprobs is not None:
                logprobs = [logprob_of(token, sampling.logprobs) for token in part]
            choices = [
                ChoiceDelta(
                    index=index,
                    token_ids=list(part),
                    logprobs=logprobs,
                    finish_reason=reason,
                    stop_token_id=eos if stops else None,
                )
                for index in range(count)
                if (request.request_id, index) not in self.aborted
            ]
            timing["decode_seconds"] = start // self.tokens_per_delta * per_delta
            yield TokenDelta(request_id=request.request_id, choices=choices, **first, **timing)
            first = {}

    def explanation(self, prompt_token_ids: list[int], num_cached: int) -> CacheExplanation:
        reason = "complete" if num_cached == len(prompt_token_ids) - 1 else "diverged"
        return CacheExplanation(
            num_matched_tokens=num_cached, num_known_tokens=num_cached, reason=reason
        )

    async def explain(
        self, prompt_token_ids: list[int], namespace: str = "", tenant: str = "", adapter: str = ""
    ) -> CacheExplanation:
        self.explained = (namespace, tenant)
        self.explained_adapter = adapter
        known = self._longest_match(namespace, prompt_token_ids)
        return self.explanation(prompt_token_ids, min(known, len(prompt_token_ids) - 1))

    async def load_adapter(self, name: str, folder: str) -> AdapterInfo:
        if "refuse" in folder:
            raise ConfigError(f"{folder}: refused")
        self.adapters[name] = AdapterInfo(
            name=name, folder=folder, rank=8, num_bytes=1, is_activated=False, digest="0"
        )
        return self.adapters[name]

    async def unload_adapter(self, name: str) -> bool:
        if name == "busy":
            raise InvalidRequestError("adapter 'busy' is used by 1 requests; try again later")
        return self.adapters.pop(name, None) is not None

    def start_tuning(self, command: StartTuning) -> None:
        self.tunings.append(command)

    def stop_tuning(self, job_id: str) -> None:
        self.stopped_tunings.append(job_id)

    async def keep_public(self, request: EngineRequest) -> TokenDelta:
        first, *_ = [delta async for delta in self.generate(request)]
        return first

    async def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))

    def set_tenants(self, tenants: SetTenants) -> None:
        self.tenants = tenants

    async def stats(
        self, *, include_tree: bool = False, include_tenants: bool = False
    ) -> EngineStats:
        if not self.is_ready:
            raise EngineDeadError("gone")
        return self.statistics

    async def close(self) -> None:
        self.is_ready = False
