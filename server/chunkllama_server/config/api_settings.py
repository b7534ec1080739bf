"""What the HTTP application needs to know; the command line and its configuration build one of
these."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Settings of the HTTP application; limits are in bytes, tokens or seconds as their names say.

    Attributes:
        served_model_names: names clients may ask for; the first is the one answers carry.
        api_keys: tenant name -> key; empty means that no key is asked for. A reload changes the
            mapping in place.
        isolation: ``tenant`` gives each key its own cache namespace, ``off`` shares one;
            None is ``tenant`` with keys, even a single one: a reload may bring more.
        namespace_secret: key of the HMAC that turns tenant and salt into a namespace.
        strict: refuse unknown request fields instead of ignoring them.
        root_path: path prefix a proxy strips.
        cors_origins: origins browsers may call from; empty turns CORS off.
        generation_defaults: sampling values of the model's generation_config, for fields a client
            leaves out.
        max_body_bytes: a larger request body is refused with 413.
        max_choices: prompts x choices of one request.
        max_pin_seconds: the longest cache lifetime a client may ask for.
        trust_request_chat_template: accept ``chat_template`` in a request.
        chat_template_kwargs: names a request's ``chat_template_kwargs`` may carry.
        tool_call_parser: output format of tool calls that no grammar forces; None goes by the
            chat template.
        embedding_pooling: how prompt states become one embedding.
        stream_stall_seconds: a client that takes no byte for so long is given up.
        offload_text_bytes: texts above this are tokenized off the event loop.
        text_seconds: time limit for tokenizing and templating one request.
        grammar_seconds: time limit for compiling one grammar.
        store_max_items, store_max_bytes, store_ttl_seconds: bounds of the response store.
        expose_metrics: serve /metrics on this port too (off with a separate admin port).
        metrics_compat: whose metric names to repeat in /metrics.
    """

    served_model_names: tuple[str, ...]
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    isolation: Literal["off", "tenant"] | None = None
    namespace_secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    strict: bool = False
    root_path: str = ""
    cors_origins: tuple[str, ...] = ()
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    max_body_bytes: int = 2 * 2**20
    max_choices: int = 1024
    max_pin_seconds: float = 86_400.0
    trust_request_chat_template: bool = False
    chat_template_kwargs: tuple[str, ...] = (
        "enable_thinking",
        "thinking",
        "date_string",
        "tools_in_user_message",
    )
    tool_call_parser: Literal["llama3_json", "hermes"] | None = None
    embedding_pooling: Literal["mean", "last"] = "mean"
    stream_stall_seconds: float = 30.0
    offload_text_bytes: int = 8192
    text_seconds: float = 10.0
    grammar_seconds: float = 2.0
    store_max_items: int = 1000
    store_max_bytes: int = 64 * 2**20
    store_ttl_seconds: float = 3600.0
    expose_metrics: bool = True
    metrics_compat: Literal["vllm"] | None = None

    @property
    def isolates_tenants(self) -> bool:
        """Whether each key has a cache namespace of its own."""
        if self.isolation is None:
            return bool(self.api_keys)
        return self.isolation == "tenant"
