"""With ``deterministic`` the numbers of a row are those that it has alone, at every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_plans import Case, fill_pool, make_case, random_case, random_pool
from native_models import SANITIZER, SPEC, make_model, random_adapter

from chunkllama.attention.plan import Planner
from chunkllama.backends.adapter import AdapterRows
from chunkllama.backends.base import KVCache
from chunkllama.backends.cpu.backend import CpuBackend

# (query heads, kv heads, head_dim)
SHAPES = [(9, 3, 64), (8, 1, 128), (5, 1, 80)]
# (computing dtype, weights, K/V in int8, whether all rows use an adapter)
KINDS = [
    (torch.bfloat16, "int8", True, False),
    (torch.bfloat16, "auto", False, True),
    *(
        pytest.param(*kind, marks=pytest.mark.nightly)
        for kind in (
            (torch.float32, "auto", False, False),
            (torch.float32, "int4", True, False),
            (torch.float32, "auto", False, True),
            (torch.bfloat16, "auto", False, False),
            (torch.bfloat16, "int4", False, True),
        )
    ),
]


def backend_of(dtype: torch.dtype, level: str, kv_heads: int, head_dim: int) -> CpuBackend:
    return CpuBackend(
        dtype=dtype,
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        level=level,
        sanitizer=SANITIZER,
        deterministic=True,
    )


def rows_of(case: Case) -> list[Case]:
    """Each row of a case as a case of its own, over the same pool."""
    return [
        make_case([ids.tolist()], [(position, 1)], chunk_size=64, num_chunks=case.num_chunks)
        for first, count, ids in zip(
            case.first_positions, case.num_tokens, case.chunk_ids, strict=True
        )
        for position in range(first, first + count)
    ]


def attend(
    ops: CpuBackend,
    kv: KVCache,
    case: Case,
    q: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[R, Hq D]"""
    heads = {"num_qo_heads": q.shape[1]}
    packing = ops.packing(num_kv_heads=kv.num_kv_heads, head_dim=kv.head_dim, **heads)
    plan = ops.upload_plan(case.plan(packing, window=window), kv, **heads)
    positions = torch.from_numpy(case.positions)
    return ops.tpp_attention(q, kv, 0, positions, plan, kv.head_dim**-0.5, softcap).clone()


