"""One row of the table of other servers' fields, and how the table writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from chunkllama_server.api.dialect.meanings import Becomes, Endpoint
from chunkllama_server.api.schema.spellings import as_plain

GENERATE: tuple[Endpoint, ...] = ("chat", "completions", "responses")
TEMPLATED: tuple[Endpoint, ...] = ("chat", "responses")


@dataclass(frozen=True, slots=True)
class Row:
    """Some names that mean the same.

    Attributes:
        note: what they become; or why they are refused or harmless, as a part of a sentence.
        servers: whose names they are.
        becomes: makes own fields of a value; None for a field that is refused or harmless.
        off: values that ask for nothing; the field is then dropped.
        quoted: values are numbers or flags, which may be texts; a text field's "0" is not off.
        refused_if: of a field without meaning here: whether this body makes it binding.
        members: of a value that is an object, those that are read; others are named.
    """

    names: tuple[str, ...]
    note: str
    servers: str
    endpoints: tuple[Endpoint, ...] = GENERATE
    becomes: Becomes | None = None
    off: tuple[Any, ...] = ()
    quoted: bool = False
    refused_if: Callable[[Mapping[str, Any]], bool] = lambda _: False
    members: tuple[str, ...] = ()
    handling: Literal["translated", "refused", "harmless"] = "harmless"

    def is_off(self, value: Any) -> bool:
        """Whether a value asks for nothing."""
        plain = as_plain(value) if self.quoted else value
        return any(plain is off or (type(plain) is not bool and plain == off) for off in self.off)

    def is_refused(self, body: Mapping[str, Any]) -> bool:
        """Whether the field is refused in this body."""
        return self.handling == "refused" and self.refused_if(body)


def translated(
    names: str,
    note: str,
    servers: str,
    becomes: Becomes,
    endpoints: tuple[Endpoint, ...] = GENERATE,
    off: tuple[Any, ...] = ("",),
    members: tuple[str, ...] = (),
    *,
    quoted: bool = False,
) -> Row:
    return Row(
        tuple(names.split()),
        note,
        servers,
        endpoints,
        becomes,
        off,
        quoted,
        members=members,
        handling="translated",
    )


def refused(
    names: str,
    note: str,
    servers: str,
    off: tuple[Any, ...] = (False,),
    endpoints: tuple[Endpoint, ...] = GENERATE,
    refused_if: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    *,
    quoted: bool = False,
) -> Row:
    return Row(
        tuple(names.split()),
        note,
        servers,
        endpoints,
        off=(*off, [], {}, ""),
        quoted=quoted,
        refused_if=refused_if,
        handling="refused",
    )


def harmless(
    names: str, note: str, servers: str, endpoints: tuple[Endpoint, ...] = GENERATE
) -> Row:
    return Row(tuple(names.split()), note, servers, endpoints)
