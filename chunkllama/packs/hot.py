"""Plan a pack of what a running server has cached, as its last snapshot has it."""

from __future__ import annotations

from collections.abc import Mapping

from chunkllama.packs.document import (
    FORMAT,
    NO_PARENT,
    PackDocument,
    PackedChunk,
    PackedPrefix,
    Scope,
)


def plan_hot_pack(
    snapshot: PackDocument, tenants: Mapping[str, str]
) -> tuple[PackDocument, list[int]]:
    """Choose the chunks of a snapshot that some tenants may read.

    Args:
        snapshot: its document.
        tenants: those tenants by their namespace in the snapshot; "" is everyone, by "".

    Returns:
        The document of the pack, whose prompts are numbered and end at the chunks that none
        continues, and where each of its chunks is in the snapshot.
    """
    scopes: dict[Scope, int] = {}
    numbers = {NO_PARENT: NO_PARENT}
    chunks: list[PackedChunk] = []
    for index, chunk in enumerate(snapshot.chunks):
        tenant = tenants.get(snapshot.scopes[chunk.scope].namespace)
        if tenant is None or chunk.parent not in numbers:
            continue
        numbers[index] = len(chunks)
        scope = scopes.setdefault(Scope(tenant, tenant), len(scopes))
        chunks.append(PackedChunk(numbers[chunk.parent], scope, chunk.tokens, chunk.sha256))
    del numbers[NO_PARENT]
    document = PackDocument(FORMAT, snapshot.model, snapshot.template, "", list(scopes), [], chunks)
    continued = {chunk.parent for chunk in chunks}
    ends = [index for index in range(len(chunks)) if index not in continued]
    depths, size = document.depths(), snapshot.model.chunk_size
    document.prefixes.extend(
        PackedPrefix(f"hot {number}", chunks[end].scope, end, (depths[end] + 1) * size)
        for number, end in enumerate(ends, 1)
    )
    return document, list(numbers)
