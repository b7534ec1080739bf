"""Log-probabilities as clients see them: of the model's own logits, before penalties and bias."""

from __future__ import annotations

import torch

from chunkllama.messages import TokenLogprob


def token_logprobs(
    logprobs: torch.Tensor, token_ids: list[int], num_top: list[int]
) -> list[TokenLogprob]:
    """The log-probability and rank of one token per row, and of the best few.

    Args:
        logprobs: [N, V] float32, log-softmax of the logits.
        token_ids: N tokens.
        num_top: N counts of best tokens to list; the order among equals is by token id.
    """
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])
    ranks = (logprobs > chosen).sum(dim=1) + 1
    top = top_tokens(logprobs, max(num_top))
    return [
        TokenLogprob(token_id=token, logprob=value, rank=rank, top=best[:count])
        for token, value, rank, best, count in zip(
            token_ids, chosen[:, 0].tolist(), ranks.tolist(), top, num_top, strict=True
        )
    ]


def top_tokens(logprobs: torch.Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The ``count`` best (token id, log-probability) pairs of each row, best first."""
    if count == 0:
        return [[] for _ in logprobs]
    values, ids = logprobs.topk(min(count, logprobs.shape[1]), dim=1)
    return [
        sorted(zip(row_ids, row_values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
