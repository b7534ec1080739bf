"""The machine that executes PTX: what instructions mean, what is refused, what of it has run."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from kernel_emulator import Counters, load, require_compiler
from ptx_emulator import compile_ptx
from ptx_text import UnsupportedPtx
from ptx_translator import translate

from chunkllama.resources import data_folder

FOLDER = Path(__file__).parent
NAN, INFINITY, ONE, SUBNORMAL = "0f7FC00000", "0f7F800000", "0f3F800000", "0f80000001"
# Statements that leave a result in %r1, and what PTX ISA 8.7 says it is. %r10 is the lane, in
# lane 5.
INSTRUCTIONS = {
    "shl clamps": ("mov.u32 %r2, 32; shl.b32 %r1, 1, %r2", 0),
    "shr of a negative": ("mov.u32 %r2, 40; shr.s32 %r1, -5, %r2", 0xFFFFFFFF),
    "shr unsigned": ("shr.u32 %r1, 0x80000000, 31", 1),
    "sum wraps": ("add.s32 %r1, 0x7fffffff, 1", 0x80000000),
    "negation of the least": ("neg.s32 %r1, -2147483648", 0x80000000),
    "mul.hi signed": ("mul.hi.s32 %r1, -2, 3", 0xFFFFFFFF),
    "mul.hi unsigned": ("mul.hi.u32 %r1, -2, 3", 2),
    "mul.wide": (
        "mul.wide.s32 %rd2, -3, 5; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r1, %rd2",
        2**32 - 1,
    ),
    "mad.lo": ("mad.lo.s32 %r1, 65537, 65537, 7", (65537 * 65537 + 7) % 2**32),
    "div truncates": ("div.s32 %r1, -7, 2", 2**32 - 3),
    "rem has the dividend's sign": ("rem.s32 %r1, -7, 2", 2**32 - 1),
    "div unsigned": ("div.u32 %r1, -7, 2", (2**32 - 7) // 2),
    "min signed": ("min.s32 %r1, -1, 1", 2**32 - 1),
    "min unsigned": ("min.u32 %r1, -1, 1", 1),
    "widening keeps the sign": (
        "mov.u32 %r2, -2; cvt.s64.s32 %rd2, %r2; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r1, %rd2",
        2**32 - 1,
    ),
    "bfi": ("bfi.b32 %r1, 0xff, 0, 4, 8", 0xFF0),
    "prmt": ("prmt.b32 %r1, 0x03020180, 0x07060504, 0x8764", 0xFF070604),
    "halves": ("mov.b32 {%rs1, %rs2}, 0x12345678; mov.b32 %r1, {%rs2, %rs1}", 0x56781234),
    "selp": ("setp.ne.s32 %p2, 1, 1; selp.b32 %r1, 3, 4, %p2", 4),
    "xor of predicates": (
        "setp.eq.s32 %p2, 1, 1; setp.lt.s32 %p3, -1, 0; xor.pred %p2, %p2, %p3; "
        "selp.b32 %r1, 3, 4, %p2",
        4,
    ),
    "constant predicates": (
        "mov.pred %p2, -1; mov.pred %p3, 0; selp.b32 %r1, 1, 0, %p2; selp.b32 %r2, 2, 0, %p3; "
        "or.b32 %r1, %r1, %r2",
        1,
    ),
    "unsigned comparison": ("setp.hi.u32 %p2, -1, 1; selp.b32 %r1, 3, 4, %p2", 3),
    "NaN is not less": (f"setp.lt.ftz.f32 %p2, {NAN}, {ONE}; selp.b32 %r1, 3, 4, %p2", 4),
    "NaN is less or unordered": (f"setp.ltu.ftz.f32 %p2, {NAN}, {ONE}; selp.b32 %r1, 3, 4, %p2", 3),
    "NaN is not ne": (f"setp.ne.f32 %p2, {NAN}, {NAN}; selp.b32 %r1, 3, 4, %p2", 4),
    "NaN is neu": (f"setp.neu.f32 %p2, {NAN}, {NAN}; selp.b32 %r1, 3, 4, %p2", 3),
    "max ignores NaN": (f"max.ftz.f32 %f1, {NAN}, {ONE}; mov.b32 %r1, %f1", 0x3F800000),
    "subnormals are flushed": (
        f"add.ftz.f32 %f1, {SUBNORMAL}, {SUBNORMAL}; mov.b32 %r1, %f1",
        2**31,
    ),
    "fma rounds once": (
        "mov.f32 %f2, 0f3F800001; fma.rn.ftz.f32 %f1, %f2, %f2, 0fBF800000; mov.b32 %r1, %f1",
        int(np.float32(2**-22 + 2**-46).view(np.uint32)),
    ),
    "ex2 of -inf": ("ex2.approx.ftz.f32 %f1, 0fFF800000; mov.b32 %r1, %f1", 0),
    "lg2 of 8": ("lg2.approx.ftz.f32 %f1, 0f41000000; mov.b32 %r1, %f1", 0x40400000),
    "rsqrt of 4": ("rsqrt.approx.ftz.f32 %f1, 0f40800000; mov.b32 %r1, %f1", 0x3F000000),
    "the first source is the upper half": (f"cvt.rn.bf16x2.f32 %r1, {ONE}, {INFINITY}", 0x3F807F80),
    "bf16 rounds ties to even": ("cvt.rn.bf16x2.f32 %r1, 0f3F808000, 0f3F818000", 0x3F803F82),
    "f16 overflows to infinity": (f"cvt.rn.f16x2.f32 %r1, 0f47800000, {ONE}", 0x7C003C00),
    "f16 widens": ("mov.u16 %rs1, 0x3555; cvt.f32.f16 %f1, %rs1; mov.b32 %r1, %f1", 0x3EAAA000),
    "shuffle": ("shfl.sync.bfly.b32 %r1|%p2, %r10, 3, 31, -1", 6),
    "vote": (
        "setp.eq.s32 %p2, %r10, 31; vote.sync.any.pred %p3, %p2, -1; selp.b32 %r1, 1, 0, %p3",
        1,
    ),
    "copies are read after their wait": (
        "cp.async.cg.shared.global [%r11], [%rd3], 16, 16; cp.async.commit_group; "
        "ld.shared.u32 %r1, [%r11]; cp.async.wait_group 0; ld.shared.u32 %r2, [%r11]; "
        "and.b32 %r1, %r1, %r2",
        0x600DF00D,
    ),
    "a copy of nothing writes zeros": (
        "cp.async.cg.shared.global [%r11], [%rd3], 16, 0; cp.async.commit_group; "
        "cp.async.wait_group 0; ld.shared.u32 %r1, [%r11]",
        0,
    ),
}
REFUSED = [
    "add.rz.ftz.f32 %f1, %f1, %f1",
    "add.f32 %f1, %f1, %f1",
    "div.full.ftz.f32 %f1, %f1, %f1",
    "ex2.ftz.f32 %f1, %f1",
    "cvt.rni.ftz.s32.f32 %r1, %f1",
    "cvt.rz.bf16x2.f32 %r1, %f1, %f1",
    "ld.volatile.global.u32 %r1, [%rd1]",
    "ld.local.u32 %r1, [%rd1]",
    "atom.global.add.u32 %r1, [%rd1], 1",
    "bar.sync 1",
    "bar.sync 0, 64",
    "shfl.sync.idx.b32 %r1, %r1, 0, 31, -1",
    "vote.sync.ballot.b32 %r1, %p1, -1",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r1}, [%r1]",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f1, %f1, %f1}, {%r1, %r1}, {%r1}, "
    "{%f1, %f1, %f1, %f1}",
    "cp.async.ca.shared.global [%r1], [%rd1], 16",
    "cp.async.cg.shared.global [%r1], [%rd1], 8",
    "mov.u32 %r1, %clock",
    "mov.u32 %r1, %r999",
    "ld.param.u32 %r1, [kernel_param_0+16]",
    "setp.lt.and.s32 %p1, %r1, 0, %p1",
    "bra.uni.dispatch $L",
    ".local .b8 stack[8]",
]


def ptx_of(statements: str) -> str:
    return f"""
