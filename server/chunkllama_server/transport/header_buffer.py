"""h11's receive buffer, with limits on a block of headers that hold before it is parsed."""

from __future__ import annotations

import re
from urllib.parse import unquote

import h11
from h11._receivebuffer import ReceiveBuffer

_BLANK_LINE = re.compile(rb"\n\r?\n")


class HeaderBuffer(ReceiveBuffer):
    """Hands h11 no headers, or trailers of a chunked body, that are too long or too many.

    h11 measures what is incomplete only, and takes 3 us for a header: the 64,000 short ones that
    one read from a socket can hold would take 0.2 s.

    Args:
        max_bytes: of a request line and its headers.
        max_headers: of a request.

    Attributes:
        is_exceeded: a block was refused.
        refused_path: of a request line whose headers were refused.
    """

    def __init__(self, max_bytes: int, max_headers: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._max_lines = max_headers + 1
        self.is_exceeded = False
        self.refused_path = ""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines up to the first blank one; None while that is missing.

        Raises:
            h11.RemoteProtocolError: they are too long or too many, or one continues the line before
                it: a proxy may read such a Transfer-Encoding in another way.
        """
        if self._data[:1] != b"\n" and self._data[:2] != b"\r\n":  # else there are none
            head = self._data[: self._max_bytes + 1]
            blank = _BLANK_LINE.search(head)
            end = len(head) if blank is None else blank.start() + 1
            if end > self._max_bytes or head.count(b"\n", 0, end) > self._max_lines:
                self.is_exceeded = True
                parts = bytes(head.partition(b"\n")[0]).split(b" ")
                if len(parts) == 3:
                    self.refused_path = unquote(parts[1].partition(b"?")[0].decode("latin-1"))
                raise h11.RemoteProtocolError("Headers too large", error_status_hint=431)
        lines: list[bytearray] | None = super().maybe_extract_lines()
        if lines and any(line.startswith((b" ", b"\t")) for line in lines):
            raise h11.RemoteProtocolError("A header is folded")
        return lines
