"""Convert response_format and structured_outputs to a GrammarSpec, after a check of its size."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from chunkllama.engine.grammar_text import gbnf_as_lark, is_gbnf
from chunkllama.errors import InvalidRequestError
from chunkllama.logger import tenant_context
from chunkllama.resources import lower_priority
from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common.fair_pool import FairPool
from chunkllama_server.api.common.grammar_cost import check_choice_cost, check_regex_cost
from chunkllama_server.api.common.lark_cost import check_lark_cost
from chunkllama_server.api.common.regex_syntax import rust_syntax
from chunkllama_server.api.common.schema_bounds import bound_grammar
from chunkllama_server.api.common.schema_levels import prepare_schema
from chunkllama_server.api.common.schema_relaxing import SchemaSource
from chunkllama_server.api.schema.base import StructuredOutputs
from chunkllama_server.api.schema.chat import ResponseFormat
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import exceeded, invalid

Validate = Callable[[GrammarSpec], None]
_NUM_SPARE = 2  # threads for others while a grammar takes longer than its time


def check_schema(schema: Any, param: str, limits: LimitsConfig = DEFAULT_LIMITS) -> str:
    """Return the schema as JSON text, its size checked.

    Raises:
        ApiError: 400 when it is too large, too deep, or has an enum too long.
    """
    stack: list[tuple[Any, int]] = [(schema, 1)]
    while stack:
        node, depth = stack.pop()
        if depth > limits.max_schema_depth:
            raise exceeded(limits, "max_schema_depth", param)
        children = node.values() if isinstance(node, dict) else node
        if isinstance(node, dict | list):
            if isinstance(node, list) and len(node) > limits.max_schema_values:
                raise exceeded(limits, "max_schema_values", param)
            stack.extend((child, depth + 1) for child in children)
    text = json.dumps(schema)
    _check_size(text, "max_schema_chars", param, limits)
    return text


def _check_size(text: str, key: str, param: str, limits: LimitsConfig) -> None:
    if not text or len(text) > getattr(limits, key):
        raise exceeded(limits, key, param, value=len(text))


def _from_json_field(
    value: str | dict[str, Any], param: str, left_out: list[str], limits: LimitsConfig
) -> GrammarSpec:
    if isinstance(value, str):
        _check_size(value, "max_schema_chars", param, limits)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise invalid("The schema is not valid JSON", param) from None
    if not isinstance(value, dict):
        raise invalid("A JSON schema is an object", param)
    return json_schema(value, param, limits, strict=False, left_out=left_out)


def json_schema(
    schema: Any, param: str, limits: LimitsConfig, *, strict: bool, left_out: list[str]
) -> GrammarSpec:
    """Return the grammar of a schema; paths that cannot be enforced are added to ``left_out``.

    Raises:
        ApiError: 400 for a schema that is too large, or strict and not enforceable.
    """
    check_schema(schema, param, limits)
    prepared = prepare_schema(schema, param, strict=strict, limits=limits)
    left_out += prepared.left_out
    return GrammarSpec(kind="json_schema", text=json.dumps(prepared.schema))


def from_structured_outputs(
    outputs: StructuredOutputs, left_out: list[str], limits: LimitsConfig = DEFAULT_LIMITS
) -> tuple[GrammarSpec, str]:
    """Return the constraint and the field that contains it.

    Raises:
        ApiError: 400 without exactly one constraint, or when it is too large.
    """
    given = {
        "json": outputs.json_,
        "regex": outputs.regex,
        "choice": outputs.choice,
        "grammar": outputs.grammar,
        # Any object, beside a schema of one, says nothing more.
        "json_object": outputs.json_object or None if outputs.json_ is None else None,
    }
    kinds = [name for name, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise invalid(
            f"structured_outputs takes exactly one of {', '.join(given)}", "structured_outputs"
        )
    param = f"structured_outputs.{kinds[0]}"
    if outputs.json_ is not None:
        return _from_json_field(outputs.json_, param, left_out, limits), param
    if outputs.regex is not None:
        _check_size(outputs.regex, "max_regex_chars", param, limits)
        check_regex_cost(outputs.regex, param, limits)
        pattern = rust_syntax(outputs.regex)
        if pattern is None:
            raise invalid(
                "The expression has an assertion or a reference that no grammar can enforce; "
                "write it without look-around, word boundaries and back references",
                param,
                "invalid_grammar",
            )
        return GrammarSpec(kind="regex", text=pattern), param
    if outputs.choice is not None:
        text = json.dumps(outputs.choice)
        _check_size(text, "max_grammar_chars", param, limits)
        check_choice_cost(outputs.choice, param, limits)
        return GrammarSpec(kind="choice", text=text), param
    if outputs.grammar is not None:
        _check_size(outputs.grammar, "max_grammar_chars", param, limits)
        if is_gbnf(outputs.grammar):  # charged when it has been translated
            return GrammarSpec(kind="gbnf", text=outputs.grammar), param
        check_lark_cost(outputs.grammar, param, limits)
        return GrammarSpec(kind="lark", text=outputs.grammar), param
    return GrammarSpec(kind="json_object", text=""), param


def from_response_format(
    response_format: ResponseFormat, left_out: list[str], limits: LimitsConfig = DEFAULT_LIMITS
) -> tuple[GrammarSpec | None, str]:
    """Return the constraint, if there is one, and the field that contains it.

    Raises:
        ApiError: 400 for json_schema without a schema, or one that is too large.
    """
    if response_format.type == "text":
        return None, "response_format"
    if response_format.type == "json_object":
        return GrammarSpec(kind="json_object", text=""), "response_format"
    description = response_format.json_schema
    if description is None:
        raise invalid("json_schema is missing", "response_format.json_schema")
    if description.schema_ is None:
        return GrammarSpec(kind="json_object", text=""), "response_format"
    param = "response_format.json_schema.schema"
    strict = bool(description.strict)
    schema = description.schema_
    return json_schema(schema, param, limits, strict=strict, left_out=left_out), param


def is_strict(response_format: ResponseFormat | None) -> bool:
    """Return whether a typed answer's schema is enforced to the letter, without bounds of ours."""
    described = response_format.json_schema if response_format is not None else None
    return described is not None and bool(described.strict)


