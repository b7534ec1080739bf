"""Time of the linear layers of the CPU backend against torch (oneDNN), per instruction-set level.

    python benchmarks/linear.py                          # every level this CPU has
    python benchmarks/linear.py --levels avx512_bf16 --rounds 7 --save
    python benchmarks/linear.py --levels amx --shapes demo.qkv --rows 1 64
    python benchmarks/linear.py --int4 --rows 1 8 --rounds 10  # 8-bit against float activations

Each level runs in a process of its own, in which oneDNN and MKL are held to the same instructions
(ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS). A round times every variant once, so the variants
alternate; a sample walks through copies of the weight that together exceed the caches, as the
layers of a model do. Figures are medians over the rounds. Torch multiplies bf16 with the plain and
with the prepacked weight, and fp32; the ratio is to the fastest of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import cpu_name, new_result

from chunkllama.backends.cpu.abi import BF16, F32, INT4, TYPES, load_library
from chunkllama.backends.cpu.build import LEVELS, available_levels
from chunkllama.backends.cpu.memory import allocate_lazily
from chunkllama.backends.cpu.packed import MAX_PARTS, CLinear, CWeights, pack_linear
from chunkllama.backends.cpu.tuning import FewRows
from chunkllama.backends.model import Linear

# (outputs, inputs) of the demo model's layers and of a 1.1B Llama's (TinyLlama).
SHAPES = {
    "demo.qkv": (960, 576),
    "demo.output": (576, 576),
    "demo.gate_up": (3072, 576),
    "demo.down": (576, 1536),
    "1.1b.qkv": (2560, 2048),
    "1.1b.output": (2048, 2048),
    "1.1b.gate_up": (11264, 2048),
    "1.1b.down": (2048, 5632),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ONEDNN_ISA = {
    "amx": "AVX512_CORE_AMX",
    "avx512_bf16": "AVX512_CORE_BF16",
    "avx512": "AVX512_CORE",
    "avx2": "AVX2",
    "baseline": "SSE41",
}  # oneDNN's limit has no names for ARM, where it takes what the CPU has
MKL_ISA = {"avx2": "AVX2", "baseline": "SSE4_2"}  # torch's fp32 products are MKL's on x86
RING_BYTES = 160 << 20  # copies of a bf16 weight together; fp32 ones take twice as much
SAMPLE_SECONDS = 0.02


class Weights:
    """Copies of one weight for each variant; ``products`` are functions of x and a copy's index."""

    def __init__(self, library: ctypes.CDLL, shape: tuple[int, int]) -> None:
        self.library, self.shape = library, shape
        n, k = shape
        self.count = max(2, RING_BYTES // (2 * n * k))
        plain = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.plain = [plain.clone() for _ in range(self.count)]
        self.wide = [plain.float() for _ in range(self.count)]
        self.memory = allocate_lazily(2 * n * k * self.count, torch.uint8)
        self.packed = [self._pack(plain, 2 * n * k * i) for i in range(self.count)]
        self.prepacked: list[torch.Tensor] = []

    def _pack(self, weight: torch.Tensor, offset: int) -> CLinear:
        n, k = self.shape
        packed = CWeights(self.memory.data_ptr() + offset, n, BF16)
        self.library.ck_pack(
            *(weight.data_ptr(), BF16, n, k, ctypes.byref(packed), k, 0, torch.get_num_threads())
        )
        return CLinear((CWeights * MAX_PARTS)(packed), None, n, k)

    def variants(self, rows: int) -> dict[str, Callable[[int], object]]:
        """Name -> product of ``rows`` rows with the copy of an index."""
        x = torch.randn(rows, self.shape[1]).bfloat16()
        wide = x.float()
        found: dict[str, Callable[[int], object]] = {
            "chunkllama": self._ours(x),
            "torch bf16": lambda i: torch.nn.functional.linear(x, self.plain[i]),
            "torch fp32": lambda i: torch.nn.functional.linear(wide, self.wide[i]),
        }
        if self._can_prepack(x):
            found["torch bf16 prepacked"] = lambda i: torch.ops.mkldnn._linear_pointwise(
                x, self.prepacked[i], None, "none", [], ""
            )
        return found

    def _ours(self, x: torch.Tensor) -> Callable[[int], object]:
        """Rows and strides as the fused model has them: padded, in the level's activation type."""
        rows, k = x.shape
        activation = self.library.ck_activation_type(BF16)
        dtype = {number: each for each, number in TYPES.items()}[activation]
        padded = torch.zeros(-(-rows // 32) * 32, k + 32, dtype=dtype)
        padded[:rows, :k] = x
        y = torch.empty(rows, self.shape[0])

        def run(index: int) -> torch.Tensor:
            self.library.ck_linear(
                ctypes.byref(self.packed[index]),
                padded.data_ptr(),
                padded.stride(0),
                activation,
                y.data_ptr(),
                y.stride(0),
                rows,
                torch.get_num_threads(),
            )
            return y

        return run

    def _can_prepack(self, x: torch.Tensor) -> bool:
        """Whether oneDNN has a bf16 product under this instruction set; packs for these rows."""
        try:
            self.prepacked = [
                torch.ops.mkldnn._reorder_linear_weight(each, len(x)) for each in self.plain
            ]
            torch.ops.mkldnn._linear_pointwise(x, self.prepacked[0], None, "none", [], "")
        except RuntimeError:
            self.prepacked = []
        return bool(self.prepacked)


def measure(weights: Weights, rows: int, rounds: int) -> dict[str, float]:
    """Median microseconds of one product, by variant."""
    variants = weights.variants(rows)
    check(variants)
    index = dict.fromkeys(variants, 0)

    def sample(name: str, repeats: int) -> float:
        product, start = variants[name], time.perf_counter()
        for _ in range(repeats):
            product(index[name] % weights.count)
            index[name] += 1
        return (time.perf_counter() - start) / repeats

    repeats = {name: max(1, round(SAMPLE_SECONDS / sample(name, 3))) for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in variants:
            times[name].append(sample(name, repeats[name]))
    return {name: statistics.median(each) * 1e6 for name, each in times.items()}


def check(variants: dict[str, Callable[[int], object]]) -> None:
    """Stop if a variant multiplies something else."""
    expected = variants["torch fp32"](0)
    assert isinstance(expected, torch.Tensor)
    for name, product in variants.items():
        result = product(0)
        assert isinstance(result, torch.Tensor)
        error = (result.float() - expected).abs().max() / expected.abs().max()
        if not error < 0.02:
            raise SystemExit(f"{name} differs from torch fp32 by {error:.3f} of the largest value")


def int4_ratios(
    library: ctypes.CDLL, shape: tuple[int, int], rows: int, rounds: int
) -> dict[str, float]:
    """Time of int4 with 8-bit activations over that with float ones, and over that of weights
    widened to the level's own product: medians of pairs, their variants alternating.
    """
    n, k = shape
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    few = FewRows(int4=max(rows, 1), int4_float=max(rows, 1))
    kinds = {"8 bits": few, "float": replace(few, rounds=False), "widened": FewRows(int4=0)}
    count = max(2, RING_BYTES // (n * k // 2))
    layers = {
        name: [pack_linear(library, Linear(weight.clone()), F32, INT4, each) for _ in range(count)]
        for name, each in kinds.items()
    }
    activation = library.ck_activation_type(BF16)
    dtype = {number: each for each, number in TYPES.items()}[activation]
    x = torch.randn(-(-rows // 32) * 32, k + 32).to(dtype)
    y = torch.empty(rows, n)

    def sample(name: str) -> float:
        start = time.perf_counter()
        for layer in layers[name]:
            library.ck_linear(
                *(ctypes.byref(layer.packed), x.data_ptr(), x.stride(0), activation),
                *(y.data_ptr(), n, rows, torch.get_num_threads()),
            )
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in kinds}
    for name in kinds:
        sample(name)
    for _ in range(rounds):
        for name in kinds:
            times[name].append(sample(name))
    return {
        name: statistics.median(a / b for a, b in zip(times["8 bits"], times[name], strict=True))
        for name in ("float", "widened")
    }


def print_int4(options: argparse.Namespace) -> None:
    print("| level | shape | rows | time / float activations | time / widened weights |")
    print("| --- | --- | --- | --- | --- |")
    for level in options.levels:
        library = load_library(next(each for each in LEVELS if each.name == level))
        for shape in options.shapes:
            for rows in options.rows:
                found = int4_ratios(library, SHAPES[shape], rows, options.rounds)
                ratios = " | ".join(f"{each:.2f}" for each in found.values())
                print(f"| {level} | {shape} | {rows} | {ratios} |", flush=True)


def run_level(name: str, shapes: list[str], rows: list[int], rounds: int) -> Iterator[dict]:
    """One result per shape and number of rows."""
    library = load_library(next(level for level in LEVELS if level.name == name))
    for shape in shapes:
        weights = Weights(library, SHAPES[shape])
        for count in rows:
            times = measure(weights, count, rounds)
            best = min(value for key, value in times.items() if key != "chunkllama")
            yield {
                "level": name,
                "shape": shape,
                "rows": count,
                "microseconds": {key: round(value, 1) for key, value in times.items()},
                "ratio": round(best / times["chunkllama"], 2),
            }


def child(options: argparse.Namespace, level: str) -> list[dict[str, Any]]:
    """Results of a level, from a process whose oneDNN is held to the same instructions."""
    command = [sys.executable, __file__, "--child", level, "--rounds", str(options.rounds)]
    command += ["--shapes", *options.shapes, "--rows", *map(str, options.rows)]
    if options.threads:
        command += ["--threads", str(options.threads)]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": ONEDNN_ISA.get(level, "ALL")}
    if level in MKL_ISA:
        environment["MKL_ENABLE_INSTRUCTIONS"] = MKL_ISA[level]
    results = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            result = json.loads(line)
            results.append(result)
            times = result["microseconds"]
            print(
                f"| {level} | {result['shape']} | {result['rows']} | "
                + " | ".join(f"{times[name]:.0f}" if name in times else "" for name in COLUMNS)
                + f" | {result['ratio']:.2f} |",
                flush=True,
            )
    if process.returncode:
        raise SystemExit(f"level {level} failed with exit code {process.returncode}")
    return results


COLUMNS = ("chunkllama", "torch bf16", "torch bf16 prepacked", "torch fp32")


def save(options: argparse.Namespace, results: list[dict[str, Any]]) -> Path:
    """Write a file of this machine and these levels; files of earlier runs stay."""
    path = new_result("-".join(["linear", *options.levels]))
    path.write_text(
        json.dumps(
            {
                "command": " ".join(["python", *sys.argv]),
                "machine": cpu_name(),
                "date": time.strftime("%Y-%m-%d"),
                "threads": options.threads or torch.get_num_threads(),
                "torch": torch.__version__,
                "onednn_max_cpu_isa": {
                    name: ONEDNN_ISA.get(name, "ALL") for name in options.levels
                },
                "rounds": options.rounds,
                "results": results,
            },
            indent=1,
        )
        + "\n"
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = [level.name for level in available_levels()]
    parser.add_argument("--levels", nargs="+", choices=here, default=here)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for --save")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--save", action="store_true", help="write results/linear-<levels>-<machine>.json"
    )
    parser.add_argument("--int4", action="store_true", help="compare int4's products only")
    parser.add_argument("--child", choices=here, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save and options.rounds < 5:
        parser.error("--save needs --rounds 5 or more: a median of fewer is noise")
    if options.int4 and options.save:
        parser.error("--int4 prints ratios and saves nothing")
    if options.threads and (options.child or options.int4):
        torch.set_num_threads(options.threads)
    if options.int4:
        print_int4(options)
        return
    if options.child:
        with torch.inference_mode():
            for result in run_level(options.child, options.shapes, options.rows, options.rounds):
                print(json.dumps(result), flush=True)
        return
    print("| level | shape | rows | " + " | ".join(f"{name}, us" for name in COLUMNS), end="")
    print(" | torch's best / chunkllama |")
    print("| --- " * (len(COLUMNS) + 4) + "|")
    results = [result for level in options.levels for result in child(options, level)]
    if options.save:
        print(f"saved {save(options, results)}")


if __name__ == "__main__":
    main()
