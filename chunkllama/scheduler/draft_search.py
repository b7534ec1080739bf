"""Find how a text may go on: by the longest end of it that occurs elsewhere (n-gram lookup).

The idea is prompt lookup decoding (Saxena, 2023) with the longest match instead of a fixed n. A
search looks at every position of the text that is searched, with numpy, and keeps no index.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]

MIN_MATCH: Final = 2  # shorter ends occur everywhere
MAX_MATCH: Final = 8
SEPARATOR: Final = -1  # between two outputs; equals no token
MAX_RECENT_TOKENS: Final = 8192  # of one tenant's recent outputs in one namespace
MAX_NAMESPACES: Final = 256


def find_continuation(text: Int32Array, context: Int32Array) -> tuple[int, int] | None:
    """Find where ``text`` goes on after the longest end of ``context`` that it has.

    Args:
        text: [N] tokens; its last position counts as no match, since nothing follows it.
        context: [M] tokens.

    Returns:
        (index in ``text`` of the token that follows, tokens that match), the last of the longest
        matches; None if none has ``MIN_MATCH`` tokens.
    """
    if len(context) < MIN_MATCH or len(text) <= MIN_MATCH:
        return None
    ends = np.flatnonzero(text[:-1] == context[-1])
    matched = 0
    for length in range(2, min(MAX_MATCH, len(context)) + 1):
        inside = ends[np.searchsorted(ends, length - 1) :]
        longer = inside[text[inside - (length - 1)] == context[-length]]
        if not len(longer):
            break
        ends, matched = longer, length
    return (int(ends[-1]) + 1, matched) if matched >= MIN_MATCH else None


class RecentOutputs:
    """The latest outputs of each tenant by namespace and adapter; none is found under another key.

    Each output stands after the end of its prompt, so that its beginning is found, too.
    """

    def __init__(self) -> None:
        self._texts: OrderedDict[tuple[str, str, str], Int32Array] = OrderedDict()

    def add(self, key: tuple[str, str, str], tokens: Int32Array, num_prompt_tokens: int) -> None:
        """Add a sequence that has ended.

        Args:
            key: tenant, namespace and adapter.
            tokens: prompt and output.
            num_prompt_tokens: how many of them are the prompt.
        """
        known = self._texts.pop(key, np.empty(0, np.int32))
        new = tokens[max(num_prompt_tokens - MAX_MATCH, 0) :]
        text = np.concatenate((known, new, [SEPARATOR]), dtype=np.int32)
        self._texts[key] = text[-MAX_RECENT_TOKENS:].copy()
        if len(self._texts) > MAX_NAMESPACES:
            self._texts.popitem(last=False)

    def get(self, key: tuple[str, str, str]) -> Int32Array | None:
        """Return the outputs of a key, the oldest first, each with ``SEPARATOR`` at its end."""
        return self._texts.get(key)

    def forget(self) -> None:
        """Drop everything."""
        self._texts.clear()
