"""The native ops against the reference and a float64 oracle, at every instruction-set level."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from attention_plans import attention_oracle, fill_pool, make_case, random_case, random_pool

from chunkllama.attention.plan_format import Packing
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.reference.backend import ReferenceBackend

CPU = torch.device("cpu")
# (query heads, kv heads): groups 1, 3, 4, 5, 7, 8.
HEADS = [(2, 2), (9, 3), (8, 2), (5, 1), (14, 2), (8, 1)]
DIMS = [64, 128, *(pytest.param(d, marks=pytest.mark.nightly) for d in (16, 80, 96, 256))]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}


@pytest.fixture(scope="module")
def ops(level: str) -> CpuBackend:
    """The backend at one level; a level that this machine lacks is reported as skipped."""
    return CpuBackend(
        dtype=torch.bfloat16,
        head_dim=64,
        num_kv_heads=1,
        level=level,
        sanitizer=os.environ.get("CHUNKLLAMA_TEST_SANITIZER", ""),
    )


def check_attention(
    ops: CpuBackend,
    rng: np.random.Generator,
    kind: str,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    packing: Packing,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    case = random_case(rng, kind=kind)  # type: ignore[arg-type]
    q_heads, kv_heads = heads
    keys, values = random_pool(rng, case, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    kv = ops.allocate_kv(
        num_layers=1,
        num_chunks=case.num_chunks,
        chunk_size=64,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    kv.layers[0].fill_(torch.nan)
    fill_pool(ops, kv, 0, case, keys, values)
    shape = (case.num_rows, q_heads, head_dim)
    q = torch.from_numpy(rng.standard_normal(shape) * rng.choice([1, 3])).to(dtype)
    plan = ops.upload_plan(case.plan(packing, window=window), kv, num_qo_heads=q_heads)
    scale = head_dim**-0.5
    out = ops.tpp_attention(q, kv, 0, torch.from_numpy(case.positions), plan, scale, softcap)
    expected = attention_oracle(case, q, keys, values, scale, window, softcap)
    assert out.dtype == dtype
    error = np.abs(out.double().numpy().reshape(expected.shape) - expected)
    assert error.max() <= TOLERANCE[dtype] * max(1, np.abs(expected).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["decode", "slices", "mixed"])
@pytest.mark.parametrize("head_dim", DIMS)
def test_attention_equals_the_oracle(
    ops: CpuBackend, rng: np.random.Generator, kind: str, head_dim: int, dtype: torch.dtype
) -> None:
    """Multi-level trees, partly filled chunks, NaN in all memory that holds no token."""
    for heads in (HEADS[1], HEADS[int(rng.integers(len(HEADS)))]):
        packing = ops.packing(num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)
        check_attention(ops, rng, kind, heads, head_dim, dtype, packing)


@pytest.mark.parametrize(
    ("heads", "head_dim"), list(zip(HEADS, (64, 80, 96, 128, 256, 16), strict=True))
)
def test_any_packing_and_group_gives_the_same_attention(
    ops: CpuBackend, rng: np.random.Generator, heads: tuple[int, int], head_dim: int
) -> None:
    for rows, run, units in ((1, 1, 64), (5, 2, 1), (300, 3, 1000)):
        packing = Packing(
            rows_per_item=rows,
            min_run_chunks=run,
            target_units=units,
            num_kv_heads=heads[1],
            split_private=bool(rng.integers(2)),
        )
        check_attention(ops, rng, "mixed", heads, head_dim, torch.bfloat16, packing)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["decode", "slices", "mixed"])
def test_attention_within_windows_equals_the_oracle(
    ops: CpuBackend, rng: np.random.Generator, kind: str, dtype: torch.dtype
) -> None:
    """Windows of one key, of parts of a softmax step, of several; on both units of the CPU."""
    for window in (1, 7, 63, 64, 65, 130, 300):
        heads = HEADS[int(rng.integers(len(HEADS)))]
        packing = ops.packing(num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=64)
        check_attention(ops, rng, kind, heads, 64, dtype, packing, window)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["decode", "slices", "mixed"])
def test_attention_with_a_soft_cap_equals_the_oracle(
    ops: CpuBackend, rng: np.random.Generator, kind: str, dtype: torch.dtype
) -> None:
    """Caps that bend every score, some, and none noticeably; with and without a window."""
    for softcap, window in ((0.5, None), (2.0, 70), (50.0, None), (1e4, 7)):
        heads = HEADS[int(rng.integers(len(HEADS)))]
        packing = ops.packing(num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=64)
        check_attention(ops, rng, kind, heads, 64, dtype, packing, window, softcap)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [2, 20])
def test_scores_that_rise_on_and_on_beside_a_broken_row(
    ops: CpuBackend, rng: np.random.Generator, rows: int, dtype: torch.dtype
) -> None:
    """By less than the softmax lets pass, by more, by more than a float's exponent; one row is
    NaN. Two rows go to the vector units, twenty to AMX."""
    scores = [0, 0, 4, 4, 12, 12, 300, 300, 310]
    shared = len(scores)
    case = make_case(
        [[*range(shared), shared + i] for i in range(rows)],
        [(64 * shared, 1)] * rows,
        chunk_size=64,
    )
    keys, values = random_pool(rng, case, num_kv_heads=1, head_dim=64, dtype=dtype)
    keys[:] = 0
    for chunk, score in enumerate(scores):
        keys[chunk, ..., 0] = score
    kv = ops.allocate_kv(
        num_layers=1,
        num_chunks=case.num_chunks,
        chunk_size=64,
        num_kv_heads=1,
        head_dim=64,
        dtype=dtype,
    )
    fill_pool(ops, kv, 0, case, keys, values)
    q = torch.zeros(rows, 3, 64, dtype=dtype)
    q[:, :, 0] = torch.tensor([1.0, 0.125, -1.0])
    expected = attention_oracle(case, q, keys, values, 1.0)
    broken = rows // 2
    q[broken] = torch.nan
    packing = ops.packing(num_qo_heads=3, num_kv_heads=1, head_dim=64)
    plan = ops.upload_plan(case.plan(packing), kv, num_qo_heads=3)
    out = ops.tpp_attention(q, kv, 0, torch.from_numpy(case.positions), plan, 1.0)
    out = out.double().numpy().reshape(expected.shape)
    assert np.isnan(out[broken]).all()
    error = np.abs(np.delete(out - expected, broken, axis=0))
    assert error.max() <= TOLERANCE[dtype] * max(1, np.abs(expected).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", DIMS)
def test_rope_append_equals_the_reference(
    ops: CpuBackend, rng: np.random.Generator, head_dim: int, dtype: torch.dtype
) -> None:
    """Compare q directly, k and v through attention over what was appended."""
    q_heads, kv_heads = 9, 3
    lengths = [130, 63, 1, 64]
    paths = [[0, 5, 2], [0, 5, 7], [9], [1]]
    spans = [(0, 130), (128, 63), (0, 1), (0, 64)]
    case = make_case(paths, spans, chunk_size=64)
    angles = rng.uniform(0, 7, (192, head_dim // 2))
    cos_sin = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], 1)).float()
    width = (q_heads + 2 * kv_heads) * head_dim
    qkv = torch.from_numpy(rng.standard_normal((sum(n for _, n in spans), width))).to(dtype)
    assert case.num_rows == sum(lengths)
    positions = torch.from_numpy(case.positions)
    results = []
    for backend in (ops, ReferenceBackend(CPU)):
        kv = backend.allocate_kv(
            num_layers=2,
            num_chunks=case.num_chunks,
            chunk_size=64,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        kv.layers[1].fill_(torch.nan)
        packing = backend.packing(num_qo_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim)
        plan = backend.upload_plan(case.plan(packing), kv, num_qo_heads=q_heads)
        q = backend.rope_append(qkv, positions, cos_sin, kv, 1, plan)
        out = backend.tpp_attention(q, kv, 1, positions, plan, head_dim**-0.5)
        results.append((q.float(), out.float()))
    (q, out), (expected_q, expected_out) = results
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(q, expected_q, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_append_goes_on_where_a_freed_chunk_held_nan(
    ops: CpuBackend, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    """Token by token into a recycled chunk: after each append only what was written is read."""
    kv = ops.allocate_kv(
        num_layers=1, num_chunks=1, chunk_size=64, num_kv_heads=1, head_dim=64, dtype=dtype
    )
    kv.layers[0].fill_(torch.nan)
    cos_sin = torch.cat((torch.ones(64, 32), torch.zeros(64, 32)), 1)
    packing = ops.packing(num_qo_heads=8, num_kv_heads=1, head_dim=64)
    values = torch.from_numpy(rng.standard_normal((64, 64))).to(dtype)
    for position in range(64):
        case = make_case([[0]], [(position, 1)], chunk_size=64)
        plan = ops.upload_plan(case.plan(packing), kv, num_qo_heads=8)
        qkv = torch.cat((torch.zeros(9 * 64, dtype=dtype), values[position]))[None]
        at = torch.tensor([position], dtype=torch.int32)
        q = ops.rope_append(qkv, at, cos_sin, kv, 0, plan)
        out = ops.tpp_attention(q, kv, 0, at, plan, 1.0).view(8, 64)
        mean = values[: position + 1].float().mean(0)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out.float(), mean.expand(8, -1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 576), (7, 40), (300, 64)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_equals_the_reference(
    ops: CpuBackend,
    rng: np.random.Generator,
    shape: tuple[int, int],
    with_residual: bool,
    dtype: torch.dtype,
) -> None:
    x, r = (torch.from_numpy(rng.standard_normal(shape) * 5).to(dtype) for _ in range(2))
    weight = torch.from_numpy(rng.standard_normal(shape[1])).to(dtype)
    residual = r if with_residual else None
    expected = ReferenceBackend(CPU).rms_norm(x.clone(), weight, 1e-5, residual)
    for got, want in zip(ops.rms_norm(x, weight, 1e-5, residual), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_and_mul_equals_the_reference(
    ops: CpuBackend, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    for rows, size in ((1, 8), (5, 100), (300, 64)):
        x = torch.from_numpy(rng.standard_normal((rows, 2 * size)) * 40).to(dtype)
        expected = ReferenceBackend(CPU).silu_and_mul(x)
        torch.testing.assert_close(
            ops.silu_and_mul(x), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 15, 16, 33, 64])
def test_copied_chunks_read_like_their_source(
    ops: CpuBackend, rng: np.random.Generator, tokens: int, dtype: torch.dtype
) -> None:
    """The source goes on after the copied tokens with NaN: none of it may reach the copy."""
    source = make_case([[2]], [(0, 64)], chunk_size=64)
    keys, values = random_pool(rng, source, num_kv_heads=2, head_dim=96, dtype=dtype)
    keys[2, tokens:], values[2, tokens:] = np.nan, np.nan
    kv = ops.allocate_kv(
        num_layers=2, num_chunks=4, chunk_size=64, num_kv_heads=2, head_dim=96, dtype=dtype
    )
    for layer in (0, 1):
        kv.layers[layer].fill_(torch.nan)
        fill_pool(ops, kv, layer, source, keys, values)
    ops.copy_chunks(kv, [(2, 1, tokens), (1, 0, tokens)])
    case = make_case([[0]], [(tokens - 1, 1)], chunk_size=64)
    keys[0], values[0] = keys[2], values[2]
    packing = ops.packing(num_qo_heads=16, num_kv_heads=2, head_dim=96)
    q = torch.from_numpy(rng.standard_normal((1, 16, 96))).to(dtype)
    for layer in (0, 1):
        plan = ops.upload_plan(case.plan(packing), kv, num_qo_heads=16)
        out = ops.tpp_attention(q, kv, layer, torch.from_numpy(case.positions), plan, 0.1)
        expected = attention_oracle(case, q, keys, values, 0.1)
        np.testing.assert_allclose(
            out.double().numpy().reshape(expected.shape), expected, atol=TOLERANCE[dtype] * 2
        )
