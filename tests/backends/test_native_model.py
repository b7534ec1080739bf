"""A whole Llama in one native call against the same Llama through the float32 reference ops."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attention_plans import random_case
from native_models import SPEC, make_model, native_ops

from chunkllama.backends.base import Quantization
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.build import available_levels
from chunkllama.backends.cpu.fused_model import FusedModel
from chunkllama.backends.model import Linear
from chunkllama.backends.reference.backend import ReferenceBackend
from chunkllama.errors import ConfigError

# (computing dtype, packed weights) -> largest error of a logit; the logits' spread is about one.
TOLERANCE = {
    (torch.float32, "auto"): 2e-5,
    (torch.bfloat16, "auto"): 0.1,
    (torch.float32, "int8"): 0.15,
    (torch.bfloat16, "int8"): 0.2,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_one_call_equals_the_reference_ops(
    level: str, rng: np.random.Generator, kind: str, tied: bool
) -> None:
    spec = replace(SPEC, tie_word_embeddings=tied)
    case = random_case(rng, kind=kind, max_rows=150)  # type: ignore[arg-type]
    token_ids = torch.from_numpy(rng.integers(0, spec.vocab_size, case.num_rows))
    positions = torch.from_numpy(case.positions)
    model, plan = make_model(ReferenceBackend(torch.device("cpu")), spec, case, torch.float32)
    expected_hidden = model.forward(token_ids, positions, plan)
    expected = model.logits(expected_hidden)
    for (dtype, weights), tolerance in TOLERANCE.items():
        ops = native_ops(dtype, level)
        plain, plan = make_model(ops, spec, case, dtype)
        native = ops.fuse(plain, weights)  # type: ignore[arg-type]
        assert plain.weights.embedding.numel() == 0, "the model's own weights should be freed"
        hidden = native.forward(token_ids, positions, plan)
        assert hidden.shape == expected_hidden.shape
        logits = native.logits(hidden)
        assert logits.shape == expected.shape and logits.dtype == torch.float32
        assert (logits - expected).abs().max() <= tolerance, (dtype, weights)
        # A second pass over the same plan appends the same K/V again and gives the same numbers.
        again = native.forward(token_ids, positions, plan)
        assert torch.equal(native.logits(again), logits)


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_of_any_number_of_rows(
    level: str, rng: np.random.Generator, dtype: torch.dtype, weights: str
) -> None:
    """Few rows, a block, a panel, several panels; more k than a core's L1 or L2 holds of a unit."""
    spec = replace(SPEC, num_layers=1, hidden_size=4130, vocab_size=100)
    model, _ = make_model(native_ops(dtype, level), spec, random_case(rng, kind="decode"), dtype)
    head = model.weights.lm_head.weight.double()
    native = model.attention.backend.fuse(model, weights)
    tolerance = {"auto": 2e-5, "int8": 0.05}[weights] if dtype == torch.float32 else 0.05
    for rows in (*range(1, 14), 16, 17, 25, 32, 33, 511, 512, 513, 1100):
        x = torch.from_numpy(rng.standard_normal((rows, spec.hidden_size))).to(dtype)
        error = (native.logits(x) - x.double() @ head.T).abs().max()
        assert error <= tolerance, rows


