"""What an operator may do with the cache: list and end pins, drop chunks, see chunks by tenant.

Nothing here runs while a step is in flight. Chunks that a running request uses are never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chunkllama.cache.adapter_tags import adapter_of, untagged
from chunkllama.cache.manager import CacheManager
from chunkllama.cache.node import Node, decode_tokens
from chunkllama.cache.tier_entry import TierEntry
from chunkllama.cache_messages import CacheCommand, EndedPin, OwnedNode, PinInfo
from chunkllama.messages import CommandReply


def run_command(command: CacheCommand, cache: CacheManager, now: float) -> CommandReply:
    """Run one command; an unknown pin or chunk is a reply that is not ``found``."""
    reply = CommandReply(command_id=command.command_id)
    if command.action == "pins":
        reply.pins = _pins(cache, now)
    elif command.action == "forget_prompts":
        cache.history.forget()
    elif command.action == "tree":
        reply.tree = [_owned(cache, node) for node in cache.tree.nodes()]
    elif command.action == "drop_pin":
        keys = [key for key in cache.pins.expiry() if key[0].chunk_id == command.chunk_id]
        keys = [key for key in keys if key[1] == command.tenant]
        reply.found = bool(keys)
        _end_pins(cache, keys, reply)
    elif command.action == "drop_branch":
        roots = [node for node in cache.tree.nodes() if node.chunk_id == command.chunk_id]
        reply.found = bool(roots)
        nodes = [each for node in roots for each in (node, *node.descendants())]
        in_files = 0
        if cache.tier is not None:
            for node in nodes:
                cache.tier.forget(node)
            in_files = sum(map(cache.tier.drop_below, roots))
        _drop(cache, nodes, reply)
        reply.num_dropped += in_files
    else:
        nodes = [node for node in cache.tree.nodes() if node.owner == command.tenant]
        in_files = _drop_files(cache, nodes, lambda entry: entry.owner == command.tenant)
        reply.found = bool(nodes) or in_files > 0
        _drop(cache, nodes, reply)
        reply.num_dropped += in_files
    return reply


def _pins(cache: CacheManager, now: float) -> list[PinInfo]:
    return [
        PinInfo(
            chunk_id=node.chunk_id,
            tenant=tenant,
            num_tokens=node.depth * cache.chunk_size + node.num_tokens,
            num_chunks=node.depth + 1,
            seconds_left=max(until - now, 0.0),
        )
        for (node, tenant), until in cache.pins.expiry().items()
    ]


def _owned(cache: CacheManager, node: Node) -> OwnedNode:
    return OwnedNode(
        chunk_id=node.chunk_id,
        parent_chunk_id=node.parent.chunk_id if node.parent else -1,
        depth=node.depth,
        num_tokens=node.num_tokens,
        num_sequences=node.num_sequences,
        num_pins=node.num_pins,
        state=cache.pool.state(node.chunk_id).name.lower(),
        tenant=node.owner,
        is_public=node.namespace == "",
    )


def _end_pins(cache: CacheManager, keys: Iterable[tuple[Node, str]], reply: CommandReply) -> None:
    for node, tenant in keys:
        path = list(node.upward())
        askers = cache.pins.remove(node, tenant)
        reply.ended_pins.append(
            EndedPin(
                namespace=node.namespace,
                tenant=tenant,
                token_ids=untagged(decode_tokens(b"".join(step.key for step in reversed(path)))),
                askers=sorted(askers),
            )
        )


def drop_adapter(cache: CacheManager, number: int, reply: CommandReply) -> None:
    """Remove every chunk computed under an adapter, which no request uses; ends pins there."""
    nodes = [node for node in cache.tree.nodes() if adapter_of(node.key) == number]
    reply.num_dropped += _drop_files(cache, nodes, lambda entry: adapter_of(entry.key) == number)
    _drop(cache, nodes, reply)


def _drop_files(
    cache: CacheManager, nodes: Iterable[Node], is_dropped: Callable[[TierEntry], bool]
) -> int:
    """Remove files of the tier; returns how many had chunks that are not among ``nodes``."""
    if cache.tier is None:
        return 0
    for node in nodes:
        cache.tier.forget(node)
    return cache.tier.drop(is_dropped)


def _drop(cache: CacheManager, nodes: Iterable[Node], reply: CommandReply) -> None:
    """Remove nodes, the deepest first; those in use, and what such a node is below, are kept."""
    chosen = set(nodes)
    _end_pins(cache, [key for key in cache.pins.expiry() if key[0] in chosen], reply)
    for node in sorted(chosen, key=lambda node: -node.depth):
        if node.is_evictable and not node.children:
            cache.history.removed(node, "dropped")
            cache.tree.remove(node)
            reply.num_dropped += 1
        else:
            reply.num_kept += 1
