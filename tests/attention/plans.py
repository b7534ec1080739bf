"""Random plans, the pool behind them and a float64 oracle, for every backend's tests.

``tests/conftest.py`` makes this file importable anywhere under tests/:

    from attention_plans import attention_oracle, fill_pool, random_case, random_pool

    case = random_case(rng, kind="slices", chunk_size=64)  # a tree and the slices of one step
    keys, values = random_pool(rng, case, num_kv_heads=3, head_dim=64)
    kv = backend.allocate_kv(num_chunks=case.num_chunks, ...)
    fill_pool(backend, kv, 0, case, keys, values)  # NaN where there is no token
    plan = backend.upload_plan(case.plan(packing), kv, num_qo_heads=9)
    out = backend.tpp_attention(q, kv, 0, torch.from_numpy(case.positions), plan, scale)
    expected = attention_oracle(case, q, keys, values, scale)  # [R, Hq, D] float64
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from chunkllama.attention.plan import Planner
from chunkllama.attention.plan_format import AttentionPlan, Packing, PlanCapacity

Kind = Literal["decode", "slices", "mixed"]


@dataclass
class Case:
    """The slices of one step over ``num_chunks`` chunks, as ``Planner.build`` takes them."""

    chunk_size: int
    num_chunks: int
    first_positions: list[int]
    num_tokens: list[int]
    chunk_ids: list[np.ndarray]
    shared: list[int]
    version: int

    @property
    def num_rows(self) -> int:
        return sum(self.num_tokens)

    @property
    def positions(self) -> np.ndarray:
        """[R] int32 position of each row."""
        parts = [
            np.arange(f, f + n) for f, n in zip(self.first_positions, self.num_tokens, strict=True)
        ]
        return np.concatenate(parts).astype(np.int32)

    def filled(self) -> np.ndarray:
        """[num_chunks] tokens that stand in each chunk once this step has appended its own."""
        filled = np.zeros(self.num_chunks, np.int64)
        for first, count, ids in zip(
            self.first_positions, self.num_tokens, self.chunk_ids, strict=True
        ):
            whole, rest = divmod(first + count, self.chunk_size)
            filled[ids[:whole]] = self.chunk_size
            if rest:
                filled[ids[whole]] = max(filled[ids[whole]], rest)
        return filled

    def plan(
        self,
        packing: Packing,
        capacity: PlanCapacity | None = None,
        window: int | None = None,
    ) -> AttentionPlan:
        return Planner(packing, self.chunk_size).build(
            first_positions=self.first_positions,
            num_tokens=self.num_tokens,
            chunk_ids=self.chunk_ids,
            shared=self.shared,
            version=self.version,
            capacity=capacity,
            window=window,
        )


def make_case(
    paths: list[list[int]],
    spans: list[tuple[int, int]],
    *,
    chunk_size: int,
    version: int = 0,
    num_chunks: int | None = None,
) -> Case:
    """A case from chunk paths in depth-first order and one (first position, tokens) per slice."""
    arrays = [np.array(path, np.int32) for path in paths]
    shared = [0]
    for before, after in pairwise(arrays):
        both = min(len(before), len(after))
        differ = np.flatnonzero(before[:both] != after[:both])
        shared.append(int(differ[0]) if len(differ) else both)
    return Case(
        chunk_size=chunk_size,
        num_chunks=num_chunks or max(map(max, paths)) + 1,
        first_positions=[first for first, _ in spans],
        num_tokens=[count for _, count in spans],
        chunk_ids=arrays,
        shared=shared,
        version=version,
    )


def random_case(
    rng: np.random.Generator,
    *,
    kind: Kind,
    chunk_size: int = 64,
    depth: int = 3,
    max_children: int = 3,
    max_run: int = 4,
    max_rows: int = 300,
) -> Case:
    """A random tree of up to ``depth`` shared levels and a step over its leaves.

    ``decode``: one token per slice, spare chunks, a version. ``slices``: several tokens per slice;
    some start inside or above what their neighbours share (same-step sharing), some sequences stand
    in two slices. ``mixed``: slices and decodes side by side.
    """
    prefixes: list[list[int]] = []
    counter = iter(range(1_000_000))

    def grow(prefix: list[int], level: int) -> None:
        here = prefix + [next(counter) for _ in range(rng.integers(0, max_run + 1))]
        if level == 0 or rng.random() < 0.25:
            prefixes.append(here)
            return
        for _ in range(rng.integers(1, max_children + 1)):
            grow(here, level - 1)

    grow([], depth)
    edges = [1, 2, chunk_size - 1, chunk_size, chunk_size + 1, 2 * chunk_size]
    paths, spans, rows = [], [], 0
    for prefix in prefixes:
        tail = int(rng.choice([*edges, *rng.integers(1, 3 * chunk_size, 3).tolist()]))
        end = len(prefix) * chunk_size + tail
        spares = int(rng.integers(0, 3))
        path = prefix + [next(counter) for _ in range(-(-tail // chunk_size) + spares)]
        single = kind == "decode" or (kind == "mixed" and rng.random() < 0.5)
        low = end - 1 if single else int(rng.choice([0, len(prefix) * chunk_size, end - 1]))
        low = max(low, end - (max_rows - rows)) if single else int(rng.integers(low, end))
        count = min(end - low, max_rows - rows)
        if count <= 0:
            break
        rows += count
        if not single and count > 1 and rng.random() < 0.3:
            first = int(rng.integers(1, count))
            paths += [path, path]
            spans += [(low, first), (low + first, count - first)]
        else:
            paths.append(path)
            spans.append((low, count))
    # Ids in no order, with freed chunks in between.
    names = rng.permutation(next(counter) + 8)
    return make_case(
        [names[path].tolist() for path in paths],
        spans,
        chunk_size=chunk_size,
        version=7 if kind == "decode" else 0,
        num_chunks=len(names),
    )


def random_pool(
    rng: np.random.Generator,
    case: Case,
    *,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """K and V [num_chunks, chunk_size, Hkv, D] float64 that ``dtype`` holds exactly."""
    shape = (case.num_chunks, case.chunk_size, num_kv_heads, head_dim)
    keys, values = (
        torch.from_numpy(rng.standard_normal(shape)).to(dtype).double().numpy() for _ in range(2)
    )
    return keys, values


def fill_pool(
    backend: Any, kv: Any, layer: int, case: Case, keys: np.ndarray, values: np.ndarray
) -> None:
    """Write K and V through ``rope_append`` (so any layout will do): NaN everywhere, then the
    case's tokens.
    """
    everything = np.full(case.num_chunks, case.chunk_size)
    nan = np.full_like(keys, np.nan)
    _append(backend, kv, layer, case.chunk_size, everything, nan, nan)
    _append(backend, kv, layer, case.chunk_size, case.filled(), keys, values)


def _append(
    backend: Any,
    kv: Any,
    layer: int,
    chunk_size: int,
    filled: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    """The first ``filled`` tokens of each chunk; a chunk is a slice of its own here."""
    chunks = np.flatnonzero(filled)
    case = make_case(
        [[c] for c in chunks.tolist()],
        [(0, n) for n in filled[chunks].tolist()],
        chunk_size=chunk_size,
    )
    rows = [(c, slot) for c in chunks for slot in range(filled[c])]
    chunk, slot = np.array(rows).T
    k, v = (torch.from_numpy(x[chunk, slot]).flatten(1) for x in (keys, values))
    qkv = torch.cat((torch.zeros_like(k), k, v), dim=1).to(kv.dtype).to(backend.device)
    # cos 1, sin 0: no rotation.
    cos_sin = torch.zeros(chunk_size, keys.shape[3])
    cos_sin[:, : keys.shape[3] // 2] = 1.0
    packing = backend.packing(
        num_qo_heads=kv.num_kv_heads, num_kv_heads=kv.num_kv_heads, head_dim=kv.head_dim
    )
    plan = backend.upload_plan(case.plan(packing), kv, num_qo_heads=kv.num_kv_heads)
    positions = torch.from_numpy(case.positions).to(backend.device)
    backend.rope_append(qkv, positions, cos_sin.to(backend.device), kv, layer, plan)


def attention_oracle(
    case: Case,
    q: torch.Tensor,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Plain softmax attention in float64, one slice at a time: [R, Hq, D]."""
    queries = q.double().cpu().numpy()
    group = queries.shape[1] // keys.shape[2]
    out = np.empty_like(queries)
    row = 0
    for first, count, ids in zip(
        case.first_positions, case.num_tokens, case.chunk_ids, strict=True
    ):
        end = first + count
        path = ids[: -(-end // case.chunk_size)]
        k, v = (
            np.repeat(x[path].reshape(-1, *x.shape[2:])[:end], group, 1) for x in (keys, values)
        )
        scores = np.einsum("rhd,khd->hrk", queries[row : row + count], k) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        hidden = np.arange(end) > np.arange(first, end)[:, None]
        if window is not None:
            hidden |= np.arange(end) <= np.arange(first, end)[:, None] - window
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[row : row + count] = np.einsum("hrk,khd->rhd", weights, v)
        row += count
    return out
