"""Quantized linears of every level against float64 products of the dequantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from attention_plans import random_case
from native_models import SPEC, make_model, native_ops

from chunkllama.backends.base import Activations, Backend, Quantization
from chunkllama.backends.cpu.abi import BF16, F32, INT4, INT8
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.fused_model import FusedModel
from chunkllama.backends.cpu.interleaved import InterleavedRows
from chunkllama.backends.cpu.packed import (
    FewRows,
    PackedLinear,
    Storage,
    pack_linear,
    unpack,
)
from chunkllama.backends.model import Linear
from chunkllama.backends.quantized import (
    Codes,
    QuantFormat,
    QuantizedLinear,
    StackedRows,
    WeightRows,
)
from chunkllama.backends.reference.backend import ReferenceBackend

NORMAL_FLOAT = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
FORMATS = {
    "int4": QuantFormat(4),
    "int4-bf16": QuantFormat(4, torch.bfloat16),
    "int4-offsets": QuantFormat(4, extra="offsets", values=tuple(map(float, range(16)))),
    "int4-upper": QuantFormat(4, extra="upper_scales"),
    "int4-table": QuantFormat(4, torch.bfloat16, values=NORMAL_FLOAT),
    "int8": QuantFormat(8),
    "int8-bf16": QuantFormat(8, torch.bfloat16),
    "int8-offsets": QuantFormat(8, extra="offsets"),
    "int8-upper": QuantFormat(8, torch.bfloat16, extra="upper_scales"),
}


class HeldRows(WeightRows):
    """Codes in memory."""

    def __init__(self, codes: Codes) -> None:
        self.held, self.format = codes, codes.format
        self.rows, self.columns = codes.codes.shape

    def codes(self, begin: int, end: int) -> Codes:
        held = self.held
        extra = None if held.extra is None else held.extra[begin:end]
        return Codes(held.format, held.codes[begin:end], held.scales[begin:end], extra)

    def floats(self, begin: int, end: int) -> torch.Tensor:
        return self.codes(begin, end).floats()


def random_rows(rng: np.random.Generator, kind: QuantFormat, rows: int, columns: int) -> HeldRows:
    """Weights of about the size that keeps products at one."""
    largest = 128.0 if kind.bits == 8 else max(map(abs, kind.values or (8.0,)))
    blocks = -(-columns // 32)

    def numbers(size: float) -> torch.Tensor:
        values = rng.standard_normal((rows, blocks)) * size * columns**-0.5
        return torch.from_numpy(values).to(kind.scale_dtype)

    codes = rng.integers(0, 1 << kind.bits, (rows, columns), dtype=np.uint8)
    extra = {"none": None, "offsets": numbers(1.0), "upper_scales": numbers(1 / largest)}
    return HeldRows(Codes(kind, torch.from_numpy(codes), numbers(1 / largest), extra[kind.extra]))


def packed_linear(ops: CpuBackend, parts: Sequence[WeightRows]) -> PackedLinear:
    linear = QuantizedLinear(torch.empty(0), parts=tuple(parts))
    return pack_linear(ops.library, linear, BF16, None)


def unpacked(ops: CpuBackend, linear: PackedLinear, columns: int) -> torch.Tensor:
    return unpack(ops.library, linear.packed.parts[0], linear.out, columns)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [T, in] with 8 bits and a scale for each 32, as the kernels round it."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    scales = torch.from_numpy(blocks.abs().amax(2, keepdim=True).numpy() / np.float32(127))
    inverses = scales.reciprocal().nan_to_num(posinf=0)
    # The product is not rounded before it is rounded to an integer.
    codes = (blocks.double() * inverses.double()).round()
    return (codes.float() * scales).flatten(1)[:, : x.shape[1]]


def without_offsets(rows: HeldRows) -> HeldRows:
    held = rows.held
    if held.format.extra != "offsets":
        return rows
    return HeldRows(Codes(replace(held.format, extra="none"), held.codes, held.scales, None))


def error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Largest error of y = x W^T over the largest sum of magnitudes."""
    exact = x.double() @ weight.double().T
    magnitude = (x.double().abs() @ weight.double().abs().T).max()
    return float((y.double() - exact).abs().max() / magnitude)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_those_of_the_dequantized_weights(
    level: str,
    rng: np.random.Generator,
    dtype: torch.dtype,
    kind: str,
) -> None:
    """Few rows, a block, a panel; outputs and inputs that are no multiple of what is packed."""
    ops = native_ops(dtype, level)
    for out, columns in ((70, 96), (33, 1056), (16, 40)):
        rows = random_rows(rng, FORMATS[kind], out, columns)
        weight = rows.floats(0, out)
        linear = packed_linear(ops, [rows])
        for count in (1, 2, 3, 4, 5, 8, 9, 17, 33, 70):
            x = torch.from_numpy(rng.standard_normal((count, columns))).to(dtype).float()
            bound = 2e-6 if dtype == torch.float32 else 2**-8  # bf16 products round weights
            y = ops.logits(x, linear)
            if linear.packed.parts[0].bytes and count <= 8 and level != "baseline":
                main = without_offsets(rows).floats(0, out)
                y = y.double() - x.double() @ (weight - main).double().T
                assert error(y, rounded(x), main) <= 4e-6, (out, columns, count)
            else:
                assert error(y, x, weight) <= bound, (out, columns, count)


