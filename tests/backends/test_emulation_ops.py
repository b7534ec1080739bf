"""The other kernels on the CPU emulator: append, norm, gate, copies, and the device layer."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from attention_plans import make_case, random_case
from conformance_vectors import VECTORS, conformance_results
from kernel_emulator import EmulatedLauncher, table

from chunkllama.backends.base import KVCache
from chunkllama.backends.cuda.backend import CudaBackend, independent_copies
from chunkllama.backends.draws import Draw
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.backends.reference.copy_chunks import copy_chunks_reference
from chunkllama.backends.reference.rms_norm import rms_norm_reference
from chunkllama.backends.reference.silu_and_mul import silu_and_mul_reference
from chunkllama.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# One rounding of either side: 2^-8 and 2^-11 of the value.
ROUNDING = {"bf16": 2**-7, "fp16": 2**-10}


def cuda_ops(
    dtype: str, head_dim: int = 64, num_kv_heads: int = 2, schedule: int = 0
) -> tuple[CudaBackend, EmulatedLauncher]:
    launcher = EmulatedLauncher(table("sm_90"), schedule=schedule)
    ops = CudaBackend(
        torch.device("cpu"),
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        launcher=launcher,
    )
    return ops, launcher


def pool(ops: CudaBackend, num_chunks: int, num_layers: int = 1) -> KVCache:
    kv = ops.allocate_kv(
        num_layers=num_layers,
        num_chunks=num_chunks,
        chunk_size=64,
        num_kv_heads=ops.num_kv_heads,
        head_dim=ops.head_dim,
        dtype=ops.dtype,
    )
    for layer in kv.layers:
        layer.copy_(torch.randn(layer.shape))
    return kv


def close(got: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance / 8)


@pytest.mark.parametrize("kind", ["decode", "slices"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_emulation_rope_append(
    head_dim: int, dtype: str, kind: str, rng: np.random.Generator
) -> None:
    """Rotated q, and K/V at the rows' slots; every other slot of the pool keeps its bits."""
    torch.manual_seed(head_dim)
    ops, launcher = cuda_ops(dtype, head_dim)
    case = random_case(rng, kind=kind, max_rows=40)
    kv = pool(ops, case.num_chunks)
    expected_kv = replace(kv, layers=[kv.layers[0].clone()])
    packing = ops.packing(num_qo_heads=6, num_kv_heads=2, head_dim=head_dim)
    plan = ops.upload_plan(case.plan(packing), kv, num_qo_heads=6)
    qkv = torch.randn(case.num_rows, 10 * head_dim).to(ops.dtype)
    positions = torch.from_numpy(case.positions)
    cos_sin = torch.randn(int(positions.max()) + 1, head_dim)
    q = ops.rope_append(qkv, positions, cos_sin, kv, 0, plan)

    reference = ReferenceBackend(torch.device("cpu"))
    plain = reference.upload_plan(plan.host, expected_kv, num_qo_heads=6)
    expected = reference.rope_append(qkv, positions, cos_sin, expected_kv, 0, plain)
    close(q, expected, dtype)
    close(kv.layers[0][:, 0], expected_kv.layers[0][:, 0], dtype)
    assert torch.equal(kv.layers[0][:, 1], expected_kv.layers[0][:, 1]), "V is copied, not computed"
    assert launcher.counters.loaded_bytes == launcher.counters.stored_bytes == qkv.nbytes


def test_emulation_rope_append_leaves_rows_beyond_the_plan_alone(
    rng: np.random.Generator,
) -> None:
    """A captured launch has rows of capacity; only those of the plan in the buffer are appended."""
    ops, _ = cuda_ops("bf16")
    case = make_case([[1, 2], [3]], [(70, 1), (5, 1)], chunk_size=64, version=1)
    kv = pool(ops, case.num_chunks)
    before = kv.layers[0].clone()
    packing = ops.packing(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    plan = ops.upload_plan(case.plan(packing), kv, num_qo_heads=4)
    positions = torch.tensor([70, 5, 0, 0], dtype=torch.int32)
    ops.rope_append(torch.randn(4, 512).bfloat16(), positions, torch.randn(80, 64), kv, 0, plan)
    changed = (kv.layers[0] != before).any(dim=(1, 2, 4)).nonzero().tolist()
    assert changed == [[2, 6], [3, 5]]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [8, 576, 2048, 4104])
def test_emulation_rms_norm(hidden_size: int, dtype: str, with_residual: bool) -> None:
    torch.manual_seed(hidden_size)
    ops, _ = cuda_ops(dtype, schedule=hidden_size % 3)
    x, residual = torch.randn(2, 3, hidden_size).to(ops.dtype)
    weight = torch.randn(hidden_size).to(ops.dtype)
    given = residual.clone() if with_residual else None
    expected, expected_sum = rms_norm_reference(x, weight, 1e-5, given)
    out, total = ops.rms_norm(x.clone(), weight, 1e-5, given)
    close(out, expected, dtype)
    assert torch.equal(total, expected_sum)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 1536, 2056])
