"""Check an answer or an event against openai-python's own types, strictly."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import BaseModel, TypeAdapter

# Members that OpenAI's answers do not have, by type; each is documented in docs/http.md.
ADDED = {
    "Model": {"max_model_len", "max_request_tokens", "chat_template", "root", "parent"},
    "ChatCompletion": {"prompt_token_ids", "prompt_logprobs", "metadata"},
    "ChatCompletionChunk": {"prompt_token_ids"},
    "Choice": {"stop_reason", "token_ids", "branch"},
    "ChatCompletionMessage": {"reasoning_content"},
    "ChoiceDelta": {"reasoning_content"},
    "Completion": {"prompt_token_ids"},
    "CompletionChoice": {
        *("stop_reason", "token_ids", "prompt_logprobs", "prompt_token_ids", "branch")
    },
    "ResponseTextDeltaEvent": {"branch"},
    # Of the events of a text, whose types lack what those of the whole text have.
    "Logprob": {"bytes"},
    "LogprobTopLogprob": {"bytes"},
    # In OpenAI's API and not in the client's types.
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},
    "ResponseCustomToolCall": {"status"},
    "Response": {"store"},
    # Of the lists, whose types have the members alone that pages are read by.
    "SyncCursorPage[Batch]": {"object", "first_id", "last_id"},
    "SyncCursorPage[FileObject]": {"object", "first_id", "last_id"},
    "PromptTokensDetails": {"cache_explanations", "image_tokens", "text_tokens"},
    "InputTokensDetails": {"cache_explanations", "image_tokens", "text_tokens"},
}


def additions(value: Any) -> set[tuple[str, str]]:
    """Members of a parsed answer that its types do not have, with the type's name."""
    if isinstance(value, list | tuple):
        return {found for item in value for found in additions(item)}
    if not isinstance(value, BaseModel):
        return set()
    name = type(value).__name__
    found = {(name, extra) for extra in value.model_extra or {}}
    fields = (getattr(value, field) for field in type(value).model_fields)
    return found.union(*map(additions, fields))


adapter = cache(TypeAdapter)


def check(kind: Any, data: Any) -> Any:
    """The parsed data, which fits the type strictly."""
    parsed = adapter(kind).validate_json(json.dumps(data), strict=True)
    unknown = {(n, extra) for n, extra in additions(parsed) if extra not in ADDED.get(n, ())}
    assert not unknown, unknown
    return parsed


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
