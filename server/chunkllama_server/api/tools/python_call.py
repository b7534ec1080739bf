"""Read a call that is written as Python: Llama 3.2 and 4, OLMo 3, Gemma."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from chunkllama_server.api.tools.brackets import BracketScanner
from chunkllama_server.api.tools.call_forms import CallForm, Functions

# Python is parsed by recursion in C, and a call of this size is no call.
_MAX_PYTHON_CHARS = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")
# The only escape of JSON that Python lacks, and the one that may stand before it.
_ESCAPED_SLASH = re.compile(r"\\\\|\\/")


class PythonCall(CallForm):
    """``name(``, which has been read, then keyword arguments up to the closing bracket."""

    def __init__(self, functions: Functions, name: str, raw: str) -> None:
        super().__init__(functions, None, raw)
        self._function = name
        self._num_chars = 0
        # Characters before the last comma between two arguments.
        self._num_sure = 0
        self._scanner = BracketScanner()

    def feed(self, text: str) -> str:
        for position, char in enumerate(text):
            self._scanner.feed(char)
            if self._scanner.is_complete:
                rest = self._split(text, position + 1)
                self._end("".join(self._read[1:])[:-1])
                return rest
            if char == "," and self._scanner.is_outermost:
                self._num_sure = self._num_chars
            self._num_chars += 1
            if self._num_chars > _MAX_PYTHON_CHARS:
                self.is_other = True
                return self._split(text, position + 1)
        return self._split(text, len(text))

    def _end(self, written: str) -> None:
        self.is_complete = True
        text = self._arguments(written)
        if text is None:
            self.is_other = True
            return
        self.name = self._function
        self._written.append(text)

    def cut(self) -> None:
        if self.is_complete or self.is_other:
            return
        self.name = self._function
        text = self._arguments("".join(self._read[1:])[: self._num_sure]) or "{"
        self._written.append(text.removesuffix("}"))

    def _arguments(self, written: str) -> str | None:
        """JSON text of the arguments; None if they are no literals."""
        properties = self._functions[self._function].get("properties") or {}
        try:
            arguments = _keyword_arguments(_without_json_escape(written), list(properties))
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            if not text.isascii() and _SURROGATE.search(text):
                # JSON's pairs of escapes are one character; alone they can only be escaped.
                text = json.dumps(arguments, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
        return text


def _without_json_escape(text: str) -> str:
    return _ESCAPED_SLASH.sub(lambda found: "/" if found[0] == "\\/" else found[0], text)


def _keyword_arguments(text: str, names: list[str]) -> dict[str, Any]:
    """The arguments of a Python call; those without a name take ``names`` in order.

    Raises:
        ValueError, SyntaxError: the text is no list of literal arguments.
    """
    call = ast.parse(f"f({text}\n)", mode="eval").body
    if not isinstance(call, ast.Call) or len(call.args) > len(names):
        raise ValueError("not a call")
    given = dict(zip(names, map(_literal, call.args), strict=False))
    for keyword in call.keywords:
        if keyword.arg is not None:
            given[keyword.arg] = _literal(keyword.value)
            continue
        members = _literal(keyword.value)
        if not isinstance(members, dict):
            raise ValueError("** needs an object")
        given.update(members)
    return given


class _JsonConstants(ast.NodeTransformer):
    """JSON's constants among Python's literals."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


def _literal(node: ast.AST) -> Any:
    return ast.literal_eval(_JsonConstants().visit(node))
