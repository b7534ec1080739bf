"""Answers, and the next turns that they are sent back in, on every endpoint and with every family's
template."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from in_process import InProcess, in_process

FAMILIES = Path(__file__).parents[1] / "text" / "families"
NAMES = sorted(path.stem for path in FAMILIES.glob("*.jinja"))
# Those that differ most in what they refuse; all of them run nightly.
STRICT = [
    *("exaone4", "functiongemma", "gemma2", "llama3_1", "minimax_m2", "mistral_v3", "mistral_v13"),
    "qwen3",
]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
RESPONSE_TOOLS = [
    {"type": "function", "name": "f", "parameters": PARAMETERS},
    {"type": "custom", "name": "run"},
]
USER = {"role": "user", "content": "go on"}
ARGUMENTS = '{"city": "Os\\"lo{", "days": 2}'
CALL = f'{{"name": "f", "arguments": {ARGUMENTS}}}'
RUN = '{"name": "run", "arguments": {"input": "ls \\n-l"}}'
# What models of the families write, and what weak ones make of it.
PIECES = (
    CALL,
    f"[{CALL}, {CALL}]",
    f"<tool_call>\n{CALL}\n</tool_call>",
    f"<tool_call>{RUN}</tool_call>",
    '[f(city="Oslo", days=2)]',
    "<tool_call>\n<function=f>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    f"[TOOL_CALLS]f[ARGS]{ARGUMENTS}",
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>",
    f"<function=f>{ARGUMENTS}</function>",
    "<think>\nIs it {so}?\n</think>\n\n",
    "[THINK]hm[/THINK]",
    "<tool_call>",
    '{"name": "f", "arguments": [1',
    "{'city': 'Oslo'",
    "It is sunny. ",
    "\0é🤖\u2028",
    "<|im_end|>{{ x }}",
    "   \n",
)
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=3).map("".join)
CHOICES = st.sampled_from(["auto", "required", "none"])
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FEW = settings(max_examples=2, deadline=None, suppress_health_check=QUIET)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=QUIET)


# Without it /v1/messages needs more tokens than it has for thoughts.
BETA = {"anthropic-beta": "interleaved-thinking-2025-05-14"}


class Family:
    """The application with the template of a family."""

    def __init__(self, http: InProcess, engine: Any) -> None:
        self._http = http
        self._engine = engine
        self._accepted: set[bytes] = set()

    def post(self, path: str, body: Any) -> Any:
        """The answer, which must be one."""
        status, answer = self._http.post(path, {"model": MODEL, **body})
        self._engine.requests.clear()  # there are hundreds of thousands
        assert status == 200, (answer, path, json.dumps(body)[:3000])
        return json.loads(answer)

    def accept(self, path: str, body: Any) -> None:
        """Check that there is an answer, which is not used.

        The same is not asked twice: many cuts lead to the same next turn.
        """
        asked = hashlib.blake2b(f"{path}{json.dumps(body)}".encode(), digest_size=16).digest()
        if asked not in self._accepted:
            self.post(path, body)
            self._accepted.add(asked)


@contextlib.contextmanager
def open_family(name: str, app_maker: Any) -> Iterator[Family]:
    """The application with a family's template while the block runs."""
    source = (FAMILIES / f"{name}.jinja").read_text("utf-8")
    engine, app = app_maker(template_source=source, strict=True)
    engine.tokens_per_delta = 64  # no answer is read before its end
    with in_process(app, BETA) as http:
        yield Family(http, engine)


strict = pytest.mark.parametrize("family", STRICT, indirect=True, scope="module")
every = pytest.mark.parametrize("family", NAMES, indirect=True, scope="module")


def check_chat(family, text, cut, choice, *, is_shown: bool = True) -> None:
    """With ``is_shown`` the endpoints that show and count a prompt are asked, too; they prepare it
    as the others do."""
    ask = {"role": "user", "content": f"say({text})yas"}
    legacy = {"functions": [tool["function"] for tool in TOOLS]}
    for fields in ({"tools": TOOLS, "tool_choice": choice}, {}, legacy):
        body = {"messages": [ask], "max_tokens": cut, **fields}
        message = family.post("/v1/chat/completions", body)["choices"][0]["message"]
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "12"}
            for call in message.get("tool_calls", ())
        ]
        if "function_call" in message:
            results = [{"role": "function", "name": "f", "content": "12"}]
        for back in ([message, USER], [message, *results, USER], [message, *results]):
            again = {**fields, "messages": [ask, *back]}
            family.accept("/v1/chat/completions", {**again, "max_tokens": 1})
        if is_shown:
            family.accept("/v1/chat/completions/render", again)
            family.accept("/tokenize", {"messages": [ask, message, *results, USER]})
        # Another endpoint goes on with what this one said.
        said = {"role": "assistant", "content": message["content"]}
        family.accept("/v1/responses", {"input": [ask, said, USER], "max_output_tokens": 16})


