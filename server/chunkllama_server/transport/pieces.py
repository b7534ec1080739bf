"""Send large bodies in pieces, each once the client has read enough of those before."""

from __future__ import annotations

from collections.abc import Iterator

from starlette.types import Message, Send

PIECE_BYTES = 1 << 16


def pieces_of(body: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield the pieces of a body, and whether more follow; an empty one has a piece."""
    for start in range(0, max(len(body), 1), PIECE_BYTES):
        end = start + PIECE_BYTES
        yield body[start:end], end < len(body)


def in_pieces(send: Send) -> Send:
    """Return ``send`` for whole bodies.

    What is handed over at once is copied and held until the client has read it, so that slow
    readers of one large answer would take its size in memory each.
    """

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        if len(body) <= PIECE_BYTES:
            await send(message)
            return
        for piece, is_followed in pieces_of(body):
            more = is_followed or bool(message.get("more_body"))
            await send({**message, "body": piece, "more_body": more})

    return send_pieces
