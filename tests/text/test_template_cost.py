"""Test that a conversation costs what its length says, not its square: counted, not timed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chunkllama.errors import InvalidRequestError
from chunkllama.text import printed_text, template_adapter
from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.printed_text import check_all_text
from chunkllama.text.template_adapter import adapt
from chunkllama.text.template_capabilities import TemplateCapabilities
from chunkllama.text.tokenizer import load_tokenizer

NUM = 300


def noted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Arguments of the calls of a function from now on."""
    calls: list[tuple[Any, ...]] = []
    work = getattr(owner, name)

    def noting(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return work(*arguments, **options)

    monkeypatch.setattr(owner, name, noting)
    return calls


@pytest.mark.parametrize("is_ascii", [True, False])
def test_texts_that_are_printed_as_json_are_looked_for_once_each(monkeypatch, is_ascii) -> None:
    messages = []
    for index in range(NUM):
        messages.append({"role": "user", "content": f'a "{index}" é'})
        messages.append({"role": "tool", "content": f'b "{index}" é'})
    texts = [json.dumps(m["content"], ensure_ascii=is_ascii) for m in messages[1::2]]
    pairs = zip(messages[::2], texts, strict=True)
    rendered = "".join(f"<{user['content']}>{text}\n" for user, text in pairs)
    calls = noted(monkeypatch, printed_text._Printed, "_find")
    check_all_text(messages, rendered)
    assert len(calls) < 2 * NUM + 5


def test_a_search_that_takes_too_long_ends_with_one_line(monkeypatch) -> None:
    monkeypatch.setattr(printed_text, "FIND_SECONDS", -1.0)
    with pytest.raises(InvalidRequestError, match="send fewer messages") as caught:
        check_all_text([{"role": "user", "content": "a"}], "b")
    assert caught.value.code == "chat_template_stopped"


def test_messages_of_one_role_are_joined_at_once(monkeypatch) -> None:
    calls = noted(monkeypatch, template_adapter, "_join")
    turn = [{"role": "user", "content": f"{i}" if i % 3 else ""} for i in range(NUM)]
    answer = {"role": "assistant", "content": "yes"}
    able = TemplateCapabilities(developer=True, repeated_roles=False)
    messages, _ = adapt([*turn, answer, *turn], None, able)
    text = "\n\n".join(f"{i}" for i in range(NUM) if i % 3)
    assert [m["content"] for m in messages if m["role"] == "user"] == [text, text]
    assert len(calls) < 10


class Counted(dict[str, Any]):
    """A message that counts how often its id is read."""

    reads = 0

    def get(self, key: str, default: Any = None) -> Any:
        Counted.reads += key == "tool_call_id"
        return super().get(key, default)


def test_results_find_their_calls_at_once() -> None:
    Counted.reads = 0
    calls = [{"id": f"c{i}"} for i in range(NUM)]
    results = [Counted(role="tool", tool_call_id=f"c{2 * i}", content=str(i)) for i in range(NUM)]
    message = {"role": "assistant", "content": "a", "tool_calls": calls}
    found = template_adapter._one_call_each(message, [*results, results[0]])
    assert Counted.reads < 4 * NUM
    assert [m["tool_calls"] for m in found if m["role"] == "assistant"] == [[c] for c in calls]
    assert found[0]["content"] == "a" and found[1:3] == [results[0], results[0]]
    assert found[-NUM // 2 :] == results[NUM // 2 :]  # those of no call, in their order


def test_a_template_is_not_probed_on_after_it_was_stopped(folders, monkeypatch) -> None:
    tokenizer = load_tokenizer(folders["chatml"])
    source = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    whole = ChatTemplate(source, tokenizer)
    calls = noted(monkeypatch, ChatTemplate, "_fill")
    assert whole.capabilities
    assert len(calls) > 1
    calls.clear()
    stopped = ChatTemplate(source, tokenizer, render_seconds=-1.0)
    assert stopped.capabilities and len(calls) == 1
