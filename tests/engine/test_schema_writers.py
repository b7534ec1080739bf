"""Schemas as eight libraries write them: every forced call is an object that its function accepts,
and ends within its tokens.

``schema_writers.json`` has their output for a function with a plain signature, one with nested
models, and one with the types that libraries have names for (dates, addresses, tuples, sets,
discriminated unions, recursion), recorded from pydantic 2.14, zod 4.6, instructor 1.17, LangChain
1.8, OpenAI Agents 0.24, AI SDK 6.0, LlamaIndex 0.14 and MCP 2.3.
"""

from __future__ import annotations

import datetime
import enum
import json
import random
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema_rs
import numpy as np
import pytest
from mask_draws import draw
from pydantic import BaseModel, Field, HttpUrl

from chunkllama import LLM, SamplingParams
from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common.schema_bounds import bound_grammar
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.tools.call_format import CallFormat
from chunkllama_server.api.tools.config import plan_tools

RECORDED = json.loads(Path(__file__).with_name("schema_writers.json").read_text())
WRITERS = [(writer, tool) for writer, tools in RECORDED.items() for tool in tools]
IDS = [f"{writer}-{tool['name']}" for writer, tool in WRITERS]
NUM_TOKENS = 1024
VOCAB, EOS = 49152, 2
CHAT = [{"role": "user", "content": "Weather in Oslo, and an order of two apples for Bergen"}]
MODEL_TOKENS = 384


class Card(BaseModel):
    kind: Literal["card"]
    number: Annotated[str, Field(pattern=r"^\d{4}-\d{4}$")]


class Cash(BaseModel):
    kind: Literal["cash"]
    amount: Annotated[float, Field(gt=0)]


class Place(BaseModel):
    name: str
    parts: list[Any] = []  # places; the schema of LangChain does not say so


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Trip(BaseModel):
    """The arguments of the recorded function of Python that has most types.

    LlamaIndex leaves the constraints of ``ratio`` and ``code`` out of its schema.
    """

    id: uuid.UUID
    start: datetime.datetime
    day: datetime.date
    at: datetime.time
    length: datetime.timedelta
    site: HttpUrl
    tags: set[str]
    point: tuple[float, float]
    level: Level
    ratio: float
    code: str
    counts: dict[str, int]
    payment: Annotated[Card | Cash, Field(discriminator="kind")]
    place: Place | None = None
    grid: list[list[int]] = []
    version: Literal[1, "two"] = 1


def plan(tool, num_tokens: int = NUM_TOKENS):
    """What a request that forces a call of the tool makes of it."""
    body = ChatCompletionRequest(
        model="m",
        messages=CHAT,
        tools=[{"type": "function", "function": tool}],
        tool_choice={"type": "function", "function": {"name": tool["name"]}},
    )
    config = plan_tools(body, CallFormat()).bounded(num_tokens)
    return config, config.grammar()


def check(config, tool, text: str) -> None:
    """The text is one whole call whose arguments are an object of the tool's schema."""
    parser = config.parser()
    deltas = [*parser.feed(text).calls, *parser.finish().calls]
    assert [delta.name for delta in deltas if delta.name] == [tool["name"]], text
    arguments = json.loads("".join(delta.arguments for delta in deltas))
    assert isinstance(arguments, dict)
    assert set(tool["parameters"].get("required", ())) <= arguments.keys()
    known = tool["parameters"].get("properties", {}).keys()
    assert arguments.keys() <= known, "a function takes no other keyword arguments"
    check_arguments(tool["parameters"], arguments)


def check_arguments(parameters: dict[str, Any], arguments: dict[str, Any]) -> None:
    if "tags" in known_to_python(parameters):
        Trip.model_validate(arguments)
        # A list with equal members is a set, too.
        arguments = {**arguments, "tags": sorted(set(arguments["tags"]))}
    checked = as_libraries_check(parameters)
    validator = jsonschema_rs.validator_for(checked, validate_formats=True)
    errors = [str(error) for error in validator.iter_errors(arguments)]
    assert not errors, (errors[0], arguments)


def as_libraries_check(node: Any) -> Any:
    """A schema without the formats that come with an expression: zod checks that alone.

    An email of zod may have a label that begins like one of punycode, for example.
    """
    if isinstance(node, list):
        return [as_libraries_check(item) for item in node]
    if not isinstance(node, dict):
        return node
    left_out = {"format"} if "pattern" in node else set()
    return {key: as_libraries_check(item) for key, item in node.items() if key not in left_out}


def known_to_python(parameters: dict[str, Any]) -> dict[str, Any]:
    """The properties of a function of Python; none for one of JavaScript."""
    return {} if "$schema" in parameters else parameters["properties"]


