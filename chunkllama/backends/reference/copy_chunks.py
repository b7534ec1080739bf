"""Copies inside the chunk pool: copy-on-write of partly shared chunks, forks."""

from __future__ import annotations

from chunkllama.backends.base import CopyTriple, KVCache


def check_copy_chunks(kv: KVCache, triples: list[CopyTriple]) -> None:
    """Raise ValueError for a chunk outside the pool or more tokens than a chunk has."""
    for source, destination, num_tokens in triples:
        inside = 0 <= source < kv.num_chunks and 0 <= destination < kv.num_chunks
        if not inside or not 0 <= num_tokens <= kv.chunk_size:
            raise ValueError(
                f"copy_chunks: ({source}, {destination}, {num_tokens}) does not fit "
                f"{kv.num_chunks} chunks of {kv.chunk_size} tokens"
            )


def copy_chunks_reference(kv: KVCache, triples: list[CopyTriple]) -> None:
    """Copy the first tokens of chunk source to chunk destination, in every layer, one triple after
    the other.
    """
    check_copy_chunks(kv, triples)
    for layer in kv.layers:
        for source, destination, num_tokens in triples:
            if source != destination:
                layer[destination, :, :, :num_tokens] = layer[source, :, :, :num_tokens]
