"""The openai client's conveniences, which rely on the small print of events and objects."""

from __future__ import annotations

import asyncio
import json

import openai
import pydantic
import pytest
from fake_engine import MODEL

from chunkllama.errors import OverloadedError, RequestFailedError

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


class Answer(pydantic.BaseModel):
    value: int


def test_responses_stream_helper(client):
    with client.responses.stream(model=MODEL, input="say(hello)yas") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == "hello"


def test_responses_stream_helper_parses(client):
    with client.responses.stream(
        model=MODEL, input='say({"value": 4})yas', text_format=Answer
    ) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == Answer(value=4)


def test_responses_stream_helper_with_tools(client):
    tools = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]
    with client.responses.stream(model=MODEL, input=f"say({CALL})yas", tools=tools) as stream:
        final = stream.get_final_response()
    assert json.loads(final.output[0].arguments) == {"a": 1}


def test_chat_stream_helper_parses(client):
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": 'say({"value": 4})yas'}],
        response_format=Answer,
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Answer(value=4)


def test_pydantic_function_tool(client):
    class Add(pydantic.BaseModel):
        a: int

    text = '<tool_call>{"name": "Add", "arguments": {"a": 1}}</tool_call>'
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": f"say({text})yas"}],
        tools=[openai.pydantic_function_tool(Add)],
    )
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Add(a=1)


def test_raw_stream(client):
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=[{"role": "user", "content": "say(ab)yas"}], stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_async_clients_at_once(server):
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"say(answer {number})yas"}],
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(40)))

    assert asyncio.run(main()) == [f"answer {number}" for number in range(40)]


def test_client_retries_after_429(server):
    server.engine.fail_with = OverloadedError("full", 1)
    seen = []

    def later(response: object) -> None:
        seen.append(response)
        server.engine.fail_with = None

    http = openai.DefaultHttpxClient(verify=False, event_hooks={"response": [later]})
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="x", max_retries=1, http_client=http
    )
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "say(in the end)yas"}]
    )
    assert answer.choices[0].message.content == "in the end"
    assert [response.status_code for response in seen] == [429, 200]


def test_client_does_not_retry_a_failed_request(server):
    server.engine.fail_with = RequestFailedError("poison", "engine_poison_request")
    client = server.client().with_options(max_retries=2)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    assert len(server.engine.requests) == 1
