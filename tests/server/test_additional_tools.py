"""Tools that items of a conversation offer, as Codex sends its own: read once, kept with the
conversation, and left out where they cannot be offered. Choices among tools of several namespaces.
"""

from __future__ import annotations

import threading

import pytest
from fake_engine import MODEL

from chunkllama_server.api.responses import request as responses_request
from chunkllama_server.api.responses import tools as responses_tools

FIELDS = ("x-chunkllama-repaired-history", "x-chunkllama-ignored-fields")
PATH = "/v1/responses"


def function(name: str, about: str = "Does it.") -> dict[str, object]:
    return {"type": "function", "name": name, "description": about, "parameters": {}}


def space(name: str, *tools: object) -> dict[str, object]:
    return {"type": "namespace", "name": name, "description": f"Space {name}.", "tools": [*tools]}


def item(*tools: object, **members: object) -> dict[str, object]:
    return {"type": "additional_tools", "role": "developer", "tools": [*tools], **members}


def user(text: str = "go on") -> dict[str, str]:
    return {"role": "user", "content": text}


def post(server, status: int = 200, **fields):
    response = server.post(PATH, {"model": MODEL, **fields})
    assert response.status_code == status, response.text
    return response if status == 200 else response.json()["error"]


def prompt(server, text_parts) -> str:
    return text_parts[0].decode(server.engine.requests[-1].prompt_token_ids)


def grammar(server) -> str:
    return server.engine.requests[-1].sampling.grammar.text


def test_a_following_response_has_the_tools_of_its_conversation(server, text_parts):
    first = post(server, input=[item(space("web", function("find"))), user()])
    second = post(server, input="x", previous_response_id=first.json()["id"])
    assert '"web__find"' in prompt(server, text_parts)
    assert "Space web." in prompt(server, text_parts)
    newer = item(space("web", function("find", "Newer.")), function("other"))
    third = post(server, input=[newer, user()], previous_response_id=second.json()["id"])
    call = '<tool_call>{"name": "web__find", "arguments": {}}</tool_call>'
    fourth = post(server, input=f"say({call})yas", previous_response_id=third.json()["id"])
    text = prompt(server, text_parts)
    assert text.count('"web__find"') == 1 + text.count(call) and '"other"' in text
    assert "Newer." in text and "Does it." in text
    assert [(out["namespace"], out["name"]) for out in fourth.json()["output"]] == [("web", "find")]
    assert not any(name in each.headers for each in (second, third, fourth) for name in FIELDS)


def test_a_tool_of_the_request_comes_before_one_of_an_item(server, text_parts):
    given = [item(function("find", "The item's.")), user()]
    post(server, input=given, tools=[function("find", "The request's.")])
    text = prompt(server, text_parts)
    assert "The request's." in text and "The item's." not in text


@pytest.mark.parametrize("named", [False, True])
def test_a_reference_to_an_item_offers_its_tools(server, text_parts, named):
    own = {"id": "at_1"} if named else {}
    first = post(server, input=[item(function("find"), **own), user()]).json()
    with server.http() as http:
        listed = http.get(f"{PATH}/{first['id']}/input_items?order=asc").json()["data"]
    reference = {"type": "item_reference", "id": listed[0]["id"]}
    second = post(server, input=[reference, user()])
    assert '"find"' in prompt(server, text_parts)
    post(server, input="x", previous_response_id=second.json()["id"])
    assert '"find"' in prompt(server, text_parts)


@pytest.mark.parametrize(
    ("tools", "is_named"),
    [
        (None, False),
        ([], False),
        (5, True),
        ({"type": "function", "name": "f"}, True),
        ([5], True),
        ([{"type": "web_search"}], True),
        ([{"name": "x"}], True),
        ([{"type": "function"}], True),
        ([function("a b")], True),
        ([space("web")], True),
        ([space("web", {"type": "web_search"})], True),
        ([space("web", {"type": "function"}, 5)], True),
        ([space("web", space("inner", function("f")))], True),
        ([space("a b", function("f"))], True),
        ([{**space("web", function("f")), "name": None}], True),
    ],
    ids=str,
)
def test_tools_of_items_that_cannot_be_offered_are_left_out_and_named(
    server, text_parts, tools, is_named
):
    response = post(server, input=[{**item(), "tools": tools}, user()])
    named = response.headers.get("x-chunkllama-repaired-history")
    assert named == ("input[0].tools" if is_named else None)
    assert not server.engine.requests[-1].sampling.grammar


