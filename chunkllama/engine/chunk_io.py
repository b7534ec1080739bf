"""K/V of whole chunks to and from the pool of a model that runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import torch

from chunkllama.backends.int8_kv import dequantize_kv
from chunkllama.backends.kivi import Bytes, KiviCodec
from chunkllama.engine.model_runner import ModelRunner
from chunkllama.packs.document import ModelIdentity
from chunkllama.packs.file import Pack
from chunkllama.packs.signature import is_signed

# Largest relative difference (Frobenius norm, K and V of each layer by themselves) between K/V of a
# pack and the same computed here: other kernels and instruction sets round differently.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, "int8": 0.1}


class ChunkIO:
    """Reads, writes and recomputes chunks; used between two steps.

    Args:
        runner: owns the model and the pool.
        identify: identifies the model; reads its weights.
        max_path_chunks: whole chunks of the longest prompt; behind them the rotary table ends.

    Attributes:
        chunk_bytes: bytes of a chunk's canonical K/V.
        stored_bytes: bytes of a chunk as it lies in the pool, or in those of all ranks.
        shape, dtype: of its canonical K/V.
        max_path_chunks: as given.
    """

    def __init__(
        self, runner: ModelRunner, identify: Callable[[], ModelIdentity], max_path_chunks: int
    ) -> None:
        self._identify = identify
        self._identity: ModelIdentity | None = None
        self._identifying = threading.Lock()
        self.max_path_chunks = max_path_chunks
        self.vocab_size = runner.spec.vocab_size
        self._runner = runner
        self._pool = runner.step_model
        kv = runner.kv
        num_ranks = self._pool.num_ranks
        num_kv_heads = kv.num_kv_heads * num_ranks
        self.dtype = kv.stored_dtype
        self.shape = (len(kv.layers), 2, num_kv_heads, kv.chunk_size, kv.row_elements)
        self.chunk_bytes = math.prod(self.shape) * self.dtype.itemsize
        self.stored_bytes = num_ranks * sum(layer[0].nbytes for layer in kv.layers)
        piece = (len(kv.layers), *kv.layers[0].shape[1:])
        self._stored_shape = piece if num_ranks == 1 else (num_ranks, *piece)

    def identify(self) -> ModelIdentity:
        """Identify the model; the first call reads its weights. Any thread may call it.

        Raises:
            ConfigError: the weights cannot be read.
        """
        with self._identifying:
            if self._identity is None:
                self._identity = self._identify()
            return self._identity

    def refusal(self, pack: Pack, template: str, public_key: bytes, realm: str = "") -> str:
        """Say why a pack must not be used here; "" if it may.

        Args:
            template: SHA-256 of the chat template here.
            public_key: Ed25519 key that must have signed it; empty: any pack may be used.
            realm: that it must have, see ``PackDocument``.
        """
        document = pack.document
        if document.realm != realm:
            return "it is a snapshot of another server" if document.realm else "it is no snapshot"
        if public_key and not pack.signature:
            return "it has no signature, and pack_public_key asks for one"
        if public_key and not is_signed(pack.text, pack.signature, public_key):
            return "its signature is not by the owner of pack_public_key"
        if difference := document.model.difference(self.identify()):
            return f"it has {difference}"
        if document.template != template:
            return "it was made with another chat template than this server has"
        if any(max(chunk.tokens) >= self.vocab_size for chunk in document.chunks):
            return "it has a token that the model does not have"
        return ""

    def read(self, chunk_id: int) -> memoryview:
        """Copy the canonical K/V of a chunk."""
        return self.restore(self.copy(chunk_id))

    def copy(self, chunk_id: int) -> torch.Tensor:
        """Copy a chunk as it lies in the pool."""
        return self._pool.copy_chunk(chunk_id)

    def restore(self, copied: torch.Tensor) -> memoryview:
        """Return the canonical K/V of a copy. Any thread may call it."""
        return self.canonical(copied).view(torch.uint8).numpy().reshape(-1).data

    def canonical(self, copied: torch.Tensor) -> torch.Tensor:
        """Return the canonical K/V of a copy as a tensor. Any thread may call it."""
        return self._pool.restore_chunk(copied).contiguous()

    def arrange(self, data: bytearray, model: ModelIdentity) -> torch.Tensor:
        """Rearrange canonical K/V for ``write``. Any thread may call it."""
        canonical = torch.frombuffer(data, dtype=self.dtype).view(model.shape)
        return self._pool.arrange_chunk(canonical)

    def widened(self, codec: KiviCodec, data: Bytes) -> torch.Tensor:
        """Return a rounded chunk for ``write``. Any thread may call it."""
        return self._pool.widen_chunk(codec, data)

    def from_stored(self, data: bytes | bytearray | memoryview) -> torch.Tensor:
        """Return the copy of a chunk whose bytes these are, for ``write``."""
        return torch.frombuffer(data, dtype=self.dtype).view(self._stored_shape)

    def write(self, chunk_id: int, arranged: torch.Tensor) -> None:
        """Store a chunk."""
        self._pool.write_chunk(chunk_id, arranged)

    def compare(self, token_ids: list[int], chunk_ids: list[int], data: bytearray) -> float:
        """Compute the last of a prompt's chunks and compare it with canonical K/V.

        Args:
            token_ids: of the last chunk.
            chunk_ids: of the prompt, at most ``max_path_chunks``; all but the last hold their K/V.

        Returns:
            The largest relative difference, see ``TOLERANCE``; not finite if a value is not.
        """
        assert len(chunk_ids) <= self.max_path_chunks, "positions without a row in the rotary table"
        self._runner.compute_chunk(token_ids, chunk_ids)
        computed = self._pool.restore_chunk(self.copy(chunk_ids[-1]))
        given = torch.frombuffer(data, dtype=self.dtype).view(computed.shape)
        if self._runner.kv.is_int8:
            given, computed = dequantize_kv(given), dequantize_kv(computed)
        return relative_difference(given, computed)


def relative_difference(given: torch.Tensor, computed: torch.Tensor) -> float:
    """Return the largest ||given - computed|| / ||computed|| over layers and K and V; both tensors
    are [layers, 2, ...]."""
    given, computed = given.double().flatten(2), computed.double().flatten(2)
    error = (given - computed).norm(dim=2)
    size = computed.norm(dim=2).clamp(min=np.finfo(np.float32).tiny)
    return float((error / size).amax()) if bool(error.isfinite().all()) else float("inf")
