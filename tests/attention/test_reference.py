"""Reference attention against plain float64 softmax attention, over random plans.

The pool holds NaN in every freed chunk and behind every end, so an error anywhere shows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_plans import (
    Case,
    attention_oracle,
    fill_pool,
    make_case,
    random_case,
    random_pool,
)

from chunkllama.attention.plan_format import Packing
from chunkllama.backends.reference import tpp_attention
from chunkllama.backends.reference.backend import ReferenceBackend

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GROUPS = [1, 3, 4, 8]
PACKINGS = [
    Packing(rows_per_item=64, small_rows_per_item=1, target_units=1),
    Packing(rows_per_item=5, min_run_chunks=1, target_units=1000, split_private=True),
    Packing(rows_per_item=16, small_rows_per_item=4, min_run_chunks=2, target_units=24),
]
OPS = ReferenceBackend(torch.device("cpu"))


def worst_error(
    rng: np.random.Generator,
    case: Case,
    packing: Packing,
    *,
    group: int,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
) -> float:
    """Largest difference to the oracle; NaN counts as infinite."""
    heads = num_kv_heads * group
    scale = head_dim**-0.5
    keys, values = random_pool(rng, case, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    kv = OPS.allocate_kv(
        num_layers=1,
        num_chunks=case.num_chunks,
        chunk_size=case.chunk_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    fill_pool(OPS, kv, 0, case, keys, values)
    q = torch.from_numpy(rng.standard_normal((case.num_rows, heads, head_dim))).to(dtype)
    plan = OPS.upload_plan(case.plan(packing, window=window), kv, num_qo_heads=heads)
    positions = torch.from_numpy(case.positions)
    out = OPS.tpp_attention(q, kv, 0, positions, plan, scale)
    assert out.dtype == dtype
    assert out.shape == (case.num_rows, heads * head_dim)
    expected = attention_oracle(case, q, keys, values, scale, window).reshape(case.num_rows, -1)
    error = np.abs(out.double().numpy() - expected).max()
    return float(np.nan_to_num(error, nan=np.inf))


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["decode", "slices", "mixed"])
def test_random_plans(rng: np.random.Generator, kind: str, group: int, chunk_size: int) -> None:
    for packing in PACKINGS:
        case = random_case(rng, kind=kind, chunk_size=chunk_size)
        assert worst_error(rng, case, packing, group=group) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["decode", "slices", "mixed"])
def test_windows(rng: np.random.Generator, kind: str) -> None:
    for packing in PACKINGS:
        for window in (1, 2, 15, 16, 17, 40, 1000):
            case = random_case(rng, kind=kind, chunk_size=16)
            error = worst_error(rng, case, packing, group=3, window=window)
            assert error < TOLERANCE[torch.float32], window


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(rng: np.random.Generator, dtype: torch.dtype) -> None:
    for kind in ("decode", "slices"):
        case = random_case(rng, kind=kind)
        error = worst_error(rng, case, PACKINGS[0], group=3, head_dim=64, dtype=dtype)
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("position", range(0, 33))
def test_contexts_that_end_at_every_position_of_a_chunk(
    rng: np.random.Generator, position: int
) -> None:
    case = make_case(
        [[0, 1, 2, 3], [0, 4, 5, 6]],
        [(position + 16, 1), (16, position + 1)],
        chunk_size=16,
    )
    assert worst_error(rng, case, PACKINGS[0], group=3) < TOLERANCE[torch.float32]


def test_300_rows_that_share_everything_but_their_last_chunk(rng: np.random.Generator) -> None:
    prefix = list(range(5))
    paths = [[*prefix, 5 + i] for i in range(300)]
    case = make_case(paths, [(80 + i % 16, 1) for i in range(300)], chunk_size=16, version=1)
    assert worst_error(rng, case, PACKINGS[0], group=1) < TOLERANCE[torch.float32]


def test_a_prefill_of_300_rows_from_nothing(rng: np.random.Generator) -> None:
    case = make_case([list(range(5))], [(0, 300)], chunk_size=64)
    assert worst_error(rng, case, PACKINGS[0], group=4) < TOLERANCE[torch.float32]


def test_blocks_of_keys_give_the_same_answer(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace so small that every run is walked chunk by chunk, and every batch is one item."""
    monkeypatch.setattr(tpp_attention, "MAX_ELEMENTS", 1)
    for kind in ("decode", "slices", "mixed"):
        case = random_case(rng, kind=kind, chunk_size=16, max_run=6)
        assert worst_error(rng, case, PACKINGS[0], group=3) < TOLERANCE[torch.float32]