def test_a_last_panel_of_few_rows_has_the_same_numbers_on_any_number_of_threads(
    level: str, rng: np.random.Generator
) -> None:
    """The last panel has one row with one thread, 129 rows with three."""
    ops = native_ops(torch.float32, level)
    x = torch.from_numpy(rng.standard_normal((513, 64))).float()
    before = torch.get_num_threads()
    for kind in ("int4", "int8"):
        linear = packed_linear(ops, [random_rows(rng, FORMATS[kind], 70, 64)])
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(ops.logits(x, linear).clone())
        torch.set_num_threads(before)
        assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["int4", "int4-offsets", "int4-upper"])
def test_activations_of_8_bits_cost_half_a_percent_and_can_be_left_out(
    level: str, rng: np.random.Generator, kind: str
) -> None:
    """Relative to the outputs' size, where 4 bits of weights cost about ten times as much."""
    ops = native_ops(torch.float32, level)
    rows = random_rows(rng, FORMATS[kind], 96, 1024)
    weight = rows.floats(0, 96)
    linear = QuantizedLinear(torch.empty(0), parts=(rows,))
    narrow = pack_linear(ops.library, linear, F32, None, FewRows())
    exact = pack_linear(ops.library, linear, F32, None, FewRows(rounds=False))
    x = torch.from_numpy(rng.standard_normal((8, 1024))).float()
    expected = x.double() @ weight.double().T

    def relative(packed: PackedLinear) -> float:
        difference = ops.logits(x, packed).double() - expected
        return float(difference.norm() / expected.norm())

    assert relative(exact) <= 1e-5
    assert relative(narrow) <= 0.008
    assert (relative(narrow) > 1e-3) == (level != "baseline")


def test_tables_that_bytes_cannot_hold_keep_float_activations(
    level: str, rng: np.random.Generator
) -> None:
    ops = native_ops(torch.float32, level)
    uses = {
        name: bool(packed_linear(ops, [random_rows(rng, kind, 32, 64)]).packed.parts[0].bytes)
        for name, kind in FORMATS.items()
    }
    assert uses == {name: kind.bits == 4 and name != "int4-table" for name, kind in FORMATS.items()}


