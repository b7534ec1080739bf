"""Keys of prompt prefixes, equal in every process that knows the tokens and the namespace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from chunkllama.cache.adapter_tags import adapter_of, untagged
from chunkllama.cache.events import digest, extended
from chunkllama.cache.node import TOKEN_BYTES, Node, decode_tokens, encode_tokens

HEAD_LEVELS: Final = 64  # chunks from the root that a replica's digest may cover


def prefix_keys(namespace: str, token_ids: Sequence[int], chunk_size: int) -> list[int]:
    """Return a key of 64 bits for each leading run of whole chunks of a prompt.

    Equal keys mean an equal namespace and equal tokens from the prompt's start to the chunk's end.
    Adapters have no part in it: what is under one has the keys that the base model's chunks have.
    """
    whole = len(token_ids) // chunk_size * chunk_size
    encoded = encode_tokens(np.asarray(token_ids[:whole], np.int32))
    width, seed = chunk_size * TOKEN_BYTES, _namespace_seed(namespace)
    keys: list[int] = []
    above = b""
    for start in range(0, len(encoded), width):
        above = extended(above, encoded[start : start + width])
        keys.append(_key(above, seed))
    return keys


def tree_heads(nodes: Iterable[Node], chunk_size: int, max_keys: int) -> list[list[int]]:
    """Return the keys of a prefix tree's whole chunks, level by level from the root.

    Only whole levels are returned, as many as ``max_keys`` keys hold; an empty one is the end of
    the tree. A tenant's chunk below public ones has keys for those in its namespace too, because
    its prompts have them.

    Args:
        nodes: parents before children; those with fewer tokens than a chunk are left out.
    """
    digests: dict[Node, bytes] = {}
    levels: list[set[int]] = []
    seen: set[tuple[str, Node]] = set()
    for node in nodes:
        if node.num_tokens < chunk_size or node.filled < chunk_size:
            continue
        digests[node] = _untagged_digest(node, digests)
        seed = _namespace_seed(node.namespace)
        for step in node.upward():
            if (node.namespace, step) in seen:
                break
            seen.add((node.namespace, step))
            if step.depth < HEAD_LEVELS:
                levels.extend(set() for _ in range(step.depth + 1 - len(levels)))
                levels[step.depth].add(_key(digests[step], seed))
    heads: list[list[int]] = []
    for level in levels:
        max_keys -= len(level)
        if max_keys < 0:
            break
        heads.append(sorted(level))
    else:
        heads.append([])
    return heads[:HEAD_LEVELS]


def _untagged_digest(node: Node, digests: dict[Node, bytes]) -> bytes:
    """Return the digest of a node's tokens without the number of their adapter."""
    if not adapter_of(node.key):
        return digest(node)
    tokens = np.array(untagged(decode_tokens(node.key)), np.int32)
    assert node.parent is not None
    return extended(digests.get(node.parent, b""), encode_tokens(tokens))


def _namespace_seed(namespace: str) -> int:
    return int.from_bytes(hashlib.sha256(namespace.encode()).digest()[:8], "big")


def _key(digest: bytes, seed: int) -> int:
    return int.from_bytes(digest[:8], "big") ^ seed