def walk(matcher, tokenizer, seed: int, begin: str = "") -> str:
    """The text of tokens drawn evenly from what the grammar allows: a model that knows nothing.

    The first token begins with ``begin``.
    """
    rng, ids = random.Random(seed), list[int]()
    mask = np.zeros(VOCAB // 32, np.int32)
    while not matcher.is_finished:
        assert len(ids) < NUM_TOKENS, f"does not end: {tokenizer.decode(ids)[-300:]}"
        mask.fill(0)
        matcher.fill_mask(mask)
        token = draw(mask, rng)
        while not ids and not tokenizer.decode([token]).startswith(begin):
            token = draw(mask, rng)
        if token == EOS:
            break
        assert matcher.accept(token)
        ids.append(token)
    return tokenizer.decode(ids)


@pytest.mark.parametrize(("writer", "tool"), WRITERS, ids=IDS)
def test_a_forced_call_ends_with_its_members(compiler, tokenizer, writer, tool):
    config, grammar = plan(tool)
    for seed in range(10):
        check(config, tool, walk(compiler.matcher(grammar, []), tokenizer, seed))


ANSWER = {
    "type": "object",
    "properties": {"summary": {"type": "string"}, "sure": {"type": "boolean"}},
    "required": ["summary", "sure"],
    "additionalProperties": False,
}


def plan_call_or_answer(tool):
    """What a request with a tool and a typed answer makes of them."""
    described = {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER}}
    body = ChatCompletionRequest(
        model="m",
        messages=CHAT,
        tools=[{"type": "function", "function": tool}],
        response_format=described,
        parallel_tool_calls=False,
    )
    config = plan_tools(body, CallFormat()).bounded(NUM_TOKENS)
    answer = bound_grammar(GrammarSpec(kind="json_schema", text=json.dumps(ANSWER)), NUM_TOKENS)
    return config, config.grammar(answer)


def check_call_or_answer(config, tool, text: str) -> str:
    parser = config.parser()
    parsed = parser.feed(text)
    parsed.extend(parser.finish())
    if parsed.calls:
        check(config, tool, text)
        return "call"
    answer = json.loads(parsed.content)
    assert jsonschema_rs.is_valid(ANSWER, answer), text
    return "answer"


def walk_calls_and_answers(compiler, tokenizer, tool, seeds) -> None:
    config, grammar = plan_call_or_answer(tool)
    for seed in seeds:
        for begin, kind in (("<", "call"), ("{", "answer")):
            text = walk(compiler.matcher(grammar, []), tokenizer, seed, begin)
            assert check_call_or_answer(config, tool, text) == kind


@pytest.mark.parametrize(("writer", "tool"), WRITERS, ids=IDS)
def test_a_call_or_a_typed_answer_can_both_happen(compiler, tokenizer, writer, tool):
    walk_calls_and_answers(compiler, tokenizer, tool, range(2))


@pytest.mark.nightly
@pytest.mark.parametrize(("writer", "tool"), WRITERS, ids=IDS)
def test_two_hundred_walks(compiler, tokenizer, writer, tool):
    config, grammar = plan(tool)
    for seed in range(200):
        check(config, tool, walk(compiler.matcher(grammar, []), tokenizer, seed))
    walk_calls_and_answers(compiler, tokenizer, tool, range(200))


def test_all_writers_are_recorded():
    assert set(RECORDED) == {
        "pydantic", "zod", "instructor", "langchain", "openai_agents", "ai_sdk", "llama_index",
        "mcp",
    }  # fmt: skip


@pytest.fixture(scope="module")
def llm(demo_path):
    with LLM(str(demo_path), num_chunks=1024) as llm:
        yield llm


def call_with_the_demo_model(llm, tool, num_calls: int) -> None:
    """Every call is whole, also one whose list the model would continue, which is closed at the
    limit; calls without lists and free keys mostly end by themselves.
    """
    config, grammar = plan(tool, MODEL_TOKENS)
    sampling = SamplingParams(
        n=num_calls, temperature=0.8, seed=0, max_tokens=MODEL_TOKENS, grammar=grammar
    )
    (output,) = llm.chat(CHAT, sampling, tools=config.prompt_tools, use_progress_bar=False)
    for choice in output.outputs:
        check(config, tool, choice.text)
    reasons = [choice.finish_reason for choice in output.outputs]
    assert set(reasons) <= {"stop", "length"}
    schema = json.dumps(tool["parameters"])
    if '"array"' not in schema and '"additionalProperties": {' not in schema:
        assert reasons.count("stop") > num_calls // 2, reasons


def test_calls_of_the_demo_model(llm):
    call_with_the_demo_model(llm, RECORDED["pydantic"][0], 4)


@pytest.mark.nightly
@pytest.mark.parametrize(("writer", "tool"), WRITERS, ids=IDS)
def test_two_hundred_calls_of_the_demo_model(llm, writer, tool):
    """200 of each writer: the walks above have as many of each tool."""
    call_with_the_demo_model(llm, tool, -(-200 // len(RECORDED[writer])))