def grammar_of(
    response_format: ResponseFormat | None,
    outputs: StructuredOutputs | None,
    left_out: list[str],
    limits: LimitsConfig,
) -> tuple[GrammarSpec | None, str]:
    """Return the constraint of a request, and the field that contains it.

    Args:
        left_out: gets the paths of schema keywords that are not enforced.

    Raises:
        ApiError: 400 for two constraints, or one that is malformed.
    """
    grammar, param = None, "response_format"
    if response_format is not None:
        grammar, param = from_response_format(response_format, left_out, limits)
    if outputs is None:
        return grammar, param
    other, other_param = from_structured_outputs(outputs, left_out, limits)
    if grammar is None or grammar == other or _is_object(grammar, other):
        return other, other_param
    if _is_object(other, grammar):
        return grammar, param
    raise invalid("Send response_format or structured_outputs, not both", "structured_outputs")


def _is_object(grammar: GrammarSpec, schema: GrammarSpec) -> bool:
    """Whether a grammar is of any object and a schema of some object, which then says more."""
    if grammar.kind != "json_object" or schema.kind != "json_schema":
        return False
    found = json.loads(schema.text)
    return isinstance(found, dict) and found.get("type") == "object"


def answer_sources(
    grammar: GrammarSpec | None, param: str, response_format: ResponseFormat | None
) -> list[SchemaSource]:
    """The schema of a typed answer, if its grammar is one of a schema."""
    if grammar is None or grammar.kind != "json_schema":
        return []
    strict = is_strict(response_format)
    return [SchemaSource(json.loads(grammar.text), param, is_strict=strict)]


def answer_grammar(
    source: SchemaSource, schema: Any, num_tokens: int, *, patterns: bool
) -> GrammarSpec:
    """The grammar of a typed answer with bounds, unless it is strict."""
    grammar = GrammarSpec(kind="json_schema", text=json.dumps(schema))
    return grammar if source.is_strict else bound_grammar(grammar, num_tokens, patterns=patterns)


def _compile(
    validate: Validate, spec: GrammarSpec, param: str, limits: LimitsConfig
) -> GrammarSpec:
    """Compile a grammar in the worker thread, where GBNF becomes Lark first."""
    if spec.kind == "gbnf":
        spec = GrammarSpec(kind="lark", text=gbnf_as_lark(spec.text))
        check_lark_cost(spec.text, param, limits)
    validate(spec)
    return spec


class GrammarChecker:
    """Compiles grammars off the event loop, so that a bad one is refused before the engine sees it.

    One is compiled at a time; the tenant that has used least of the compiler's time is next.

    Args:
        load: makes the function that compiles a grammar or raises InvalidRequestError. Called with
            the first grammar, in the worker thread.
        limits: time that one grammar may take once its turn has come, and that it waits for it.

    A thread cannot be stopped: while one takes longer, another compiles the grammars of the other
    tenants, and its own tenant's wait, at most ``grammar_wait_seconds``.
    """

    def __init__(self, load: Callable[[], Validate], limits: LimitsConfig = DEFAULT_LIMITS) -> None:
        self._load = load
        self._validate: asyncio.Future[Validate] | None = None
        self._limits = limits
        self._pool = FairPool(
            1,
            "grammar",
            lambda _: 1.0,
            num_spare=_NUM_SPARE,
            patience=limits.grammar_seconds,
            begin_thread=lower_priority,
        )

    def num_overdue(self) -> int:
        """How many grammars have been compiled for longer than their time, and still are."""
        return self._pool.num_overdue()

    async def check(self, spec: GrammarSpec, param: str) -> GrammarSpec:
        """Compile a grammar once, to find its errors, and return the one the engine is to run.

        Raises:
            ApiError: 400 when the grammar is wrong or takes too long; 503 when the compiler is
                busy with other requests.
        """
        tenant = tenant_context.get()
        if self._validate is None:
            self._validate = asyncio.ensure_future(self._pool.run(tenant, self._load))
        validate = await asyncio.shield(self._validate)
        loop = asyncio.get_running_loop()
        has_begun = asyncio.Event()

        def work() -> GrammarSpec:
            loop.call_soon_threadsafe(has_begun.set)
            return _compile(validate, spec, param, self._limits)

        compiling = asyncio.ensure_future(self._pool.run(tenant, work))
        compiling.add_done_callback(_retrieve)  # its request may have ended
        try:
            async with asyncio.timeout(self._limits.grammar_wait_seconds):
                await has_begun.wait()
        except BaseException as error:
            compiling.cancel()  # out of the queue
            if isinstance(error, TimeoutError):
                is_own = self._pool.num_overdue(tenant) > 0
                reason = "an earlier grammar of yours that takes too long" if is_own else "others"
                raise exceeded(self._limits, "grammar_wait_seconds", value=reason) from None
            raise
        try:
            async with asyncio.timeout(self._limits.grammar_seconds):
                return await asyncio.shield(compiling)
        except InvalidRequestError as error:
            raise invalid(error.message, param, error.code or "invalid_grammar") from None
        except TimeoutError:
            raise exceeded(self._limits, "grammar_seconds", param) from None

    def close(self) -> None:
        self._pool.close()


def _retrieve(compiling: asyncio.Future[GrammarSpec]) -> None:
    if not compiling.cancelled():
        compiling.exception()
