"""Texts that end what no token alone can: strings with a pattern or a format, and raw text."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from re import _parser  # type: ignore[attr-defined]  # of regular expressions, of the library's own
from typing import Any, NamedTuple
from urllib.parse import unquote

from chunkllama.logger import init_logger
from chunkllama.sampling_params import GrammarSpec

logger = init_logger(__name__)

# A longer text of a pattern is not made, nor more of them.
_MAX_CHARS, _MAX_TEXTS = 64, 64
# Keywords that contain schemas.
_MEMBERS = frozenset(
    (
        *("additionalProperties", "items", "additionalItems", "prefixItems"),
        *("anyOf", "oneOf", "allOf"),
    )
)
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_JSON = re.compile(r"%json\s*")
# Short texts of each format whose texts may go on without end; of those with parts that something
# else has to follow, one of each.
_OF_FORMATS = {
    "date-time": ("2000-01-01T00:00:00Z",),
    "time": ("00:00:00Z",),
    "duration": ("P1D", "PT1S"),
    "email": ("q@q.qq",),
    "hostname": ("q.qq",),
    "uri": ("q://q", "q://q@q", "q:%aa", "q://[::]", "q://[::0.0.0.0]", "q://[va.a]"),
}
_CHARS = "q0 -.,_@/:+#!\u00e9"
_OF_CLASSES = {
    "CATEGORY_DIGIT": "0",
    "CATEGORY_NOT_DIGIT": "q",
    "CATEGORY_SPACE": " ",
    "CATEGORY_NOT_SPACE": "q",
    "CATEGORY_WORD": "q",
    "CATEGORY_NOT_WORD": "-",
}


class EndTexts(NamedTuple):
    """Texts that may end a part of an answer.

    Attributes:
        terminators: end raw text, each as texts and ids of tokens; wherever one may come, it leads
            to the end.
        of_strings: texts of the strings with a pattern or a format, as JSON has them.
    """

    terminators: tuple[tuple[bytes | int, ...], ...]
    of_strings: tuple[bytes, ...]


def end_texts(spec: GrammarSpec) -> EndTexts:
    """Return the texts that may end a part of an answer with a grammar; no strings where they
    cannot be found, as an answer can do without them.
    """
    listed: list[bytes] = []
    try:
        texts = dict.fromkeys(text for schema in _schemas(spec) for text in _texts(schema))
        listed = [json.dumps(text, ensure_ascii=False)[1:-1].encode() for text in texts]
    except Exception as error:
        logger.error("no texts that end strings of a grammar", exc_info=error)
    terminators = (tuple(p if isinstance(p, int) else p.encode() for p in end) for end in spec.ends)
    return EndTexts(tuple(terminators), tuple(listed[:_MAX_TEXTS]))


def _schemas(spec: GrammarSpec) -> Iterator[Any]:
    if spec.kind == "json_schema":
        yield json.loads(spec.text)
    elif spec.kind == "lark":
        decoder, at = json.JSONDecoder(), 0
        while found := _JSON.search(spec.text, at):
            at = found.end()
            # Without JSON behind it, it stands in a text.
            with contextlib.suppress(ValueError):
                schema, at = decoder.raw_decode(spec.text, at)
                yield schema


def _texts(root: Any) -> Iterator[str]:
    """Yield a short text of each pattern and format in a schema and the schemas in it."""
    nodes, seen = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        names = node.get("patternProperties")
        for pattern in (node.get("pattern"), *(names if isinstance(names, dict) else ())):
            yield from filter(None, texts_of_pattern(pattern) if isinstance(pattern, str) else ())
        form = node.get("format")
        yield from _OF_FORMATS.get(form, ()) if isinstance(form, str) else ()
        nodes += _parts(node)
        reference = node.get("$ref")
        if isinstance(reference, str):
            nodes.append(_at(root, reference))


def _parts(node: dict[str, Any]) -> Iterator[Any]:
    """Yield the schemas directly in a schema; its values and unknown members hold none."""
    for key, value in node.items():
        if key in _MEMBERS:
            yield from value if isinstance(value, list) else [value]
        elif key in _MAPS and isinstance(value, dict):
            yield from value.values()


def _at(root: Any, reference: str) -> Any:
    """Return what a reference into a schema names; None where it names nothing."""
    node = root
    for part in reference.split("/")[1:] if reference.startswith("#/") else ():
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, dict) else None
    return node


def texts_of_pattern(pattern: str) -> list[str]:
    """Return about the shortest text that a regular expression matches, then short ones in which
    one more of its optional or alternative parts comes; none where it has what is not read here, or
    the shortest takes too many characters.
    """
    try:
        first, *others = _texts_of(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError, _UnreadError):
        return []
    if len(first) > _MAX_CHARS:
        return []
    return [first, *(text for text in others if len(text) <= _MAX_CHARS)]


class _UnreadError(Exception):
    """A part of a regular expression is not read here."""


def _texts_of(parts: Any) -> list[str]:
    """Return texts of a parsed expression, pairs of a name and what it holds: the shortest, then
    those with another text of one part.

    A text of more than _MAX_CHARS is cut behind one more, and there are at most _MAX_TEXTS: repeats
    of repeats multiply them.
    """
    texts = [""]
    for name, value in parts:
        own = _texts_of_part(str(name), value)
        others = [text + own[0] for text in texts[1:]] + [texts[0] + text for text in own[1:]]
        texts = _cut([texts[0] + own[0], *others])
    return texts


def _cut(texts: list[str]) -> list[str]:
    return [text[: _MAX_CHARS + 1] for text in texts[:_MAX_TEXTS]]


def _texts_of_part(name: str, value: Any) -> list[str]:
    match name:
        case "LITERAL":
            return [chr(value)]
        case "NOT_LITERAL":
            return [_char_outside([("LITERAL", value)])]
        case "ANY":
            return ["q"]
        case "IN" if str(value[0][0]) == "NEGATE":
            return [_char_outside(value[1:])]
        case "IN":
            return [_char_inside(value)]
        case "BRANCH":
            first, *others = sorted(map(_texts_of, value[1]), key=lambda texts: len(texts[0]))
            return [*first, *(text for texts in others for text in texts)][:_MAX_TEXTS]
        case "SUBPATTERN":
            return _texts_of(value[-1])
        case "ATOMIC_GROUP":
            return _texts_of(value)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            least, most, inner = value
            texts = _texts_of(inner)
            rest = texts[0] * (min(least, _MAX_CHARS + 1) - 1)
            if least:
                return _cut([text + rest for text in texts])
            return ["", *texts[: _MAX_TEXTS - 1]] if most else [""]
        case "AT":
            return [""]
    raise _UnreadError


def _char_inside(members: Any) -> str:
    name, value = str(members[0][0]), members[0][1]
    if name == "CATEGORY":
        return _OF_CLASSES[str(value)]
    return chr(value[0] if name == "RANGE" else value)


def _char_outside(members: Any) -> str:
    for char in _CHARS:
        if not any(_is_member(char, str(name), value) for name, value in members):
            return char
    raise _UnreadError


def _is_member(char: str, name: str, value: Any) -> bool:
    if name == "RANGE":
        return bool(value[0] <= ord(char) <= value[1])
    if name == "LITERAL":
        return char == chr(value)
    kind = str(value)
    is_member = {
        "DIGIT": char.isdecimal(),
        "SPACE": char.isspace(),
        "WORD": char.isalnum() or char == "_",
    }[kind.removeprefix("CATEGORY_").removeprefix("NOT_")]
    return is_member != ("NOT_" in kind)