@pytest.mark.parametrize(
    ("window", "softcap"), [(130, 2.0), pytest.param(None, None, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("kind", [pytest.param("decode", marks=pytest.mark.nightly), "mixed"])
def test_attention_of_a_row_is_that_of_the_row_alone(
    level: str, rng: np.random.Generator, kind: str, window: int | None, softcap: float | None
) -> None:
    """Scores that rise in steps, so that one row's maximum would move the reference of others."""
    for dtype, is_int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        q_heads, kv_heads, dim = SHAPES[int(rng.integers(len(SHAPES)))]
        case = random_case(rng, kind=kind, max_run=12, max_rows=60)  # type: ignore[arg-type]
        ops = backend_of(dtype, level, kv_heads, dim)
        kv = ops.allocate_kv(
            num_layers=1,
            num_chunks=case.num_chunks,
            chunk_size=64,
            num_kv_heads=kv_heads,
            head_dim=dim,
            dtype=dtype,
            is_int8=is_int8,
        )
        keys, values = random_pool(rng, case, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype)
        keys *= rng.choice([1, 8], len(keys))[:, None, None, None]
        fill_pool(ops, kv, 0, case, keys, values)
        q = torch.from_numpy(rng.standard_normal((case.num_rows, q_heads, dim))).to(dtype)
        bounds = {"window": window, "softcap": softcap}
        together = attend(ops, kv, case, q, **bounds)
        assert together.isfinite().all()
        alone = rows_of(case)
        for row in rng.choice(case.num_rows, min(case.num_rows, 12), replace=False).tolist():
            found = attend(ops, kv, alone[row], q[row : row + 1], **bounds)
            assert torch.equal(found[0], together[row]), (dtype, row)


class Sequences:
    """A fused model, and prompts whose tokens are computed slice by slice.

    Args:
        prompts: token ids; each has chunks of its own.
    """

    def __init__(
        self, level: str, dtype: torch.dtype, weights: str, is_int8: bool, prompts: list[np.ndarray]
    ) -> None:
        self.prompts = prompts
        ids = iter(range(1000))
        self.chunks = [[next(ids) for _ in range(-(-len(p) // 64))] for p in prompts]
        case = make_case(self.chunks, [(0, len(p)) for p in prompts], chunk_size=64)
        self.ops = backend_of(dtype, level, SPEC.num_kv_heads, SPEC.head_dim)
        plain, _ = make_model(self.ops, SPEC, case, dtype, is_int8=is_int8)
        self.kv, self.planner = plain.kv, plain.attention.planner
        self.model = plain.attention.backend.fuse(plain, weights)  # type: ignore[arg-type]

    def compute(self, spans: dict[int, tuple[int, int]], adapter: object = None) -> torch.Tensor:
        """One step: (first, end) of some prompts; returns the logits of all rows."""
        case = make_case(
            [self.chunks[i] for i in spans],
            [(first, end - first) for first, end in spans.values()],
            chunk_size=64,
            num_chunks=self.kv.num_chunks,
        )
        assert isinstance(self.planner, Planner)
        plan = self.ops.upload_plan(
            case.plan(self.planner.packing), self.kv, num_qo_heads=SPEC.num_qo_heads
        )
        tokens = np.concatenate([self.prompts[i][slice(*span)] for i, span in spans.items()])
        rows = [] if adapter is None else [AdapterRows(0, case.num_rows, adapter)]
        hidden = self.model.forward(
            torch.from_numpy(tokens), torch.from_numpy(case.positions), plan, rows
        )
        return self.model.logits(hidden).clone()

    def stored(self, prompt: int) -> list[torch.Tensor]:
        """K/V of its whole chunks."""
        whole = len(self.prompts[prompt]) // 64
        return [
            self.ops.restore_chunk(self.kv, self.ops.copy_chunk(self.kv, each))
            for each in self.chunks[prompt][:whole]
        ]


@pytest.mark.parametrize(("dtype", "weights", "is_int8", "with_adapter"), KINDS)
def test_a_prompt_in_slices_beside_others_has_the_numbers_of_the_prompt_alone(
    level: str,
    rng: np.random.Generator,
    dtype: torch.dtype,
    weights: str,
    is_int8: bool,
    with_adapter: bool,
) -> None:
    """Logits and K/V; slices of one token, of a few, and of more than a block or panel."""
    prompts = [rng.integers(0, SPEC.vocab_size, n) for n in (600, 300, 150)]
    run = Sequences(level, dtype, weights, is_int8, prompts)
    adapter = None
    if with_adapter:
        given = random_adapter(SPEC, rng, ("q_proj", "up_proj", "down_proj"), (5, 16))
        adapter = run.model.prepare_adapter(given)[0]
    alone = [run.compute({i: (0, len(p))}, adapter) for i, p in enumerate(prompts)]
    expected = run.stored(0)
    for layer in run.kv.layers:
        layer.zero_()
    done = [0, 0, 0]
    while any(n < len(p) for n, p in zip(done, prompts, strict=True)):
        sizes = [int(rng.choice([0, 1, 1, 2, 7, 33, 70, 200])) for _ in done]
        ends = [min(n + s, len(p)) for n, s, p in zip(done, sizes, prompts, strict=True)]
        spans = {i: (done[i], ends[i]) for i in rng.permutation(3).tolist() if ends[i] > done[i]}
        if not spans:
            continue
        logits, row = run.compute(spans, adapter), 0
        for i, (first, end) in spans.items():
            assert torch.equal(logits[row : row + end - first], alone[i][first:end]), (i, first)
            row += end - first
        done = ends
    for before, after in zip(expected, run.stored(0), strict=True):
        assert torch.equal(before, after)


def test_the_best_token_is_that_of_the_logits(level: str, rng: np.random.Generator) -> None:
    run = Sequences(level, torch.bfloat16, "int4", False, [rng.integers(0, SPEC.vocab_size, 40)])
    x = torch.from_numpy(rng.standard_normal((40, SPEC.hidden_size))).float()
    values, tokens = run.model.best_tokens(x)
    logits = run.model.logits(x).clone()
    assert torch.equal(values, logits.amax(dim=1)) and torch.equal(tokens, logits.argmax(dim=1))
    for row in range(0, 40, 7):
        assert torch.equal(run.model.logits(x[row : row + 1])[0], logits[row])


def test_the_name_of_the_arithmetic_is_that_of_a_build_a_cpu_and_threads(level: str) -> None:
    before = torch.get_num_threads()
    names = []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            names.append(backend_of(torch.float32, level, 1, 64).arithmetic)
    finally:
        torch.set_num_threads(before)
    assert names[0] == names[1] and names[0].startswith(level)
    assert names[0].removesuffix("1 threads") == names[2].removesuffix("2 threads") != names[0]
    plain = CpuBackend(
        dtype=torch.float32, head_dim=64, num_kv_heads=1, level=level, sanitizer=SANITIZER
    )
    assert plain.arithmetic == ""
