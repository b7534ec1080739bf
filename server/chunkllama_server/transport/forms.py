"""Read a form of one file and a few short fields, beside the event loop.

A body's parts are counted before anything is kept of them, and parsed and written in threads: the
parser takes up to half a microsecond a byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from tempfile import SpooledTemporaryFile
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile

from chunkllama_server.transport.errors import ApiError, invalid

_TYPE = b"multipart/form-data"
_MEMORY_BYTES = 1 << 20  # of a file; a larger one lies on the disk
_MAX_FIELD_BYTES = 4096


class _Form:
    """The parts of a body, as they arrive.

    Args:
        boundary: between them.
        max_fields: that are no file.
    """

    def __init__(self, boundary: bytes, max_fields: int) -> None:
        self.items: list[tuple[str, str | UploadFile]] = []
        self._max_fields = max_fields
        self._file: UploadFile | None = None
        self._is_in_file = False
        self._is_whole = False
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._name = ""
        self._text = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._add_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        """Read more of the body.

        Raises:
            ApiError: 400, it is malformed or has too many parts.
            OSError: the file cannot be written.
        """
        try:
            self._parser.write(data)
        except FormParserError:
            raise _malformed() from None

    def finish(self) -> FormData:
        """Return all parts.

        Raises:
            ApiError: 400, the body ends before its last part.
        """
        if not self._is_whole:
            raise _malformed()
        if self._file is not None:
            self._file.file.seek(0)
        return FormData(self.items)

    def close(self) -> None:
        """Drop the file."""
        if self._file is not None:
            self._file.file.close()

    def _begin_part(self) -> None:
        self._disposition = b""
        self._text = bytearray()
        self._is_in_file = False

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name, self._header_value = bytearray(), bytearray()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _malformed()
        self._name = options[b"name"].decode(errors="replace")
        if b"filename" not in options:
            num_fields = len(self.items) - (self._file is not None)
            if num_fields >= self._max_fields:
                raise invalid(f"The form has more than {self._max_fields} fields", self._name)
            return
        if self._file is not None:
            raise invalid("The form has more than one file", self._name)
        self._is_in_file = True
        file: Any = SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115 # closed as a part
        filename = options[b"filename"].decode(errors="replace")
        self._file = UploadFile(file, size=0, filename=filename)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_in_file:
            assert self._file is not None and self._file.size is not None
            self._file.size += self._file.file.write(data[start:end])
            return
        if len(self._text) + end - start > _MAX_FIELD_BYTES:
            message = f"A field of a form has at most {_MAX_FIELD_BYTES} bytes"
            raise invalid(message, self._name)
        self._text += data[start:end]

    def _end_part(self) -> None:
        if self._is_in_file:
            assert self._file is not None
            self.items.append((self._name, self._file))
        else:
            self.items.append((self._name, self._text.decode(errors="replace")))

    def _end(self) -> None:
        self._is_whole = True


def _malformed() -> ApiError:
    return invalid("The body is not valid multipart/form-data", code="invalid_form")


def form_boundary(headers: Headers) -> bytes:
    """Return what separates the parts of a form.

    Raises:
        ApiError: 415 for a body of another type, 400 for a form without a boundary.
    """
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind.lower() != _TYPE:
        raise ApiError(
            415,
            "Send the form as multipart/form-data, with a boundary",
            code="unsupported_media_type",
        )
    if not options.get(b"boundary"):
        raise invalid("The Content-Type multipart/form-data needs a boundary", code="invalid_form")
    return options[b"boundary"]


async def read_form(
    boundary: bytes, blocks: AsyncIterable[bytes], max_fields: int, take: Callable[[int], None]
) -> FormData:
    """Read a form of one file at most.

    Args:
        boundary: of ``form_boundary``.
        blocks: the body.
        max_fields: that are no file.
        take: called with the bytes of each block before they are kept; may refuse them.

    Raises:
        ApiError: 400 for a form that is malformed or has more parts.
        OSError: the file cannot be written.
    """
    try:
        form = _Form(boundary, max_fields)
    except FormParserError:  # the boundary is too long
        raise _malformed() from None
    try:
        async for block in blocks:
            if block:
                take(len(block))
                await asyncio.to_thread(form.write, block)
        return form.finish()
    except BaseException:
        form.close()
        raise
