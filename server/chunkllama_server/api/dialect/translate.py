"""Translate request bodies written for other servers: names, nested paths and value shapes.

Each name of the table is translated, refused by name, or harmless. A name that no table has is
ignored and named, unless it looks like a constraint or a limit: then it is refused, because an
answer that does not obey it would be wrong without a sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from chunkllama_server.api.dialect.meanings import Endpoint
from chunkllama_server.api.dialect.row import GENERATE, Row
from chunkllama_server.api.dialect.shaped import DialectError
from chunkllama_server.api.dialect.table import CONTAINERS, TABLE
from chunkllama_server.api.dialect.values import SHAPES
from chunkllama_server.transport.errors import ApiError, invalid

# Parts of names that constrain or bound an answer, or change the prompt, on any server.
_WORDS = frozenset(
    (
        *("guided", "grammar", "gbnf", "ebnf", "lark", "regex", "pattern", "schema", "structured"),
        *("constraint", "constraints", "logit", "logits", "penalty", "banned", "forbidden"),
        *("stop", "stops", "stopping", "lora", "loras", "adapter"),
    )
)
_LIMIT = re.compile(r"(max|min)_(\w+_)?(tokens?|length|len|words|chars|characters)")
_PROMPTS = frozenset(
    ("system", "system_prompt", "system_message", "system_instruction", "negative_prompt", "prefix")
)


@dataclass(slots=True)
class Translation:
    """A body in this server's names.

    Attributes:
        spelled: path of each translated value here, and as the client wrote it.
        harmless: paths of known fields that have no effect.
        unknown: paths of unknown members of containers; those of the body itself stay in it.
    """

    body: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    harmless: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


_FORMATS = frozenset(("format", "response_format", "output_format", "answer_format"))


def looks_binding(name: str) -> bool:
    """Whether an unknown name would constrain or bound the answer, or change the prompt."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    joined = "_".join(words)
    is_word = not _WORDS.isdisjoint(words) or joined in _PROMPTS | _FORMATS
    return is_word or bool(_LIMIT.fullmatch(joined))


@cache
def rows_of(endpoint: Endpoint) -> Mapping[str, Row]:
    """The table's rows that apply to an endpoint, by name."""
    return {name: row for row in TABLE for name in row.names if endpoint in row.endpoints}


def translate(body: dict[str, Any], endpoint: Endpoint, own: frozenset[str]) -> Translation:
    """Return the body in this server's names.

    Args:
        own: names of the endpoint's own fields; they are never looked up in the table.

    Raises:
        ApiError: 400 with the client's path: a refused field, a value that cannot be translated,
            or two spellings of one field that differ.
    """
    translator = _Translator(body, endpoint, own)
    for path, name, value in translator.members():
        translator.read(path, name, value)
    translator.check_constraints()
    return translator.result