.version 8.7
.target sm_90
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry kernel(
	.param .align 8 .b8 kernel_param_0[16]
)
.maxntid 32, 1, 1
{{
	.reg .pred 	%p<8>;
	.reg .b16 	%rs<8>;
	.reg .f32 	%f<8>;
	.reg .b32 	%r<16>;
	.reg .b64 	%rd<8>;

	ld.param.v2.u64 	{{%rd1, %rd3}}, [kernel_param_0];
	mov.u32 	%r10, %tid.x;
	mov.u32 	%r12, memory;
	shl.b32 	%r11, %r10, 4;
	add.s32 	%r11, %r12, %r11;
	setp.eq.s32 	%p1, %r10, 5;
{statements}
	ret;
}}
"""


def instruction_lines() -> str:
    lines = []
    for index, (statements, _) in enumerate(INSTRUCTIONS.values()):
        lines += [*statements.split("; "), f"@%p1 st.global.u32 [%rd1+{4 * index}], %r1"]
    return "".join(f"\t{line};\n" for line in lines)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    require_compiler()
    path = tmp_path_factory.mktemp("ptx") / "instructions.so"
    texts = {"kernel": (ptx_of(instruction_lines()), {"kernel<int>": "kernel"})}
    compile_ptx(path, texts, fibers=data_folder("kernels") / "emulation")
    return load(path)


def emulate(library: ctypes.CDLL, threads: int, params: bytes) -> int:
    grid = (ctypes.c_uint * 3)(1, 1, 1)
    sizes = (ctypes.c_size_t(512), params, ctypes.c_size_t(len(params)))
    counters = Counters()
    status: int = library.emulate(b"kernel<int>", grid, threads, *sizes, 0, ctypes.byref(counters))
    return status


def test_emulation_of_ptx_instructions(library: ctypes.CDLL) -> None:
    """Every result of hand-written PTX is the one of the PTX ISA."""
    results = np.zeros(len(INSTRUCTIONS), np.uint32)
    source = np.zeros(8, np.uint32)
    aligned = source[-(source.ctypes.data // 4) % 4 :]
    aligned[:4] = 0x600DF00D
    params = np.array([results.ctypes.data, aligned.ctypes.data], np.uint64).tobytes()
    assert emulate(library, 32, params) == 0
    expected = {name: value for name, (_, value) in INSTRUCTIONS.items()}
    got = dict(zip(expected, results.tolist(), strict=True))
    assert got == expected


def test_emulation_of_ptx_refuses_launches_that_a_gpu_refuses(library: ctypes.CDLL) -> None:
    assert emulate(library, 32, bytes(24)) == -2, "a struct of another size"
    assert emulate(library, 64, bytes(16)) == -3, "more threads than .maxntid"


@pytest.mark.parametrize("statement", REFUSED)
def test_emulation_of_ptx_refuses_what_it_does_not_know(statement: str) -> None:
    with pytest.raises(UnsupportedPtx, match="line 23: "):
        translate(ptx_of(f"\t{statement};\n"), {"kernel<int>": "kernel"})


# Shares of the instructions that the suites run, by file. What is left in rms_norm are loops
# unrolled further than the rows of the tests are long.
COVERED = {
    "tpp_partial": 0.9,
    "tpp_merge": 0.95,
    "rope_append": 0.99,
    "rms_norm": 0.75,
    "silu_and_mul": 0.99,
    "copy_chunks": 0.99,
    "conformance": 1.0,
}


@pytest.mark.nightly
def test_emulation_of_ptx_runs_its_lines(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """The suites run nearly every instruction of the PTX, over the specializations they launch."""
    report = tmp_path / "coverage.json"
    paths = [str(FOLDER / "emulation"), str(FOLDER.parents[1])]
    environment = child_environment | {
        "CHUNKLLAMA_PTX_COVERAGE": str(report),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    suites = [str(FOLDER / f"test_emulation_{name}.py") for name in ("attention", "ops")]
    command = [sys.executable, "-m", "pytest", "-p", "ptx_coverage", "-q", *suites]
    command += ["-m", "nightly or not nightly", "-k", "ptx_90 and not rough"]
    subprocess.run(command, env=environment, check=True, cwd=FOLDER.parents[1])
    ran: dict[str, int] = defaultdict(int)
    instructions: dict[str, int] = defaultdict(int)
    for expression, lines in json.loads(report.read_text()).items():
        kernel = expression.split("<")[0]
        ran[kernel] += len(set(lines["ran"]) & set(lines["instructions"]))
        instructions[kernel] += len(lines["instructions"])
    shares = {kernel: ran[kernel] / instructions[kernel] for kernel in instructions}
    assert shares.keys() == COVERED.keys()
    assert {kernel: share for kernel, share in shares.items() if share < COVERED[kernel]} == {}
