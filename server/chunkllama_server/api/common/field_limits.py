"""Check the lengths of a request's fields against the server's own limits.

The request models refuse what the API itself does not allow; an operator may allow less.
"""

from __future__ import annotations

from pydantic import BaseModel

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
    "stop_sequences": "max_stop_strings",
    "stop_token_ids": "max_stop_token_ids",
    "logit_bias": "max_logit_bias",
    "bad_words": "max_bad_words",
    "allowed_token_ids": "max_allowed_token_ids",
}


def check_field_limits(body: BaseModel, limits: LimitsConfig) -> None:
    """Refuse numbers and lists beyond the settings.

    Raises:
        ApiError: 400 naming the field.
    """
    known = type(body).model_fields.keys()  # beside them is what a client has made up
    for field in body.model_fields_set & known:
        value = getattr(body, field)
        key = _NUMBERS.get(field)
        if field == "logprobs" and not isinstance(value, bool):
            key = "max_logprobs"  # of a completion; in a chat it is a switch
        if key is None and field in _LENGTHS and value is not None:
            key, value = _LENGTHS[field], 1 if isinstance(value, str) else len(value)
        if key is not None and value is not None and value > getattr(limits, key):
            raise exceeded(limits, key, field, value=value)
