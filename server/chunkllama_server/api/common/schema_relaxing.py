"""Find what the grammar library cannot read of a JSON schema, and leave only that out.

The library tells in words what it cannot do, not where. A schema that it refuses is compiled again
in parts: without the schemas inside it, without single keywords, and each schema inside it alone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common.schema_bounds import bounded
from chunkllama_server.api.common.schema_keywords import map_parts
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import ApiError, invalid

Check = Callable[[GrammarSpec, str], Awaitable[GrammarSpec]]
# Makes the whole grammar of its schemas; False is without bounds of ours beside patterns.
Build = Callable[[Sequence[Any], bool], Awaitable[tuple[GrammarSpec | None, str]]]
# Makes a grammar where it does not hold up other requests.
Prepare = Callable[[Callable[[], GrammarSpec]], Awaitable[GrammarSpec]]
Place = tuple[str, ...]
REFUSED = "invalid_grammar"
_DEFINITIONS = ("$defs", "definitions")
# Left out first: a pattern says more than the length beside it.
_KEYWORDS = (
    *("maxLength", "minLength", "maxProperties", "minProperties", "maxItems", "minItems"),
    *("multipleOf", "exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "format"),
    *("pattern", "additionalProperties", "patternProperties", "enum", "type"),
)
# Compilations that one schema may need, beyond which it is left out as a whole.
_MOST = 64


@dataclass(frozen=True, slots=True)
class SchemaSource:
    """A schema that a grammar is made of.

    Attributes:
        schema: as ``prepare_schema`` returns it.
        path: of the schema in the request.
        owner: names it in errors, e.g. the tool it belongs to.
        is_strict: what cannot be read is refused instead of left out.
        is_call: it is of a function's arguments, which are an object in any case.
    """

    schema: dict[str, Any]
    path: str
    owner: str = ""
    is_strict: bool = False
    is_call: bool = False


async def checked_grammar(
    check: Check,
    prepare: Prepare,
    build: Build,
    sources: Sequence[SchemaSource],
    num_tokens: int,
    limits: LimitsConfig = DEFAULT_LIMITS,
) -> tuple[GrammarSpec | None, list[str]]:
    """The grammar that the engine is to run, and the paths of what its schemas lack.

    Args:
        check: compiles a grammar.
        prepare: runs what makes the grammar of a part of a schema.
        sources: the schemas that ``build`` makes the grammar of, in this order.
        num_tokens: output tokens that the answer may take.

    Raises:
        ApiError: 400 for a grammar that is no schema's, or of a strict schema; 503 as ``check``.
    """
    schemas = [source.schema for source in sources]
    refusal: ApiError | None = None
    for bounds_patterns in (True, False) if sources else (True,):
        grammar, param = await build(schemas, bounds_patterns)
        if grammar is None:
            return None, []
        try:
            return await check(grammar, param), []
        except ApiError as error:
            if error.code != REFUSED or not sources:
                raise
            refusal = error
    assert refusal is not None, "without one the grammar has been returned"
    left_out: list[str] = []
    relaxed = []
    try:
        async with asyncio.timeout(limits.grammar_wait_seconds):
            for source in sources:
                schema, paths = await _relaxed(check, prepare, source, num_tokens)
                relaxed.append(schema)
                left_out += paths
    except TimeoutError:
        raise refusal from None
    if not left_out:  # each can be read by itself
        raise refusal
    grammar, param = await build(relaxed, False)
    return None if grammar is None else await check(grammar, param), left_out


async def _relaxed(
    check: Check, prepare: Prepare, source: SchemaSource, num_tokens: int
) -> tuple[Any, list[str]]:
    """A schema that can be read, and the paths of what was left out.

    Raises:
        ApiError: 400 naming the first of them where the schema is strict.
    """
    relaxer = _Relaxer(check, prepare, num_tokens, source)
    if not await relaxer.error(source.schema):
        return source.schema, []
    try:
        schema = await relaxer.root()
    except _TooManyError:
        relaxer.left_out, schema = {(): "it has too many parts to tell which"}, {}
    if source.is_strict:
        place, message = next(iter(relaxer.left_out.items()))
        pointer = "/".join(part.replace("~", "~0").replace("/", "~1") for part in place)
        owner = f" of {source.owner}" if source.owner else ""
        where = ".".join((source.path, *place))
        raise invalid(f"The schema at #/{pointer}{owner}: {message}", where, REFUSED)
    if source.is_call and schema.get("type") != "object":
        schema = {"type": "object"}
    return schema, [".".join((source.path, *place)) for place in relaxer.left_out]


class _TooManyError(Exception):
    """More compilations than a schema may need."""


class _Relaxer:
    """Attributes:
    left_out: place of each part that is left out, and what the library says of it.
    """

    def __init__(
        self, check: Check, prepare: Prepare, num_tokens: int, source: SchemaSource
    ) -> None:
        self.left_out: dict[Place, str] = {}
        self._check = check
        self._prepare = prepare
        self._num_tokens = num_tokens
        self._source = source
        self._definitions: dict[str, Any] = {}
        self._num_compiled = 0

    async def error(self, schema: dict[str, Any]) -> str:
        """What the library says of a schema; "" if it can be read.

        Raises:
            ApiError: a refusal for another reason, e.g. its cost.
        """
        self._num_compiled += 1
        if self._num_compiled > _MOST:
            raise _TooManyError
        grammar = await self._prepare(lambda: self._grammar(schema))
        try:
            await self._check(grammar, "")
        except ApiError as error:
            if error.code != REFUSED:
                raise
            return error.message
        return ""

    def _grammar(self, schema: dict[str, Any]) -> GrammarSpec:
        whole = {**self._definitions, **schema}
        if not self._source.is_strict or self._source.is_call:
            whole = bounded(whole, self._num_tokens, patterns=False)
        return GrammarSpec(kind="json_schema", text=json.dumps(whole))

    async def root(self) -> Any:
        """The schema with what can be read of it."""
        schema = self._source.schema
        found = {key: schema[key] for key in _DEFINITIONS if isinstance(schema.get(key), dict)}
        # Each definition alone: references to others count as any value.
        self._definitions = {key: dict.fromkeys(held, True) for key, held in found.items()}
        kept: dict[str, Any] = {}
        for key, held in found.items():
            kept[key] = {name: await self._part(inner, (key, name)) for name, inner in held.items()}
        self._definitions = kept
        own = {key: value for key, value in schema.items() if key not in found}
        return {**kept, **await self._part(own, ())}

    async def _part(self, node: Any, place: Place) -> Any:
        """A schema inside the whole, with what can be read of it."""
        if not isinstance(node, dict) or not await self.error(node):
            return node
        return await self._repaired(node, place)

    async def _repaired(self, node: dict[str, Any], place: Place) -> dict[str, Any]:
        inner: dict[Place, Any] = {}

        def shell(part: Any, below: Place) -> Any:
            inner[below] = part
            return True if isinstance(part, dict) else part

        message = await self.error(map_parts(node, shell))
        if message:
            changed = await self._without_keyword(map_parts(node, shell), message, place)
            if changed is None:
                self.left_out[place] = message
                return {}
            node = {key: value for key, value in node.items() if key in changed}
        kept = {
            below: await self._part(part, (*place, *below))
            for below, part in inner.items()
            if below[0] in node
        }
        repaired = map_parts(node, lambda part, below: kept.get(below, part))
        message = await self.error(repaired)
        if message:  # its parts exclude each other
            self.left_out[place] = message
            return {}
        return repaired

    async def _without_keyword(
        self, shell: dict[str, Any], message: str, place: Place
    ) -> dict[str, Any] | None:
        """The schema without the one keyword that cannot be read; None if it is more than one."""
        for key in _KEYWORDS:
            if key not in shell:
                continue
            rest = {name: value for name, value in shell.items() if name != key}
            if not await self.error(rest):
                self.left_out[(*place, key)] = message
                return rest
        return None
