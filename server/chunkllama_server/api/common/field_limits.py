"""Check the lengths of a request's fields against the server's own limits.

The request models refuse what the API itself does not allow; an operator may allow less.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from chunkllama_server.api.schema.base import RequestModel
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.transport.errors import exceeded

_NUMBERS = {
    "n": "max_choices",
    "best_of": "max_choices",
    "top_logprobs": "max_logprobs",
    "prompt_logprobs": "max_logprobs",
}
_LENGTHS = {
    "stop": "max_stop_strings",
    "stop_token_ids": "max_stop_token_ids",
    "logit_bias": "max_logit_bias",
    "bad_words": "max_bad_words",
    "allowed_token_ids": "max_allowed_token_ids",
}
_LEAST_STOP = 16  # characters that a short stop string counts as
_HOLDERS = ("options", "parameters")  # fields of other protocols that hold sampling fields


def check_field_limits(body: RequestModel, limits: LimitsConfig) -> None:
    """Refuse numbers and lists beyond the settings.

    Raises:
        ApiError: 400 naming the field.
    """
    _check(body, "", limits)
    for holder in _HOLDERS:
        fields = getattr(body, holder, None)
        if isinstance(fields, RequestModel):
            _check(fields, f"{holder}.", limits)


def _check(fields: RequestModel, prefix: str, limits: LimitsConfig) -> None:
    known = type(fields).model_fields.keys()  # beside them is what a client has made up
    keys = {**_LENGTHS, **fields.own_limits}
    for field in fields.model_fields_set & known:
        value = getattr(fields, field)
        key = _NUMBERS.get(field)
        if field == "logprobs" and not isinstance(value, bool):
            key = "max_logprobs"  # of a completion; in a chat it is a switch
        if key is None and field in keys and value is not None:
            key = keys[field]
            value = _size(key, [value] if isinstance(value, str) else value)
        if key is not None and value is not None and value > getattr(limits, key):
            raise exceeded(limits, key, f"{prefix}{field}", value=value)


def _size(key: str, items: Collection[Any]) -> int:
    if key == "max_stop_chars":
        return sum(max(len(text), _LEAST_STOP) for text in items)
    return len(items)
