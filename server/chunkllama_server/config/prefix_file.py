"""Check the YAML file of prompts that ``chunkllama pack build`` packs."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chunkllama.engine.pack_builder import PrefixPrompt
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.template_adapter import adapt, plain_messages, template_tool
from chunkllama.text.tokenizer import Tokenizer

# Conversations go on with one of these: what their prompts have in common is the prefix.
_USERS = ("a", "1")


class PrefixEntry(BaseModel):
    """One prompt of the file: ``text`` as /v1/completions has it, or ``messages``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=256)
    scope: Literal["public", "tenant"] = "public"
    tenant: str = Field(default="", max_length=256)
    pin: bool = False
    text: str = ""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _check(self) -> PrefixEntry:
        if (self.scope == "tenant") != bool(self.tenant):
            raise ValueError("scope: tenant and tenant: NAME belong together")
        if bool(self.text) == bool(self.messages):
            raise ValueError("give text or messages")
        if self.tools and not self.messages:
            raise ValueError("tools belong to messages")
        return self


def encode_prefixes(
    document: object, path: Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[PrefixPrompt]:
    """Check the file's entries and encode their prompts.

    Args:
        document: what the file holds.
        path: of the file, for messages; it may be a pipe, which cannot be read again.

    Raises:
        ConfigError: one line with the file, the entry and the field.
    """
    where = f"prefixes: {path}"
    if not isinstance(document, list) or not document:
        raise ConfigError(f"{where} must be a YAML list of prompts")
    prompts: dict[str, PrefixPrompt] = {}
    for number, values in enumerate(document, start=1):
        entry = _parse(values, f"{where}: entry {number}")
        if entry.name in prompts:
            raise ConfigError(f"{where}: entry {number}: name: {entry.name} occurs twice")
        try:
            ids = _encode(entry, tokenizer, template)
        except InvalidRequestError as error:
            raise ConfigError(f"{where}: entry {number}: {error}") from None
        prompts[entry.name] = PrefixPrompt(entry.name, entry.tenant, ids, entry.pin)
    return list(prompts.values())


def _parse(values: object, where: str) -> PrefixEntry:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must hold key: value lines")
    try:
        return PrefixEntry.model_validate(values)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, detail["loc"]))
        message = detail["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {field + ': ' if field else ''}{message}") from None


def _encode(entry: PrefixEntry, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """Token ids that every prompt with this prefix begins with."""
    if entry.text:
        return tokenizer.encode(entry.text, add_special_tokens=True, allow_special=True)
    if template is None:
        raise InvalidRequestError("the model has no chat template; give text", "messages")
    tools = [template_tool(tool.get("function", tool)) for tool in entry.tools] or None

    def encode(messages: list[dict[str, Any]]) -> list[int]:
        chat, shown = adapt(plain_messages(messages), tools, template.capabilities)
        return template.encode(chat, tools=shown)

    if entry.messages[-1].get("role") == "user":
        return encode(entry.messages)
    first, second = (
        encode([*entry.messages, {"role": "user", "content": user}]) for user in _USERS
    )
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [token for token, _ in same]
