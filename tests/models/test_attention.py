"""The backend: a step in, one plan for all layers; decode plans live as long as their version."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_plans import attention_oracle, make_case, random_pool

from chunkllama.attention.plan import Planner
from chunkllama.attention.plan_format import Packing
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.models.attention import Attention
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput

HEADS, HEAD_DIM, CHUNK = 2, 16, 16


def make_backend(num_chunks: int = 16, num_layers: int = 2) -> Attention:
    ops = ReferenceBackend(torch.device("cpu"))
    kv = ops.allocate_kv(
        num_layers=num_layers,
        num_chunks=num_chunks,
        chunk_size=CHUNK,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
    )
    for layer in kv.layers:
        layer.fill_(torch.nan)
    return Attention(ops, kv, Planner(Packing(), CHUNK), HEADS, HEAD_DIM**-0.5)


def make_step(
    spans: list[tuple[int, int]], paths: list[list[int]], shared: list[int], version: int
) -> SchedulerOutput:
    slices = [
        ScheduledSlice(
            slot=slot,
            first_position=first,
            token_ids=np.zeros(count, np.int32),
            chunk_ids=np.array(path, np.int32),
            shared=common,
            samples=True,
        )
        for slot, ((first, count), path, common) in enumerate(
            zip(spans, paths, shared, strict=True)
        )
    ]
    return SchedulerOutput(step=1, slices=slices, plan_version=version)


def test_a_decode_plan_is_kept_while_its_version_stays() -> None:
    backend = make_backend()
    paths, shared = [[0, 1], [0, 2]], [0, 1]
    first = backend.plan(make_step([(17, 1), (18, 1)], paths, shared, version=4))
    assert backend.plan(make_step([(18, 1), (19, 1)], paths, shared, version=4)) is first
    # A step with a prefill in between has a plan of its own and does not end the other's life.
    alone = backend.plan(make_step([(0, 20)], [[3, 4]], [0], version=0))
    assert alone is not first
    assert backend.plan(make_step([(19, 1), (20, 1)], paths, shared, version=4)) is first
    joined = backend.plan(
        make_step([(20, 1), (21, 1), (3, 1)], [*paths, [5]], [*shared, 0], version=5)
    )
    assert joined.host.num_rows == 3
    assert joined.host.version == 5


def test_rows_that_change_without_a_new_version_are_a_bug() -> None:
    backend = make_backend()
    backend.plan(make_step([(17, 1)], [[0, 1]], [0], version=4))
    with pytest.raises(AssertionError, match="version"):
        backend.plan(make_step([(18, 1), (3, 1)], [[0, 1], [2]], [0, 0], version=4))


def test_prefill_of_a_leader_with_its_follower_then_decode(rng: np.random.Generator) -> None:
    """Same-step sharing through the whole backend: the follower reads what the leader appends."""
    backend = make_backend()
    paths = [[0, 1, 2, 3], [0, 1, 4, 5]]
    cos_sin = torch.cat((torch.ones(64, 8), torch.zeros(64, 8)), dim=1)
    spans = [(0, 40), (32, 5)]
    for step in range(4):
        case = make_case(paths, spans, chunk_size=CHUNK)
        keys, values = random_pool(rng, case, num_kv_heads=HEADS, head_dim=HEAD_DIM)
        if step == 0:
            known_keys, known_values = keys, values
        plan = backend.plan(make_step(spans, paths, [0, 2], version=0 if step == 0 else 1))
        where = [
            (path[p // CHUNK], p % CHUNK)
            for path, (first, count) in zip(paths, spans, strict=True)
            for p in range(first, first + count)
        ]
        chunk, slot = np.array(where).T
        q = rng.standard_normal((len(where), HEADS, HEAD_DIM))
        qkv = np.concatenate((q, known_keys[chunk, slot], known_values[chunk, slot]), axis=1)
        positions = torch.from_numpy(case.positions)
        for layer in range(2):
            out = backend.forward(
                torch.from_numpy(qkv).float().flatten(1), positions, cos_sin, layer, plan
            )
            q32 = torch.from_numpy(q).float()
            expected = attention_oracle(case, q32, known_keys, known_values, backend.scale)
            error = np.abs(out.double().numpy() - expected.reshape(len(where), -1)).max()
            assert error < 2e-6
        spans = [(first + count, 1) for first, count in spans]


def test_planner_and_pool_must_agree_on_the_chunk_size() -> None:
    backend = make_backend()
    with pytest.raises(AssertionError):
        Attention(backend.backend, backend.kv, Planner(Packing(), 32), HEADS, 1.0)
