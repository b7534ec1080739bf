"""Files of conversations to train on: which tokens are trained, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chunkllama.errors import InvalidRequestError
from chunkllama_server.api.tuning.examples import ExampleReader, FileLimits, StoppedError
from chunkllama_server.config.limits import LimitsConfig

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi <|im_end|>"}
ANSWER = {"role": "assistant", "content": "Hello."}
AGAIN = {"role": "assistant", "content": "Bye."}
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}


@pytest.fixture
def reader(text_parts: tuple[Any, Any]) -> ExampleReader:
    return made(text_parts, FileLimits(lines=3, answers=4, tokens=10_000))


def made(text_parts: tuple[Any, Any], limits: FileLimits) -> ExampleReader:
    tokenizer, template = text_parts
    return ExampleReader(template, frozenset(tokenizer.eos_token_ids), 200, limits, LimitsConfig())


def written(path: Path, *lines: Any) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("messages", "trained"),
    [
        ([SYSTEM, USER, ANSWER], ["Hello.<|im_end|>"]),
        ([USER, ANSWER, USER, AGAIN], ["Hello.<|im_end|>", "Bye.<|im_end|>"]),
        ([USER, {**ANSWER, "weight": 0}, USER, {**AGAIN, "weight": 1}], ["Bye.<|im_end|>"]),
        ([USER, ANSWER, USER], ["Hello.<|im_end|>"]),
        ([USER, CALL, RESULT, ANSWER], ['get{"a": 1}<|im_end|>', "Hello.<|im_end|>"]),
    ],
)
def test_answers_alone_are_trained(
    reader: ExampleReader,
    text_parts: tuple[Any, Any],
    tmp_path: Path,
    messages: list[dict[str, Any]],
    trained: list[str],
) -> None:
    tokenizer, _ = text_parts
    line = {"messages": messages, "tools": [TOOL]} if RESULT in messages else {"messages": messages}
    (example,) = reader.read(written(tmp_path / "f", "", line))
    stretches: list[list[int]] = []
    for target in example.targets:
        if not stretches or stretches[-1][-1] != target - 1:
            stretches.append([])
        stretches[-1].append(target)
    texts = [
        tokenizer.decode([example.token_ids[at] for at in stretch], skip_special_tokens=False)
        for stretch in stretches
    ]
    assert texts == trained
    # The whole is what a request would send, and a user's text writes no control token.
    assert tokenizer.decode(example.token_ids[:1], skip_special_tokens=False) == "<|im_start|>"
    ends = [token for token in example.token_ids if token == tokenizer.token_id("<|im_end|>")]
    assert len(ends) == len(messages) + ("tools" in line)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not valid JSON|JSON"),
        ('{"prompt": "a", "completion": "b"}', "must be an object like"),
        ({"messages": []}, "messages: no message of the assistant is trained"),
        ({"messages": [USER]}, "messages: no message of the assistant is trained"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages: no message of the assistant"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, r"messages\[1\].weight: must be 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"messages\[0\].weight"),
        ({"messages": [ANSWER]}, r"messages\[0\].role: an answer cannot be the first"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, r"messages\[1\].role: must be one"),
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, r"messages\[0\].content"),
        ({"messages": [USER, {**ANSWER, "mood": "x"}]}, r"messages\[1\].mood: is not supported"),
        ({"messages": [USER, ANSWER], "model": "x"}, "model: is not supported"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "x"}]}, r"tools\[0\]: must be a function"),
        ({"messages": [USER, ANSWER], "tools": {}}, "tools: must be a list"),
        ({"messages": [USER, "x"]}, r"messages\[1\]: must be an object"),
        ({"messages": [{**USER, "content": "x" * 300}, ANSWER]}, "at most 200 are trained"),
        ({"messages": [USER, ANSWER] * 5}, "messages: 5 answers are trained, at most 4 of a line"),
    ],
)
def test_a_line_is_refused_with_its_number_and_field(
    reader: ExampleReader, tmp_path: Path, line: Any, why: str
) -> None:
    good = {"messages": [USER, ANSWER]}
    with pytest.raises(InvalidRequestError, match=rf"^line 3: .*({why})") as caught:
        reader.read(written(tmp_path / "f", good, "", line))
    assert caught.value.code == "invalid_training_file" and "\n" not in caught.value.message


def test_a_file_has_at_least_one_line_and_not_too_many(
    reader: ExampleReader, tmp_path: Path
) -> None:
    line = {"messages": [USER, ANSWER]}
    with pytest.raises(InvalidRequestError, match="the file has no line"):
        reader.read(written(tmp_path / "f", " "))
    assert len(reader.read(written(tmp_path / "f", line, line, line))) == 3
    with pytest.raises(InvalidRequestError, match="line 4: a file has at most 3 lines"):
        reader.read(written(tmp_path / "f", line, line, line, line))


def test_what_finding_the_answers_renders_is_bounded_and_can_be_stopped(
    reader: ExampleReader, text_parts: tuple[Any, Any], tmp_path: Path
) -> None:
    line = {"messages": [USER, ANSWER, USER, AGAIN]}
    path = written(tmp_path / "f", line, line, line)
    size = len(reader.read(path)[0].token_ids)
    # Each line is rendered whole, and for each answer without it and with it.
    with pytest.raises(InvalidRequestError, match=r"^line 2: a file is rendered to at most") as why:
        made(text_parts, FileLimits(lines=3, answers=4, tokens=5 * size)).read(path)
    assert "\n" not in why.value.message and len(why.value.message) < 300
    calls: list[int] = []

    def is_stopped() -> bool:
        calls.append(0)
        return len(calls) == 6

    with pytest.raises(StoppedError):  # before the second answer of the second line
        reader.read(path, is_stopped)
    assert len(calls) == 6
