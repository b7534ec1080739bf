"""Bugs planted in copies of the kernels' sources, and how a case runs on the result.

The kernels themselves hold no test code: a bug is a replacement of text in a copy, and planting it
fails if that text is no longer there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kernel_emulator import build, kernels_of, require_compiler, table
from ptx_emulator import build_ptx, require_nvrtc

from chunkllama.resources import data_folder

RUN_CASE = Path(__file__).parent / "run_case.py"
REPOSITORY = Path(__file__).parents[3]
TOLERANCE = 2e-3
SANITIZERS = {
    "asan": ("address", "libasan.so"),
    "tsan": ("thread", "libtsan.so"),
    "ubsan": ("undefined", "libubsan.so"),
}


@dataclass(frozen=True)
class Bug:
    """Text to replace in a kernel file, and who must notice.

    ``tool``: numbers, bytes, conflicts, emulator (it aborts with ``message``), asan, tsan, ubsan.
    ``on_ptx``: the message of the PTX machine where it notices by itself what the C++ machine
    needs a sanitizer for.
    """

    file: str
    old: str
    new: str
    tool: str
    message: str = ""
    on_ptx: str = ""


STAGE_BARRIER = (
    "    __syncthreads();  // this stage has arrived for all, and none reads the one loaded next\n"
)
BUGS = {
    "missing_stage_barrier": Bug("tpp_partial.cuh", STAGE_BARRIER, "", "tsan", "data race"),
    "missing_stage_barrier_numbers": Bug("tpp_partial.cuh", STAGE_BARRIER, "", "numbers"),
    "missing_wait": Bug(
        "tpp_partial.cuh", "    copy_async_wait<X::STAGES - 2>();\n", "", "numbers"
    ),
    "missing_barrier_before_join": Bug(
        "tpp_partial.cuh",
        "  __syncthreads();  // the pipeline's memory becomes the join buffer\n",
        "",
        "tsan",
        "data race",
    ),
    "missing_barrier_in_join": Bug(
        "tpp_partial.cuh",
        "  __syncthreads();  // every warp's share is in place\n",
        "",
        "tsan",
        "data race",
    ),
    "missing_barrier_between_units": Bug(
        "tpp_partial.cuh",
        "    __syncthreads();  // the next unit's queries overwrite the join buffer\n",
        "",
        "tsan",
        "data race",
    ),
    "divergent_barrier": Bug(
        "tpp_partial.cuh",
        STAGE_BARRIER,
        "    if (threadIdx.x < 64) __syncthreads();\n",
        "emulator",
        "emulator: ",
    ),
    "copies_left_in_flight": Bug(
        "tpp_partial.cuh",
        "  copy_async_wait<0>();\n",
        "  loader.num_tokens = loader.token + 1; loader.load();\n",
        "emulator",
        "exits with asynchronous copies in flight",
    ),
    "row_bound_of_queries_forgotten": Bug(
        "tpp_partial.cuh",
        "const bool valid = at.row < unit.packed_rows;",
        "const bool valid = true;",
        "asan",
        "heap-buffer-overflow",
    ),
    "write_past_shared_memory": Bug(
        "tpp_partial.cuh",
        "  DYNAMIC_SHARED(shared);\n",
        "  DYNAMIC_SHARED(shared);\n  if (threadIdx.x == 0) shared[X::SHARED_BYTES + 8] = 0;\n",
        "asan",
        "heap-buffer-overflow",
        on_ptx="shared access outside",
    ),
    "join_buffer_misaligned": Bug(  # a GPU faults at a float4 that is no multiple of 16 bytes
        "tpp_partial.cuh",
        "HEAD_DIM + 8;",
        "HEAD_DIM + 6;",
        "ubsan",
        "misaligned address",
        on_ptx="shared access misaligned",
    ),
    "token_bound_of_copies_forgotten": Bug(
        "tpp_partial.cuh", "FULL || token + at.row < num_tokens;", "true;", "bytes"
    ),
    "mask_one_key_late": Bug("tpp_partial.cuh", ": key >= end;", ": key > end;", "numbers"),
    "masked_too_rarely": Bug(
        "tpp_partial.cuh",
        "if (token + X::STAGE_TOKENS > unit.unmasked_tokens)",
        "if (token > unit.unmasked_tokens)",
        "numbers",
    ),
    "no_swizzle": Bug("tpp_partial.cuh", "? row & 7 :", "? 0 :", "conflicts"),
    "sum_not_rescaled": Bug("softmax_state.cuh", "    sum *= factor;\n", "", "numbers"),
    "output_not_rescaled": Bug(
        "tpp_partial.cuh", "          o[a][j][2 * h] *= factor;\n", "", "numbers"
    ),
    "full_stage_too_early": Bug(
        "tpp_partial.cuh",
        "if (token + X::STAGE_TOKENS <= num_tokens)",
        "if (token < num_tokens)",
        "bytes",
    ),
    "merge_ignores_the_maximum": Bug(
        "tpp_merge.cuh",
        "weight = state.weight_of({p.partial_lse[at], 1.f})",
        "weight = 1.f",
        "numbers",
    ),
    "single_partials_not_written": Bug(
        "tpp_partial.cuh", "    if (p.row_flags[row]) {", "    if (false) {", "numbers"
    ),
}
_BF16_MMA = '"r"(b0), "r"(b1));\n  }\n};\n\ntemplate <>\nstruct Element<fp16>'
_A = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), ' + _BF16_MMA
_BF16_PACK = '"cvt.rn.bf16x2.f32 %0, %1, %2;\\n" : "=r"(packed) : "f"(high), "f"(low)'
_LDMATRIX = """x4.shared.b16 {%0,%1,%2,%3}, [%4];\\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])"""
# What only PTX shows: its strings, their constraints, and the struct as a launch passes it.
PTX_BUGS = {
    "bf16_halves_swapped": Bug(
        "device.cuh",
        _BF16_PACK,
        _BF16_PACK.replace("high", "x").replace("low", "high").replace('"f"(x)', '"f"(low)'),
        "numbers",
    ),
    "copy_size_inverted": Bug("device.cuh", "(valid ? 16 : 0)", "(valid ? 0 : 16)", "numbers"),
    "copy_size_ignored": Bug("device.cuh", '"r"(valid ? 16 : 0)', '"r"(16)', "bytes"),
    "wait_for_one_group_less": Bug(
        "device.cuh", '::"n"(PENDING) :', '::"n"(PENDING + 1) :', "numbers"
    ),
    "groups_never_committed": Bug(
        "device.cuh",
        "cp.async.commit_group;",
        "",
        "emulator",
        "exits with asynchronous copies in flight",
    ),
    "transposed_on_the_wrong_branch": Bug(
        "device.cuh", "  if (TRANSPOSED)\n", "  if (!TRANSPOSED)\n", "numbers"
    ),
    "ldmatrix_registers_swapped": Bug(
        "device.cuh", _LDMATRIX, _LDMATRIX.replace("{%0,%1,", "{%1,%0,"), "numbers"
    ),
    "mma_of_the_other_type": Bug(
        "device.cuh", "f32.bf16.bf16.f32 {", "f32.f16.f16.f32 {", "numbers"
    ),
    "mma_rows_swapped": Bug(
        "device.cuh", _A, _A.replace('a[1]), "r"(a[2]', 'a[2]), "r"(a[1]'), "numbers"
    ),
    "mma_columns_swapped": Bug(
        "device.cuh", _BF16_MMA, _BF16_MMA.replace('b0), "r"(b1', 'b1), "r"(b0'), "numbers"
    ),
    "address_without_its_window": Bug(
        "device.cuh",
        "return (u32)__cvta_generic_to_shared(pointer);",
        "return (u32)(u64)pointer;",
        "emulator",
        "shared access",
    ),
    "exponent_negated": Bug(
        "device.cuh",
        'ex2.approx.ftz.f32 %0, %1;\\n" : "=f"(y) : "f"(x)',
        'ex2.approx.ftz.f32 %0, %1;\\n" : "=f"(y) : "f"(-x)',
        "numbers",
    ),
    "logarithm_of_another_base": Bug(
        "device.cuh",
        '"lg2.approx.ftz.f32 %0, %1;\\n" : "=f"(y) : "f"(x)',
        '"lg2.approx.ftz.f32 %0, %1;\\n" : "=f"(y) : "f"(x * x)',
        "numbers",
    ),
    "shuffle_of_half_a_warp": Bug(
        "device.cuh",
        "__shfl_xor_sync(0xffffffffu",
        "__shfl_xor_sync(0x0000ffffu",
        "emulator",
        "a collective of a part of a warp",
    ),
    "vote_of_half_a_warp": Bug(
        "device.cuh",
        "__any_sync(0xffffffffu",
        "__any_sync(0x0000ffffu",
        "emulator",
        "a collective of a part of a warp",
    ),
    "unconditional_copy_on_the_wrong_branch": Bug(
        "device.cuh", "  if (ALWAYS)\n", "  if (!ALWAYS)\n", "bytes"
    ),
    "fields_of_the_struct_swapped": Bug(
        "tpp_partial.cuh",
        "  int num_kv_heads;\n  int group;      // query heads per kv head\n",
        "  int group;      // query heads per kv head\n  int num_kv_heads;\n",
        "bytes",
    ),
}


def library(
    tmp_path: Path, bug: Bug | None, sanitizer: str | None = None, machine: str = "cpp"
) -> Path:
    """An emulator of the bf16, head_dim 64 kernels, with the bug planted in its sources."""
    require_compiler()
    sources = tmp_path / "kernels"
    for part in ("cuda", "emulation"):
        shutil.copytree(data_folder("kernels") / part, sources / part)
    if bug:
        path = sources / "cuda" / bug.file
        text = path.read_text()
        assert text.count(bug.old) == 1, f"the planted bug no longer applies to {bug.file}"
        path.write_text(text.replace(bug.old, bug.new))
    flags: tuple[str, ...] = ()
    if sanitizer:
        flags = (f"-fsanitize={SANITIZERS[sanitizer][0]}", "-fno-sanitize-recover=all")
    kernels = kernels_of(("bf16", 64), (table("sm_90"),))
    if machine == "cpp":
        return build(kernels, *flags, "-w", sources=sources, folder=tmp_path)
    require_nvrtc()
    launched = [k for k in kernels if k.file_name in ("tpp_partial.cuh", "tpp_merge.cuh")]
    return build_ptx(launched, *flags, sources=sources, folder=tmp_path)


def run(built: Path, schedule: int, sanitizer: str | None = None) -> subprocess.CompletedProcess:
    environment = dict(
        os.environ,
        PYTHONPATH=str(REPOSITORY),
        ASAN_OPTIONS="detect_leaks=0",
        TSAN_OPTIONS="halt_on_error=1 report_bugs=1",
    )
    if sanitizer:
        runtime = SANITIZERS[sanitizer][1]
        environment["LD_PRELOAD"] = subprocess.check_output(
            ["g++", f"-print-file-name={runtime}"], text=True
        ).strip()
    command = [sys.executable, str(RUN_CASE), str(built), str(schedule)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def measured(process: subprocess.CompletedProcess) -> dict[str, float]:
    assert process.returncode == 0, process.stdout + process.stderr
    result: dict[str, float] = json.loads(process.stdout)
    return result


def is_clean(result: dict[str, float]) -> bool:
    return (
        result["error"] <= TOLERANCE
        and result["bank_conflicts"] == 0
        and result["copied_bytes"] == result["predicted_bytes"]
    )


def notices(process: subprocess.CompletedProcess[str], bug: Bug, message: str) -> None:
    """Assert that what a bug names has noticed it: a message, or what the case measured."""
    if message:
        assert process.returncode != 0 and message in process.stderr, process.stderr[-2000:]
        return
    result = measured(process)
    caught = {
        "numbers": not result["error"] <= TOLERANCE,
        "bytes": result["copied_bytes"] != result["predicted_bytes"],
        "conflicts": result["bank_conflicts"] > 0,
    }
    assert caught[bug.tool], result
