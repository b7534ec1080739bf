"""Build packs from prompts, and check packs against the model: for commands, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from chunkllama.cache.node import encode_tokens
from chunkllama.engine.core import EngineCore
from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.messages import EngineRequest
from chunkllama.packs.document import (
    FORMAT,
    NO_PARENT,
    ModelIdentity,
    PackDocument,
    PackedChunk,
    PackedPrefix,
    Scope,
)
from chunkllama.packs.file import Pack
from chunkllama.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class PrefixPrompt:
    """A prompt to pack.

    Attributes:
        tenant: who may read it; "" is everyone.
        pin: keep its chunks in the pool of a server that loads it.
    """

    name: str
    tenant: str
    token_ids: list[int]
    pin: bool = False


def plan_pack(
    prompts: list[PrefixPrompt], model: ModelIdentity, template: str
) -> tuple[PackDocument, list[PrefixPrompt]]:
    """Lay out the chunks of prompts, each stored once, without checksums.

    Returns:
        The document, and the prompts in the order of its chunks: those of everyone first, because
        each tenant's chunks are below them as far as the tokens are equal.

    Raises:
        ConfigError: no prompt is as long as a chunk.
    """
    ordered = sorted(prompts, key=lambda prompt: prompt.tenant != "")
    scopes = [
        Scope(tenant, tenant) for tenant in dict.fromkeys(prompt.tenant for prompt in ordered)
    ]
    numbers = {scope.tenant: number for number, scope in enumerate(scopes)}
    chunks: list[PackedChunk] = []
    known: dict[tuple[int, str, tuple[int, ...]], int] = {}
    prefixes = []
    size = model.chunk_size
    for prompt in ordered:
        parent = NO_PARENT
        for begin in range(0, len(prompt.token_ids) // size * size, size):
            tokens = tuple(prompt.token_ids[begin : begin + size])
            found = known.get((parent, "", tokens), known.get((parent, prompt.tenant, tokens)))
            if found is None:
                found = known[parent, prompt.tenant, tokens] = len(chunks)
                scope = numbers[prompt.tenant]
                chunks.append(PackedChunk(parent, scope, list(tokens), sha256=""))
            parent = found
        prefixes.append(
            PackedPrefix(
                prompt.name, numbers[prompt.tenant], parent, len(prompt.token_ids), prompt.pin
            )
        )
    if not chunks:
        raise ConfigError(
            f"prefixes: none is as long as a chunk of {size} tokens: nothing can be packed"
        )
    return PackDocument(FORMAT, model, template, "", scopes, prefixes, chunks), ordered


def compute_chunks(
    core: EngineCore,
    document: PackDocument,
    ordered: list[PrefixPrompt],
    on_prefix: Callable[[PackedPrefix], None] = lambda prefix: None,
) -> Iterator[memoryview]:
    """Compute the chunks of a planned pack; yields the canonical K/V of each.

    Raises:
        ConfigError: a prompt does not fit the context or the pool.
    """
    assert core.packs is not None
    cache, io = core.packs.cache, core.packs.io
    done = 0
    for prefix, prompt in zip(document.prefixes, ordered, strict=True):
        on_prefix(prefix)
        namespace = f"tenant {prompt.tenant}" if prompt.tenant else ""
        _run(core, prompt, namespace)
        key = encode_tokens(np.array(prompt.token_ids, np.int32))
        nodes = cache.match(key, len(prompt.token_ids), namespace).nodes
        path = document.path(prefix.last)
        if len(nodes) < len(path):
            raise ConfigError(f"prefixes: {prompt.name}: the pool is too small; raise num_chunks")
        for node, index in zip(nodes, path, strict=False):
            if index == done:
                yield io.read(node.chunk_id)
                done += 1


def _run(core: EngineCore, prompt: PrefixPrompt, namespace: str) -> None:
    request = EngineRequest(
        request_id=prompt.name,
        prompt_token_ids=prompt.token_ids,
        sampling=SamplingParams(temperature=0.0, max_tokens=1, seed=0),
        namespace=namespace,
    )
    try:
        core.add(request)
    except InvalidRequestError as error:
        raise ConfigError(f"prefixes: {prompt.name}: {error}") from None
    while core.has_work():
        for delta in core.step():
            if delta.error is not None:
                raise ConfigError(f"prefixes: {prompt.name}: {delta.error.message}")


def recompute_chunks(
    core: EngineCore, pack: Pack, indexes: list[int]
) -> Iterator[tuple[int, float]]:
    """Compute chunks with the pack's own chunks before them; yields each index and the largest
    relative difference, see ``chunk_io.TOLERANCE``.

    Every chunk of the paths must have the right checksum.

    Raises:
        ConfigError: the pool or the context is too small for a path.
    """
    assert core.packs is not None
    cache, io = core.packs.cache, core.packs.io
    document = pack.document
    there: list[int] = []  # the chunks whose K/V lie in the first chunks of the pool
    ids = cache.pool.allocate(cache.num_chunks)
    try:
        for index in indexes:
            path = document.path(index)
            if len(path) > io.max_path_chunks:
                raise ConfigError(f"chunk {index} is beyond the context; raise max_model_len")
            if len(path) > len(ids):
                raise ConfigError("the pool is too small for this pack; raise num_chunks")
            same = list(takewhile(lambda pair: pair[0] == pair[1], zip(there, path, strict=False)))
            for depth in range(min(len(same), len(path) - 1), len(path) - 1):
                data = pack.read_chunk(path[depth])
                assert data is not None, "the checksum was right before"
                io.write(ids[depth], io.arrange(data, document.model))
            data = pack.read_chunk(index)
            assert data is not None, "the checksum was right before"
            tokens = document.chunks[index].tokens
            yield index, io.compare(tokens, ids[: len(path)], data)
            io.write(ids[len(path) - 1], io.arrange(data, document.model))
            there = path
    finally:
        for chunk_id in ids:
            cache.pool.free(chunk_id)