def test_eight_bits_of_zero_tiny_and_broken_activations(
    level: str, rng: np.random.Generator
) -> None:
    ops = native_ops(torch.float32, level)
    rows = random_rows(rng, FORMATS["int4"], 40, 128)
    weight, linear = rows.floats(0, 40), packed_linear(ops, [rows])
    x = torch.zeros(7, 128)
    x[1] = 1e-42
    x[2, 5], x[2, 70] = 1e30, 1e-30
    x[3, 100] = torch.nan
    x[4, 0] = torch.inf
    x[5, :32] = torch.linspace(-2, 2, 32)
    x[6] = -127
    y = ops.logits(x, linear)
    assert (y[0] == 0).all() and (y[1].abs() < 1e-37).all()
    torch.testing.assert_close(y[2], x[2] @ weight.T, rtol=1e-5, atol=0)
    assert y[3].isnan().all() and not y[4].isfinite().any()
    linspace = x[5] if level == "baseline" else rounded(x)[5]
    torch.testing.assert_close(y[5], linspace @ weight.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[6], x[6] @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_weights_are_the_codes_weights(
    level: str,
    rng: np.random.Generator,
    kind: str,
) -> None:
    ops = native_ops(torch.bfloat16, level)
    rows = random_rows(rng, FORMATS[kind], 75, 160)
    found = unpacked(ops, packed_linear(ops, [rows]), 160)
    torch.testing.assert_close(found, rows.floats(0, 75), rtol=1e-6, atol=1e-7)


def test_parts_of_different_formats_are_one_layer(
    level: str,
    rng: np.random.Generator,
) -> None:
    """Parts of whole units keep their formats; any other stack is widened."""
    ops = native_ops(torch.bfloat16, level)
    for sizes in ((64, 32, 40), (64, 20, 40)):
        kinds = [FORMATS[name] for name in ("int4-offsets", "int8-upper", "int4")]
        parts = [random_rows(rng, k, n, 128) for k, n in zip(kinds, sizes, strict=True)]
        linear = packed_linear(ops, parts)
        used = [each.type for each in linear.packed.parts if each.n]
        assert used == ([INT4, INT8, INT4] if sizes[1] % 32 == 0 else [BF16])
        weight = torch.cat([part.floats(0, part.rows) for part in parts])
        for count in (1, 2, 3, 5, 40, 600):
            x = torch.from_numpy(rng.standard_normal((count, 128))).bfloat16().float()
            assert error(ops.logits(x, linear), x, weight) <= 2**-7, count


@pytest.mark.parametrize("kind", ["int4", "int4-offsets", "int8", "int8-upper"])
def test_broken_numbers_reach_their_own_row_and_column_only(
    level: str,
    rng: np.random.Generator,
    kind: str,
) -> None:
    ops = native_ops(torch.bfloat16, level)
    rows = random_rows(rng, FORMATS[kind], 70, 96)
    rows.held.scales[11, 1] = torch.nan
    rows.held.scales[12, 2] = torch.inf
    if rows.held.extra is not None:
        rows.held.extra[13, 0] = torch.nan
    linear = packed_linear(ops, [rows])
    broken = [11, 12] if rows.held.extra is None else [11, 12, 13]
    healthy = [column for column in range(70) if column not in broken]
    for count in (1, 2, 5, 14, 40, 70):
        x = torch.from_numpy(rng.uniform(0.5, 1, (count, 96))).float()
        plain = ops.logits(x, linear).clone()
        assert not plain[:, broken].isfinite().any()
        assert plain[:, healthy].isfinite().all()
        x[count // 2, 7] = torch.nan
        y = ops.logits(x, linear)
        assert y[count // 2].isnan().all()
        others = torch.arange(count) != count // 2
        assert torch.equal(y[others].nan_to_num(), plain[others].nan_to_num())
        x[count // 2, 7] = 3e38
        huge = ops.logits(x, linear)[count // 2, healthy]
        weight = rows.floats(0, 70)[healthy, 7]
        assert torch.equal(huge.sign()[weight != 0], weight.sign()[weight != 0])


def heavy_tailed(rng: np.random.Generator, rows: int, columns: int) -> torch.Tensor:
    values = rng.standard_t(4, (rows, columns)) * columns**-0.5
    return torch.from_numpy(values).float()


def test_int4_is_as_close_as_llama_cpps_type_of_the_same_size(
    level: str,
    rng: np.random.Generator,
) -> None:
    ops = native_ops(torch.bfloat16, level)
    weight = heavy_tailed(rng, 64, 512)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.dequantize(gguf.quantize(weight.numpy(), q4_0), q4_0)
    ours = unpacked(ops, pack_linear(ops.library, Linear(weight.clone()), F32, INT4), 512)
    assert Storage(INT4).size(64, 512) == 64 * 512 * 9 // 16
    expected = float(np.square(theirs - weight.numpy()).mean())
    assert float((ours - weight).square().mean()) < 0.6 * expected


@pytest.mark.parametrize("storage", [INT4, INT8])
def test_quantizing_zero_tiny_huge_and_broken_blocks(
    level: str,
    storage: int,
) -> None:
    ops = native_ops(torch.float32, level)
    weight = torch.zeros(40, 128)
    weight[1, :32] = 1e-40
    weight[2] = 1e30
    weight[3, 7] = torch.nan
    weight[4, 40] = -torch.inf
    weight[5, 64:96] = torch.linspace(-3, 3, 32)
    found = unpacked(ops, pack_linear(ops.library, Linear(weight.clone()), F32, storage), 128)
    assert (found[0] == 0).all() and (found[6:] == 0).all()
    assert (found[1].abs() < 1e-38).all()
    torch.testing.assert_close(found[2], weight[2], rtol=5e-3, atol=0)
    assert found[3, :32].isnan().all() and (found[3, 32:] == 0).all()
    assert not found[4, 32:64].isfinite().any() and (found[4, :32] == 0).all()
    step = 3 / 127 if storage == INT8 else 3 * 28 / 127  # the widest of int4's
    assert (found[5] - weight[5]).abs().max() <= 0.6 * step


QUANTIZED: list[Quantization] = ["auto", "int8", "int4"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("formats", [("int4-offsets", "int4-offsets", "int8-upper"), ("int8",) * 3])
def test_a_quantized_model_equals_the_reference_running_its_widened_weights(
    level: str,
    rng: np.random.Generator,
    formats: tuple[str, str, str],
    tied: bool,
) -> None:
    """Fused and op by op: queries and keys in one format, values in another, as files mix them."""
    case = random_case(rng, kind="mixed", max_rows=60)
    token_ids = torch.from_numpy(rng.integers(0, SPEC.vocab_size, case.num_rows))
    positions = torch.from_numpy(case.positions)
    seed = int(rng.integers(1 << 30))

    def run(
        backend: Backend, dtype: torch.dtype, multiplier: float, activations: Activations = "int8"
    ) -> torch.Tensor:
        spec = replace(SPEC, tie_word_embeddings=tied, residual_multiplier=multiplier)
        model, plan = make_model(backend, spec, case, dtype)
        quantize(model.weights, formats, np.random.default_rng(seed))
        runnable = backend.fuse(model, int4_activations=activations)
        assert isinstance(runnable, FusedModel) == (backend.name == "cpu" and multiplier == 1)
        return runnable.logits(runnable.forward(token_ids, positions, plan)).clone()

    def quantize(weights, kinds: tuple[str, ...], generator: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
        head_dim = SPEC.head_dim
        sizes = [SPEC.num_qo_heads * head_dim, *[SPEC.num_kv_heads * head_dim] * 2]

        def stack(rows: Sequence[int], columns: int, names: Sequence[str]) -> tuple:  # type: ignore[type-arg]
            return tuple(
                random_rows(generator, FORMATS[name], n, columns)
                for n, name in zip(rows, names, strict=True)
            )

        hidden, inner = SPEC.hidden_size, SPEC.intermediate_size
        empty = torch.empty(0, dtype=weights.embedding.dtype)
        for layer in weights.layers:
            qkv = stack(sizes, hidden, kinds)
            layer.qkv = QuantizedLinear(empty, layer.qkv.bias, parts=qkv)
            output = stack([hidden], sizes[0], kinds[:1])
            layer.output = QuantizedLinear(empty, layer.output.bias, parts=output)
            both = stack([inner] * 2, hidden, kinds[:2])
            layer.gate_up = QuantizedLinear(empty, layer.gate_up.bias, parts=both)
            down = stack([hidden], inner, kinds[2:])
            layer.down = QuantizedLinear(empty, layer.down.bias, parts=down)
        weights.embedding = empty
        (rows,) = stack([SPEC.vocab_size], hidden, kinds[2:])
        weights.embedding_rows = rows
        head = (rows,) if tied else stack([SPEC.vocab_size], hidden, kinds[2:])
        weights.lm_head = QuantizedLinear(empty, parts=head)

    for multiplier in (1.0, 0.5):
        reference = ReferenceBackend(torch.device("cpu"))
        expected = run(reference, torch.float32, multiplier)
        for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
            found = run(native_ops(dtype, level), dtype, multiplier)
            assert (found - expected).abs().max() <= bound * expected.abs().max(), dtype


def test_a_gate_shorter_than_what_is_read_at_a_time_is_padded_with_zeros(
    rng: np.random.Generator,
) -> None:
    """Gate and up alternate by 16 rows up to whole strides, in any range of them."""
    for count in (5, 40, 64, 70):
        gate, up = (random_rows(rng, FORMATS["int4-offsets"], count, 64) for _ in range(2))
        both = InterleavedRows(gate, up)
        size = -(-count // 64) * 64
        padded = [
            torch.nn.functional.pad(x.floats(0, count), (0, 0, 0, size - count)) for x in (gate, up)
        ]
        whole = torch.stack([x.view(-1, 16, 64) for x in padded], dim=1).reshape(-1, 64)
        for step in (32, 96, 2 * size):
            for begin in range(0, both.rows, step):
                end = min(begin + step, both.rows)
                assert torch.equal(both.floats(begin, end), whole[begin:end])
                assert torch.equal(both.codes(begin, end).floats(), whole[begin:end])


def test_stacked_rows_of_one_format_are_read_across_their_parts(rng: np.random.Generator) -> None:
    parts = [random_rows(rng, FORMATS["int4"], n, 64) for n in (10, 30, 5)]
    stacked = StackedRows(parts)
    whole = torch.cat([part.floats(0, part.rows) for part in parts])
    assert torch.equal(stacked.floats(3, 42), whole[3:42])
    assert torch.equal(stacked.codes(3, 42).floats(), whole[3:42])


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_the_setting_and_float32_keep_float_activations(
    level: str, rng: np.random.Generator, multiplier: float
) -> None:
    """Of a model's own projections, fused and op by op; a bfloat16 model rounds by default."""
    case = random_case(rng, kind="decode", max_rows=4)
    for dtype, activations, rounds in (
        (torch.bfloat16, "int8", True),
        (torch.bfloat16, "float", False),
        (torch.float32, "int8", False),
    ):
        spec = replace(SPEC, residual_multiplier=multiplier)
        model, _ = make_model(native_ops(dtype, level), spec, case, dtype)
        backend = model.attention.backend
        runnable = backend.fuse(model, "int4", activations)  # type: ignore[arg-type]
        if isinstance(runnable, FusedModel):
            layers = runnable._model.layers
            parts = [layers[i].down.parts[0] for i in range(SPEC.num_layers)]
        else:
            parts = [layer.down.packed.parts[0] for layer in model.weights.layers]  # type: ignore[attr-defined]
        assert [bool(part.bytes) for part in parts] == [rounds] * SPEC.num_layers
