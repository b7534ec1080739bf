"""The longest prefix of a prompt that the tree has, at token granularity."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from chunkllama.cache.edge import edges_of
from chunkllama.cache.node import PUBLIC, TOKEN_BYTES, Node, common_prefix


class Match(NamedTuple):
    """What the tree has of a token list, at token granularity.

    Attributes:
        nodes: whole chunks to share; each is filled, or will be by the step being put together.
        copy_source: a node whose first ``num_copied`` tokens continue the match, to be copied.
        num_tokens: tokens that need no computing, ``len(nodes) * C + num_copied``.
        num_later_tokens: what the same match would give once every node seen is filled.
        pending: (node, tokens) to watch when waiting for ``num_later_tokens``.
        ends_in_rounded: a chunk that the tier has rounded has more of the tokens. It is shared
            whole or not at all: a copy of a part would count as computed.
    """

    nodes: list[Node]
    copy_source: Node | None
    num_copied: int
    num_tokens: int
    num_later_tokens: int
    pending: tuple[Node, int] | None
    ends_in_rounded: bool = False

    @property
    def num_public_tokens(self) -> int:
        """Those of ``num_tokens`` that everyone may match; they come first."""
        count = 0
        if self.nodes and self.nodes[0].namespace == PUBLIC:
            count = bisect_left(self.nodes, True, key=lambda node: node.namespace != PUBLIC)
            count *= self.nodes[0].num_tokens
        copies_public = self.copy_source is not None and self.copy_source.namespace == PUBLIC
        return count + (self.num_copied if copies_public else 0)

    def rounded_tokens(self, limit: int) -> int:
        """Count those of the first ``limit`` tokens whose K/V the tier has rounded."""
        return sum(
            min(node.num_tokens, max(limit - node.depth * node.num_tokens, 0))
            for node in self.nodes
            if node.bits
        )


def find_match(root: Node, key: bytes, limit: int, namespace: str, size: int) -> Match:
    """The longest usable prefix of ``key``, at most ``limit`` tokens; changes nothing.

    A tenant's path leaves the public part at one node. Which one is not known from above
    (both sides may hold equal chunks), so each exit of the public path is followed.
    """
    public = _chain(root, key, limit, PUBLIC, size) if PUBLIC in root.children else []
    if not public:
        return _usable(root, _chain(root, key, limit, namespace, size), key, limit, namespace, size)
    chains = []
    if namespace != PUBLIC:
        for i, node in _exits(root, public):
            own = _chain(node, key, limit, namespace, size)
            if own:
                chains.append(public[:i] + own)
    # a tenant's chunks below the last public one give at least what the public path alone gives
    if not chains or chains[-1][: len(public)] != public:
        chains.insert(0, public)
    matches = [_usable(root, chain, key, limit, namespace, size) for chain in chains]
    if len(matches) == 1:
        return matches[0]
    # from the public path a tenant's whole chunk looks like one to copy: sharing it comes first
    best = max(matches, key=lambda match: (match.num_tokens, len(match.nodes)))
    later = max(matches, key=lambda match: match.num_later_tokens)
    if later.num_later_tokens <= best.num_later_tokens:
        return best
    return best._replace(num_later_tokens=later.num_later_tokens, pending=later.pending)


def _chain(node: Node, key: bytes, limit: int, namespace: str, size: int) -> list[Node]:
    """Whole chunks of one namespace below ``node`` that equal ``key``, filled or not.

    Args:
        node: the last one of its edge.
    """
    width = size * TOKEN_BYTES
    chain: list[Node] = []
    start, end = (node.depth + 1) * width, limit // size * width
    while start < end:
        children = node.children.get(namespace)
        child = None if children is None else children.find(key[start : start + width])
        if child is None:
            break
        nodes = child.edge.nodes
        if len(nodes) > 1:
            stop = start + len(nodes) * width
            if stop > end or not key.startswith(child.edge.key, start):
                equal = common_prefix(child.edge.key, key[start : min(stop, end)])
                chain += nodes[: equal // size]
                break
        chain += nodes
        node = nodes[-1]
        start += len(nodes) * width
    return chain


def _usable(
    root: Node, chain: list[Node], key: bytes, limit: int, namespace: str, size: int
) -> Match:
    ready = len(chain)
    if chain and chain[-1].scheduled < size:  # those before it are computed first
        ready = bisect_left(chain, True, key=lambda node: node.scheduled < size)
    nodes = chain[:ready]
    behind = here = _overlaps(chain[-1] if chain else root, key, limit, namespace, size)
    if ready < len(chain):
        here = _overlaps(nodes[-1] if nodes else root, key, limit, namespace, size)
    source, copied = _copy_source(here)
    most, pending = 0, None
    for node, overlap in behind:
        if overlap > most and not node.bits:
            most, pending = overlap, (node, overlap)
    if ready < len(chain):
        pending = (chain[-1], size)
    num_tokens = ready * size + copied
    later = max(len(chain) * size + most, num_tokens)
    in_rounded = any(node.bits and overlap > copied for node, overlap in here)
    return Match(nodes, source, copied, num_tokens, later, pending, in_rounded)


def _overlaps(
    parent: Node, key: bytes, limit: int, namespace: str, size: int
) -> list[tuple[Node, int]]:
    """Children of ``parent`` next to ``key`` and how many tokens they share with it."""
    start = (parent.depth + 1) * size
    end = min(start + size, limit)
    if end <= start or not parent.children:
        return []
    rest = key[start * TOKEN_BYTES : end * TOKEN_BYTES]
    found = []
    for children in parent.visible_children(namespace):
        for node in children.neighbours(rest):
            found.append((node, common_prefix(node.key, rest)))
    return found


def _exits(root: Node, public: list[Node]) -> Iterator[tuple[int, Node]]:
    """Nodes of a public path below which others may begin, and their depth plus one."""
    yield 0, root
    depth = 0
    for edge in edges_of(public):
        depth += len(edge.nodes)
        if depth <= len(public):
            yield depth, edge.nodes[-1]


def _copy_source(overlaps: list[tuple[Node, int]]) -> tuple[Node | None, int]:
    """The node from which most tokens may be copied in this step, and how many.

    A node that a copy of this step fills is not filled yet, but its source is. One that the tier
    has rounded is never copied from.
    """
    best, most = None, 0
    for node, overlap in overlaps:
        source, tokens = node, min(overlap, node.filled)
        if node.copied_from is not None and tokens < min(overlap, node.copied_from[1]):
            source, tokens = node.copied_from[0], min(overlap, node.copied_from[1])
        if tokens > most and not node.bits:
            best, most = source, tokens
    return best, most
