"""The offline API and the server turn the same deltas into the same output."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_engine import MODEL

from chunkllama import LLM, SamplingParams
from chunkllama.errors import InvalidRequestError, RequestFailedError
from chunkllama.messages import ChoiceDelta, EngineRequest, TokenDelta, TokenLogprob
from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.output_processor import OutputDelta, with_ranking
from chunkllama_server.api.common.request_stream import RequestStream
from chunkllama_server.metrics.server_metrics import ServerMetrics
from chunkllama_server.transport.request_context import RequestInfo

PROMPT = "Where?"


@dataclass
class Choice:
    """What the engine generates for one choice."""

    text: str
    logprobs: list[float] | None = None
    finish_reason: str = "length"
    stop_token: str | None = None


@dataclass
class ScriptedEngine:
    """Engine core and engine client at once; generates the given choices, a few tokens a step."""

    tokenizer: Any
    choices: list[Choice]
    tokens_per_delta: int
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[int | None] = field(default_factory=list)

    def deltas(self, request: EngineRequest) -> Iterator[TokenDelta]:
        ids = [self.tokenizer.encode(choice.text, allow_special=True) for choice in self.choices]
        for start in range(0, max(map(len, ids)), self.tokens_per_delta):
            end = start + self.tokens_per_delta
            yield TokenDelta(
                request_id=request.request_id,
                num_cached_tokens=3,
                choices=[
                    self._delta(index, ids[index], slice(start, end), request.sampling)
                    for index in range(len(ids))
                    if start < len(ids[index]) and index not in self.aborted
                ],
            )

    def _delta(
        self, index: int, ids: list[int], part: slice, sampling: SamplingParams
    ) -> ChoiceDelta:
        choice = self.choices[index]
        is_last = part.stop >= len(ids)
        values = choice.logprobs or [-1.0] * len(ids)
        entries = [
            TokenLogprob(token_id, value, 1, [])
            for token_id, value in zip(ids[part], values[part], strict=True)
        ]
        has_stop = is_last and choice.stop_token is not None
        return ChoiceDelta(
            index=index,
            token_ids=ids[part],
            logprobs=None if sampling.logprobs is None else entries,
            finish_reason=choice.finish_reason if is_last else None,
            stop_token_id=self.tokenizer.token_id(choice.stop_token) if has_stop else None,
        )

    # As the core of an LLM.
    def add(self, request: EngineRequest) -> None:
        self.requests.append(request)
        self._pending = self.deltas(request)

    def has_work(self) -> bool:
        return self._next() is not None

    def _next(self) -> TokenDelta | None:
        if not hasattr(self, "_peeked"):
            self._peeked = next(self._pending, None)
        return self._peeked

    def step(self) -> list[TokenDelta]:
        delta = self._next()
        del self._peeked
        return [] if delta is None else [delta]

    def abort(self, request_id: str, index: int | None = None) -> Any:
        self.aborted.append(index)
        return asyncio.sleep(0) if self.is_client else None

    def close(self) -> None:
        pass

    # As the engine client of the server.
    is_client = False

    async def generate(self, request: EngineRequest) -> Any:
        self.requests.append(request)
        for delta in self.deltas(request):
            yield delta


@dataclass
class Result:
    """Everything that must not depend on the entry point."""

    choices: list[tuple[str, list[int], str | None, int | str | None]]
    num_tokens: int
    num_cached_tokens: int


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("parity")
    write_tiny_model(folder)
    return folder


@pytest.fixture
def run_llm(model_folder, monkeypatch):
    def run(engine: ScriptedEngine, sampling: SamplingParams) -> Result:
        monkeypatch.setattr("chunkllama.llm.build_engine", lambda _: engine)
        (output,) = LLM(str(model_folder)).generate(PROMPT, sampling, use_progress_bar=False)
        assert output.finished
        assert all((c.logprobs is None) == (sampling.logprobs is None) for c in output.outputs)
        assert [c.index for c in output.outputs] == list(range(sampling.n))
        return Result(
            [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs],
            sum(len(c.token_ids) for c in output.outputs),
            output.num_cached_tokens,
        )

    return run


def run_server(engine: ScriptedEngine, sampling: SamplingParams, *, streamed: bool) -> Result:
    engine.is_client = True
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=engine.tokenizer.encode(PROMPT),
        sampling=with_ranking(sampling),
    )
    stream = RequestStream(
        engine,
        request,
        engine.tokenizer,
        ServerMetrics(),
        info=RequestInfo("r", 0.0),
        continues_prompt=True,
    )

    async def collect() -> list[OutputDelta]:
        if not streamed:
            return await stream.collect()
        whole = [OutputDelta(index) for index in range(sampling.n)]
        async for pieces in stream.pieces():
            for piece in pieces:
                assert piece.text or piece.finish_reason
                whole[piece.index].extend(piece)
        return whole

    choices = asyncio.run(collect())
    counts = stream.counts
    if sampling.num_choices == sampling.n:
        assert counts.output == sum(len(c.token_ids) for c in choices)
    return Result(
        [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in choices],
        sum(len(c.token_ids) for c in choices),
        stream.output.num_cached_tokens,
    )


NICE = "Paris is nice!"


def cases() -> list[Any]:
    def case(name: str, sampling: dict[str, Any], choice: Choice, *expected: Any) -> Any:
        return pytest.param(sampling, choice, expected, id=name)

    bang = Choice(NICE, finish_reason="stop", stop_token="!")
    eos = Choice("Paris<|im_end|>", finish_reason="stop", stop_token="<|im_end|>")
    keep = {"include_stop_str_in_output": True}
    return [
        case("length", {}, Choice(NICE), NICE, "length", None, 14),
        case("stop id", {"stop_ids": "!"}, bang, "Paris is nice", "stop", "!", 14),
        case("stop id kept", {"stop_ids": "!", **keep}, bang, NICE, "stop", "!", 14),
        case("end of sequence", {}, eos, "Paris", "stop", None, 6),
        case("end of sequence kept", keep, eos, "Paris", "stop", None, 6),
        case(
            "end of sequence shown",
            {**keep, "skip_special_tokens": False},
            eos, "Paris<|im_end|>", "stop", None, 6,
        ),
        case("stop string", {"stop": "is n"}, Choice(NICE), "Paris ", "stop", "is n", 10),
        case("stop string kept", {"stop": "is n", **keep}, Choice(NICE), "Paris is n", "stop",
             "is n", 10),
        case("stop string never whole", {"stop": "nice!?"}, Choice(NICE), NICE, "length", None, 14),
        case("first of two", {"stop": ("nice", "s i")}, Choice(NICE), "Pari", "stop", "s i", 7),
        case("stop string in the last token", {"stop": "!"}, Choice(NICE), NICE[:-1], "stop", "!",
             14),
        case("min_tokens passes a stop string", {"stop": "is", "min_tokens": 6}, Choice(NICE),
             "Paris ", "stop", "is", 8),
        case("min_tokens ends with the stop string", {"stop": "is", "min_tokens": 5}, Choice(NICE),
             "Par", "stop", "is", 5),
        case("a stop string begins before min_tokens", {"stop": "s is", "min_tokens": 7},
             Choice(NICE), "Pari", "stop", "s is", 8),
        case("min_tokens passes all", {"stop": ("is", "nice"), "min_tokens": 14}, Choice(NICE),
             NICE, "length", None, 14),
        case("half a character", {}, Choice("é"), "é", "length", None, 2),
        case("a stop character of two tokens", {"stop": "é"}, Choice("aéb"), "a", "stop", "é", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("tokens_per_delta", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(("sampling", "choice", "expected"), cases())
def test_one_choice(run_llm, text_parts, sampling, choice, expected, tokens_per_delta) -> None:
    tokenizer = text_parts[0]
    fields = {**sampling}
    if "stop_ids" in fields:
        fields["stop_token_ids"] = (tokenizer.token_id(fields.pop("stop_ids")),)
    params = SamplingParams(**fields)
    text, finish_reason, stop_reason, count = expected
    if "stop_token_ids" in fields:
        stop_reason = tokenizer.token_id(stop_reason)
    ids = tokenizer.encode(choice.text, allow_special=True)[:count]
    wanted = Result([(text, ids, finish_reason, stop_reason)], count, 3)

    def engine() -> ScriptedEngine:
        return ScriptedEngine(tokenizer, [choice], tokens_per_delta)

    assert run_llm(engine(), params) == wanted
    assert run_server(engine(), params, streamed=False) == wanted
    assert run_server(engine(), params, streamed=True) == wanted


@pytest.mark.parametrize("tokens_per_delta", [1, 2, 100])
def test_a_stop_string_aborts_only_its_own_choice(run_llm, text_parts, tokens_per_delta) -> None:
    choices = [Choice("abcdefgh"), Choice("xycdefghij"), Choice("zzz")]
    sampling = SamplingParams(n=3, stop="de", temperature=1.0)
    results = []
    for run in (
        run_llm,
        lambda *given: run_server(*given, streamed=False),
        lambda *given: run_server(*given, streamed=True),
    ):
        engine = ScriptedEngine(text_parts[0], choices, tokens_per_delta)
        results.append(run(engine, sampling))
    assert results[0] == results[1] == results[2]
    assert [(c[0], c[2]) for c in results[0].choices] == [
        ("abc", "stop"), ("xyc", "stop"), ("zzz", "length"),
    ]  # fmt: skip
    assert results[0].num_tokens == 5 + 5 + 3


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize(
    ("scores", "order"),
    [
        ([[-1.0, -1.0], [-0.5, -0.5], [-2.0, -2.0]], [1, 0]),
        ([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]], [0, 1]),
        ([[-2.0, -2.0], [-1.0, -1.0], [-1.0, -1.0]], [1, 2]),
        ([[-1.0, -3.0], [-3.0, -1.0], [-1.5, -2.0]], [2, 0]),
    ],
)
def test_best_of_ranks_alike_and_ties_keep_their_order(
    run_llm, text_parts, scores, order, logprobs
) -> None:
    choices = [Choice(f"{index}x", values) for index, values in enumerate(scores)]
    sampling = SamplingParams(n=2, best_of=3, temperature=1.0, logprobs=logprobs)
    engines = [ScriptedEngine(text_parts[0], choices, 1) for _ in range(2)]
    offline = run_llm(engines[0], sampling)
    assert offline == run_server(engines[1], sampling, streamed=False)
    assert [c[0] for c in offline.choices] == [f"{index}x" for index in order]
    assert [e.requests[0].sampling.logprobs for e in engines] == [0, 0]


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_choice_that_the_engine_ended_fails_the_request(run_llm, text_parts, reason) -> None:
    choices = [Choice("ab", finish_reason=reason)]
    for run in (run_llm, lambda *given: run_server(*given, streamed=False)):
        with pytest.raises(RequestFailedError, match="The engine ended this request"):
            run(ScriptedEngine(text_parts[0], choices, 1), SamplingParams())


TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
WORDS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
CONVERSATIONS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "system", "content": "now in French"},
        {"role": "user", "content": "and?"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("source", [None, WORDS], ids=["prints tools", "has no tools"])
def test_a_conversation_has_one_prompt(start_server, text_parts, messages, tools, source):
    tokenizer, template = text_parts
    template = template if source is None else ChatTemplate(source, tokenizer)
    llm = object.__new__(LLM)
    llm._tokenizer, llm._template = tokenizer, template
    server = start_server(template_source=source)
    fields = {} if tools is None else {"tools": tools}
    answer = server.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})
    assert answer.status_code == 200
    assert llm._encode_chat(messages, tools=tools) == server.engine.requests[0].prompt_token_ids
    with pytest.raises(InvalidRequestError, match="text parts"):
        llm._encode_chat([{"role": "user", "content": [{"type": "image_url"}]}])