def test_beside_one_that_is_left_out_the_others_are_offered(server, text_parts):
    given = item(
        {"type": "function"},
        function("find"),
        space("web", {"type": "web_search"}, function("a"), function("b")),
    )
    response = post(server, input=[given, user()])
    assert response.headers["x-chunkllama-repaired-history"] == "input[0].tools"
    text = prompt(server, text_parts)
    assert all(f'"{name}"' in text for name in ("find", "web__a", "web__b"))
    assert text.count("Space web.") == 1


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "web_search"}] * 1025,
        [space("web", *[5] * 1025)],
        [space("web", space("inner", *[function("f")] * 1025))],
    ],
    ids=("flat", "in a namespace", "deeper"),
)
def test_too_many_tools_are_refused_before_they_are_read(server, monkeypatch, tools):
    validate = responses_tools.ResponseTool.model_validate
    read: list[object] = []
    monkeypatch.setattr(
        responses_tools.ResponseTool,
        "model_validate",
        lambda given: (read.append(given), validate(given))[1],
    )
    error = post(server, 400, input=[item(function("find")), item(*tools), user()])
    assert error["param"] == "input[1].tools"
    assert len(read) == 1


def test_tools_of_a_conversation_are_bounded_together(server):
    first = post(server, input=[item(*[{"type": "x"}] * 1000, function("f")), user()]).json()
    names = [{"type": "function", "name": f"f{i}"} for i in range(1024)]
    error = post(server, 400, input=[item(*names), user()], previous_response_id=first["id"])
    assert error["param"] == "tools"


@pytest.mark.parametrize("path", [PATH, f"{PATH}/compact", f"{PATH}/input_tokens"])
def test_tools_are_read_once_beside_the_event_loop(server, monkeypatch, path):
    threads: list[str] = []

    class Reader(responses_tools.ToolReader):
        def __init__(self, *args):
            threads.append(threading.current_thread().name)
            super().__init__(*args)

    monkeypatch.setattr(responses_request, "ToolReader", Reader)
    body = {"model": MODEL, "input": [item(*[{"type": "web_search"}] * 1000), user()]}
    assert server.post(path, body).status_code == 200
    assert len(threads) == 1 and threads[0].startswith("body")


TWO = [space("a", function("search"), function("own")), space("b", function("search"))]


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("mode", ["function", "allowed_tools"])
def test_a_choice_names_the_namespace(server, mode, name):
    chosen = {"type": "function", "name": "search", "namespace": name}
    choice = {"type": mode, "mode": "required", "tools": [chosen]} if mode != "function" else chosen
    response = post(server, input="x", tools=TWO, tool_choice=choice)
    assert f'"const": "{name}__search"' in grammar(server)
    assert grammar(server).count('"const"') == 1
    assert not any(name in response.headers for name in FIELDS)
    assert response.json()["tool_choice"] == choice


def test_a_name_that_one_namespace_has_needs_none(server):
    post(server, input="x", tools=TWO, tool_choice={"type": "function", "name": "own"})
    assert '"const": "a__own"' in grammar(server)


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "function", "name": "search"}, "tool_choice.name"),
        ({"type": "function", "name": "own", "namespace": "b"}, "tool_choice.name"),
        (
            {"type": "allowed_tools", "tools": [{"name": "own"}, {"name": "search"}]},
            "tool_choice.tools",
        ),
        (
            {"type": "allowed_tools", "tools": [{"name": "search", "namespace": 5}]},
            "tool_choice.tools",
        ),
        (
            {"type": "allowed_tools", "tools": [{"name": "own", "namespace": "b"}]},
            "tool_choice.tools",
        ),
    ],
    ids=str,
)
def test_a_choice_that_no_one_tool_has_is_refused(server, choice, param):
    assert post(server, 400, input="x", tools=TWO, tool_choice=choice)["param"] == param
