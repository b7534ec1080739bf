"""Load a server's settings from the command line, the environment, a YAML file and defaults.

Keys are flat and the same everywhere: ``--num-chunks``, ``CHUNKLLAMA_NUM_CHUNKS``, ``num_chunks:``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator

from chunkllama.config import (
    Bytes,
    CacheConfig,
    ConfigGroup,
    EngineConfig,
    LogConfig,
    ModelConfig,
    SchedulerConfig,
    check_keys,
    limit,
    rename_keys,
)
from chunkllama.config_errors import first_error
from chunkllama.engine.faults import TEST_MODE
from chunkllama.engine.faults import VARIABLE as FAULTS
from chunkllama.errors import ConfigError
from chunkllama_server.config.adapters import AdapterConfig
from chunkllama_server.config.api_keys import KeyEntry, parse_key
from chunkllama_server.config.batches import BatchConfig
from chunkllama_server.config.cluster import ClusterConfig
from chunkllama_server.config.files import read_text, read_yaml
from chunkllama_server.config.limits import LimitsConfig
from chunkllama_server.config.packs import PackConfig
from chunkllama_server.config.protocols import Protocols
from chunkllama_server.config.shared import SharedConfig
from chunkllama_server.config.tuning import TuningConfig

ENV_PREFIX = "CHUNKLLAMA_"
# Read elsewhere, before any configuration: locations of files, and what tests plant.
_OTHER_VARIABLES = frozenset(
    {"CHUNKLLAMA_CACHE", "CHUNKLLAMA_NATIVE_DIR", "CHUNKLLAMA_CONFIG", TEST_MODE, FAULTS}
)

_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT_\d+_(TCP|UDP|SCTP)")


def _listed(value: object) -> object:
    """Split "a,b" into a list: environment variables and flags are strings."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _split(value: object) -> object:
    """Split the texts of a list too: a flag may hold "a,b" or be repeated."""
    listed = _listed(value)
    if isinstance(listed, list | tuple) and all(isinstance(part, str) for part in listed):
        return [part for text in listed for part in text.split(",")]
    return listed


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Tags = Annotated[tuple[str, ...], BeforeValidator(_split)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_listed)]
Port = Annotated[int, Field(ge=0, le=65535)]

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
]


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
        pattern="^https?://.",
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
    root_path: str = Field(default="", description="Path prefix that a proxy removes.")
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


_ENGINE_GROUPS = (ModelConfig, CacheConfig, SchedulerConfig, LogConfig)
_SERVER_GROUPS = (
    *(ServerConfig, LimitsConfig, BatchConfig, TuningConfig, AdapterConfig, PackConfig),
    *(SharedConfig, ClusterConfig),
)


class Settings(
    ServerConfig,
    LimitsConfig,
    BatchConfig,
    TuningConfig,
    AdapterConfig,
    PackConfig,
    SharedConfig,
    ClusterConfig,
    LogConfig,
    SchedulerConfig,
    CacheConfig,
    ModelConfig,
):
    """All keys of all groups."""

    groups: ClassVar[tuple[type[ConfigGroup], ...]] = (*_ENGINE_GROUPS, *_SERVER_GROUPS)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Return the names that clients may request; the first is the default."""
        path = Path(self.model).resolve()  # an alias or a hub id ends in its name, too
        own_name = path.stem if path.suffix.lower() == ".gguf" else path.name
        return self.served_model_name or (own_name,)

    def engine(self) -> EngineConfig:
        """Return the engine's part."""
        keys = [key for group in _ENGINE_GROUPS for key in group.model_fields]
        return EngineConfig.from_flat(**{key: getattr(self, key) for key in keys})

    def key_entries(self) -> list[KeyEntry]:
        """Return the API keys of the flags and the file with the quotas behind them.

        A key without a name is named by its hash, which does not depend on other keys.

        Raises:
            ConfigError: the file cannot be read or a line is malformed.
        """
        entries = [secret.get_secret_value() for secret in self.api_key]
        if self.api_key_file is not None:
            lines = read_text(self.api_key_file, "api_key_file").splitlines()
            entries += [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
            if not entries:
                raise ConfigError(f"api_key_file: {self.api_key_file} holds no key")
        return [parse_key(entry, number) for number, entry in enumerate(entries, start=1)]

    def keys_by_tenant(self) -> dict[str, str]:
        """Return API keys by tenant name.

        Raises:
            ConfigError: see ``key_entries``; a name or key occurs twice.
        """
        keys: dict[str, str] = {}
        for number, (name, key, _) in enumerate(self.key_entries(), start=1):
            if name in keys or key in keys.values():
                raise ConfigError(f"api_key: entry {number} ({name}) repeats a name or a key")
            keys[name] = key
        operators = [secret.get_secret_value() for secret in self.operator_key]
        if operators and not keys and self.admin_port is None:
            raise ConfigError(
                "operator_key: needs api_key or admin_port; without keys anyone reads everything"
            )
        if not all(operators) or any(key in keys.values() for key in operators):
            raise ConfigError("operator_key: empty, or the same as a tenant's key")
        return keys


class Loaded:
    """Settings and the origin of each value.

    Attributes:
        origins: key to "command line", "environment", a file's path, or "default".
    """

    def __init__(self, settings: Settings, origins: dict[str, str]) -> None:
        self.settings = settings
        self.origins = origins


def load_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    config_file: Path | None = None,
) -> Loaded:
    """Merge all sources: command line over environment over file over defaults.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a bad value, with its origin.
    """
    known = list(Settings.model_fields)
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX)
        and name not in _OTHER_VARIABLES
        and not _is_service_link(name, value)
    }
    variables = rename_keys(variables, "the environment")
    check_keys(variables, known, f"the environment ({ENV_PREFIX}...)")
    config_file = config_file or (
        Path(environ["CHUNKLLAMA_CONFIG"]) if environ.get("CHUNKLLAMA_CONFIG") else None
    )
    document = read_yaml(config_file) if config_file is not None else {}
    document = rename_keys(document, str(config_file))
    flags = rename_keys(flags, "the command line")
    check_keys(document, known, str(config_file))
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for origin, source in (
        (str(config_file), document),
        ("environment", variables),
        ("command line", flags),
    ):
        for key, value in source.items():
            values[key], origins[key] = value, origin
    try:
        return Loaded(Settings(**values), origins)
    except ValidationError as error:
        message = first_error(error, Settings.model_fields)
        origin = origins.get(message.split(":")[0], "")
        raise ConfigError(f"{message} (from {origin})" if origin else message) from None


def _is_service_link(name: str, value: str) -> bool:
    """Tell whether Kubernetes set it for a Service whose name begins with chunkllama."""
    return value.startswith("tcp://") or _SERVICE_LINK.search(name) is not None
