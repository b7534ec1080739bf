"""A model and its chunk pool, as one step after another uses them: the work of one rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chunkllama.backends.adapter import AdapterRows
from chunkllama.backends.base import Backend, KVCache
from chunkllama.backends.kivi import Bytes, KiviCodec
from chunkllama.backends.model import RunnableModel
from chunkllama.model_spec import ModelSpec
from chunkllama.models.attention import Attention
from chunkllama.scheduler.output import SchedulerOutput


class StepModel:
    """Runs steps, and reads and writes whole chunks between them.

    Args:
        spec: of the whole model.
        model: that, or one rank's part of it, built on ``attention``.
        attention: the backend, the chunk pool and the planner.

    Attributes:
        spec: as given.
        num_ranks: that the model is split over.
    """

    num_ranks = 1

    def __init__(self, spec: ModelSpec, model: RunnableModel, attention: Attention) -> None:
        self.spec = spec
        self.attention = attention
        self._model: RunnableModel | None = model

    @property
    def model(self) -> RunnableModel:
        """The model."""
        assert self._model is not None, "the model was closed"
        return self._model

    @property
    def backend(self) -> Backend:
        """The device's ops."""
        return self.attention.backend

    @property
    def kv(self) -> KVCache:
        """The chunk pool; of a model that is split, this rank's."""
        return self.attention.kv

    @property
    def spare_chunks(self) -> int:
        """Chunks that a sequence has reserved beyond its tokens, so that plans last longer."""
        return self.attention.planner.packing.spare_chunks

    def run(self, output: SchedulerOutput, adapters: Sequence[AdapterRows] = ()) -> torch.Tensor:
        """Copy chunks and compute the slices.

        Returns:
            Final hidden states [T, H] of the slices' tokens, one slice after the other.
        """
        if output.copies:
            self.backend.copy_chunks(self.kv, output.copies)
        if not output.slices:
            return torch.empty(0, self.spec.hidden_size)
        plan = self.attention.plan(output)
        slices = output.slices
        token_ids = np.concatenate([piece.token_ids for piece in slices])
        positions: list[int] = []
        for piece in slices:
            positions += range(piece.first_position, piece.first_position + piece.num_tokens)
        upload = self.backend.upload
        return self.model.forward(
            upload(token_ids), upload(np.array(positions, np.int32)), plan, adapters
        )

    def replace_pool(self, num_chunks: int) -> None:
        """Allocate this rank's pool again, of another size; what it holds is lost."""
        self.attention.replace_pool(num_chunks)

    def check(self) -> None:
        """Check that what ``run`` has computed can be used, once it has been read from the device.

        Raises:
            EngineDeadError: another rank ended meanwhile.
        """

    def copy_chunk(self, chunk_id: int) -> torch.Tensor:
        """Copy a chunk to the host as it lies in the pool."""
        return self.backend.copy_chunk(self.kv, chunk_id)

    def write_chunk(self, chunk_id: int, arranged: torch.Tensor) -> None:
        """Store a chunk that lies as in the pool."""
        self.backend.write_chunk(self.kv, chunk_id, arranged)

    def restore_chunk(self, copied: torch.Tensor) -> torch.Tensor:
        """Return the canonical K/V [layers, 2, kv heads, chunk_size, row_elements] of a copy. Any
        thread may call it."""
        return self.backend.restore_chunk(self.kv, copied)

    def arrange_chunk(self, canonical: torch.Tensor) -> torch.Tensor:
        """Rearrange canonical K/V for ``write_chunk``. Any thread may call it."""
        return self.backend.arrange_chunk(self.kv, canonical)

    def widen_chunk(self, codec: KiviCodec, data: Bytes) -> torch.Tensor:
        """Return a rounded chunk for ``write_chunk``. Any thread may call it."""
        return self.backend.widen_chunk(self.kv, codec, data)

    def close(self) -> None:
        """Release the model and the pool; closing twice does no harm."""
        self.kv.layers.clear()
        self._model = None
