"""What a shape of another server becomes here, and the error of one that has no meaning here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Shaped:
    """A value in this server's shape.

    Attributes:
        value: None leaves the field out.
        renamed: paths below the field that moved: ours to the client's.
        also: other fields that the value sets, each with the client's path below the field.
        ignored: paths below the field of what is left out.
    """

    value: Any
    renamed: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


Shape = Callable[[Any], Shaped]


class DialectError(ValueError):
    """A value that has no meaning here; the message continues the field's path."""

    def __init__(self, message: str, member: str = "") -> None:
        super().__init__(message)
        self.member = member
