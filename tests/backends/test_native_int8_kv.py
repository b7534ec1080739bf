"""K/V in int8: the codes, and attention over them on the reference and at every level of the CPU,
against a float64 oracle that reads the values the codes stand for."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from attention_plans import Case, attention_oracle, fill_pool, make_case, random_case, random_pool

from chunkllama.attention.plan_format import Packing
from chunkllama.backends.base import Backend, KVCache
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.build import available_levels
from chunkllama.backends.int8_kv import dequantize_kv, mix_heads, quantize_kv
from chunkllama.backends.reference.backend import ReferenceBackend

BACKENDS = ["reference", *(level.name for level in available_levels())]
# (query heads, kv heads, head_dim): groups 1, 3, 4, 5, 7, 8.
SHAPES = [(2, 2, 16), (9, 3, 64), (8, 2, 128), (5, 1, 80), (14, 2, 96), (8, 1, 256)]
# Of the largest value; a code that two roundings see on either side of a tie differs by one.
TOLERANCE = {torch.float32: 4e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Pool:
    """A pool in int8 and the values [num_chunks, 64, Hkv, D] that it stands for."""

    kv: KVCache
    keys: np.ndarray
    values: np.ndarray


def backend_of(name: str, dtype: torch.dtype, kv_heads: int, head_dim: int) -> Backend:
    if name == "reference":
        return ReferenceBackend(torch.device("cpu"))
    sanitizer = os.environ.get("CHUNKLLAMA_TEST_SANITIZER", "")
    heads = {"num_kv_heads": kv_heads, "head_dim": head_dim}
    return CpuBackend(dtype=dtype, level=name, sanitizer=sanitizer, **heads)


def pool_of(
    ops: Backend,
    rng: np.random.Generator,
    case: Case,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    num_layers: int = 1,
) -> Pool:
    """Every layer holds the same; where no token is, bytes that read as a scale of NaN. Keys of the
    result are mixed, as queries of the tests are.
    """
    kv = ops.allocate_kv(
        num_layers=num_layers,
        num_chunks=case.num_chunks,
        chunk_size=case.chunk_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        is_int8=True,
    )
    keys, values = random_pool(rng, case, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    for layer in range(num_layers):
        kv.layers[layer].fill_(-1)
        fill_pool(ops, kv, layer, case, keys, values)
    mixed = mix_heads(torch.from_numpy(keys))
    wide = (dequantize_kv(quantize_kv(x)) for x in (mixed, torch.from_numpy(values)))
    return Pool(kv, *(x.double().numpy() for x in wide))


def attend(
    ops: Backend,
    pool: Pool,
    case: Case,
    q: torch.Tensor,
    *,
    layer: int = 0,
    packing: Packing | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    kv, (_, q_heads, head_dim) = pool.kv, q.shape
    packing = packing or ops.packing(
        num_qo_heads=q_heads, num_kv_heads=kv.num_kv_heads, head_dim=head_dim
    )
    plan = ops.upload_plan(case.plan(packing, window=window), kv, num_qo_heads=q_heads)
    positions = torch.from_numpy(case.positions)
    out = ops.tpp_attention(q, kv, layer, positions, plan, head_dim**-0.5, softcap)
    return out.double().numpy().reshape(q.shape)


def check(
    ops: Backend,
    rng: np.random.Generator,
    kind: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    **options: object,
) -> None:
    case = random_case(rng, kind=kind)  # type: ignore[arg-type]
    q_heads, kv_heads, head_dim = shape
    pool = pool_of(ops, rng, case, kv_heads, head_dim, dtype)
    q = torch.from_numpy(rng.standard_normal((case.num_rows, q_heads, head_dim))).to(dtype)
    out = attend(ops, pool, case, q, **options)  # type: ignore[arg-type]
    bounds = {key: options.get(key) for key in ("window", "softcap")}
    expected = attention_oracle(case, q, pool.keys, pool.values, head_dim**-0.5, **bounds)
    error = np.abs(out - expected).max()
    assert error <= TOLERANCE[dtype] * max(1, np.abs(expected).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["decode", "mixed"])
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_equals_the_oracle(name: str, rng: np.random.Generator, kind: str, dtype) -> None:
    """Multi-level trees, partly filled chunks, NaN in all memory that holds no token."""
    for shape in (SHAPES[1], SHAPES[int(rng.integers(len(SHAPES)))]):
        check(backend_of(name, dtype, *shape[1:]), rng, kind, shape, dtype)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["decode", "slices", "mixed"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_shape_packing_and_bound(
    name: str, rng: np.random.Generator, kind: str, dtype
) -> None:
    for shape in SHAPES:
        ops = backend_of(name, dtype, *shape[1:])
        for rows, run, units in ((1, 1, 64), (5, 2, 1), (300, 3, 1000)):
            packing = Packing(
                rows_per_item=rows, min_run_chunks=run, target_units=units, num_kv_heads=shape[1]
            )
            check(ops, rng, kind, shape, dtype, packing=packing)
        for window, softcap in ((1, None), (65, None), (130, 2.0), (None, 0.5)):
            check(ops, rng, kind, shape, dtype, window=window, softcap=softcap)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_bound_hides_keys_and_bends_scores(name: str, rng: np.random.Generator) -> None:
    ops = backend_of(name, torch.bfloat16, 3, 64)
    check(ops, rng, "mixed", SHAPES[1], torch.bfloat16, window=70, softcap=2.0)


@pytest.mark.parametrize("rows", [1, 20])  # few go to the vector units, many to AMX
@pytest.mark.parametrize("name", BACKENDS)
def test_nan_reaches_the_rows_that_see_it_and_no_others(
    name: str, rng: np.random.Generator, rows: int
) -> None:
    """One sequence has a key that is infinite, one a value that is NaN, others beside them share
    their first chunk."""
    ops = backend_of(name, torch.bfloat16, 1, 64)
    paths = [[0, i + 1] for i in range(rows + 2)]
    case = make_case(paths, [(100, 1)] * len(paths), chunk_size=64)
    keys, values = random_pool(rng, case, num_kv_heads=1, head_dim=64, dtype=torch.bfloat16)
    keys[1, 3, 0, 5], values[2, 7, 0, 9] = np.inf, np.nan
    pool = pool_of(ops, rng, case, 1, 64, torch.bfloat16)
    fill_pool(ops, pool.kv, 0, case, keys, values)
    q = torch.from_numpy(rng.standard_normal((case.num_rows, 4, 64))).bfloat16()
    out = attend(ops, pool, case, q)
    assert np.isnan(out[:2]).all()
    assert np.isfinite(out[2:]).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_token_appended_alone_reads_like_one_of_many(name: str, rng: np.random.Generator) -> None:
    """Token by token into a recycled chunk: after each append only what was written is read."""
    ops = backend_of(name, torch.bfloat16, 1, 64)
    case = make_case([[0]], [(0, 64)], chunk_size=64)
    pool = pool_of(ops, rng, case, 1, 64, torch.bfloat16)
    pool.kv.layers[0].fill_(-1)
    cos_sin = torch.cat((torch.ones(64, 32), torch.zeros(64, 32)), 1)
    packing = ops.packing(num_qo_heads=8, num_kv_heads=1, head_dim=64)
    values = torch.from_numpy(rng.standard_normal((64, 64))).bfloat16()
    wide = dequantize_kv(quantize_kv(values))
    for position in range(64):
        step = make_case([[0]], [(position, 1)], chunk_size=64)
        plan = ops.upload_plan(step.plan(packing), pool.kv, num_qo_heads=8)
        qkv = torch.cat((torch.zeros(9 * 64).bfloat16(), values[position]))[None]
        at = torch.tensor([position], dtype=torch.int32)
        q = ops.rope_append(qkv, at, cos_sin, pool.kv, 0, plan)
        out = ops.tpp_attention(q, pool.kv, 0, at, plan, 1.0).view(8, 64)
        mean = wide[: position + 1].mean(0).expand(8, -1)
        torch.testing.assert_close(out.float(), mean, rtol=1.6e-2, atol=1.6e-2)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("name", BACKENDS)
def test_mixed_queries_meet_mixed_keys(name: str, rng: np.random.Generator, head_dim: int) -> None:
    """Queries of the op that appends attend like unmixed ones to unmixed keys, which all have one
    dimension that is far larger than the others."""
    ops = backend_of(name, torch.float32, 2, head_dim)
    case = make_case([[0, 1]], [(0, 100)], chunk_size=64)
    pool = pool_of(ops, rng, case, 2, head_dim, torch.float32)
    shape = (100, 4 + 2 + 2, head_dim)
    qkv = torch.from_numpy(rng.standard_normal(shape)).float()
    qkv[:, 4:6, 3] += 30
    half = head_dim // 2
    cos_sin = torch.cat((torch.ones(100, half), torch.zeros(100, half)), 1)
    packing = ops.packing(num_qo_heads=4, num_kv_heads=2, head_dim=head_dim)
    plan = ops.upload_plan(case.plan(packing), pool.kv, num_qo_heads=4)
    positions = torch.from_numpy(case.positions)
    q = ops.rope_append(qkv.flatten(1), positions, cos_sin, pool.kv, 0, plan)
    out = attend(ops, pool, case, q.clone())
    keys, values = (
        x.double().numpy()[np.r_[:100, 0:28]].reshape(2, 64, 2, head_dim)
        for x in (qkv[:, 4:6], qkv[:, 6:])
    )
    expected = attention_oracle(case, qkv[:, :4], keys, values, head_dim**-0.5)
    assert np.abs(out - expected).max() < 0.1
    assert np.linalg.norm(out - expected) < 0.025 * np.linalg.norm(expected)


@pytest.mark.parametrize("tokens", [1, 16, 33, 64])
@pytest.mark.parametrize("name", BACKENDS)
def test_copied_tokens_read_like_their_source(
    name: str, rng: np.random.Generator, tokens: int
) -> None:
    """A branch of a chunk takes codes and scales of its tokens, and nothing of what follows."""
    ops = backend_of(name, torch.bfloat16, 2, 96)
    source = make_case([[2]], [(0, 64)], chunk_size=64)
    pool = pool_of(ops, rng, source, 2, 96, torch.bfloat16, num_layers=2)
    for layer in pool.kv.layers:
        layer[:2].fill_(-1)
    ops.copy_chunks(pool.kv, [(2, 1, tokens), (1, 0, tokens)])
    case = make_case([[0]], [(tokens - 1, 1)], chunk_size=64)
    pool.keys[0], pool.values[0] = pool.keys[2], pool.values[2]
    q = torch.from_numpy(rng.standard_normal((1, 16, 96))).bfloat16()
    expected = attention_oracle(case, q, pool.keys, pool.values, 96**-0.5)
    for layer in (0, 1):
        np.testing.assert_allclose(
            attend(ops, pool, case, q, layer=layer), expected, atol=2 * TOLERANCE[torch.bfloat16]
        )


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_chunk_leaves_and_enters_the_pool_in_canonical_order(
    name: str, rng: np.random.Generator, head_dim: int
) -> None:
    ops = backend_of(name, torch.float32, 3, head_dim)
    case = make_case([[1]], [(0, 64)], chunk_size=64)
    pool = pool_of(ops, rng, case, 3, head_dim, torch.float32, num_layers=2)
    copied = ops.copy_chunk(pool.kv, 1)
    canonical = ops.restore_chunk(pool.kv, copied)
    assert canonical.shape == (2, 2, 3, 64, head_dim + 2)
    assert torch.equal(ops.arrange_chunk(pool.kv, canonical), copied)
    got = dequantize_kv(canonical).double().numpy()
    step = np.abs(got).max(axis=-1, keepdims=True) / 127
    for part, expected in ((0, pool.keys), (1, pool.values)):
        error = np.abs(got[:, part] - expected[1].swapaxes(0, 1))
        assert (error <= 1.01 * step[:, part]).all()  # a tie may round either way
        assert (error > 1e-6).mean() < 1e-3
    ops.write_chunk(pool.kv, 0, copied)
    assert torch.equal(ops.copy_chunk(pool.kv, 0), copied)


@pytest.mark.parametrize("shape", [(1,), (7, 80), (3, 5, 33)])
def test_a_code_is_within_half_a_step(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x = torch.from_numpy(rng.standard_normal(shape) * 10.0 ** rng.integers(-30, 30)).float()
    stored = quantize_kv(x)
    assert stored.shape == (*shape[:-1], shape[-1] + 2)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((dequantize_kv(stored) - x).abs() <= 0.51 * step).all()
    assert ((dequantize_kv(stored) / x.where(x != 0, 1)) >= 0).all()


def test_what_has_no_scale_is_zero_or_nan() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-40, -1e-40], [1.0, torch.nan], [-torch.inf, 1.0]])
    wide = dequantize_kv(quantize_kv(rows))
    assert torch.equal(wide[:2], torch.zeros(2, 2))
    assert wide[2:].isnan().all()
