"""Settings of the HTTP server: addresses, keys, protocols, templates, stored responses, drain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from chunkllama.config import Bytes, ConfigGroup, limit
from chunkllama_server.config.lists import Names, split_tags, split_text
from chunkllama_server.config.protocols import Protocols

# Not split where it is a flag: a key may have a comma.
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(split_text)]
Tags = Annotated[tuple[str, ...], BeforeValidator(split_tags)]
Port = Annotated[int, Field(ge=0, le=65535)]
# As browsers send it: of a file or a page in a sandbox it is null, of an extension the scheme is
# another one.
_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://(?:[^/\s:]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")

# Model families by the form in which they write tool calls.
ToolFamily = Literal[
    "hermes",
    "llama3_json",
    "pythonic",
    "mistral",
    "qwen3_coder",
    "deepseek_v3",
    "granite",
    "phi4_mini_json",
    "functionary",
    "kimi_k2",
    "minimax_m2",
    "glm45",
    "deepseek_v32",
    "functiongemma",
]


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port out of range
        return False


class ServerConfig(ConfigGroup):
    """The HTTP server."""

    served_model_name: Names = Field(
        default=(), description="Names that clients may request. Default: the model's own name."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Port = Field(default=8000, description="Port to listen on; 0 selects a free one.")
    admin_port: Port | None = Field(
        default=None,
        description="Serve /metrics and the operator's paths on this port instead of the main one; "
        "reading needs no key.",
    )
    admin_host: str = Field(
        default="127.0.0.1",
        description="Address that admin_port listens on. Other than a loopback address, it needs "
        "an operator_key for all that changes something.",
    )
    metrics_tenants: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description="Tenants with a label of their own in /metrics, those with most tokens; the "
        "others share the label other.",
    )
    metrics_compat: Literal["vllm"] | None = Field(
        default=None,
        description="Repeat the metrics under the names of another server, for its routers and "
        "dashboards.",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="Send a trace of each request to this OTLP/HTTP URL, such as "
        "http://127.0.0.1:4318/v1/traces; needs the extra chunkllama[otel].",
    )
    api_key: Secrets = Field(
        default=(),
        description="name:key of a tenant, or a bare key; repeatable. Prefer api_key_file: "
        "other users can read a command line.",
    )
    api_key_file: Path | None = Field(
        default=None,
        description="File with one name:key per line, and quotas like weight=2 behind it; # begins "
        "a comment.",
    )
    tenants_file: Path | None = Field(
        default=None,
        description="YAML file with quotas of tenants: rates, shares, priority, models; read again "
        "at SIGHUP.",
    )
    operator_key: Secrets = Field(
        default=(),
        description="Key that reads all of /metrics, /v1/usage, /dashboard/data and "
        "/dashboard/tenants, loads adapters, and that requests to admin_port need which change "
        "something; it may do nothing else; repeatable. Prefer the environment or a file: other "
        "users can read a command line.",
    )
    isolation: Literal["off", "tenant"] | None = Field(
        default=None,
        description="tenant gives each key its own cache namespace, off shares one. tenant is the "
        "default with keys.",
    )
    highest_priority: int = Field(
        default=-10,
        ge=-1000,
        le=1000,
        description="Lowest priority number, which is served first, that a request with an API "
        "key may carry.",
    )
    public_prefixes: Path | None = Field(
        default=None,
        description="YAML list of system prompts that all tenants share; computed at start and "
        "pinned in the cache.",
    )
    chat_template: Path | None = Field(
        default=None, description="jinja2 file to use instead of the model's chat template."
    )
    strict: bool = Field(
        default=False, description="Refuse unknown request fields instead of ignoring them."
    )
    trust_request_chat_template: bool = Field(
        default=False,
        description="Accept a chat_template in requests; only for clients that may run templates.",
    )
    chat_template_kwargs: Names = Field(
        default=("enable_thinking", "thinking", "date_string", "tools_in_user_message", "*"),
        description="Names that chat_template_kwargs may set; * is all that the template reads.",
    )
    protocols: Protocols = Field(
        default=("anthropic", "ollama", "tgi"),
        description="Protocols of other servers that are served beside OpenAI's: anthropic "
        "(/v1/messages), ollama (/api), tgi (/generate, /); none serves OpenAI's alone.",
    )
    tool_call_parser: ToolFamily | None = Field(
        default=None,
        description="Family whose form of tool calls is read. Default: all forms, and that of the "
        "chat template where a grammar forces one.",
    )
    reasoning_tags: Tags = Field(
        default=("auto",),
        description="Tags around the model's thoughts, as START,END; auto takes those of the chat "
        "template or the vocabulary, none leaves thoughts in the text.",
    )
    idle_prefill: bool = Field(
        default=True,
        description="While no request runs, prefill the last answer without its thoughts where the "
        "chat template drops those of earlier turns; its tokens are charged to the tenant.",
    )
    embedding_pooling: Literal["mean", "last"] = Field(
        default="mean", description="Pooling of a prompt's hidden states to one embedding."
    )
    response_store_items: int = limit(
        1000, "responses", "tenant", "left out",
        "Responses that this process stores; 0 stores none. The oldest is dropped.", ge=0,
    )  # fmt: skip
    response_store_bytes: Bytes = limit(
        64 << 20, "bytes", "tenant", "left out",
        "Size of all responses that this process stores, or of one with response_store.",
    )  # fmt: skip
    recent_prompt_tokens: int = limit(
        262_144, "tokens", "tenant", "left out",
        "Recent prompts kept for the report of divergences; 0 keeps none. The oldest is dropped.",
        ge=0, le=100_000_000,
    )  # fmt: skip
    response_store_seconds: float = limit(
        3600.0, "seconds", "tenant", "left out",
        "A stored response expires after this many seconds.", gt=0,
    )  # fmt: skip
    background_responses: int = limit(
        16, "responses", "tenant", "429 background_limit",
        "Background responses at once; one key has at most half of them where there are several.",
        ge=0,
    )  # fmt: skip
    root_path: str = Field(
        default="",
        pattern=r"^(/[\w.~-]+)*$",
        examples=["/llm"],
        description="Path prefix that a proxy removes, such as /llm: with a slash at its beginning "
        "and none at its end.",
    )
    allowed_hosts: Names = Field(
        default=(),
        description="Host names accepted by a server that listens on a loopback address, in "
        "addition to localhost, IP addresses and names without a dot. Others are refused with 403.",
    )
    cors_origins: Names = Field(
        default=(), description="Origins from which browsers may call; * is any. Default: none."
    )
    ssl_certfile: Path | None = Field(default=None, description="PEM certificate chain for HTTPS.")
    ssl_keyfile: Path | None = Field(default=None, description="PEM private key for HTTPS.")
    drain_seconds: float = limit(
        30.0, "seconds", "operator", "503 draining",
        "Time for live requests to finish on SIGTERM; then they are ended.", ge=0,
    )  # fmt: skip
    engine_hang_seconds: float = Field(
        default=30.0,
        gt=0,
        description="An engine process that makes no progress for this many seconds is restarted; "
        "ten times as long while it uses processor time.",
    )
    standby: bool = Field(
        default=False,
        description="Keep a second engine process ready, which takes over when the first one ends; "
        "weights and pool take their memory twice.",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not _is_http_url(value):
            raise ValueError("write http://HOST:PORT/v1/traces, or https")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"write https://HOST or https://HOST:PORT, null or *, not {origin!r}"
                )
        return value

    @model_validator(mode="after")
    def _check_tls(self) -> ServerConfig:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile must be given together")
        return self

    @model_validator(mode="after")
    def _check_admin_port(self) -> ServerConfig:
        if self.admin_port and self.admin_port == self.port:
            raise ValueError("admin_port must differ from port")
        return self

    @model_validator(mode="after")
    def _check_reasoning_tags(self) -> ServerConfig:
        tags = self.reasoning_tags
        if tags not in (("auto",), ("none",)) and (len(tags) != 2 or tags[0] == tags[1]):
            raise ValueError("reasoning_tags must be auto, none, or two tags as START,END")
        return self
