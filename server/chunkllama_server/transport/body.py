"""Request bodies read strictly, and responses written fast."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import FormData, Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chunkllama.rests import rest
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.config.settings import Settings
from chunkllama_server.transport.errors import (
    ApiError,
    as_api_error,
    exceeded,
    from_validation_error,
    invalid,
)
from chunkllama_server.transport.paths import names_json
from chunkllama_server.transport.request_context import request_info

_CONTAINERS = frozenset((dict, list))
# What begins an array or object, and what stands between two values.
_MARKS = {"max_json_containers": (b"[", b"{"), "max_json_values": (b",",)}
_PIECE_BYTES = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the BOM of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Encodings of text that decode in linear time; by the names Python gives them.
_CHARSETS = frozenset(
    (
        *("utf-8", "ascii", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"),
        *("utf-32-be", "iso8859-1", "iso8859-2", "iso8859-15", "cp1250", "cp1251", "cp1252"),
        *("koi8-r", "shift_jis", "euc_jp", "euc_kr", "gb2312", "gbk", "gb18030", "big5"),
    )
)
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([\w.:+-]{1,40})\"?", re.IGNORECASE)


def _refuse_constant(name: str) -> NoReturn:
    raise invalid(f"{name} is not a JSON number", code="invalid_json")


def named_charset(headers: Headers) -> str | None:
    """The charset that Content-Type names, by Python's name of it.

    Raises:
        ApiError: 415 for one that is not an encoding of text known here.
    """
    match = _CHARSET.search(headers.get("content-type", ""))
    if match is None:
        return None
    try:
        name = codecs.lookup(match[1]).name
    except LookupError:
        name = ""
    if name not in _CHARSETS:
        raise ApiError(
            415,
            f"The charset {match[1]!r} of Content-Type is not known; send UTF-8",
            code="unsupported_charset",
        )
    return name


def _as_utf8(raw: bytes, charset: str | None) -> bytes:
    """The text in UTF-8 without a byte order mark, which names the encoding where there is one."""
    for mark, encoding in _BOMS:
        if raw.startswith(mark):
            raw = raw[len(mark) :]
            return raw if encoding == "utf-8" else raw.decode(encoding).encode()
    return raw if charset in (None, "utf-8") else raw.decode(charset).encode()


def parse_json(
    raw: bytes,
    charset: str | None = None,
    limits: LimitsConfig = DEFAULT_LIMITS,
    repairs: Callable[[Any], bool] | None = None,
) -> Any:
    """JSON as RFC 8259 has it: no NaN or Infinity, no lone surrogates. A NUL character is text: it
    comes out of documents and of tools that print binary files.

    Args:
        charset: encoding of ``raw``; UTF-8 if it is None.
        limits: counts that a body may have.
        repairs: called with a body that has lone surrogates; says whether they become U+FFFD. None
            refuses them.

    What a body costs to parse and check, on the event loop, is bounded before it is parsed: about
    15 us an object, 7 us a member of a wrong type, 0.3 us a number.

    Raises:
        ApiError: 400 with code invalid_json.
    """
    try:
        raw = _as_utf8(raw, charset)
        _check_counts(raw, limits)
        parsed = json.loads(raw.decode(), parse_constant=_refuse_constant)
        _check_shape(parsed, limits)
        if b"\\u" in raw:
            text = json.dumps(parsed, ensure_ascii=False)
            if repairs is not None and _SURROGATE.search(text) and repairs(parsed):
                parsed = json.loads(_SURROGATE.sub("\ufffd", text))
            else:
                text.encode()
    except UnicodeError:
        name = (charset or "UTF-8").upper()
        raise invalid(f"The body is not valid {name} text", code="invalid_json") from None
    except (ValueError, RecursionError):
        raise invalid("The request body is not valid JSON", code="invalid_json") from None
    return parsed


def _check_counts(raw: bytes, limits: LimitsConfig) -> None:
    """Refuse a body of many arrays, objects or values; what stands in strings is not counted."""
    most = {key: getattr(limits, key) for key in _MARKS}
    if all(_count(raw, marks) <= most[key] for key, marks in _MARKS.items()):
        return
    # Outside of strings no JSON has a backslash, so that what is left of quotes are their ends.
    parts_marked = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    in_string = 0
    for start in range(0, len(parts_marked), _PIECE_BYTES):  # between pieces other threads run
        parts = parts_marked[start : start + _PIECE_BYTES].split(b'"')
        bare = b"".join(parts[in_string::2])
        in_string ^= (len(parts) - 1) % 2
        for key, marks in _MARKS.items():
            most[key] -= _count(bare, marks)
            if most[key] < 0:
                raise exceeded(limits, key)


def _count(raw: bytes, marks: tuple[bytes, ...]) -> int:
    return sum(map(raw.count, marks))


def _check_shape(value: Any, limits: LimitsConfig) -> None:
    """Refuse what is short to send and long to check, and numbers beyond a double.

    A level's values are listed and looked through without a line of Python for each.
    """
    level = [value]
    num_objects = 0
    for _ in range(limits.max_json_depth + 1):
        kinds = set(map(type, level))
        if float in kinds and (math.inf in level or -math.inf in level):
            raise invalid("The body has a number that no double holds", code="invalid_json")
        if kinds.isdisjoint(_CONTAINERS):
            return
        nodes = [child for child in level if type(child) in _CONTAINERS]
        members = [len(node) for node in nodes if type(node) is dict]
        num_objects += len(members)
        if num_objects > limits.max_json_objects:
            raise exceeded(limits, "max_json_objects")
        if max(members, default=0) > limits.max_json_members:
            raise exceeded(limits, "max_json_members")
        level = list(
            chain.from_iterable(node.values() if type(node) is dict else node for node in nodes)
        )
    raise exceeded(limits, "max_json_depth")


class StrictRequest(Request):
    """A request whose ``json`` accepts nothing but JSON, translates it, and checks it against the
    route's schema.

    FastAPI would check it on the event loop; a long body is read in a worker thread as a whole.
    """

    translate: Callable[[Any, Scope], Any]
    repairs: Callable[[Any], bool]
    check: Callable[[Any], Any]
    read_form: Callable[[Request], Coroutine[Any, Any, FormData]]

    async def json(self) -> Any:
        """The body as the route's model; FastAPI takes one as it is.

        Raises:
            ApiError: 400 naming the field, 503 where too many long bodies wait.
        """
        raw = await self.body()
        request_info(self.scope).body_bytes = len(raw)
        charset, context = named_charset(self.headers), self.app.state.context
        return await context.text.prepare(len(raw), lambda: self._read(raw, charset))

    def _read(self, raw: bytes, charset: str | None) -> Any:
        settings = self.app.state.context.settings
        parsed = parse_json(raw, charset, settings, self.repairs)
        rest()
        translated = self.translate(parsed, self.scope)
        rest()
        return self.check(translated)

    async def form(self, **_: Any) -> FormData:  # type: ignore[override]
        """The parts of a form, as the route reads them; a large file lies on the disk.

        Raises:
            ApiError: 503 where the disk is full, 500 where a file cannot be written otherwise, and
                what the route refuses.
        """
        try:
            return await self.read_form(self)
        except OSError as error:
            raise as_api_error(error) from None


FILES_PATH = "/v1/files"  # its body is an uploaded file
_CONVERSATION_PATHS = frozenset(
    (
        *("/v1/chat/completions", "/v1/chat/completions/render"),
        *("/v1/responses", "/v1/responses/input_tokens", "/v1/responses/compact"),
        *("/v1/messages", "/v1/messages/count_tokens", "/api/chat"),
    )
)


def is_conversation(path: str, parsed: Any) -> bool:
    """Whether a body holds a conversation, which goes on where a client that cuts text by UTF-16
    units has sent halves of characters.

    Args:
        path: of its endpoint.
    """
    if path == "/tokenize":
        return isinstance(parsed, dict) and parsed.get("messages") is not None
    return path in _CONVERSATION_PATHS


class JsonRoute(APIRoute):
    """A route whose bodies are read by ``parse_json``."""

    def translate(self, parsed: Any, scope: Scope) -> Any:
        """Return the body as the route's schema has it; a subclass may translate it."""
        return parsed

    def repairs(self, parsed: Any, scope: Scope) -> bool:
        """Return whether lone surrogates of a body are replaced, and note it for the answer."""
        is_repaired = is_conversation(self.path, parsed)
        if is_repaired:
            request_info(scope).name_repairs(["body"])
        return is_repaired

    async def read_form(self, request: Request) -> FormData:
        """Return the parts of a form; a router with a route that takes one overrides it."""
        raise ApiError(415, "This path takes no form", code="unsupported_media_type")

    def check(self, parsed: Any) -> Any:
        """Return the body as an object of the route's model.

        Raises:
            ApiError: 400 naming the field.
        """
        if self.body_field is None:
            return parsed
        value, errors = self.body_field.validate(parsed, {}, loc=("body",))
        if errors:
            raise from_validation_error(RequestValidationError(errors, body=parsed))
        return value

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            if names_json(request.headers):
                # FastAPI parses a body of this type alone; the charset stays.
                charset = request.headers.get("content-type", "").partition(";")[2]
                value = "application/json" + (f";{charset}" if charset else "")
                MutableHeaders(scope=request.scope)["content-type"] = value
            strict = StrictRequest(request.scope, request.receive)
            strict.translate = self.translate
            strict.repairs = lambda parsed: self.repairs(parsed, request.scope)
            strict.check = self.check
            strict.read_form = self.read_form
            return await handle(strict)

        return handle_strictly


