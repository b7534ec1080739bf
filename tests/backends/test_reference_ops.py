"""The small reference ops against transformers or plain arithmetic, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_plans import make_case
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from chunkllama.attention.plan_format import Packing
from chunkllama.backends.base import DevicePlan, KVCache
from chunkllama.backends.reference import tpp_attention
from chunkllama.backends.reference.backend import ReferenceBackend

OPS = ReferenceBackend(torch.device("cpu"))


def make_kv(*, chunk_size: int = 16, num_chunks: int = 6, layers: int = 2) -> KVCache:
    kv = OPS.allocate_kv(
        num_layers=layers,
        num_chunks=num_chunks,
        chunk_size=chunk_size,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
    )
    for layer in kv.layers:
        layer.fill_(torch.nan)
    return kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Its float32 value, rounded once."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(48, eps=1e-5)
    norm.weight.data = torch.randn(48).to(dtype).float()
    weight = norm.weight.to(dtype)
    x, residual = torch.randn(2, 7, 48).to(dtype)
    out, total = OPS.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, norm((x + residual).float()).to(dtype))
    out, total = OPS.rms_norm(x, weight, 1e-5)
    assert torch.equal(total, x)
    assert torch.equal(out, norm(x.float()).to(dtype))


def test_rms_norm_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="weight"):
        OPS.rms_norm(torch.ones(2, 8), torch.ones(9), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        OPS.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5, torch.ones(1, 8))


def test_silu_and_mul() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, 5, 12)
    out = OPS.silu_and_mul(torch.cat((gate, up), dim=1))
    torch.testing.assert_close(out, F.silu(gate) * up)
    with pytest.raises(ValueError, match="silu_and_mul"):
        OPS.silu_and_mul(torch.ones(2, 5))


def slice_plan(kv: KVCache) -> tuple[DevicePlan, torch.Tensor]:
    """Rows at positions 14..18 of a sequence in chunks 4, 2 and at 3..4 of one in chunk 5."""
    case = make_case([[4, 2], [5]], [(14, 5), (3, 2)], chunk_size=16, num_chunks=kv.num_chunks)
    plan = OPS.upload_plan(case.plan(Packing()), kv, num_qo_heads=4)
    return plan, torch.from_numpy(case.positions)


def test_rope_append_rotates_as_transformers_and_writes_where_the_plan_says() -> None:
    torch.manual_seed(0)
    kv = make_kv()
    plan, positions = slice_plan(kv)
    qkv = torch.randn(7, (4 + 2 + 2) * 8)
    angles = torch.outer(torch.arange(32.0), 10000.0 ** -torch.linspace(0, 1, 5)[:4])
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    q = OPS.rope_append(qkv, positions, cos_sin, kv, 1, plan)

    heads = qkv.view(7, 8, 8)
    both = angles[positions.long()].repeat(1, 2)
    expected_q, expected_k = apply_rotary_pos_emb(
        heads[None, :, :4].transpose(1, 2),
        heads[None, :, 4:6].transpose(1, 2),
        both.cos()[None],
        both.sin()[None],
    )
    torch.testing.assert_close(q, expected_q[0].transpose(0, 1))
    places = [(4, 14), (4, 15), (2, 0), (2, 1), (2, 2), (5, 3), (5, 4)]
    chunk, slot = torch.tensor(places).T
    torch.testing.assert_close(kv.layers[1][chunk, 0, :, slot], expected_k[0].transpose(0, 1))
    torch.testing.assert_close(kv.layers[1][chunk, 1, :, slot], heads[:, 6:])
    # Nothing else is touched.
    assert kv.layers[1].isfinite().sum() == 7 * 2 * 2 * 8
    assert kv.layers[0].isnan().all()


def test_rope_append_refuses_shapes_that_do_not_fit() -> None:
    kv = make_kv()
    plan, positions = slice_plan(kv)
    cos_sin = torch.ones(32, 8)
    with pytest.raises(ValueError, match="qkv"):
        OPS.rope_append(torch.ones(6, 64), positions, cos_sin, kv, 0, plan)
    with pytest.raises(ValueError, match="qkv"):
        OPS.rope_append(torch.ones(7, 60), positions, cos_sin, kv, 0, plan)
    with pytest.raises(ValueError, match="positions"):
        OPS.rope_append(torch.ones(7, 64), positions[:6], cos_sin, kv, 0, plan)
    with pytest.raises(ValueError, match="cos_sin"):
        OPS.rope_append(torch.ones(7, 64), positions, cos_sin[:, :4], kv, 0, plan)


def test_tpp_attention_refuses_shapes_that_do_not_fit() -> None:
    kv = make_kv()
    plan, positions = slice_plan(kv)
    for q in (torch.ones(6, 4, 8), torch.ones(7, 3, 8), torch.ones(7, 4, 16)):
        with pytest.raises(ValueError, match="tpp_attention"):
            OPS.tpp_attention(q, kv, 0, positions, plan, 1.0)


def test_copy_chunks_copies_the_first_tokens_in_every_layer() -> None:
    kv = make_kv()
    for layer in kv.layers:
        layer[0].normal_()
    OPS.copy_chunks(kv, [(0, 3, 5), (3, 4, 2), (1, 5, 0)])
    for layer in kv.layers:
        assert torch.equal(layer[3, :, :, :5], layer[0, :, :, :5])
        assert layer[3, :, :, 5:].isnan().all()
        assert torch.equal(layer[4, :, :, :2], layer[0, :, :, :2])
        assert layer[4, :, :, 2:].isnan().all()
        assert layer[5].isnan().all()
    for triple in ((6, 0, 1), (0, -1, 1), (0, 1, 17)):
        with pytest.raises(ValueError, match="copy_chunks"):
            OPS.copy_chunks(kv, [triple])


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_allocate_kv(chunk_size: int) -> None:
    kv = make_kv(chunk_size=chunk_size, layers=3)
    assert len(kv.layers) == 3
    assert (kv.num_chunks, kv.chunk_size, kv.num_kv_heads, kv.head_dim) == (6, chunk_size, 2, 8)
    assert sum(layer.numel() for layer in kv.layers) == 3 * 6 * 2 * 2 * chunk_size * 8


def test_allocate_kv_refuses_what_it_has_not() -> None:
    with pytest.raises(ValueError, match="chunk size 48"):
        make_kv(chunk_size=48)
    with pytest.raises(ValueError, match="at least 1"):
        make_kv(num_chunks=0)


def test_the_workspace_is_bounded_whatever_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 chunks read by 2 rows: a block of keys at a time, not all of them in float32."""
    monkeypatch.setattr(tpp_attention, "MAX_ELEMENTS", 1 << 12)
    kv = make_kv(num_chunks=514, layers=1)
    run = list(range(512))
    case = make_case([[*run, 512], [*run, 513]], [(8192, 1)] * 2, chunk_size=16, version=1)
    plan = OPS.upload_plan(case.plan(Packing(target_units=1)), kv, num_qo_heads=4)
    assert plan.state.attention.wide_tiles.numel() <= 2 << 12
