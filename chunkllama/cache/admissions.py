"""The ways to give a sequence its chunks, of which admission takes the first that fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from chunkllama.cache.matching import Match


class Admission(NamedTuple):
    """One way to give a sequence its chunks.

    Attributes:
        match: what it shares and copies.
        reuses_leaf: its copy source becomes its own chunk instead of being copied.
        num_new: chunks to allocate.
        available: chunks that are free or can be evicted for it (its own path cannot).
    """

    match: Match
    reuses_leaf: bool
    num_new: int
    available: int


def ways_to_admit(
    match: Match, num_chunks: int, namespace: str, chunk_size: int, num_available: int, own: int
) -> Iterator[Admission]:
    """Ways to admit a sequence of ``num_chunks`` chunks, the one that keeps most first.

    An unused partial leaf of its namespace becomes its own chunk when all of it is matched
    (one that other tenants can see is copied, or they would lose it). Under memory pressure
    the leaf's other tokens are dropped, then the copy itself, so a request that fits alone
    can always be admitted alone.

    Args:
        num_available: chunks that are free or can be evicted now.
        own: those of the match's nodes among them.
    """
    source = match.copy_source
    num_new = num_chunks - len(match.nodes)
    available = num_available - own
    if source is None:
        yield Admission(match, False, num_new, available)
        return
    idle = source.is_evictable and not source.children
    partial = source.num_tokens < chunk_size
    rest = available - source.is_evictable
    is_own = source.namespace == namespace
    if idle and partial and is_own and match.num_copied == source.num_tokens:
        yield Admission(match, True, num_new - 1, rest)
        return
    yield Admission(match, False, num_new, rest)
    if idle and partial:
        yield Admission(match, True, num_new - 1, rest)
    if source.is_evictable:
        num_tokens = match.num_tokens - match.num_copied
        without = match._replace(copy_source=None, num_copied=0, num_tokens=num_tokens)
        yield Admission(without, False, num_new, available)
