"""What the executor keeps per sequence slot between steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from chunkllama.engine.grammar import Matcher
from chunkllama.sampling_params import SamplingParams


@dataclass(slots=True)
class SequenceState:
    """One sequence: its parameters and history.

    Attributes:
        index: of the choice within its request; part of the random numbers' counter.
        matcher: the grammar's state after ``output_token_ids``.
        failed: why this sequence can sample no more, "" while it can.
        pooled: [H] float32 sum (mean pooling) or last hidden state, over the rows seen so far.
    """

    sampling: SamplingParams
    index: int
    prompt_token_ids: NDArray[np.int32]
    output_token_ids: list[int]
    pooling: str = ""
    matcher: Matcher | None = None
    failed: str = ""
    pooled: torch.Tensor | None = field(default=None, repr=False)
    _allowed_ids: torch.Tensor | None = field(default=None, repr=False)

    def allowed_ids(self, vocab_size: int, device: torch.device) -> torch.Tensor:
        """int64 ids of ``allowed_token_ids`` that the model has; made once."""
        if self._allowed_ids is None:
            known = [token for token in self.sampling.allowed_token_ids if 0 <= token < vocab_size]
            self._allowed_ids = torch.tensor(known, dtype=torch.int64, device=device)
        return self._allowed_ids

    def append(self, token_id: int) -> None:
        """Add a sampled token; the grammar moves on with it."""
        self.output_token_ids.append(token_id)
        if self.matcher is not None and not self.matcher.accept(token_id):
            self.failed = "grammar_error"
