"""Reads PTX as NVRTC emits it: entry functions, their statements, operands of a statement."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class UnsupportedPtx(Exception):
    """A directive, an instruction or an operand that is not known: nothing is guessed."""


@dataclass
class Entry:
    """An entry function.

    Attributes:
        name: lowered name.
        param: name of its one parameter, a struct of ``param_bytes``.
        max_threads: of ``.maxntid``.
        statements: (line of the PTX, text without the semicolon); a label keeps its colon.
    """

    name: str
    param: str = ""
    param_bytes: int = 0
    max_threads: int = 0
    statements: list[tuple[int, str]] = field(default_factory=list)

    def head(self, line: str) -> None:
        """Take in a line between the name and the body."""
        if found := re.match(r"\.param .*\.b8 (\w+)\[(\d+)\]", line):
            if self.param:
                raise UnsupportedPtx(f"{self.name}: more than one parameter")
            self.param, self.param_bytes = found[1], int(found[2])
        elif found := re.match(r"\.maxntid (\d+)", line):
            self.max_threads = int(found[1])


def parse(text: str) -> tuple[list[Entry], set[str]]:
    """The entry functions, and the names of ``.extern .shared`` arrays."""
    entries: list[Entry] = []
    shared: set[str] = set()
    body: _Body | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("//")[0].strip()
        if not line:
            continue
        if body is not None:
            if body.ends_with(number, line):
                body = None
        elif found := re.match(r"\.extern \.shared .*\s(\w+)\[\];", line):
            shared.add(found[1])
        elif found := re.search(r"\.entry (\w+)\(", line):
            entries.append(Entry(found[1]))
        elif line == "{":
            body = _Body(entries[-1])
        elif entries:
            entries[-1].head(line)
    if body is not None:
        raise UnsupportedPtx("the text ends inside a function")
    return entries, shared


class _Body:
    """Collects the statements of a function from its lines."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.pending = entry, ""

    def ends_with(self, number: int, line: str) -> bool:
        """Take in a line; True for the function's last one."""
        if line == "}" and not self.pending:
            return True
        self.pending = f"{self.pending} {line}".strip()
        statements = self.entry.statements
        if found := re.fullmatch(r"\{\s*\.reg \.(\w+) (\w+);\s*(.*);\s*\}", self.pending):
            # A scope on one line, as NVRTC makes of inline PTX with a register of its own.
            kind, name, inner = found.groups()
            unique = f"%scope{number}"
            statements.append((number, f".reg .{kind} {unique}"))
            statements += [
                (number, re.sub(rf"\b{name}\b", unique, statement).strip())
                for statement in inner.split(";")
            ]
            self.pending = ""
        elif not self.pending.startswith("{") and self.pending.endswith((";", ":")):
            statements.append((number, self.pending.rstrip(";").strip()))
            self.pending = ""
        elif self.pending == "{":
            raise UnsupportedPtx(f"line {number}: nested scope")
        return False


def operands(text: str) -> list[str]:
    """Split at commas outside braces and brackets."""
    parts = re.findall(r"(?:[^,{\[]|\{[^}]*\}|\[[^\]]*\])+", text)
    return [part.strip() for part in parts if part.strip()]


def vector(text: str) -> list[str]:
    """The registers of ``{a, b, ...}``."""
    if not (text.startswith("{") and text.endswith("}")):
        raise UnsupportedPtx(f"vector {text}")
    return [part.strip() for part in text[1:-1].split(",")]
