"""What the emulator notices: bugs planted in copies of the sources, each with the tool to catch it.

The kernels themselves hold no test code: a bug is a replacement of text in a copy, and the test
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

import pytest
from kernel_emulator import build, kernels_of, require_compiler, table

from chunkllama.resources import data_folder

RUN_CASE = Path(__file__).parent / "emulation" / "run_case.py"
REPOSITORY = Path(__file__).parents[2]
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
    """

    file: str
    old: str
    new: str
    tool: str
    message: str = ""


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
    ),
    "join_buffer_misaligned": Bug(  # a GPU faults at a float4 that is no multiple of 16 bytes
        "tpp_partial.cuh", "HEAD_DIM + 8;", "HEAD_DIM + 6;", "ubsan", "misaligned address"
    ),
    "token_bound_of_copies_forgotten": Bug(
        "tpp_partial.cuh", "token + at.row < num_tokens);", "true);", "bytes"
    ),
    "mask_one_key_late": Bug("tpp_partial.cuh", ": key >= end;", ": key > end;", "numbers"),
    "masked_too_rarely": Bug(
        "tpp_partial.cuh",
        "if (token + X::STAGE_TOKENS > unit.unmasked_tokens)",
        "if (token > unit.unmasked_tokens)",
        "numbers",
    ),
    "no_swizzle": Bug("tpp_partial.cuh", "piece ^ (row & 7)", "piece", "conflicts"),
    "sum_not_rescaled": Bug("softmax_state.cuh", "    sum *= factor;\n", "", "numbers"),
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


def library(tmp_path: Path, bug: Bug | None, sanitizer: str | None = None) -> Path:
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
    return build(kernels, *flags, "-w", sources=sources, folder=tmp_path)


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


@pytest.mark.parametrize("schedule", [0, 1, 5])
def test_emulation_case_without_a_bug_is_clean(schedule: int, tmp_path: Path) -> None:
    result = measured(run(library(tmp_path, None), schedule))
    assert is_clean(result), result


@pytest.mark.nightly
@pytest.mark.parametrize("schedule", [0, 1, 5])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_emulation_sanitizer_is_clean(sanitizer: str, schedule: int, tmp_path: Path) -> None:
    result = measured(run(library(tmp_path, None, sanitizer), schedule, sanitizer))
    assert is_clean(result), result


@pytest.mark.parametrize("name", [n for n, bug in BUGS.items() if bug.tool not in SANITIZERS])
def test_emulation_catches_planted_bug(name: str, tmp_path: Path) -> None:
    """Bugs that the plain emulator notices, by numbers, counters or its own lints."""
    bug = BUGS[name]
    process = run(library(tmp_path, bug), schedule=0)
    if bug.tool == "emulator":
        assert process.returncode != 0 and bug.message in process.stderr, process.stderr
        return
    result = measured(process)
    caught = {
        "numbers": not result["error"] <= TOLERANCE,
        "bytes": result["copied_bytes"] != result["predicted_bytes"],
        "conflicts": result["bank_conflicts"] > 0,
    }
    assert caught[bug.tool], result


@pytest.mark.nightly
@pytest.mark.parametrize("name", [n for n, bug in BUGS.items() if bug.tool in SANITIZERS])
def test_emulation_sanitizer_catches_planted_bug(name: str, tmp_path: Path) -> None:
    """Bugs that need ASan or TSan: most of them give the right numbers under every schedule."""
    bug = BUGS[name]
    process = run(library(tmp_path, bug, bug.tool), schedule=0, sanitizer=bug.tool)
    assert process.returncode != 0 and bug.message in process.stderr, process.stderr[-2000:]
