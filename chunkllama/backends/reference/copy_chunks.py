"""Copies inside the chunk pool: copy-on-write of partly shared chunks, forks."""

from __future__ import annotations

from chunkllama.backends.base import CopyTriple, KVCache


def copy_chunks_reference(kv: KVCache, triples: list[CopyTriple]) -> None:
    """Copy the first tokens of chunk source to chunk destination, in every layer, one triple after
    the other.
    """
    for layer in kv.layers:
        for source, destination, num_tokens in triples:
            if source != destination:
                layer[destination, :, :, :num_tokens] = layer[source, :, :, :num_tokens]
