"""Client libraries as their users call them: chat, stream, a tool, a typed answer.

huggingface_hub comes with the package, so it runs in CI. The others are the extra ``clients`` and
run nightly; together they weigh half a gigabyte.
"""

from __future__ import annotations

import asyncio
import importlib
import json

import pydantic
import pytest
from fake_engine import MODEL

CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
TAGGED = f"<tool_call>{CALL}</tool_call>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


class City(pydantic.BaseModel):
    """A city."""

    name: str
    people: int


OSLO = City(name="Oslo", people=700_000)
TYPED = OSLO.model_dump_json()


def said(text: str) -> str:
    return f"say({text})yas"


def users(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": said(text)}]


def library(name: str):
    """An installed client, of the extra ``clients``."""
    return importlib.import_module(name)


@pytest.fixture
def url(server) -> str:
    return f"{server.url}/v1"


def test_huggingface_hub(server):
    client = library("huggingface_hub").InferenceClient(base_url=server.url, api_key="none")
    answer = client.chat_completion(users("Paris"), model=MODEL)
    assert answer.choices[0].message.content == "Paris"
    chunks = client.chat_completion(users("Paris"), model=MODEL, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris"
    answer = client.chat_completion(users(TAGGED), model=MODEL, tools=[TOOL], tool_choice="auto")
    call = answer.choices[0].message.tool_calls[0].function
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Oslo"})
    described = {"name": "City", "schema": City.model_json_schema(), "strict": True}
    answer = client.chat_completion(
        users(TYPED),
        model=MODEL,
        response_format={"type": "json_schema", "json_schema": described},
    )
    assert City.model_validate_json(answer.choices[0].message.content) == OSLO


@pytest.mark.nightly
def test_litellm(url):
    litellm = library("litellm")
    options = {"model": f"openai/{MODEL}", "api_base": url, "api_key": "none"}
    answer = litellm.completion(messages=users("Paris"), **options)
    assert answer.choices[0].message.content == "Paris"
    chunks = litellm.completion(messages=users("Paris"), stream=True, **options)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Paris"
    answer = litellm.completion(messages=users(TAGGED), tools=[TOOL], **options)
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {
        "city": "Oslo"
    }
    chunks = list(litellm.completion(messages=users(TAGGED), tools=[TOOL], stream=True, **options))
    whole = litellm.stream_chunk_builder(chunks)
    assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    answer = litellm.completion(messages=users(TYPED), response_format=City, **options)
    assert City.model_validate_json(answer.choices[0].message.content) == OSLO


@pytest.mark.nightly
def test_langchain(url):
    model = library("langchain_openai").ChatOpenAI(model=MODEL, base_url=url, api_key="none")
    assert model.invoke(said("Paris")).content == "Paris"
    assert "".join(chunk.content for chunk in model.stream(said("Paris"))) == "Paris"
    for choice in (None, "any", "get_weather"):
        text = TAGGED if choice is None else f"[{CALL}]"
        calling = model.bind_tools([TOOL], tool_choice=choice).invoke(said(text))
        assert [call["args"] for call in calling.tool_calls] == [{"city": "Oslo"}]
    assert model.with_structured_output(City).invoke(said(TYPED)) == OSLO
    called = f'[{{"name": "City", "arguments": {TYPED}}}]'
    typed = model.with_structured_output(City, method="function_calling")
    assert typed.invoke(said(called)) == OSLO


@pytest.mark.nightly
def test_pydantic_ai(url):
    library("pydantic_ai")
    agents = importlib.import_module("pydantic_ai")
    models = importlib.import_module("pydantic_ai.models.openai")
    providers = importlib.import_module("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=url, api_key="none")
    model = models.OpenAIChatModel(MODEL, provider=provider)
    assert agents.Agent(model).run_sync(said("Paris")).output == "Paris"
    asked = []

    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        asked.append(city)
        return said("It is sunny.")

    agent = agents.Agent(model, tools=[get_weather])
    assert agent.run_sync(said(TAGGED)).output == "It is sunny."
    assert asked == ["Oslo"]
    typed = agents.Agent(model, output_type=agents.NativeOutput(City))
    assert typed.run_sync(said(TYPED)).output == OSLO
    called = f'[{{"name": "final_result", "arguments": {TYPED}}}]'
    assert agents.Agent(model, output_type=City).run_sync(said(called)).output == OSLO

    async def streamed() -> str:
        async with agents.Agent(model).run_stream(said("Paris")) as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    assert asyncio.run(streamed()) == "Paris"


@pytest.mark.nightly
def test_instructor(client):
    instructor = library("instructor")
    plain = instructor.from_openai(client).chat.completions
    untyped = {"model": MODEL, "messages": users("Paris"), "response_model": None}
    assert plain.create(**untyped).choices[0].message.content == "Paris"
    chunks = plain.create(**untyped, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris"
    for mode, text in (
        (instructor.Mode.TOOLS, f'[{{"name": "City", "arguments": {TYPED}}}]'),
        (instructor.Mode.JSON, TYPED),
        (instructor.Mode.JSON_SCHEMA, TYPED),
    ):
        patched = instructor.from_openai(client, mode=mode)
        asked = {"model": MODEL, "messages": users(text), "max_retries": 0}
        whole = patched.chat.completions.create(response_model=City, **asked)
        assert whole.model_dump() == OSLO.model_dump()
        # Its name of the function is that of the partial model.
        asked["messages"] = users(text.replace('"City"', '"PartialCity"'))
        partial = patched.chat.completions.create_partial(response_model=City, **asked)
        assert list(partial)[-1].model_dump() == OSLO.model_dump()


@pytest.mark.nightly
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents(url, api):
    agents = library("agents")
    client = importlib.import_module("openai").AsyncOpenAI(base_url=url, api_key="none")
    agents.set_tracing_disabled(True)
    kind = {
        "chat": agents.OpenAIChatCompletionsModel,
        "responses": agents.OpenAIResponsesModel,
    }[api]
    model = kind(model=MODEL, openai_client=client)
    asked = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        asked.append(city)
        return said("It is sunny.")

    @agents.function_tool(name_override="get_weather")
    def get_typed(city: str) -> str:
        """Get the weather of a city."""
        asked.append(city)
        return said(TYPED)

    async def run() -> None:
        plain = agents.Agent(name="a", model=model)
        assert (await agents.Runner.run(plain, said("Paris"))).final_output == "Paris"
        streamed = agents.Runner.run_streamed(plain, said("Paris"))
        kinds = [event.type async for event in streamed.stream_events()]
        assert "raw_response_event" in kinds and streamed.final_output == "Paris"
        calling = agents.Agent(name="a", model=model, tools=[get_weather])
        assert (await agents.Runner.run(calling, said(TAGGED))).final_output == "It is sunny."
        both = agents.Agent(name="a", model=model, tools=[get_typed], output_type=City)
        assert (await agents.Runner.run(both, said(TAGGED))).final_output == OSLO

    asyncio.run(run())
    assert asked == ["Oslo", "Oslo"]


@pytest.mark.nightly
def test_strands_agents(url):
    strands = library("strands")
    openai_models = importlib.import_module("strands.models.openai")
    client = {"base_url": url, "api_key": "none"}
    model = openai_models.OpenAIModel(client_args=client, model_id=MODEL)
    asked = []

    @strands.tool
    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        asked.append(city)
        return said("It is sunny.")

    def agent(**options):
        return strands.Agent(model=model, callback_handler=None, **options)

    async def streamed() -> str:
        events = agent().stream_async(said("Paris"))
        return "".join([event["data"] async for event in events if "data" in event])

    assert str(agent()(said("Paris"))).strip() == "Paris"
    assert asyncio.run(streamed()) == "Paris"
    assert str(agent(tools=[get_weather])(said(TAGGED))).strip() == "It is sunny."
    assert asked == ["Oslo"]
    called = f'[{{"name": "City", "arguments": {TYPED}}}]'
    typed = agent()(said(called), structured_output_model=City)
    assert typed.structured_output == OSLO
