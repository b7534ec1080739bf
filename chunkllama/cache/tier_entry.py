"""Chunks of the tier, and what is being read of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from chunkllama.cache.node import Node

NO_FILE: Final = -1
_WEIGHT: Final = 0.2  # of a new measurement in the price
_FORGOTTEN: Final = 0.98  # of the price, each time that computing seems cheaper


class Form(NamedTuple):
    """How the tier keeps a chunk.

    Attributes:
        num_bytes: that it takes.
        bits: that each value is rounded to; 0: it is kept as it is.
    """

    num_bytes: int
    bits: int = 0


class TierEntry:
    """One whole chunk.

    Attributes:
        children: by namespace and key.
        file: number of its file, NO_FILE without one.
        form: of its file.
        is_written: the file can be read.
        key, namespace, owner: as those of a ``Node``.
        parent: None at the root, and of an entry that has left the tree.
        promotion: that reads it now.
    """

    __slots__ = (
        "children",
        "file",
        "form",
        "is_written",
        "key",
        "last_use",
        "namespace",
        "owner",
        "parent",
        "promotion",
    )

    def __init__(self, parent: TierEntry | None, namespace: str, key: bytes) -> None:
        self.parent = parent
        self.namespace = namespace
        self.key = key
        self.owner = ""
        self.children: dict[tuple[str, bytes], TierEntry] = {}
        self.file = NO_FILE
        self.form = Form(0)
        self.is_written = False
        self.last_use = 0
        self.promotion: Promotion | None = None

    @property
    def is_evictable_leaf(self) -> bool:
        """Its file may be removed for another one."""
        return self.is_written and self.promotion is None and not self.children

    def descendants(self) -> Iterator[TierEntry]:
        """Every entry below this one."""
        stack = [*self.children.values()]
        while stack:
            entry = stack.pop()
            yield entry
            stack += entry.children.values()


class Promotion:
    """Successive chunks that are being read for a prompt.

    Attributes:
        entries: of the chunks.
        above: node that the next of them continues.
        first: depth of the first.
        num_needed: chunks that the prompt's sequence needs, these among them.
        num_added: those that are in the pool.
        is_done: no more are added.
        seconds: once it is done, the price of those that were added.
    """

    __slots__ = ("above", "entries", "first", "is_done", "num_added", "num_needed", "seconds")

    def __init__(self, entries: list[TierEntry], above: Node, num_needed: int) -> None:
        self.entries = entries
        self.above = above
        self.first = above.depth + 1
        self.num_needed = num_needed
        self.num_added = 0
        self.is_done = False
        self.seconds = 0.0

    def tokens_below(self, limit: int, chunk_size: int) -> int:
        """Return how many of a prompt's first ``limit`` tokens were added."""
        begin, end = self.first * chunk_size, (self.first + self.num_added) * chunk_size
        return max(min(end, limit) - begin, 0)


class Wait(NamedTuple):
    """What a sequence waits for: a read of what continues its match; None: the reads of others have
    to end before that begins."""

    promotion: Promotion | None


class ReadLimits(NamedTuple):
    """What a read may take.

    Attributes:
        least_tokens: that it must save.
        needed_chunks: that the sequence needs beside its match, those that are read among them.
        available_chunks: for all sequences that are about to start.
        most_promotions: that may be in progress.
        compute_seconds: estimates the time of computing tokens; None is not known.
    """

    least_tokens: int
    needed_chunks: int
    available_chunks: int
    most_promotions: int
    compute_seconds: Callable[[int], float | None]


class ReadPrice:
    """What reading a chunk takes, measured, so that it can be compared with computing it."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def add(self, seconds: float) -> None:
        """Take in the time of one chunk, from the wish for it until it was in the pool."""
        before = seconds if self._seconds is None else self._seconds
        self._seconds = before + _WEIGHT * (seconds - before)

    def seconds(self, num_chunks: int) -> float:
        """Return the price of chunks; 0 before the first measurement."""
        return num_chunks * (self._seconds or 0.0)

    def is_lower(self, num_chunks: int, compute_seconds: float | None) -> bool:
        """Whether reading takes no longer than computing; None is not known.

        Each answer of no lowers the price a little: what was slow is tried again.
        """
        if self._seconds is None or compute_seconds is None:
            return True
        if num_chunks * self._seconds <= compute_seconds:
            return True
        self._seconds *= _FORGOTTEN
        return False