def test_a_row_alone_gives_the_numbers_it_has_among_others(
    level: str, rng: np.random.Generator
) -> None:
    native, size = one_layer(level, rng, torch.bfloat16, "auto")
    x = torch.from_numpy(rng.standard_normal((150, size))).float()
    together = native.logits(x).clone()
    for row in (0, 11, 12, 13, 149):
        assert torch.equal(native.logits(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_and_nan_reach_their_own_row_and_column_only(
    level: str, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    """Products beyond a float are infinite, infinities of both signs and zero times one NaN."""
    native, size = one_layer(
        level,
        rng,
        dtype,
        "auto",
        ((11, slice(None)), 3e38),
        ((12, slice(None)), torch.inf),
        ((13, 5), torch.nan),
        ((14, 3), -torch.inf),
    )
    for rows in (1, 2, 9, 14, 40, 70, 600):
        x = torch.from_numpy(rng.uniform(0.5, 1, (rows, size))).float()
        plain = native.logits(x).clone()
        assert plain[:, :11].isfinite().all() and plain[:, 15:].isfinite().all()
        assert (plain[:, 11:13] == torch.inf).all()
        assert plain[:, 13].isnan().all()
        assert (plain[:, 14] == -torch.inf).all()
        x[rows // 2] = -3e38
        huge = native.logits(x).clone()[rows // 2]
        assert (huge[11], huge[12], huge[14]) == (-torch.inf, -torch.inf, torch.inf)
        x[rows // 2] = 0
        zero = native.logits(x).clone()[rows // 2]
        assert zero[12:15].isnan().all()
        assert (zero[:12] == 0).all() and (zero[15:] == 0).all()
        x[rows // 2, 7] = torch.nan
        broken = native.logits(x)
        assert broken[rows // 2].isnan().all()
        others = torch.arange(rows) != rows // 2
        assert torch.equal(broken[others].nan_to_num(), plain[others].nan_to_num())


def one_layer(
    level: str,
    rng: np.random.Generator,
    dtype: torch.dtype,
    weights: str,
    *entries: tuple[Any, float],
) -> tuple[FusedModel, int]:
    """A model of one layer and 1,003 tokens with these entries of its head, and its hidden size."""
    spec = replace(SPEC, num_layers=1, vocab_size=1003)
    model, _ = make_model(native_ops(dtype, level), spec, random_case(rng, kind="decode"), dtype)
    for where, value in entries:
        model.weights.lm_head.weight[where] = value
    ops = native_ops(dtype, level)
    return ops.fuse(model, weights), spec.hidden_size  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_token_is_that_of_the_largest_logit(
    level: str, rng: np.random.Generator, dtype: torch.dtype, weights: str
) -> None:
    """Padding behind the vocabulary is no token, though its logit 0 is above all; NaN shows."""
    native, _ = one_layer(level, rng, dtype, weights, ((slice(None), 0), -4.0))
    for rows in (1, 2, 3, 16, 33, 70, 600):
        x = torch.from_numpy(rng.standard_normal((rows, SPEC.hidden_size))).float()
        x[:, 0] = 9  # all logits are negative
        logits = native.logits(x).clone()
        values, tokens = native.best_tokens(x)
        assert torch.equal(values, logits.max(dim=1).values)
        assert torch.equal(tokens, logits.argmax(dim=1))
        assert values.max() < 0
        x[rows // 2, 3] = torch.nan
        values, tokens = native.best_tokens(x)
        assert values.isnan().nonzero().flatten().tolist() == [rows // 2]
        assert ((tokens >= 0) & (tokens < 1003)).all()


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_best_tokens_the_lower_counts_and_one_nan_hides_behind_none(
    level: str, rng: np.random.Generator, dtype: torch.dtype, weights: str
) -> None:
    tie = (([7, 999], 1), 8.0)
    native, size = one_layer(level, rng, dtype, weights, tie)
    broken, _ = one_layer(level, rng, dtype, weights, tie, ((501, 2), torch.nan))
    for rows in (1, 2, 16, 70):
        x = torch.zeros(rows, size)
        x[:, 1] = 9
        assert native.best_tokens(x)[1].tolist() == [7] * rows
        values, tokens = broken.best_tokens(x)
        assert values.isnan().all()
        assert tokens.tolist() == [501] * rows


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    """One thread, and more than most machines have cores: then they come late to the phases."""
    before = torch.get_num_threads()
    yield (1, 2, *[8] * 20)
    torch.set_num_threads(before)


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_any_number_of_threads_gives_the_same_numbers(
    level: str, rng: np.random.Generator, weights: str, thread_counts: tuple[int, ...]
) -> None:
    ops = native_ops(torch.bfloat16, level)
    for kind in ("decode", "mixed"):
        case = random_case(rng, kind=kind, max_rows=150)  # type: ignore[arg-type]
        plain, plan = make_model(ops, SPEC, case, torch.bfloat16)
        native = ops.fuse(plain, weights)  # type: ignore[arg-type]
        token_ids = torch.from_numpy(rng.integers(0, SPEC.vocab_size, case.num_rows))
        results = []
        for count in thread_counts:
            torch.set_num_threads(count)
            hidden = native.forward(token_ids, torch.from_numpy(case.positions), plan).clone()
            results.append((hidden, *native.best_tokens(hidden)))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    "levels", [available_levels()[0].name, pytest.param("", id="every", marks=pytest.mark.nightly)]
)
def test_a_team_smaller_than_asked_for_does_all_the_work(
    child_environment: dict[str, str], levels: str
) -> None:
    """OMP_THREAD_LIMIT, OMP_DYNAMIC: the runtime may give fewer threads than the kernels want."""
    code = (
        "import pytest, sys, torch; torch.set_num_threads(16); sys.exit(pytest.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            f"(linears_of or one_call or best_token) and [{levels}",
        ],
        env={**child_environment, "OMP_THREAD_LIMIT": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_of_zero_tiny_uneven_and_broken_rows(
    level: str, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    """A scale holds for 32 weights of a row: an outlier costs only its 31 neighbours."""
    spec = replace(SPEC, num_layers=1, hidden_size=128, vocab_size=40)
    model, _ = make_model(native_ops(dtype, level), spec, random_case(rng, kind="decode"), dtype)
    head = model.weights.lm_head.weight
    head[:4] = 0
    head[1, 64:96] = 1e-40
    head[2] = 1
    head[2, 5] = 1e4
    head[3, 7] = torch.nan
    native = model.attention.backend.fuse(model, "int8")
    for rows in (1, 5, 40):
        x = torch.ones(rows, spec.hidden_size)
        logits = native.logits(x)
        assert (logits[:, 0] == 0).all()
        assert (logits[:, 1].abs() < 1e-30).all()
        assert ((logits[:, 2] - (1e4 + 96)).abs() <= 0.01 * 1e4).all()
        x[:, :32] = 0
        assert ((native.logits(x)[:, 2] - 96).abs() <= 0.01 * 96).all()
        assert logits[:, 3].isnan().all()
        assert logits[:, 4:].isfinite().all()


def test_a_plain_model_runs_through_the_ops_one_by_one(
    level: str, rng: np.random.Generator
) -> None:
    case = random_case(rng, kind="mixed", max_rows=100)
    token_ids = torch.from_numpy(rng.integers(0, SPEC.vocab_size, case.num_rows))
    positions = torch.from_numpy(case.positions)
    outputs = []
    for backend in (
        ReferenceBackend(torch.device("cpu")),
        native_ops(torch.float32, level),
    ):
        model, plan = make_model(backend, SPEC, case, torch.float32)
        outputs.append(model.forward(token_ids, positions, plan))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "weights"), TOLERANCE)
def test_packed_layers_run_one_by_one_equal_the_fused_call(
    rng: np.random.Generator, dtype: torch.dtype, weights: Quantization, tied: bool
) -> None:
    """What ``fuse`` returns for a specification that the fused call lacks, and for one it has."""
    plain_spec = replace(SPEC, tie_word_embeddings=tied)
    general_spec = replace(plain_spec, embedding_multiplier=2.0)
    case = random_case(rng, kind="mixed", max_rows=100)
    token_ids = torch.from_numpy(rng.integers(0, SPEC.vocab_size, case.num_rows))
    positions = torch.from_numpy(case.positions)
    ops = CpuBackend(dtype=dtype, head_dim=SPEC.head_dim, num_kv_heads=SPEC.num_kv_heads)
    logits = []
    for spec in (plain_spec, general_spec):
        model, plan = make_model(ops, spec, case, dtype)
        if spec is plain_spec:
            model.weights.embedding *= 2
        elif tied:
            model.weights.lm_head = Linear(model.weights.embedding * 2)
        runnable = ops.fuse(model, weights)
        assert isinstance(runnable, FusedModel) == (spec is plain_spec)
        hidden = runnable.forward(token_ids, positions, plan)
        logits.append(runnable.logits(hidden).clone())
        assert torch.equal(runnable.best_tokens(hidden)[1], logits[-1].argmax(dim=1))
    # Narrow activations round at other places, if these weights have them.
    tolerance = 2e-5 if dtype == torch.float32 else TOLERANCE[dtype, weights]
    assert (logits[0] - logits[1]).abs().max() <= tolerance


def test_weights_wider_than_the_model_are_refused(rng: np.random.Generator) -> None:
    case = random_case(rng, kind="decode")
    ops = CpuBackend(dtype=torch.bfloat16, head_dim=32, num_kv_heads=3)
    model, _ = make_model(ops, SPEC, case, torch.bfloat16)
    with pytest.raises(ConfigError, match="int8"):
        ops.fuse(model, "fp32")


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.float32, 40)])
def test_shapes_without_a_kernel_are_refused(dtype: torch.dtype, head_dim: int) -> None:
    with pytest.raises(ConfigError):
        CpuBackend(dtype=dtype, head_dim=head_dim, num_kv_heads=1)
