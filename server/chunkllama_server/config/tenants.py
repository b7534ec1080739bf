"""Quotas of tenants, from a YAML file and from the fields of the key file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from chunkllama.config_errors import first_error
from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.messages import SetTenants
from chunkllama.tenant_limits import TenantLimits, parse_weights
from chunkllama_server.config.files import load_yaml

if TYPE_CHECKING:
    from chunkllama_server.config.settings import Settings

logger = init_logger(__name__)

_MAX_NAMED: Final = 5  # tenants without a key
_MAX_COMPARED: Final = 500  # names for a hint, each of which takes 60 microseconds


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


def _names(value: object) -> object:
    """Split "a,b" of the key file."""
    return value.split(",") if isinstance(value, str) else value


_Number = BeforeValidator(_no_bool)
Count = Annotated[int, _Number, Field(ge=0, le=10**9)]
Rate = Annotated[int, _Number, Field(ge=1, le=10**12)]
Share = Annotated[float, _Number, Field(gt=0, le=1)]
Models = Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)]


class TenantQuotas(BaseModel):
    """Quotas of one tenant; a field without a value is no quota of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: Annotated[float, _Number, Field(ge=0.001, le=1000)] | None = Field(
        default=None,
        description="Share of the engine relative to other tenants, with scheduling_policy fair. "
        "Default: that of tenant_weights, else 1.",
    )
    max_concurrent_requests: Annotated[int, _Number, Field(ge=1, le=10**9)] | None = Field(
        default=None, description="Requests that run at once; others wait."
    )
    max_queued_requests: Count | None = Field(
        default=None, description="Requests that wait; one more is refused with 429."
    )
    queue_share: Share | None = Field(
        default=None,
        description="Part of max_waiting that its requests may take. Default: as many places as "
        "are still free.",
    )
    requests_per_minute: Rate | None = Field(
        default=None, description="POST requests per minute; one more is refused with 429."
    )
    tokens_per_minute: Rate | None = Field(
        default=None,
        description="Prompt and output tokens per minute; a request beyond is refused with 429.",
    )
    pin_chunks: Count | None = Field(
        default=None,
        description="Chunks that its pins may cover, within the server's budget of half the pool; "
        "0 refuses pins. Default: as many as the budget has left.",
    )
    chunk_share: Share | None = Field(
        default=None,
        description="Part of the chunk pool; beyond it, its cached chunks are evicted before "
        "those of tenants within their shares.",
    )
    chunk_floor: Annotated[float, _Number, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Part of the chunk pool up to which its cached chunks are evicted after those "
        "of all other tenants. Default: half an equal share.",
    )
    stored_responses: Count | None = Field(
        default=None,
        description="Responses stored for previous_response_id; the oldest are dropped. Default: "
        "response_store_items, of which the tenant with most loses first.",
    )
    file_bytes: Annotated[int, _Number, Field(ge=0, le=10**15)] | None = Field(
        default=None,
        description="Bytes of stored files and results of batches. Default: the setting "
        "file_bytes.",
    )
    tokenizer_share: Annotated[float, _Number, Field(ge=0.001, le=1)] | None = Field(
        default=None,
        description="Share of the tokenizer threads' time relative to other tenants whose long "
        "texts wait. Default: 1.",
    )
    highest_priority: Annotated[int, _Number, Field(ge=-1000, le=1000)] | None = Field(
        default=None,
        description="Lowest priority number, which is served first, that a request may carry. "
        "Default: the setting highest_priority.",
    )
    allowed_models: Models | None = Field(
        default=None,
        description="Served names that it may request, and adapters as NAME or MODEL:NAME. "
        "Default: all.",
    )

    @model_validator(mode="after")
    def _check_floor(self) -> TenantQuotas:
        share, floor = self.chunk_share, self.chunk_floor
        if share is not None and floor is not None and floor > share:
            raise ValueError(f"chunk_floor: must be at most chunk_share {share}, got {floor}")
        return self

    def engine_limits(self) -> TenantLimits:
        """Return the part that the engine applies."""
        return TenantLimits(
            **{name: getattr(self, name) for name in TenantLimits.__struct_fields__}
        )


NO_QUOTAS = TenantQuotas()


def engine_message(quotas: Mapping[str, TenantQuotas]) -> SetTenants:
    """Return the message that gives the engine its part of all quotas."""
    return SetTenants(tenants={name: each.engine_limits() for name, each in quotas.items()})