def test_one_decode_plan_serves_until_its_spares_are_used_up(rng: np.random.Generator) -> None:
    """Positions grow by themselves; every step appends through the plan and attends with it."""
    paths = [[0, 1, 2, 3], [0, 1, 4, 5], [6, 7, 8]]
    case = make_case(paths, [(32, 1), (40, 1), (15, 1)], chunk_size=16, version=9)
    heads, head_dim = 2, 16
    keys, values = random_pool(rng, case, num_kv_heads=heads, head_dim=head_dim)
    kv = OPS.allocate_kv(
        num_layers=1,
        num_chunks=case.num_chunks,
        chunk_size=16,
        num_kv_heads=heads,
        head_dim=head_dim,
        dtype=torch.float32,
    )
    fill_pool(OPS, kv, 0, case, keys, values)
    plan = OPS.upload_plan(case.plan(PACKINGS[2]), kv, num_qo_heads=heads)
    cos_sin = torch.cat((torch.ones(64, 8), torch.zeros(64, 8)), dim=1)
    for _ in range(20):
        case.first_positions = [p + 1 for p in case.first_positions]
        places = [
            (path[p // 16], p % 16) for path, p in zip(paths, case.first_positions, strict=True)
        ]
        chunk, slot = np.array(places).T
        q = torch.from_numpy(rng.standard_normal((3, heads, head_dim))).float()
        k, v = (torch.from_numpy(x[chunk, slot]).float() for x in (keys, values))
        qkv = torch.cat((q, k, v), dim=1).flatten(1)
        positions = torch.from_numpy(case.positions)
        rotated = OPS.rope_append(qkv, positions, cos_sin, kv, 0, plan)
        out = OPS.tpp_attention(rotated, kv, 0, positions, plan, 0.25)
        expected = attention_oracle(case, q, keys, values, 0.25).reshape(3, -1)
        assert np.abs(out.double().numpy() - expected).max() < TOLERANCE[torch.float32]


def test_extreme_scores_neither_overflow_nor_vanish(rng: np.random.Generator) -> None:
    case = make_case([[0, 1], [0, 2]], [(20, 1), (25, 1)], chunk_size=16, version=1)
    keys, values = random_pool(rng, case, num_kv_heads=1, head_dim=16)
    keys *= 1e4
    kv = OPS.allocate_kv(
        num_layers=1,
        num_chunks=3,
        chunk_size=16,
        num_kv_heads=1,
        head_dim=16,
        dtype=torch.float32,
    )
    fill_pool(OPS, kv, 0, case, keys, values)
    q = torch.from_numpy(rng.standard_normal((2, 1, 16))).float()
    plan = OPS.upload_plan(case.plan(PACKINGS[0]), kv, num_qo_heads=1)
    out = OPS.tpp_attention(q, kv, 0, torch.from_numpy(case.positions), plan, 1.0)
    expected = attention_oracle(case, q, keys.astype(np.float32), values, 1.0).reshape(2, -1)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-2)


def test_a_nan_stays_with_its_own_sequence(rng: np.random.Generator) -> None:
    case = make_case([[0, 1], [0, 2]], [(20, 1), (25, 1)], chunk_size=16, version=1)
    keys, values = random_pool(rng, case, num_kv_heads=1, head_dim=16)
    keys[1, 3] = np.nan  # position 19 of the first sequence: visible to it alone
    kv = OPS.allocate_kv(
        num_layers=1, num_chunks=3, chunk_size=16, num_kv_heads=1, head_dim=16, dtype=torch.float32
    )
    fill_pool(OPS, kv, 0, case, keys, values)
    plan = OPS.upload_plan(case.plan(PACKINGS[0]), kv, num_qo_heads=1)
    q = torch.ones(2, 1, 16)
    out = OPS.tpp_attention(q, kv, 0, torch.from_numpy(case.positions), plan, 0.25)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.nightly
def test_a_thousand_random_plans(rng: np.random.Generator) -> None:
    for _ in range(1000):
        kind = str(rng.choice(["decode", "slices", "mixed"]))
        case = random_case(rng, kind=kind, chunk_size=int(rng.choice([16, 32, 64, 128])))
        packing = PACKINGS[rng.integers(len(PACKINGS))]
        group = int(rng.choice(GROUPS))
        assert worst_error(rng, case, packing, group=group) < TOLERANCE[torch.float32]
