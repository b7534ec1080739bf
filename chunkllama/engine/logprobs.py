"""Log-probabilities as clients see them: of the model's own logits, before penalties and bias."""

from __future__ import annotations

import torch

from chunkllama.messages import TokenLogprob


def token_logprobs(
    logprobs: torch.Tensor, token_ids: torch.Tensor, num_top: list[int]
) -> list[TokenLogprob]:
    """The log-probability and rank of one token per row, and of the best few: one read of the
    device.

    Args:
        logprobs: [N, V] float32, log-softmax of the logits.
        token_ids: [N] int64.
        num_top: N counts of best tokens to list; the order among equals is by token id.
    """
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=1, keepdim=True) + 1
    best = best_tokens(logprobs, max(num_top))
    columns = [column.double() for column in (token_ids[:, None], ranks, chosen, best)]
    return [
        TokenLogprob(token_id=int(token), rank=int(rank), logprob=logprob, top=_pairs(best)[:count])
        for (token, rank, logprob, *best), count in zip(
            torch.cat(columns, dim=1).tolist(), num_top, strict=True
        )
    ]


def best_tokens(logprobs: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` best tokens of each row and their log-probabilities: [N, 2 count] float64."""
    values, ids = logprobs.topk(min(count, logprobs.shape[1]), dim=1)
    return torch.cat((ids.double(), values.double()), dim=1)


def candidates(best: torch.Tensor) -> list[list[tuple[int, float]]]:
    """The (token id, log-probability) pairs of what ``best_tokens`` returns, best first."""
    return [_pairs(row) for row in best.tolist()]


def _pairs(row: list[float]) -> list[tuple[int, float]]:
    half = len(row) // 2
    pairs = zip(map(int, row[:half]), row[half:], strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