def load_quotas(settings: Settings) -> dict[str, TenantQuotas]:
    """Return the quotas of every tenant with an API key.

    Raises:
        ConfigError: one line with the file, the tenant and the field.
    """
    tenants = list(settings.keys_by_tenant())
    key_file = f"api_key_file: {settings.api_key_file}" if settings.api_key_file else "api_key"
    own: dict[str, dict[str, Any]] = {name: {} for name in tenants}
    for entry in settings.key_entries():
        _check_fields(entry.fields, f"{key_file}: tenant {entry.name}")
        own[entry.name] = dict(entry.fields)
    path = settings.tenants_file
    if path is None:
        quotas = {n: _parse(fields, f"{key_file}: tenant {n}") for n, fields in own.items()}
        _check_all(quotas, settings, key_file)
        return quotas
    if not tenants:
        raise ConfigError("tenants_file: needs api_key; without keys there is one tenant")
    where = f"tenants_file: {path}"
    defaults, listed = _read_file(path, where, tenants)
    for name, fields in listed.items():
        both = next((field for field in fields if field in own[name]), None)
        if both is not None:
            raise ConfigError(f"{where}: tenant {name}: {both} is set with its key, too; keep one")
    quotas = {
        name: _parse({**defaults, **own[name], **listed.get(name, {})}, f"{where}: tenant {name}")
        for name in tenants
    }
    _check_all(quotas, settings, where)
    return quotas


def _read_file(
    path: Path, where: str, tenants: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the defaults and the fields of each listed tenant, by themselves valid."""
    document = _mapping(load_yaml(path, "tenants_file"), where)
    unknown = next((key for key in document if key not in ("defaults", "tenants")), None)
    if unknown is not None:
        raise ConfigError(f"{where}: unknown key {unknown}; write defaults: or tenants:")
    defaults = _mapping(document.get("defaults"), f"{where}: defaults")
    _check_fields(defaults, f"{where}: defaults")
    _parse(defaults, f"{where}: defaults")
    listed: dict[str, dict[str, Any]] = {}
    known, unused = set(tenants), []
    for name, fields in _mapping(document.get("tenants"), f"{where}: tenants").items():
        own = _mapping(fields, f"{where}: tenant {name}")
        _check_fields(own, f"{where}: tenant {name}")
        if name in known:
            listed[name] = own
        else:  # an error would keep a key valid that was removed from the other file
            unused.append(name)
    for name in unused[:_MAX_NAMED]:
        hint = _hint(name, tenants)
        logger.warning("%s: tenant %s: not used, it has no API key%s", where, name, hint)
    if (left := len(unused) - _MAX_NAMED) > 0:
        logger.warning("%s: %d more tenants have no API key", where, left)
    return defaults, listed


def _mapping(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must hold key: value lines")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: {key!r} is not text; put it in quotes")
    return value


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [*islice(known, _MAX_COMPARED)], n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _check_fields(fields: Iterable[str], where: str) -> None:
    known = TenantQuotas.model_fields
    for field in fields:
        if field not in known:
            raise ConfigError(f"{where}: unknown field {field}{_hint(field, known)}")


def _parse(fields: Mapping[str, Any], where: str) -> TenantQuotas:
    try:
        return TenantQuotas(**fields)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_error(error)}") from None


def _check_all(quotas: Mapping[str, TenantQuotas], settings: Settings, where: str) -> None:
    """Check what depends on the settings or on several tenants."""
    weights = parse_weights(settings.tenant_weights)
    for name, each in quotas.items():
        if each.weight is not None and name in weights:
            raise ConfigError(
                f"{where}: tenant {name}: weight: is in tenant_weights, too; keep one"
            )
        served = settings.model_names
        for model in each.allowed_models or ():
            base, _, adapter = model.rpartition(":")
            # an adapter may be loaded later: MODEL:NAME names it
            is_adapter = model in settings.adapter_folders or (base in served and adapter)
            if model not in served and not is_adapter:
                raise ConfigError(
                    f"{where}: tenant {name}: allowed_models: {model} is not served; served: "
                    f"{', '.join(served)}"
                )
    floors = sum(each.chunk_floor or 0.0 for each in quotas.values())
    if floors > 1 + 1e-9:
        raise ConfigError(
            f"{where}: chunk_floor: the floors of all tenants add up to {floors:g} of the pool; "
            "at most 1"
        )
