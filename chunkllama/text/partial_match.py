"""Find where a text that is still growing may end in a tag or a stop string."""

from __future__ import annotations


def partial_end(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag`` and is not all of it."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