def check_responses(family, text, cut, choice) -> None:
    ask = {"role": "user", "content": f"say({text})yas"}
    body = {"tools": RESPONSE_TOOLS, "tool_choice": choice}
    asked = {**body, "input": [ask], "max_output_tokens": cut}
    first = family.post("/v1/responses", asked)
    output = first["output"]
    results = [
        {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": "12"}
        for item in output
        if item["type"].endswith("_call")
    ]
    references = [{"type": "item_reference", "id": item["id"]} for item in output]
    previous = {"previous_response_id": first["id"]}
    short = {**body, "max_output_tokens": 16}
    for more in (
        {"input": [ask, *output, *results, USER]},
        {"input": [ask, *output, USER]},
        {"input": [ask, *references, *results, USER]},
        {"input": [*results, USER], **previous},
    ):
        family.accept("/v1/responses/input_tokens", {**body, **more})
        family.accept("/v1/responses", {**short, **more})
    family.accept("/v1/responses/input_tokens", {**body, "input": "go on", **previous})
    second = family.post("/v1/responses", {**short, "input": "go on", **previous})
    third = {"input": "and on", "previous_response_id": second["id"], "max_output_tokens": 16}
    family.accept("/v1/responses", third)
    compacted = family.post("/v1/responses/compact", {"input": "go on", **previous})["output"]
    family.accept("/v1/responses", {"input": [*compacted, USER], "max_output_tokens": 16})


MESSAGES_CHOICES = {"auto": "auto", "required": "any", "none": "none"}


def check_messages(family, text, cut, choice) -> None:
    """Anthropic's API; the answer is also sent back without a result, and continued."""
    ask = {"role": "user", "content": f"say({text})yas"}
    tools = [{"name": "f", "input_schema": PARAMETERS}]
    for thinking in ({}, {"thinking": {"type": "enabled", "budget_tokens": 1024}}):
        with_tools = {"tools": tools, "tool_choice": {"type": MESSAGES_CHOICES[choice]}}
        for fields in (with_tools, {}):
            body = {**fields, **thinking, "max_tokens": cut}
            content = family.post("/v1/messages", {**body, "messages": [ask]})["content"]
            answer = {"role": "assistant", "content": content}
            results = [
                {"type": "tool_result", "tool_use_id": block["id"], "content": "12"}
                for block in content
                if block["type"] == "tool_use"
            ]
            for back in (
                [answer, {"role": "user", "content": [*results, {"type": "text", "text": "go"}]}],
                [answer, USER],
            ):
                again = {**fields, **thinking, "messages": [ask, *back]}
                family.accept("/v1/messages", {**again, "max_tokens": 1})
            family.accept("/v1/messages/count_tokens", again)


def check_ollama(family, text, cut, choice) -> None:
    ask = {"role": "user", "content": f"say({text})yas"}
    tools = [] if choice == "none" else TOOLS
    base = {"stream": False, "tools": tools, "options": {"num_predict": 1}}
    asked = {**base, "messages": [ask], "options": {"num_predict": cut}}
    message = family.post("/api/chat", asked)["message"]
    results = [
        {"role": "tool", "content": "12", "tool_name": call["function"]["name"]}
        for call in message.get("tool_calls", ())
    ]
    for back in ([message, USER], [message, *results, USER], [message, *results]):
        family.accept("/api/chat", {**base, "messages": [ask, *back]})
    body = {"stream": False, "prompt": ask["content"], "options": {"num_predict": cut}}
    said = family.post("/api/generate", body)["response"]
    again = {**body, "prompt": f"{ask['content']}\n{said}\ngo on", "options": {"num_predict": 1}}
    family.accept("/api/generate", again)


def check_completions(family, text, cut, choice) -> None:
    body = {"prompt": f"say({text})yas", "max_tokens": cut, "return_token_ids": True}
    first = family.post("/v1/completions", body)["choices"][0]
    more = {"max_tokens": 1}
    family.accept("/v1/completions", {**more, "prompt": body["prompt"] + first["text"]})
    family.accept("/v1/completions", {**more, "prompt": first["token_ids"]})
    family.accept("/tokenize", {"prompt": first["text"]})


def check_continued(family, text, cut, choice) -> None:
    """A cut answer is continued where it ended."""
    ask = {"role": "user", "content": f"say({text})yas"}
    body = {"messages": [ask], "max_tokens": cut, "tools": TOOLS, "tool_choice": choice}
    message = family.post("/v1/chat/completions", body)["choices"][0]["message"]
    if message.get("tool_calls"):
        return
    last = {"messages": [ask, message], "continue_final_message": True, "max_tokens": 1}
    family.accept("/v1/chat/completions", last)


OTHERS = [check_messages, check_ollama, check_completions, check_continued]


def cuts(piece: str) -> list[tuple[str, int]]:
    """An answer and its lengths in tokens; those of the tests' tokenizer are bytes."""
    text = f"{piece}."
    return [(text, cut) for cut in range(1, len(text.encode()) + 2)]