def _opened(members: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of each member; a container's own stand in its place."""
    for name, value in members.items():
        if name in CONTAINERS and isinstance(value, dict):
            yield from _opened(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", name, value


class _Translator:
    def __init__(self, body: dict[str, Any], endpoint: Endpoint, own: frozenset[str]) -> None:
        self.result = Translation()
        self._given = body
        self._own = own
        self._all = {name: value for _, name, value in self.members()}
        self._endpoint = endpoint
        self._rows = rows_of(endpoint)

    def members(self) -> Iterator[tuple[str, str, Any]]:
        """Path, name and value of each member; own fields come first, containers are opened."""
        for name, value in self._given.items():
            if name in self._own:
                yield name, name, value
        others = {name: value for name, value in self._given.items() if name not in self._own}
        yield from _opened(others, "")

    def read(self, path: str, name: str, value: Any) -> None:
        if value is None and name not in self._own:
            return
        if name in self._own:
            self._take_own(path, name, value)
            return
        row = self._rows.get(name)
        if row is not None:
            self._apply(row, path, value)
        elif value and self._endpoint in GENERATE and looks_binding(name):
            raise binding(path)
        elif path != name:
            self.result.unknown.append(path)
        else:
            self.result.body[name] = value

    def _take_own(self, path: str, name: str, value: Any) -> None:
        shape = SHAPES.get((self._endpoint, name))
        if shape is None or value is None:
            self._set(name, value, path)
            return
        try:
            shaped = shape(value)
        except DialectError as error:
            where = f"{path}{'' if error.member.startswith('[') else '.'}{error.member}"
            where = where.removesuffix(".")
            raise invalid(f"{where} {error}", where, "unsupported") from None
        for ours, theirs in shaped.renamed.items():
            if ours != theirs or path != name:
                self.result.spelled[f"{name}{ours}"] = f"{path}{theirs}"
        self.result.unknown += [f"{path}{below}" for below in shaped.ignored]
        for target, (below, meaning) in shaped.also.items():
            self._set(target, meaning, f"{path}{below}")
        if shaped.value is not None:
            self._set(name, shaped.value, path)

    def _apply(self, row: Row, path: str, value: Any) -> None:
        if row.is_off(value):
            return
        if row.becomes is None:
            if row.is_refused(self._all):
                raise refused(row, path)
            self.result.harmless.append(path)
            return
        try:
            meanings = row.becomes(value, self._endpoint)
        except DialectError as error:
            raise invalid(f"{path} {error}", path, "unsupported") from None
        for target, meaning in meanings.items():
            self._set(target, meaning, path)
        if row.members and isinstance(value, dict):
            unread = value.keys() - set(row.members)
            self.result.unknown += [f"{path}.{name}" for name in value if name in unread]

    def _set(self, target: str, value: Any, path: str) -> None:
        """Set an own field, or a member of one."""
        name, _, member = target.partition(".")
        body = self.result.body
        if member:
            holder = body.get(name)
            if holder is None:
                holder = {}
            elif not isinstance(holder, dict):
                raise invalid(f"{name} must be an object", name)
            body[name] = holder = {**holder}
        else:
            holder, member = body, name
        earlier = holder.get(member)
        if isinstance(earlier, dict) and isinstance(value, dict) and name == target:
            for inner, meaning in value.items():  # what another field has set stays beside it
                self._set(f"{name}.{inner}", meaning, f"{path}.{inner}")
            return
        if earlier is not None and value is not None and not _same(earlier, value):
            other = self.result.spelled.get(target, target)
            raise invalid(f"Send {other} or {path}, not both", path)
        if earlier is None and (value is not None or member not in holder):
            holder[member] = value
        if path != target and value is not None:
            self.result.spelled.setdefault(target, path)

    def check_constraints(self) -> None:
        """Refuse two constraints by the names the client gave them."""
        outputs = self.result.body.get("structured_outputs")
        spelled = self.result.spelled
        if not isinstance(outputs, dict):
            return
        if outputs.get("json") is not None:
            outputs.pop("json_object", None)  # the schema says it, too
        given = [f"structured_outputs.{name}" for name, value in outputs.items() if value]
        names = [spelled.get(path, path) for path in given]
        if len(names) > 1 and any(path in spelled for path in given):
            raise invalid(f"Send one of {' and '.join(names)}, not both", names[-1])


def _same(first: Any, second: Any) -> bool:
    """Whether two values mean the same: a list of one text is that text, order does not count."""
    if isinstance(first, str | list) and isinstance(second, str | list):
        texts = [[value] if isinstance(value, str) else value for value in (first, second)]
        if all(isinstance(text, str) for text in (*texts[0], *texts[1])):
            return set(texts[0]) == set(texts[1])
    return bool(first == second)


def binding(path: str) -> ApiError:
    """The 400 of an unknown field that cannot be ignored without a sign."""
    return invalid(
        f"{path[:100]} is not known to this server; its name says that it constrains the answer, "
        "so it is refused instead of ignored",
        path[:200],
        "unsupported",
    )


def refused(row: Row, path: str) -> ApiError:
    """The 400 of a field that this server has no equivalent of."""
    return invalid(f"{path} is not supported by this server: {row.note}", path, "unsupported")