def test_emulation_silu_and_mul(size: int, dtype: str) -> None:
    torch.manual_seed(size)
    ops, launcher = cuda_ops(dtype)
    gate_up = (4 * torch.randn(3, 2 * size)).to(ops.dtype)
    gate_up[0, 0], gate_up[0, 1] = -80.0, 80.0  # 2^x far outside float16
    out = ops.silu_and_mul(gate_up)
    close(out, silu_and_mul_reference(gate_up), dtype)
    assert launcher.counters.loaded_bytes == gate_up.nbytes
    assert launcher.counters.stored_bytes == out.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_emulation_copy_chunks(head_dim: int, dtype: str) -> None:
    """Every layer, the tokens asked for and no others, chains in their order."""
    torch.manual_seed(head_dim)
    ops, launcher = cuda_ops(dtype, head_dim)
    kv = pool(ops, num_chunks=8, num_layers=3)
    expected = replace(kv, layers=[layer.clone() for layer in kv.layers])
    triples = [(0, 1, 64), (2, 3, 1), (1, 4, 33), (4, 2, 5), (5, 5, 64), (6, 7, 0)]
    copy_chunks_reference(expected, triples)
    ops.copy_chunks(kv, triples)
    for got, want in zip(kv.layers, expected.layers, strict=True):
        assert torch.equal(got, want)
    copied = (64 + 1 + 33 + 5) * 3 * 2 * 2 * head_dim * 2
    assert launcher.counters.loaded_bytes == launcher.counters.stored_bytes == copied


def test_emulation_copies_that_depend_on_one_another_are_not_launched_together() -> None:
    triples = [(0, 1, 4), (0, 2, 4), (1, 3, 4), (5, 5, 9), (4, 0, 4), (6, 4, 4)]
    batches = list(independent_copies(triples))
    assert [t for batch in batches for t in batch] == [t for t in triples if t[0] != t[1]]
    for batch in batches:
        read, written = {t[0] for t in batch}, [t[1] for t in batch]
        assert not read & set(written) and len(set(written)) == len(written)
    for before, after in pairwise(batches):
        touched = {chunk for source, destination, _ in before for chunk in (source, destination)}
        assert after[0][1] in touched or after[0][0] in touched, "a batch ends only where it must"


@pytest.mark.parametrize("dtype", DTYPES)
def test_emulation_device_layer_matches_the_stored_vectors(dtype: str, machine: str) -> None:
    """The stored answers, which a GPU is held to, are those of C++; PTX passes as a GPU has to."""
    stored = json.loads(VECTORS.read_text())[dtype]
    results = conformance_results(dtype, stored["elements"], stored["numbers"])
    exact = [*range(12), *range(20, 27), 30, 31]
    stored_results = np.array(stored["results"], np.uint32)
    assert np.array_equal(results[:, exact], stored_results[:, exact])
    approximate = [*range(12, 20), 27, 28, 29]
    np.testing.assert_allclose(
        results[:, approximate].view(np.float32),
        stored_results[:, approximate].copy().view(np.float32),
        **({"rtol": 1e-6} if machine == "cpp" else {"rtol": 1e-5, "atol": 1e-5}),
    )


def test_cuda_ops_refuse_what_the_kernels_lack_by_name() -> None:
    device = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"dtype: torch\.float32"):
        CudaBackend(device, dtype=torch.float32, head_dim=64, num_kv_heads=1)
    with pytest.raises(ConfigError, match="head_dim: 80"):
        CudaBackend(device, dtype=torch.float16, head_dim=80, num_kv_heads=1)
    ops, _ = cuda_ops("bf16")
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.silu_and_mul(torch.zeros(2, 24, dtype=torch.bfloat16)[:, :12])
    with pytest.raises(ValueError, match="chunk size 16"):
        ops.allocate_kv(
            num_layers=1,
            num_chunks=4,
            chunk_size=16,
            num_kv_heads=2,
            head_dim=64,
            dtype=torch.bfloat16,
        )


@pytest.mark.parametrize("size", [1, 255, 300, 1024, 5000])
def test_emulation_draw_tokens(size: int) -> None:
    """The tokens of the op in torch, but where the numbers of the best two are nearly equal."""
    torch.manual_seed(size)
    logits = 3 * torch.randn(24, size)
    logits[:, ::7] = -torch.inf
    logits[:, 0] = 1.0
    kinds = [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 5, "top_p": 0.8},
        {"top_p": 0.5},
        {"top_p": 1e-12},
        {"min_p": 0.1},
        {"min_p": 0.02, "top_k": 40, "top_p": 0.9, "temperature": 2.0},
    ]
    ops, _ = cuda_ops("bf16", schedule=size % 3)
    reference = ReferenceBackend(torch.device("cpu"))
    differ = 0
    for start in range(0, 240, 24):
        draws = [
            Draw(row, 2**63 + start, row % 3, start + row, **{"temperature": 1.0, **kinds[row % 8]})
            for row in range(24)
        ]
        got = ops.draw(logits.clone(), draws[::-1])
        differ += int((got.flip(0) != reference.draw(logits.clone(), draws)).sum())
    assert differ == 0, "of 240; these seeds have no near ties"


def test_emulation_draw_tokens_of_broken_rows() -> None:
    """Rows of NaN, infinity or nothing allowed yield some token, and no other row changes."""
    torch.manual_seed(0)
    ops, _ = cuda_ops("bf16")
    logits = torch.randn(7, 300)
    draws = [Draw(row, 1, 0, row, 1.0, top_k=9 * (row % 2), top_p=0.9) for row in range(7)]
    healthy = ops.draw(logits.clone(), draws)
    logits[1], logits[3], logits[5] = torch.nan, torch.inf, -torch.inf
    logits[3, 4:] = 0.0
    tokens = ops.draw(logits, draws)
    assert bool(((tokens >= 0) & (tokens < 300)).all())
    assert torch.equal(tokens[::2], healthy[::2])
