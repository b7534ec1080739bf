"""The header of a pack: the model it was computed with, its chunks, their tokens and scopes.

A pack is a safetensors file with one tensor ``kv`` [N, layers, 2, kv heads, chunk size, head_dim],
K then V, whole chunks in the order of the document. Its metadata holds the document as JSON, the
SHA-256 of that text, and perhaps a signature of it. No torch here: the API process reads it too.
"""

from __future__ import annotations

import math

import msgspec

from chunkllama.model_spec import KV_ITEM_SIZES, kv_row_elements

FORMAT = 1
NO_PARENT = -1


class ModelIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What K/V depend on beside the tokens. Two models with equal fields compute the same K/V.

    Attributes:
        name: as the model was named; the only field that may differ.
        weights: SHA-256 of the weight files.
        architecture: SHA-256 of the model's numbers, those of the rotary embedding apart.
        rope: the rotary embedding's parameters as JSON.
        quantization: storage of the linear layers, as the setting has it.
        dtype: of K/V.
        num_layers, num_kv_heads, head_dim, chunk_size: the shape of a chunk.
        compute_dtype: that the model computes in, where K/V have another; else "".
        arithmetic: kernels, CPU and number of threads of K/V that a deterministic server has
            computed; else "".
    """

    name: str
    weights: str
    architecture: str
    rope: str
    quantization: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int
    compute_dtype: str = ""
    arithmetic: str = ""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of a chunk: layers, K and V, kv heads, tokens, head_dim (int8: and its scale)."""
        row = kv_row_elements(self.head_dim, self.dtype)
        return (self.num_layers, 2, self.num_kv_heads, self.chunk_size, row)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's K/V."""
        return math.prod(self.shape) * KV_ITEM_SIZES[self.dtype]

    def difference(self, server: ModelIdentity) -> str:
        """Say in one line what differs from the server's model; "" if nothing does."""
        for field, what in (
            ("dtype", "dtype {0}, this server has {1}"),
            ("compute_dtype", "K/V of a model in {0}, this server computes in {1}"),
            ("chunk_size", "chunks of {0} tokens, this server has {1}"),
            ("quantization", "quantization {0}, this server has {1}"),
            ("weights", "other weights: it was made with {2}, this server runs {3}"),
            ("rope", "another rotary embedding: {0}, this server has {1}"),
            ("architecture", "other numbers in config.json than this server's model has"),
        ):
            own, other = getattr(self, field), getattr(server, field)
            if own != other:
                return what.format(own, other, self.name, server.name)
        if self.shape != server.shape:
            return "another shape of K/V"
        if server.arithmetic and self.arithmetic != server.arithmetic:
            made_by = self.arithmetic or "a server that is not deterministic"
            return f"K/V of {made_by}, and this server is deterministic with {server.arithmetic}"
        return ""


class Scope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may read a chunk.

    Attributes:
        tenant: whose chunk it is; "" is the operator's, or that of a server with one tenant.
        namespace: "" lets everyone read it. In a pack it is the tenant, in a snapshot the
            namespace that the chunk had in the tree.
    """

    tenant: str = ""
    namespace: str = ""


class PackedChunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One whole chunk.

    Attributes:
        parent: index of the chunk before it in its prompts; -1 at their beginning.
        scope: index of its scope.
        tokens: its token ids.
        sha256: of its bytes in the tensor.
    """

    parent: int
    scope: int
    tokens: list[int]
    sha256: str


class PackedPrefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt that the pack holds.

    Attributes:
        last: index of its last whole chunk; -1: it is shorter than one.
        num_tokens: of the whole prompt, the part behind the last whole chunk included.
        pin: its chunks stay in the pool.
    """

    name: str
    scope: int
    last: int
    num_tokens: int
    pin: bool = False


class PackDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything of a pack but K/V.

    Attributes:
        template: SHA-256 of the chat template that the prompts were rendered with; "": none.
        realm: of a snapshot: where its namespaces mean something; "" makes it a pack.
    """

    format: int
    model: ModelIdentity
    template: str
    realm: str
    scopes: list[Scope]
    prefixes: list[PackedPrefix]
    chunks: list[PackedChunk]

    def depths(self) -> list[int]:
        """Return the index of each chunk in its prompts."""
        depths: list[int] = []
        for chunk in self.chunks:
            depths.append(0 if chunk.parent == NO_PARENT else depths[chunk.parent] + 1)
        return depths

    def path(self, index: int) -> list[int]:
        """Return the chunks from a prompt's beginning to ``index``, that one included."""
        path = []
        while index != NO_PARENT:
            path.append(index)
            index = self.chunks[index].parent
        return path[::-1]

    def tokens(self, index: int) -> list[int]:
        """Return the tokens from a prompt's beginning to the end of a chunk."""
        return [token for step in self.path(index) for token in self.chunks[step].tokens]


def check_document(document: PackDocument) -> str:
    """Say in a few words what no pack can have; "" if the document is sound."""
    model, scopes = document.model, document.scopes
    if document.format != FORMAT:
        return f"format {document.format}, this version reads {FORMAT}"
    if model.dtype not in KV_ITEM_SIZES or min(model.shape) < 1:
        return "its K/V have no shape or dtype that exists"
    if len(set(scopes)) != len(scopes):
        return "a scope occurs twice"
    if not document.realm and any(scope.namespace != scope.tenant for scope in scopes):
        return "a tenant's chunks are in another namespace"
    for index in range(len(document.chunks)):
        if problem := _check_chunk(document, index):
            return f"chunk {index} {problem}"
    for prefix in document.prefixes:
        if not 0 <= prefix.scope < len(scopes):
            return f"prefix {prefix.name} has no scope"
        if not NO_PARENT <= prefix.last < len(document.chunks):
            return f"prefix {prefix.name} ends at no chunk"
    return ""


def _check_chunk(document: PackDocument, index: int) -> str:
    model, scopes, chunk = document.model, document.scopes, document.chunks[index]
    if not NO_PARENT <= chunk.parent < index:
        return "stands before its parent"
    if not 0 <= chunk.scope < len(scopes):
        return "has no scope"
    if len(chunk.tokens) != model.chunk_size:
        return f"is not one of {model.chunk_size} tokens"
    if min(chunk.tokens) < 0 or max(chunk.tokens) >= 1 << 31:
        return "has a token id that no model has"
    parent = chunk.parent
    above = "" if parent == NO_PARENT else scopes[document.chunks[parent].scope].namespace
    return "" if above in ("", scopes[chunk.scope].namespace) else "is below another tenant's"