class BodyLimitMiddleware:
    """Refuses bodies over ``max_body_bytes`` with 413, by Content-Length or as they arrive, and
    compressed ones with 415.

    Uploaded files have a limit of their own.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity") != b"identity":
            error = ApiError(415, "Compressed request bodies are not accepted")
            await error.response(scope)(scope, receive, send)
            return
        key = "max_file_bytes" if scope["path"].endswith(FILES_PATH) else "max_body_bytes"
        most: int = getattr(self._settings, key)
        if int(headers.get(b"content-length", b"0")) > most:
            await self._too_large(key).response(scope)(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                raise self._too_large(key)
            return message

        await self._app(scope, receive_counted, send)

    def _too_large(self, key: str) -> ApiError:
        error = exceeded(self._settings, key)
        # The rest of the body is not read, so the connection cannot be used again.
        error.headers = {"connection": "close"}
        return error


def json_response(payload: Mapping[str, Any] | Sequence[Any]) -> Response:
    """A 200 with a JSON body.

    Lists of lists and objects are written item by item, between which other threads run.
    """
    if isinstance(payload, Mapping):
        parts: Any = {name: _written(value) for name, value in payload.items()}
    else:
        parts = _written(payload)
    return Response(msgspec.json.encode(parts), media_type="application/json")


def _written(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [msgspec.Raw(msgspec.json.encode(item)) for item in value]
    return value
